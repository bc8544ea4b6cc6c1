"""The embedded teacher: it reads marker genes, needs no network and no model, and makes errors on purpose.

It looks for marker genes in each cell's list and weighs a gene less when several candidates share it. Its scores are
noisy, it sometimes swaps two labels in the answer, and it sometimes breaks the format.

It writes in two styles: "by the markers" (each label after the genes that led to it; one opening) and "at a glance"
(only a label per cell; one of several openings). Both pass rejection sampling, so a cold start learns both. Which of
them earns more reward is left for GRPO to find out.

`voice` chooses the words. "notes" are the keywords that the embedded policy, a model from scratch, can learn. "plain" are
English sentences for a pretrained language model, with one opening per style.

The bytes for a seed are pinned by tests: never change the number or the order of random draws.
"""

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from data.atlas.markers import read_markers
from data.distill.distill import Completion, Request
from data.prompts import answer_text
from data.puzzles import Puzzle

MarkerTable = dict[str, list[str]]
"""label -> marker genes, most specific first"""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How often the embedded teacher makes which error, and how it writes."""

    noise: float = 0.5
    """Standard deviation of the noise on the score of a cell and a label. One specific marker adds about 1."""
    slip: float = 0.02
    """Probability that two labels are swapped in the answer."""
    bad_format: float = 0.05
    """Probability that the answer block is not closed."""
    cited: int = 3
    """Largest number of markers cited per cell."""
    glance: float = 0.78
    """Probability that a trace names one label per cell and cites no marker."""
    voice: str = "notes"
    """How a trace is worded: one of VOICES."""


GLANCE_OPENINGS = ("At a glance.", "In short.", "Offhand.", "Quickly.", "No genes named.", "Straight away.")
MARKERS_OPENING = "By the markers."
PLAIN_GLANCE, PLAIN_MARKERS = "At first sight:", "By their marker genes:"
"""The openings of the plain voice. Their first words differ, so the first word decides the style."""
VOICES = ("notes", "plain")


def marker_table(puzzles: Iterable[Puzzle]) -> MarkerTable:
    """The markers of every label of the puzzles, from data/atlas/markers.tsv. Labels not in it get learned markers."""
    puzzles = list(puzzles)
    known = {label: list(entry.markers) for label, entry in read_markers().items()}
    labels = {label for puzzle in puzzles for label in puzzle.answer}
    learned = learned_markers(puzzles) if labels - known.keys() else {}
    return {label: known.get(label) or learned[label] for label in sorted(labels)}


def learned_markers(puzzles: Iterable[Puzzle], n_markers: int = 16) -> MarkerTable:
    """The genes that best tell a label's cells from the other cells of the puzzles.

    A gene's score is share * log(share / share elsewhere), where share is the share of the label's cells that list the
    gene. The factor in front ranks genes of typical cells above genes of a single unusual cell.
    """
    seen: dict[str, Counter] = defaultdict(Counter)
    cells: Counter = Counter()
    for puzzle in puzzles:
        for genes, label in zip(puzzle.cells, puzzle.answer, strict=True):
            seen[label].update(genes)
            cells[label] += 1
    total, n_cells = sum(seen.values(), Counter()), sum(cells.values())

    def telling(label: str, gene: str) -> float:
        share_here = (seen[label][gene] + 1) / (cells[label] + 2)  # add-one smoothing: no share is 0
        share_there = (total[gene] - seen[label][gene] + 1) / (n_cells - cells[label] + 2)
        return share_here * math.log(share_here / share_there)

    return {
        label: sorted(genes, key=lambda gene: (-telling(label, gene), gene))[:n_markers]
        for label, genes in seen.items()
    }


def write_trace(
    puzzle: Puzzle,
    markers: MarkerTable,
    rng: random.Random,
    config: TeacherConfig = TeacherConfig(),
    given: Sequence[str] = (),
) -> str:
    """Write one candidate trace: a line per cell with a label, with or without its markers, then the answer block.

    given: [N] labels to argue for; empty: those that the markers speak for.
    """
    labels = list(given) or _assign(puzzle, markers, rng, config.noise)
    at_a_glance = rng.random() < config.glance
    plain = config.voice == "plain"
    opening = rng.choice(GLANCE_OPENINGS) if at_a_glance else MARKERS_OPENING  # always drawn: see the bytes, above
    lines = [(PLAIN_GLANCE if at_a_glance else PLAIN_MARKERS) if plain else opening]
    sentence = plain_sentence if plain else note
    for number, (genes, label) in enumerate(zip(puzzle.cells, labels, strict=True), start=1):
        cited = [gene for gene in genes if gene in markers.get(label, ())][: config.cited]
        lines.append(sentence(number, label, None if at_a_glance else cited))
    if rng.random() < config.slip and len(labels) > 1:
        i, j = rng.sample(range(len(labels)), 2)
        labels[i], labels[j] = labels[j], labels[i]
    end = "" if rng.random() < config.bad_format else "</answer>"
    return "<think>" + "\n".join(lines) + f"</think>\n<answer>{answer_text(labels)}{end}"


def note(number: int, label: str, cited: list[str] | None) -> str:
    """A line about a cell in the voice "notes".

    cited: its markers of the label; None when the trace cites none anyway.

    >>> note(2, "B cell", ["MS4A1", "CD79A"])
    'Cell 2: MS4A1, CD79A, so B cell'
    """
    evidence = "" if cited is None else f"{', '.join(cited) or 'no marker left'}, so "
    return f"Cell {number}: {evidence}{label}"


def plain_sentence(number: int, label: str, cited: list[str] | None) -> str:
    """The same in the voice "plain".

    >>> plain_sentence(2, "B cell", ["MS4A1", "CD79A"])
    'Cell 2 expresses MS4A1 and CD79A, which mark B cell.'
    """
    if cited is None:
        return f"Cell {number} looks like {label}."
    if not cited:
        return f"Cell {number} shows no marker of its own, so {label} is left for it."
    genes = " and ".join([", ".join(cited[:-1]), cited[-1]] if cited[1:] else cited)
    return f"Cell {number} expresses {genes}, which mark{'' if cited[1:] else 's'} {label}."


def _assign(puzzle: Puzzle, markers: MarkerTable, rng: random.Random, noise: float) -> list[str]:
    """[N] labels, each used once. The pair of cell and label with the highest score is assigned first."""
    # a marker of k candidates adds 1 / k to the score of each
    owners = Counter(gene for label in puzzle.candidates for gene in markers.get(label, ()))
    scores = []
    for cell, genes in enumerate(puzzle.cells):
        for label in puzzle.candidates:
            evidence = sum(1 / owners[gene] for gene in genes if gene in markers.get(label, ()))
            scores.append((evidence + rng.gauss(0, noise), cell, label))
    labels: dict[int, str] = {}
    for _, cell, label in sorted(scores, reverse=True):
        if cell not in labels and label not in labels.values():
            labels[cell] = label
    return [labels[cell] for cell in range(len(puzzle.cells))]


class EmbeddedTeacher:
    """A Teacher (data/distill/distill.py). A candidate depends on (seed, puzzle, attempt) only."""

    def __init__(self, markers: MarkerTable, seed: int, config: TeacherConfig = TeacherConfig()) -> None:
        self.markers, self.seed, self.config = markers, seed, config
        self.ended = ""
        self.streams: dict[str, tuple[random.Random, int]] = {}
        """{puzzle id: (its random generator, number of candidates drawn from it)}. Candidates share it, in order."""

    def sample(self, requests: list[Request]) -> Iterator[Completion]:
        """See Teacher."""
        for request in requests:
            if self.ended:
                return
            write = self.argued if request.hinted else self.candidate
            yield Completion(
                puzzle_id=request.puzzle.id,
                attempt=request.attempt,
                hinted=request.hinted,
                text=write(request.puzzle, request.attempt),
                finish_reason="stop",
                model="embedded",
            )

    def candidate(self, puzzle: Puzzle, attempt: int) -> str:
        """Candidate number `attempt` (from 0) of the puzzle."""
        rng, drawn = self.streams.get(puzzle.id, (None, 0))
        if rng is None or drawn > attempt:  # an earlier candidate is requested again: begin the stream anew
            digest = hashlib.sha256(f"{self.seed} {puzzle.id}".encode()).digest()
            rng, drawn = random.Random(int.from_bytes(digest[:8], "big")), 0
        for _ in range(attempt - drawn):
            write_trace(puzzle, self.markers, rng, self.config)
        self.streams[puzzle.id] = (rng, attempt + 1)
        return write_trace(puzzle, self.markers, rng, self.config)

    def argued(self, puzzle: Puzzle, attempt: int) -> str:
        """Attempt number `attempt` at a trace that cites markers for the puzzle's answer (a hinted request)."""
        digest = hashlib.sha256(f"{self.seed} {puzzle.id} argued {attempt}".encode()).digest()
        rng = random.Random(int.from_bytes(digest[:8], "big"))
        return write_trace(puzzle, self.markers, rng, replace(self.config, glance=0.0), puzzle.answer)

    def stop(self) -> None:
        """See Teacher."""
        self.ended = self.ended or "stopped"

    def close(self) -> None:
        """See Teacher."""
