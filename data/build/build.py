"""CellPuzzles from .h5ad files: N cells of one donor and experimental batch, each of another cell type.

Where the authors' code and the Cell-o1 paper (arXiv:2506.02911) differ, this builder follows the paper: candidates are
shuffled, donors are disjoint between splits, no cell is in two splits, no set of cells occurs twice.

`build_puzzles` has five steps: summarise every file, assign the donors to splits, build each file (in worker processes,
data/build/onefile.py), audit the splits for leaks, write the report.
"""

import dataclasses
import os
import platform
import random
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.audit import Audit, audit
from data.build import h5ad
from data.build.contexts import has_disease, several_values
from data.build.onefile import FileSummary, build_file, split_summary, summarise_file, unseen_donors
from data.build.settings import BuildConfig, check_config
from data.build.splits import SPLITS, choose_test_donors
from data.build.staging import Staging, run_all
from data.clusters.labels import known_labels
from data.errors import UserError
from data.meaning.labels import same_name
from data.prompts import normalise_label
from data.puzzles import Puzzle

VERSIONS_OF = ("numpy", "h5py", "pyarrow")


@dataclasses.dataclass(frozen=True)
class BuildProgress:
    """Functions that a long build calls to report its progress. By default they do nothing."""

    say: Callable[[str], None] = lambda text: None
    """Called with one line of text for each finished file."""
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None
    """Called with the phase ("looking at files" or "reading cells"), the files or cells done, and their total."""


def build_puzzles(
    files: Sequence[str | Path],
    config: BuildConfig,
    *,
    workers: int = 1,
    staging: Staging | None = None,
    watch: BuildProgress = BuildProgress(),
) -> tuple[dict[str, list[Puzzle]], dict[str, Any]]:
    """Build puzzles from one or more .h5ad files. Returns ({"train": puzzles, "test": ..., "unseen": ...}, report).

    workers: number of processes; each builds one file at a time. The puzzles do not depend on it.
    staging: folder with finished files, from which a stopped build goes on. Default: a temporary folder.
    Raises UserError when an option, a file or a column cannot be used, or when the splits share cells or donors.

    >>> from data.atlas.simulate import write_atlas
    >>> cells = write_atlas("atlas.h5ad", n_donors=12, cells_per_type=2)  # or a file from CELLxGENE
    >>> config = BuildConfig(min_cells=3, max_cells=3, top_genes=10, puzzles_per_n=4, test_puzzles_per_n=2)
    >>> splits, report = build_puzzles(["atlas.h5ad"], config)
    >>> {split: len(puzzles) for split, puzzles in splits.items()}
    {'train': 4, 'test': 2, 'unseen': 0}
    >>> puzzle = splits["train"][0]
    >>> puzzle.id, puzzle.meta["donor"], len(puzzle.cells), len(puzzle.cells[0])
    ('train-000000', 'donor_002', 3, 10)
    >>> sorted(puzzle.candidates) == sorted(puzzle.answer)
    True
    """
    if staging is None:
        with TemporaryDirectory() as folder:
            return build_puzzles(files, config, workers=workers, staging=Staging(Path(folder)), watch=watch)
    check_config(config)
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    paths = h5ad.sorted_files(files)
    _refuse_names_not_in_utf8(paths)
    # all files are looked at first: donors are divided over the whole build, and a bad file shows early
    summaries = run_all(
        _summarise_file,
        [(path, config) for path in paths],
        workers,
        lambda done, total: None,
        lambda number, _: watch.progress("looking at files", number + 1, len(paths)),
    )
    _refuse_if_nothing_to_build(summaries, config)
    _refuse_labels_alike(summaries)
    assignment = assign_donors(summaries, config)
    _build_files(summaries, assignment, config, workers, staging, watch)
    splits, reports = _gathered(summaries, staging)
    leaks = audit(splits, donors_apart=config.split_mode != "cell")  # --split cell shares donors on purpose
    if config.gene_dropout and len(paths) > 1:
        unseen = (
            "train lists lack genes (--gene-dropout), so a cell that another file holds too is hardly found by its list"
        )
        leaks = dataclasses.replace(leaks, warnings=(*leaks.warnings, unseen))
    _refuse_leaks(leaks, config, len(paths))
    if not splits["train"]:
        raise UserError("no train puzzle could be built: every batch drawn holds a cell without an expressed gene")
    labels = _labels(splits["train"], summaries, assignment)
    return splits, _report(splits, summaries, reports, leaks, config) | {"labels": labels}


def _refuse_labels_alike(summaries: list[FileSummary]) -> None:
    """Raise UserError for labels of two files that differ only in how one name is written, as check_labels does for one."""
    seen: dict[str, tuple[str, Path]] = {}
    for summary in summaries:
        for label in sorted(summary.report["cell_types"]):
            other, path = seen.setdefault(same_name(normalise_label(label)), (label, summary.path))
            if other != label:
                raise UserError(
                    f"{summary.path}: the cell type {label!r} is written {other!r} in {path}, and an answer could not tell them "
                    "apart; give them one name"
                )


def _refuse_names_not_in_utf8(paths: list[Path]) -> None:
    """Raise UserError for a file name that is not UTF-8. The name seeds the file's draws and is part of every row."""
    for path in paths:
        name = os.fsencode(path.name).decode(errors="replace")
        if name != path.name:
            raise UserError(f"{path.parent / name}: the file's name is not UTF-8; rename it")


def _summarise_file(path: Path, config: BuildConfig, advance: Callable) -> FileSummary:
    return summarise_file(path, config)


def _build_files(
    summaries: list[FileSummary],
    assignment: dict,
    config: BuildConfig,
    workers: int,
    staging: Staging,
    watch: BuildProgress,
) -> None:
    """Build the files that staging does not hold yet."""
    staging.folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    del settings["allow_leaks"]  # accepting leaks does not change a file's puzzles, so it may change under --resume
    calls = []
    for summary in summaries:
        of_file = {donor: assignment[donor] for donor in summary.donors if donor in assignment}
        fingerprint = staging.fingerprint(summary.path, settings, of_file)
        if staging.has(summary.path, fingerprint):
            watch.say(f"{summary.path.name}: finished earlier")
        else:
            calls.append((summary.path, of_file, summary.report["values"], config, staging, fingerprint))

    def tell_finished(number: int, built: tuple[int, int]) -> None:
        watch.say(f"{calls[number][0].name}: {built[0]} puzzles of {built[1]} cells")

    run_all(
        _build_and_stage,
        calls,
        workers,
        lambda done, total: watch.progress("reading cells", done, total),
        tell_finished,
    )


def _build_and_stage(
    path: Path,
    assignment: dict,
    kind: str | None,
    config: BuildConfig,
    staging: Staging,
    fingerprint: str,
    advance: Callable,
) -> tuple[int, int]:
    """Build one file in a worker process. Returns (number of puzzles, number of their cells) once both are on disk."""
    splits, report = build_file(path, assignment, kind, config, advance)
    staging.save(path, fingerprint, splits, report)
    return sum(map(len, splits.values())), sum(len(p.cells) for puzzles in splits.values() for p in puzzles)


def _gathered(summaries: list[FileSummary], staging: Staging) -> tuple[dict[str, list[Puzzle]], list[dict[str, Any]]]:
    """({split: puzzles with their ids}, [report of each file's splits]) from the staged files.

    The ids are counted here, over all files, so that they do not depend on which file was finished first.
    """
    splits: dict[str, list[Puzzle]] = {split: [] for split in SPLITS}
    reports = []
    for summary in summaries:
        puzzles, report = staging.load(summary.path)
        reports.append(report)
        for split, puzzle in puzzles:
            splits[split].append(dataclasses.replace(puzzle, id=f"{split}-{len(splits[split]):06d}"))
    return splits, reports


def _refuse_if_nothing_to_build(summaries: list[FileSummary], config: BuildConfig) -> None:
    """Note in each report why a file gives no puzzle. Raises UserError with the first reason when no file gives one."""
    organisms = {s.organism: s.path for s in summaries if s.organism}
    if len(organisms) > 1:
        (one, first), (other, second) = sorted(organisms.items())[:2]
        raise UserError(
            f"{first} holds {one} and {second} {other}, whose genes have other names; build them separately"
        )
    problems = []
    for summary in summaries:
        sizes, n_types = summary.group_sizes, len(summary.report["cell_types"])
        best = max(sizes, key=lambda group: sizes[group], default=None)
        if best is None:
            reasons, remedy = _why_dropped(summary)
            problem = f"all {summary.report['cells_read']} cells were dropped ({reasons}){remedy}"
        elif n_types < config.min_cells:
            problem = f"has {n_types} cell types, fewer than --min-cells {config.min_cells}{_dropped(summary)}"
        elif sizes[best] < config.min_cells:
            problem = (
                f"no donor and batch has {config.min_cells} cell types: the best, donor {best[0]!r} batch {best[1]!r}, "
                f"has {sizes[best]}{_dropped(summary)}; {_remedy_for_groups(summary)}"
            )
        else:
            continue
        problems.append(f"{summary.path}: {problem}")
        summary.report["notes"].append(f"gives no puzzle: {problem}")
    if len(problems) == len(summaries):
        others = f" (none of the other {len(problems) - 1} files gives a puzzle either)" if len(problems) > 1 else ""
        raise UserError(problems[0] + others)


def _remedy_for_groups(summary: FileSummary) -> str:
    """What to do when the cells of a file are spread over too many donors and batches."""
    n_groups, n_cells = len(summary.group_sizes), summary.report["cells_kept"]
    if max(summary.group_sizes.values()) > 1 and 2 * n_groups <= n_cells:
        return "lower --min-cells"
    return (
        f"{n_cells} cells have {len(summary.donors)} donors: name the column of donors with --donor-key, and that of batches "
        "with --batch-key"
    )


def _why_dropped(summary: FileSummary) -> tuple[str, str]:
    """(reasons for which cells of a file were dropped, with their numbers; the remedy, or "")."""
    dropped = {reason: n for reason, n in summary.report["cells_dropped"].items() if n}
    remedies = [summary.remedies[reason] for reason in dropped if reason in summary.remedies]
    reasons = ", ".join(f"{n} because {reason}" for reason, n in dropped.items()) or "the file has none"
    return reasons, f"; keep them with {' and '.join(remedies)}" if remedies else ""


def _dropped(summary: FileSummary) -> str:
    """What a message adds about the cells that were dropped, or ""."""
    n_dropped = sum(summary.report["cells_dropped"].values())
    if not n_dropped:
        return ""
    reasons, remedy = _why_dropped(summary)
    return f" ({n_dropped} of {summary.report['cells_read']} cells were dropped: {reasons}{remedy})"


def assign_donors(summaries: list[FileSummary], config: BuildConfig) -> dict[str, str]:
    """{donor: split} of the donors that can give puzzles. One donor id in several files counts as one donor.

    With --split cell or instance, every donor without an unseen disease is "train"; cells or puzzles are divided later.
    Raises UserError when no cell has the unseen disease, or too few donors are left.
    """
    diseases = {disease for s in summaries for kinds in s.donors.values() for _, disease in kinds} - {"unknown"}
    for name in config.unseen_disease:
        if not any(has_disease(disease, (name,)) for disease in diseases):
            single = {part for disease in diseases for part in several_values(disease)}  # of 'a || b', also 'a' and 'b'
            nearest = h5ad.nearest_names(name, diseases | single)
            raise UserError(f"--unseen-disease {name}: no cell has it (nearest: {nearest})")
    unseen = {donor for summary in summaries for donor in unseen_donors(summary, config.unseen_disease)}
    assignment = dict.fromkeys(sorted(unseen), "unseen")
    able = {d for s in summaries for (d, _), n_types in s.group_sizes.items() if n_types >= config.min_cells}
    able = sorted(able - unseen)  # sorted: the draw of test donors must not depend on the order of a set
    if not able:
        raise UserError("every donor that can give a puzzle has an --unseen-disease: nothing is left to train on")
    assignment.update(dict.fromkeys(able, "train"))
    if config.split_mode == "donor" and config.test_fraction > 0:
        if len(able) == 1:
            only = f"only donor {able[0]!r} can give puzzles, so none is left for test"
            raise UserError(f"{only}; use --split cell or --test-fraction 0")
        tissue_of = {donor: _main_tissue(summaries, donor) for donor in able}
        rng = random.Random(f"{config.seed}:test donors")  # named by its purpose, so no other draw shifts it
        assignment.update(dict.fromkeys(choose_test_donors(tissue_of, config.test_fraction, rng), "test"))
    return assignment


def _main_tissue(summaries: list[FileSummary], donor: str) -> str:
    """The tissue of most of the donor's cells. A tie goes to the first tissue in alphabetical order."""
    cells: Counter[str] = Counter()
    for summary in summaries:
        for (tissue, _), n_cells in summary.donors.get(donor, {}).items():
            cells[tissue] += n_cells
    return min(cells, key=lambda tissue: (-cells[tissue], tissue))


def _refuse_leaks(leaks: Audit, config: BuildConfig, n_files: int) -> None:
    if leaks.leaks and not config.accepts_leaks:
        remedies = ["accept it with --allow-leaks"]
        if config.split_mode != "donor":
            remedies.insert(0, "use --split donor")
        elif n_files > 1:
            remedies.insert(0, "leave one of the files out")
        more = f" (and {len(leaks.leaks) - 1} more findings)" if len(leaks.leaks) > 1 else ""
        raise UserError(f"the splits leak: {leaks.leaks[0]}{more}; {', or '.join(remedies)}")


def _report(
    splits: dict[str, list[Puzzle]],
    summaries: list[FileSummary],
    reports: list[dict],
    leaks: Audit,
    config: BuildConfig,
) -> dict[str, Any]:
    """The content of report.json. It has file names but no folders, so that it is the same on every machine."""
    asked_for = {"test": config.test_fraction > 0, "unseen": bool(config.unseen_disease)}
    notes = [
        f"{split} is empty: none of its donors and batches has {config.min_cells} cell types left"
        for split, asked in asked_for.items()
        if asked and not splits[split]
    ]
    files_of = Counter(donor for summary in summaries for donor in summary.donors)
    if shared := sorted(donor for donor, n in files_of.items() if n > 1):
        notes.append(f"taken for one donor although in several files: {', '.join(shared)}")
    return {
        "seed": config.seed,
        "command": _command(summaries, config),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS_OF}},
        "options": {**dataclasses.asdict(config), "split": config.split_mode},
        "notes": notes,
        "files": [
            summary.report | report | {"notes": summary.report["notes"] + report["notes"]}
            for summary, report in zip(summaries, reports, strict=True)
        ],
        "splits": {split: split_summary(puzzles) for split, puzzles in splits.items()},
        "audit": leaks.to_dict(),
    }


def _labels(train: list[Puzzle], summaries: list[FileSummary], assignment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """{label of the train puzzles: its Cell Ontology id, tissues and cells}: what a model can learn here."""
    donors = {donor for donor, split in assignment.items() if split == "train"}
    wanted = {label for puzzle in train for label in puzzle.answer}
    known = known_labels((summary.labels for summary in summaries), donors, wanted)
    return {label: dataclasses.asdict(of_label) for label, of_label in known.items()}


def _command(summaries: list[FileSummary], config: BuildConfig) -> str:
    """The command that builds the same bytes again: every option that is not at its default."""
    words = ["python", "launch/build.py"]
    for summary in summaries:
        words += ["--h5ad", summary.path.name]
    # the seed is always shown: a reader should not need to know the default
    for setting in dataclasses.fields(BuildConfig):
        value = getattr(config, setting.name)
        if value == setting.default and setting.name != "seed":
            continue
        flag = f"--{setting.name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            words += [flag] if item is True else [flag, str(item)]
    return shlex.join([*words, "--out", "DIR"])
