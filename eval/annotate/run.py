"""One annotation from a file, or from an AnnData in memory, to the labels on its cells; who answers, and where answers are kept.

This room does not import the trainer, so a checkpoint comes as a `Model`, which launch/annotate.py makes (`open_model`).
Answers are kept in the file of eval/predict.py: nothing is asked, or bought, twice.
"""

import datetime
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data.build.cells import ORGANISMS
from data.build.h5ad import nearest_names, obs_columns, open_h5ad, read_obs
from data.clusters.annotated import refuse_changed
from data.clusters.known import KnownLabels, check_genes_known
from data.clusters.profiles import Advance, Asked, Profiles, profiles_of, read_profiles
from data.errors import UserError
from data.files import unlock_folder
from data.formats.memory import InMemory
from data.formats.stores import content_stamp
from data.puzzles import Puzzle
from eval.annotate.annotation import Annotation, Questions, annotate_profiles, counts_of
from eval.annotate.candidates import candidates_of
from eval.annotate.doubts import Agreement, agreement_of
from eval.annotate.page import Shown, annotation_page
from eval.annotate.questions import Question
from eval.annotate.settings import AnnotateConfig, QuestionSettings
from eval.annotate.votes import Reading, read_answer
from eval.annotate.writing import add_to, csv_of, obs_columns_of, record_of, refuse_places, write_all
from eval.baselines import known_markers
from eval.predict import Partial, answer_all
from eval.report.html import count
from eval.run_files import PARTIAL
from eval.settings import EvaluateConfig, settings_of
from eval.sources import Loaded, LocalModel, PuzzleSet, RemoteModel

UMAP = "X_umap"
Tell = Callable[[int, int], None]


def untold(done: int, total: int) -> None:
    """Tells nobody how far a stage of questions is."""


@dataclass(frozen=True)
class Model:
    """A model that can be asked."""

    name: str
    load: Callable[[EvaluateConfig, list[PuzzleSet]], Loaded] | None = None
    """Opens a checkpoint with room for the longest of some puzzles; None for a model behind an endpoint."""
    known: KnownLabels | None = None
    """What it was trained on, where that is recorded."""
    hashes: dict[str, str] = field(default_factory=dict)
    """{"model": SHA-256 of its weights, "adapter": of its adapter}, as far as there are any."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that answer."""
    files: str | None = None
    """A fingerprint that changes with the files of a local model."""


class Answers:
    """The answers to questions, from a model or from the file that keeps them."""

    def __init__(self, model: Model, asked: EvaluateConfig, first: Sequence[Question], longest: list[Puzzle]) -> None:
        """asked: how the model is asked; its `out` is the folder of the file. first: the questions of the first stage, on
        which all others depend. longest: a puzzle at least as long as any that will be asked, for each sample.

        Raises UserError when the folder holds answers and --resume is not given, or was made with other settings.
        """
        self.asked, self.is_local = asked, model.load is not None
        settings = settings_of(asked, [question.puzzle for question in first], model.files)
        # under a name that says more than "puzzles_digest" where another run's answers are refused
        settings["questions (clusters, candidates, options)"] = settings.pop("puzzles_digest")
        path = Path(asked.out) / PARTIAL
        if path.is_file() and not asked.resume:
            raise UserError(
                f"{path}: holds answers of an earlier run, which may have cost money; add --resume to use them, or remove "
                "the folder"
            )
        puzzles = [question.puzzle for question in first] + longest
        load = model.load
        try:
            self.partial = Partial(asked.out, settings, asked.resume, afresh=f"remove {asked.out}")
            if load is not None:
                self.source = LocalModel(lambda: load(asked, [PuzzleSet("clusters", "", puzzles, puzzles)]))
            else:
                self.source = RemoteModel(asked)
            self.source.resume(self.partial)
        except BaseException:
            unlock_folder(asked.out)  # a notebook goes on
            raise

    def of(self, questions: Sequence[Question], name: str) -> list[Reading]:
        """The answers to some questions, in their order. name: for the progress bar."""
        puzzles = [question.puzzle for question in questions]
        chunk = self.asked.chunk if self.is_local else max(1, len(puzzles))
        rows = answer_all(puzzles, self.source.ask, self.partial, chunk=chunk, whole_chunks=self.is_local, name=name)
        return [read_answer(question, row["prediction"]) for question, row in zip(questions, rows, strict=True)]

    def close(self) -> None:
        """Free the model, and let others write the folder. The file of answers stays."""
        self.source.close()
        unlock_folder(self.partial.path.parent)


def annotate(
    adata: Any,
    *,
    cluster_key: str,
    model: Model | str,
    copy: bool = False,
    answers: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> Any:
    """Label the clusters of an AnnData; returns it, or a labelled copy of it (copy=True).

    Adds the obs columns cell_type_llm, cell_type_llm_confidence, cell_type_llm_second and
    cell_type_llm_ontology_term_id, and uns["cell_type_llm"]. `adata.X` and everything else stay as they are.

    cluster_key: the obs column of clusters. model: an opened checkpoint, `launch.annotate.open_model("FOLDER")`, which can
        annotate several objects; or, with endpoint="URL", the name of a model there.
    answers: a folder that keeps the model's answers, so that with resume=True nothing is asked twice. Needed with an
        endpoint, whose answers may cost money; for a checkpoint the default keeps none.
    settings: the options of launch/annotate.py with underscores: candidates, samples, max_cells, one_to_one, ...
        candidates may be a list of labels.

    Raises UserError for a column, values, genes or settings that cannot be used.
    """
    candidates = given = settings.pop("candidates", None)
    if isinstance(given, Iterable) and not isinstance(given, str):
        given = list(given)  # a generator can be read once
        if isinstance(candidates, AbstractSet) and all(isinstance(one, str) for one in given):
            given.sort()  # its order is another in every process, and would change every question
    refuse_arguments(adata, given, settings)
    as_text = given if isinstance(given, str) else None
    asked = QuestionSettings(cluster_key=cluster_key, candidates=as_text, **settings)
    if isinstance(model, str):
        if asked.endpoint is None:
            raise UserError(
                f"model={model!r}: give endpoint= too for the name of a model, or open the folder of a checkpoint with "
                "launch.annotate.open_model"
            )
        if answers is None:
            raise UserError(
                "answers: name a folder that keeps the endpoint's answers, so that none is paid for twice (resume=True)"
            )
        model = Model(model)
    elif asked.base:
        raise UserError(
            "base: the model is open already; name its base with launch.annotate.open_model(FOLDER, base=...)"
        )
    asked = asked.as_trained(model.known)
    InMemory(adata)  # refuses one whose matrix is on disk, which `copy` could not copy
    adata = adata.copy() if copy else adata
    truth = read_truth(InMemory(adata), asked.truth_key)
    profiles = profiles_of(adata, cluster_key, asked, asked=Asked(asked.max_donors, asked.max_cells))
    with tempfile.TemporaryDirectory() as scratch:
        annotation = ask_and_decide(profiles, model, asked, Path(answers or scratch), resume, given)
    for sentence in annotation.unsaid:
        print(f"note: {sentence}")
    if truth is not None:
        print(agreement_line(agreement_of(annotation, str(asked.truth_key), profiles.cluster_of_cell.tolist(), truth)))
    columns = obs_columns_of(annotation, profiles.cluster_of_cell)
    add_to(adata, columns, record_of(annotation, provenance(model, asked, "eval.annotate.annotate")))
    return adata


def refuse_arguments(adata: Any, candidates: Any, settings: dict[str, Any]) -> None:
    """Raises UserError for what is no AnnData, no labels, or no option of `annotate`."""
    if not (hasattr(adata, "obs") and hasattr(adata, "layers")):
        raise UserError(
            f"adata: is a {type(adata).__name__}, not an AnnData; read the file with anndata.read_h5ad, or use "
            "launch/annotate.py (of a MuData give one modality, mdata['rna'])"
        )
    if candidates is not None and not isinstance(candidates, str):
        wrong = (
            [one for one in candidates if not isinstance(one, str)]
            if isinstance(candidates, Iterable)
            else [candidates]
        )
        if wrong:
            raise UserError(f"candidates: {wrong[0]!r} is no label; give a list of texts, or the name of a file")
    options = [option.name for option in fields(QuestionSettings)]
    for name in settings:
        if name not in options:
            raise UserError(f"{name}: annotate has no such option; nearest: {nearest_names(name, options)}")


def annotate_file(
    config: AnnotateConfig,
    model: Model,
    command: str,
    watch: Callable[[], AbstractContextManager[Advance]] = lambda: nullcontext(lambda read, total: None),
    tell: Tell = untold,
) -> tuple[Annotation, Agreement | None, list[str]]:
    """Label the clusters of a file; write OUT, its .csv and its .html. Returns (annotation, agreement with --truth-key,
    notes on what was replaced in the copy).

    command: the command line, for the record. watch: makes what shows how far the reading of the matrix is. tell: called with
    the questions of a stage that are answered, and all of the stage. Raises UserError for what cannot be used, before the
    model is asked; RunError when the endpoint fails (then --resume goes on).
    """
    config = config.as_trained(model.known)
    source, out = Path(config.file), Path(config.out)
    refuse_places(source, out, config.candidates)
    stamp = content_stamp(source) if os.path.exists(source) else None  # read_profiles says that it is missing
    truth = read_truth(source, config.truth_key)
    with watch() as advance:
        profiles = read_profiles(
            source, config.cluster_key, config, advance, Asked(config.max_donors, config.max_cells)
        )
    annotation = ask_and_decide(profiles, model, config, config.answers, config.resume, config.candidates, tell)
    agreement = None
    if truth is not None:
        agreement = agreement_of(annotation, str(config.truth_key), profiles.cluster_of_cell.tolist(), truth)
    refuse_changed(source, stamp)
    # its symbols are of human genes
    table = known_markers(()) if profiles.organism in (None, ORGANISMS["human"]) else {}
    record = provenance(model, config, command)
    shown = Shown(
        title=source.name,
        table=table,
        settings=record,
        clusters=profiles.cluster_of_cell,
        places=read_umap(source),
        agreement=agreement,
    )
    columns = obs_columns_of(annotation, profiles.cluster_of_cell)
    page = annotation_page(annotation, shown)
    rows = csv_of(annotation, table, agreement)
    replaced = write_all(source, out, columns, record_of(annotation, record), rows, page, stamp)
    return annotation, agreement, replaced


def ask_and_decide(
    profiles: Profiles,
    model: Model,
    settings: QuestionSettings,
    folder: Path,
    resume: bool,
    given: Any,
    tell: Tell = untold,
) -> Annotation:
    """The annotation of some profiles. folder: keeps the answers. given: candidates, as a text or a list. tell: of progress.

    Raises UserError when the model has no candidates for a sample, or does not know the genes.
    """
    candidates = candidates_of(profiles.profiles, given, model.known)
    questions = Questions(profiles, candidates, settings)
    for note in filter(None, (settings.unlike_training(model.known), questions.left_unstated(model.known))):
        print(f"note: {note}", file=sys.stderr)
    # said before minutes or money are spent: what they advise changes the questions
    for sentence in profiles.notes:
        print(f"note: {sentence}", file=sys.stderr)
    # and a forgotten list of labels makes every question open-ended
    for source in sorted({some.source for some in candidates.values()}):
        print(f"candidates: {source}", file=sys.stderr)
    if model.known is not None:
        lists = [genes for profile in questions.profiles for genes in questions.lists_of(profile)]
        listed = {gene for genes in lists for gene in genes}
        check_genes_known(listed, model.known.genes, settings.min_known_genes)
    asked = settings.asked(model.name, folder, resume)
    answers = Answers(model, asked, questions.screening or questions.voting([]), questions.longest())
    answers.partial.tell = tell
    kept = f"; {len(answers.partial.rows):,} answers are there already" if answers.partial.rows else ""
    print(f"asking: {questions.announced()}{kept}", file=sys.stderr)
    try:
        annotation = annotate_profiles(profiles, candidates, questions, answers.of, settings)
    finally:
        answers.close()
    annotation.notes.extend(profiles.notes)
    return annotation


def provenance(model: Model, settings: QuestionSettings, command: str) -> dict[str, Any]:
    """What made the labels: model, hashes, versions, command, day, settings. It holds no key."""
    where = {"endpoint": settings.endpoint} if settings.endpoint else {}
    return {
        "model": model.name,
        **where,
        **{f"{name}_hash": value for name, value in model.hashes.items()},
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": model.versions,
        "settings": {
            name: value for name, value in asdict(settings).items() if name not in ("file", "out", "resume", "notify")
        },
    }


def refuse_missing_columns(source: Path | InMemory, *keys: str | None) -> None:
    """Raises UserError for the first of these obs columns that the file lacks."""
    present = obs_columns(source)
    for key in keys:
        if key is not None and key not in present:
            raise UserError(
                f"{source}: no obs column {key!r} (nearest: {nearest_names(key, present)}); name the column of clusters with "
                "--cluster-key, that of known labels with --truth-key"
            )


def read_truth(source: Path | InMemory, key: str | None) -> list[str] | None:
    """[C] the known label of each cell, "" where there is none. Raises UserError for a column that is missing."""
    if key is None:
        return None
    refuse_missing_columns(source, key)
    return read_obs(source, [key])[key].texts(missing="")


def read_umap(source: Path) -> np.ndarray | None:
    """[C, 2] obsm["X_umap"], where the file has it as an array of two or more columns."""
    with open_h5ad(source) as file:
        name = f"obsm/{UMAP}"
        if name not in file or len(getattr(file[name], "shape", ())) != 2 or file[name].shape[1] < 2:
            return None
        return np.asarray(file[name][:, :2], dtype=float)


def summary_lines(annotation: Annotation, agreement: Agreement | None) -> Iterable[str]:
    """What the command prints: a line per cluster, then how many are right, where that is known."""
    width = max(len(name) for name in annotation.clusters)
    for cluster in annotation.clusters.values():
        second = f", then {cluster.found.second}" if cluster.found.second else ""
        guess = (
            f" ({cluster.found.label}?)" if cluster.label != str(cluster.found.label) and cluster.found.label else ""
        )
        tally = cluster.found.tally
        votes = f"{tally.votes[cluster.found.label]} of {count(tally.asked, 'answer')}"
        yield f"{cluster.cluster:{width}}  {cluster.confidence:.2f}  {cluster.label}{guess}: {votes}{second}"
    yield f"{counts_of(annotation)}, {annotation.n_answers:,} answers"
    if annotation.n_invalid:
        yield f"answers of an invalid format, which count for nothing: {annotation.n_invalid:,}"
    if agreement is not None:
        yield agreement_line(agreement)


def agreement_line(agreement: Agreement) -> str:
    """How many clusters got the label of --truth-key."""
    return (
        f"for {agreement.clusters_right} of {agreement.n_clusters} clusters the best label is what most of their cells have "
        f"in {agreement.key}"
    )
