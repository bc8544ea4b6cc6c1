"""An annotation from profiles to labels: candidates, questions in two stages, votes, confidence, one rationale each."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from data.build.contexts import stated_in
from data.clusters.known import STATES, KnownLabels
from data.clusters.profiles import ClusterProfile, Profiles, natural
from data.errors import RunError
from data.prompts import normalise_label
from data.puzzles import Puzzle
from eval.annotate.calibration import VOTES, calibrated, read_calibration
from eval.annotate.candidates import Candidates
from eval.annotate.evidence import Rationale, rationales
from eval.annotate.questions import Layout, Question, SampleQuestions, gene_lists
from eval.annotate.settings import QuestionSettings
from eval.annotate.votes import ClusterLabel, Reading, Tally, beliefs, count_votes, label_clusters
from eval.report.html import count

UNCERTAIN = "uncertain"
"""The label of a cluster whose confidence is too low, that has no vote, or is too small to be asked about."""
UNKNOWN_TERM = "unknown"
"""The Cell Ontology id where there is none: CELLxGENE's word."""

Ask = Callable[[Sequence[Question], str], list[Reading]]
"""Answers to questions, in their order; the text is shown by the progress bar."""


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """One cluster with its label."""

    cluster: str
    n_cells: int
    """All its cells of the file, whether or not they are in a profile."""
    label: str
    """What is written: the best label, or UNCERTAIN."""
    found: ClusterLabel
    """Best label, second choice, share of votes, votes."""
    confidence: float
    """The calibrated share of the answers that gave it the label; an answer that cannot be used gave none."""
    ontology: str
    """Cell Ontology id of `label`, or UNKNOWN_TERM."""
    profiles: tuple[ClusterProfile, ...]
    """Those that were asked about, the largest first; none for a cluster that is too small."""
    rationale: Rationale | None
    """An answer that gave the cluster its best label."""

    @property
    def genes(self) -> list[str]:
        """The genes that describe it: each once, from the largest profile's two lists."""
        lists = [of for profile in self.profiles[:1] for of in (profile.by_expression, profile.by_difference)]
        return list(dict.fromkeys(gene for genes in lists for gene in genes))


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """All clusters of a file with their labels."""

    clusters: dict[str, Annotated]
    """{cluster: its label}, by name, numbers in their order; clusters too small to be asked about come last."""
    candidates: dict[str, Candidates]
    """{sample: its candidates}"""
    notes: list[str] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)
    """Those of the notes that were not printed before the model was asked."""
    n_answers: int = 0
    n_invalid: int = 0


def counts_of(annotation: Annotation) -> str:
    """How many clusters have how many labels, such as "17 clusters, 15 cell types, 1 uncertain"; of the labels written."""
    labels = [cluster.label for cluster in annotation.clusters.values()]
    kinds = len(set(labels) - {UNCERTAIN})
    return f"{count(len(labels), 'cluster')}, {count(kinds, 'cell type')}, {labels.count(UNCERTAIN)} uncertain"


class Questions:
    """The questions about all samples of a file."""

    def __init__(self, profiles: Profiles, candidates: dict[str, Candidates], settings: QuestionSettings) -> None:
        self.settings = settings
        self.profiles = profiles.profiles
        layout = Layout(
            max_cells=settings.max_cells,
            genes_by=settings.genes_by,
            keep_apart=settings.one_to_one != "always",
            seed=settings.seed,
        )
        by_sample: dict[str, list[ClusterProfile]] = defaultdict(list)
        for profile in self.profiles:
            by_sample[profile.sample].append(profile)
        self.of_sample = {
            sample: SampleQuestions(number, some, candidates[sample].labels, layout)
            for number, (sample, some) in enumerate(by_sample.items())
        }

    @cached_property
    def screening(self) -> list[Question]:
        """The questions of the first stage; none when every answer is open-ended."""
        return [question for of in self.of_sample.values() for question in of.screening(self.settings.screens)]

    def voting(self, screened: Sequence[Reading]) -> list[Question]:
        """The questions whose answers are votes. screened: the answers of the first stage."""
        found = []
        for of in self.of_sample.values():
            # pooled over samples: a cluster is of one type in all of them
            belief = beliefs(screened, [profile.cluster for profile in of.profiles], of.labels)
            found += of.voting(range(self.settings.samples), belief)
        return found

    def announced(self) -> str:
        """How many questions there will be, for who waits for them or pays them: a line, before the first is asked."""
        first = len(self.screening)
        # a set that must not hold two clusters alike can be smaller, so there can be more
        votes = self.settings.samples * sum(-(-len(of.profiles) // of.size) for of in self.of_sample.values())
        letters_of = max(len(puzzle.user_message) for puzzle in self.longest())
        stages = [f"{count(first, 'question')} to narrow the labels down, then"] * bool(first)
        return " ".join(
            [*stages, f"at least {count(votes, 'question')} for the votes, of up to {letters_of:,} letters"]
        )

    def left_unstated(self, known: KnownLabels | None) -> str:
        """A note on facts that every prompt of the training states and a prompt of this file does not; "" elsewhere."""
        states = set(known.puzzles.get(STATES, [])) if known else set()
        missing = sorted(states - set.intersection(*(stated_in(profile.context) for profile in self.profiles)))
        if not missing:
            return ""
        return (
            f"every prompt that the model was trained on states {' and '.join(missing)}, and not all of this file do; where "
            f"you know it, give --constant {missing[0]}=VALUE (of healthy donors disease=normal)"
        )

    def longest(self) -> list[Puzzle]:
        """A puzzle for each sample that is at least as long as every one that is asked, to make room for it."""
        found = []
        for of in self.of_sample.values():
            longest = [max(self.lists_of(profile), key=letters) for profile in of.profiles]
            cells = sorted(longest, key=letters, reverse=True)
            labels = sorted(of.labels, key=lambda label: -len(label))
            most = max(of.size, min(self.settings.max_cells, len(labels)))
            context = max((profile.context for profile in of.profiles), key=len)
            # the longest cell and label twice: a text with fewer letters may have more tokens
            cells, labels = [cells[0], *cells[: of.size]], [*labels[:1], *labels[:most]]
            puzzle = Puzzle(id="", context=context, cells=cells, candidates=labels, answer=[])
            found.append(puzzle)
        return found

    def lists_of(self, profile: ClusterProfile) -> list[list[str]]:
        """The lists of genes that prompts show for a cluster."""
        return gene_lists(profile, self.settings.genes_by)


def letters(genes: Sequence[str]) -> int:
    """The length of a list of genes in a prompt."""
    return len(", ".join(genes))


def refuse_useless(asked: Sequence[Question], readings: Sequence[Reading]) -> None:
    """Raises RunError that names the commonest problem when no answer to some questions could be used."""
    if any(any(reading.labels) for reading in readings):
        return
    (problem, _), *_ = Counter(reading.problem or "it names no candidate" for reading in readings).most_common(1)
    sizes = sorted({len(question.puzzle.cells) for question in asked})
    raise RunError(
        f"none of {len(readings)} answers can be used (mostly: {problem}; asked about {' or '.join(map(str, sizes))} clusters at "
        "a time); read them in the folder of answers, and check --model and --max-response-tokens, and that the model was "
        "trained on puzzles of this size: for larger ones annotate more clusters together, for smaller ones give --max-cells"
    )


def annotate_profiles(
    profiles: Profiles, candidates: dict[str, Candidates], questions: Questions, ask: Ask, settings: QuestionSettings
) -> Annotation:
    """Ask, count, decide. Raises RunError when no answer about any cluster could be used."""
    screening = questions.screening
    screened = ask(screening, "screening") if screening else []
    if screening:  # before the votes, which cost more
        refuse_useless(screening, screened)
    voting = questions.voting(screened)
    readings = ask(voting, "votes")
    refuse_useless(voting, readings)
    asked_about = sorted({profile.cluster for profile in questions.profiles}, key=natural)
    found = label_clusters(count_votes(readings, asked_about), settings.one_to_one)
    reasons = rationales(readings, {cluster: label.label for cluster, label in found.items()})
    n_cells = Counter(profiles.cluster_of_cell.tolist())
    n_cells.pop("", None)
    table, clusters = read_calibration(), {}
    for cluster in [*asked_about, *(name for name in sorted(n_cells, key=natural) if name not in found)]:
        label = found.get(cluster) or ClusterLabel(cluster=cluster, label=None, second=None, share=0.0, tally=Tally())
        own = sorted((p for p in questions.profiles if p.cluster == cluster), key=lambda p: -p.n_cells)
        confidence = calibrated(label.tally.share_of_answers(label.label), table)
        sure = label.label is not None and confidence >= settings.min_confidence
        terms = {name: term for profile in own for name, term in candidates[profile.sample].ontology.items()}
        clusters[cluster] = Annotated(
            cluster=cluster,
            n_cells=n_cells[cluster],
            label=str(label.label) if sure else UNCERTAIN,
            found=label,
            confidence=confidence,
            ontology=terms.get(normalise_label(str(label.label)), UNKNOWN_TERM) if sure else UNKNOWN_TERM,
            profiles=tuple(own),
            rationale=reasons.get(cluster),
        )
    read = [*screened, *readings]
    few = f"confidence was calibrated with {VOTES} answers, and is too high with {settings.samples}: give --samples {VOTES}"
    return Annotation(
        notes=[few] if settings.samples < VOTES else [],
        unsaid=[few] if settings.samples < VOTES else [],
        clusters=clusters,
        candidates=candidates,
        n_answers=len(read),
        n_invalid=sum(bool(reading.problem) for reading in read),
    )
