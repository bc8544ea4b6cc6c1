"""Describe puzzles: the paper's tables (statistics.md), its figure (statistics.png) and a data card (data_card.md).

python launch/describe.py --puzzles puzzles/train.parquet --puzzles puzzles/test.parquet --out puzzles
"""

import dataclasses
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from data.audit import MIN_GENES, audit
from data.describe import (
    DISEASES,
    NOT_STATED,
    Splits,
    escape,
    statistics_markdown,
    statistics_png,
    summary_table,
    table,
)
from data.errors import UserError
from data.files import write_whole
from launch.audit import read_splits
from launch.options import command, option

NO_REPORT = f"{NOT_STATED.capitalize()}: there is no report.json of a build beside the puzzles."
LIMITS = (
    "A puzzle shows the order of the most expressed genes only: no counts, no genes below the cut, and the order of genes "
    "with equal values means nothing.",
    "Labels are those of the source files and were not checked; they are as right, and as fine, as their annotation.",
    "A puzzle holds one cell of each of its types, so rare types are as frequent as common ones and a label's frequency is "
    "not that of the tissue.",
    "The context names tissue and disease where they are known, so a label may be guessed from them without a gene.",
)
FEW_DONORS = 5
ALL_PRIMARY = "all cells count as primary data"
"""In the note on a file that does not say which are (data/build/cells.py)."""
COUNTS = {str: int}
REPORT = {
    "options?": dict,
    "versions?": dict,
    "command?": (str, list),
    "notes?": [str],
    "splits?": {str: {"puzzles?": int}},
    "files": [
        {
            "cells_dropped?": COUNTS,
            "cells_set_aside?": COUNTS,
            "groups_skipped?": COUNTS,
            "notes?": [str],
            "splits?": {str: {"quota_left?": COUNTS, "puzzles_with_a_cell_without_genes?": int}},
        }
    ],
    "audit?": {
        "rules": {str: (int, float)},
        "splits": [{"name": str, "puzzles": int, "donors": int, "cells": int, "distinct_cells": int}],
        "pairs": [
            {
                "first": str,
                "second": str,
                "shared_cells": int,
                "puzzles_with_shared_cell": int,
                "share_with_shared_cell": (int, float),
                "shared_donors?": list,
                "near_duplicate_lists": int,
                "same_batches": int,
            }
        ],
        "leaks": [str],
        "warnings": [str],
    },
}
"""What the card reads of a report (launch/build.py)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    puzzles: tuple[str, ...] = option(dataclasses.MISSING, "File of puzzles, a split each; repeatable.")
    out: str = option(dataclasses.MISSING, "Folder for statistics.md, statistics.png and data_card.md.")
    report: str | None = option(None, "report.json of the build; found by itself beside the puzzles.")


@command(Config)
def main(config: Config) -> None:
    """Tables, figure and data card of any set of puzzles, ours or the published ones."""
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise UserError(f"--out {config.out}: is a file, not a folder")
    report = read_report(config.report) if config.report else report_beside(config.puzzles)
    for file in write_description(config.out, read_splits(config.puzzles), report):
        click.echo(f"written to {file}")


def report_beside(files: Iterable[str]) -> dict[str, Any] | None:
    """The report.json of the one folder that holds all the files, if there is one, and it is one of a build."""
    folders = {Path(os.path.abspath(file)).parent for file in files}
    found = folders.pop() / "report.json"
    if folders or not found.is_file():
        return None
    try:
        return read_report(found)
    except ValueError:
        click.echo(f"note: {found} is not the report of a build, and is left out")
        return None


def read_report(path: str | Path | None) -> dict[str, Any] | None:
    """What the build wrote. Raises UserError that names the file when it is absent or not a report."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(f"--report {path}: no such file")
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        report = None
    if not fits_shape(report, REPORT):
        raise UserError(f"--report {path}: not the report.json of a build; leave the option out to do without")
    return report


def fits_shape(value: Any, shape: Any) -> bool:
    """Is it of that shape? A list holds values of its only item's shape, and a dict of str those of its only value's; in
    other dicts a key that ends in ? may be absent or null."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits_shape(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(fits_shape(item, shape[str]) for item in value.values())
    return all(
        (key[-1] == "?" and value.get(key.rstrip("?")) is None) or fits_shape(value.get(key.rstrip("?")), of_key)
        for key, of_key in shape.items()
    )


def write_description(out: str | os.PathLike, splits: Splits, report: dict[str, Any] | None) -> list[Path]:
    """Write statistics.md, statistics.png and data_card.md into a folder, each whole or not at all.

    splits: {name: puzzles}; empty ones are counted in the tables and left out of the figure.
    report: report.json of the build, None for puzzles that we did not build; the card says what is not stated.
    Raises UserError when no split holds a puzzle or the folder cannot be written.
    """
    if not any(splits.values()):
        raise UserError(f"{out}: no split holds a puzzle, so there is nothing to describe")
    summary = summary_table(splits)
    files = {
        "statistics.md": statistics_markdown(splits, summary),
        "statistics.png": statistics_png(splits),
        "data_card.md": data_card(splits, report or {}, summary),
    }
    return [write_whole(Path(out) / name, content) for name, content in files.items()]


def data_card(splits: Splits, report: dict[str, Any], summary: str) -> str:
    """The card as Markdown, with the splits' summary table; the same puzzles and report give the same bytes."""
    found = report.get("audit")
    if not _fits(found, splits):  # JSON's lists for tuples, so that the card does not depend on who audited
        by_donor = (report.get("options") or {}).get("split") != "cell"
        found = json.loads(json.dumps(audit(splits, donors_apart=by_donor).to_dict()))
    sections = {
        "Sources": _sources(report),
        "Filters": _filters(report),
        "What was left out, and why": _left_out(report),
        "Splits": summary + "\n\nTables: statistics.md; figure: statistics.png.",
        "Leak audit": _leaks(found, splits),
        "Known limits": _bullets([*LIMITS, *_own_limits(splits, report, found)]),
        "How it was made": _origin(report),
        "Licence": (
            "The cells, and what is written of them here, keep the licence of the files they come from; read it, and cite "
            "those data sets, before you pass the puzzles on. Building puzzles adds no right and takes none away."
        ),
    }
    parts = ["# Data card: cell type puzzles", _what(splits)]
    for title, text in sections.items():
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def _fits(found: dict[str, Any] | None, splits: Splits) -> bool:
    """Is it the audit of these very splits (by name and size, but for empty ones)?"""
    if not {"rules", "splits", "pairs", "leaks", "warnings"} <= (found or {}).keys():
        return False
    audited = {one["name"]: one["puzzles"] for one in found["splits"] if one["puzzles"]}
    return audited == {name: len(puzzles) for name, puzzles in splits.items() if puzzles}


def _what(splits: Splits) -> str:
    puzzles = [puzzle for of_split in splits.values() for puzzle in of_split]
    n_cells = sum(len(puzzle.cells) for puzzle in puzzles)
    longest = max(len(cell) for puzzle in puzzles for cell in puzzle.cells)
    diseases = DISEASES.counts(puzzles)["puzzles"].keys() - {NOT_STATED, "normal"}
    text = [
        f"{_number(len(puzzles), 'puzzle')} in {_number(len(splits), 'split')} ({', '.join(splits)}) of the CellPuzzles task of "
        f"Cell-o1 (arXiv:2506.02911); {n_cells:,} cells, counted once per puzzle; {_number(len(diseases), 'disease')} besides "
        f"normal. A cell is shown as a list of at most {longest} genes, most expressed first, after a sentence about its donor."
    ]
    kinds = {
        "batch": "A puzzle is a batch of {} of one donor, with the candidate cell types, each of which goes to exactly one cell.",
        "cell": "A puzzle is one cell of a batch alone, with all candidate cell types of the batch, one of which is its own.",
        "open": "An open-ended puzzle is a batch of {} of one donor, without candidates.",
    }
    for kind, sentence in kinds.items():
        sizes = [len(puzzle.cells) for puzzle in puzzles if puzzle.variant == kind]
        if sizes:
            least = "" if min(sizes) == max(sizes) else f"{min(sizes)} to "
            count = "" if len(sizes) == len(puzzles) else f" ({_number(len(sizes), 'puzzle')})"
            text.append(sentence.format(f"{least}{_number(max(sizes), 'cell')}").removesuffix(".") + f"{count}.")
    return " ".join(text)


def _sources(report: dict[str, Any]) -> str:
    if not report.get("files"):
        return NO_REPORT
    keys = ("organism", "layer", "values", "cells_read", "cells_kept", "donors", "groups", "sha256")
    head = ["file", *(key.replace("_", " ") for key in keys)]
    head[head.index("groups")] = "donors x batches"
    rows = [[_shown(file.get("file")), *(_shown(file.get(key)) for key in keys)] for file in report["files"]]
    return table(head, rows, left=4)


def _filters(report: dict[str, Any]) -> str:
    """The settings that decide which cells, genes and batches may stand in a puzzle, as sentences."""
    options = report.get("options") or {}
    if not options:
        return NO_REPORT
    say = {
        "top_genes": "At most {} genes are listed per cell.",
        "rank": "Genes are ranked by: {}.",
        "profile": "What stands for a type in a batch: {} (cell: one of its cells; cluster: the mean of them).",
        "drop_genes": "Gene classes never listed: {}.",
        "gene_dropout": "Chance that a gene of a train cell is passed over: {}.",
        "split": "Train and test differ by: {}.",
        "test_fraction": "Share that goes to test: {}.",
        "unseen_disease": "Diseases kept out of train and test: {}.",
        "organism": "Organism: {}.",
        "include_non_primary": "Cells that are not primary data are used as well.",
    }
    sizes = f"{_shown(options.get('min_cells'))} to {_shown(options.get('max_cells'))}"
    sentences = [f"A batch has {sizes} cells, each of another cell type, all of one donor and experimental batch."]
    sentences += [text.format(_shown(options.get(key))) for key, text in say.items() if options.get(key)]
    reasons = dict.fromkeys(reason for file in report.get("files", ()) for reason in _reasons(file, options))
    sentences += [f"A cell is left out where: {'; '.join(reasons)}."] if reasons else []
    return _bullets(sentences)


def _reasons(file: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """For which the cells of a file were left out, had there been any; whether they are primary data may not have counted."""
    any_data = options.get("include_non_primary") or any(ALL_PRIMARY in note for note in file.get("notes") or ())
    return [
        reason for reason in file.get("cells_dropped") or {} if not (any_data and reason.startswith("is_primary_data"))
    ]


def _left_out(report: dict[str, Any]) -> str:
    """Cells, donors and batches, and puzzles that are missing, summed over the files."""
    files = report.get("files")
    if not files:
        return NO_REPORT
    rows = []
    for key, what in (
        ("cells_dropped", "cells"),
        ("cells_set_aside", "cells set aside"),
        ("groups_skipped", "donors x batches"),
    ):
        sums: Counter = Counter()
        for file in files:
            sums.update(file.get(key) or {})
        rows += [[what, reason, f"{count:,}"] for reason, count in sums.items()]
    for split in dict.fromkeys(name for file in files for name in file.get("splits", {})):
        of_split = [file.get("splits", {}).get(split, {}) for file in files]
        empty = sum(one.get("puzzles_with_a_cell_without_genes", 0) for one in of_split)
        missing = sum(sum((one.get("quota_left") or {}).values()) for one in of_split)
        rows += [[f"{split} puzzles", "a cell without an expressed gene", f"{empty:,}"]] * bool(empty)
        rows += [[f"{split} puzzles", "asked for, but no other batch of that size to draw", f"{missing:,}"]] * bool(
            missing
        )
    return table(["what", "why", "number"], rows, left=2)


def _leaks(found: dict[str, Any], splits: Splits) -> str:
    """The audit's numbers per pair of splits, then its sentences."""
    rules = found.get("rules", {})
    text = (
        f"Looked for: the same cell (by source and id, or by an identical list of {rules.get('min_genes', MIN_GENES)} or more "
        f"genes), the same donor, the same batch, and near-duplicate lists (at least {100 * rules.get('same_genes', 0):.0f} % "
        f"of the genes in common, rank correlation at least {rules.get('same_order', 0):g})."
    )
    head = ["pair", "shared cells", "puzzles with one", "shared donors", "near-duplicate lists", "same batches"]
    rows = [
        [
            f"{pair['first']} -> {pair['second']}",
            f"{pair['shared_cells']:,}",
            f"{pair['puzzles_with_shared_cell']:,} ({100 * pair['share_with_shared_cell']:.1f} %)",
            NOT_STATED if pair["shared_donors"] is None else f"{len(pair['shared_donors']):,}",
            f"{pair['near_duplicate_lists']:,}",
            f"{pair['same_batches']:,}",
        ]
        for pair in found["pairs"]
        if splits.get(pair["first"]) and splits.get(pair["second"])
    ]
    lines = [f"Leak: {sentence}" for sentence in found["leaks"]] or ["No leak was found."] * bool(rows)
    lines += [f"Warning: {sentence}" for sentence in found["warnings"]]
    return "\n\n".join(
        [
            text,
            *([table(head, rows)] if rows else ["One split with puzzles only: nothing to compare."]),
            _bullets(lines),
        ]
    )


def _own_limits(splits: Splits, report: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What these puzzles in particular cannot show."""
    limits = []
    for one in found["splits"]:
        if 0 < one["donors"] < FEW_DONORS:
            limits.append(f"{one['name']} has {_number(one['donors'], 'donor')} only: its results depend on them.")
        if one["distinct_cells"] < 0.8 * one["cells"]:
            distinct, places = f"{one['distinct_cells']:,}", f"{one['cells']:,}"
            limits.append(
                f"{one['name']} uses cells again: {distinct} distinct cells fill {places} places in its puzzles."
            )
    if found["leaks"]:
        limits.append("The splits leak (see the audit): results on them say less about new cells than they seem to.")
    mode = (report.get("options") or {}).get("split")
    if mode in ("cell", "instance"):
        limits.append(f"Train and test differ by {mode}, not by donor: test says nothing about new donors.")
    for name, puzzles in splits.items():
        counted = ((report.get("splits") or {}).get(name) or {}).get("puzzles")
        if counted is not None and counted != len(puzzles):
            limits.append(f"report.json counts {counted:,} puzzles in {name}, the file holds {len(puzzles):,}.")
    notes = [f"{file.get('file')}: {note}" for file in report.get("files", ()) for note in file.get("notes", ())]
    return limits + [f"Note of the build: {note}" for note in [*report.get("notes", ()), *notes]]


def _origin(report: dict[str, Any]) -> str:
    """Seed, command, versions and every option of the build."""
    if not report:
        return NO_REPORT
    line = report.get("command")
    line = shlex.join(map(str, line)) if isinstance(line, list | tuple) else line
    versions = ", ".join(f"{name} {number}" for name, number in (report.get("versions") or {}).items())
    text = [_bullets([f"Seed: {_shown(report.get('seed'))}", f"Versions: {versions or NOT_STATED}"])]
    text.append(f"```\n{without_folders(line)}\n```" if line else f"Command: {NOT_STATED}.")
    options = {name: value for name, value in (report.get("options") or {}).items() if value not in (None, [], (), "")}
    rows = [
        [name, "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
        for name, value in options.items()
    ]
    text += [table(["option", "value"], [[name, without_folders(value)] for name, value in rows], left=2)] * bool(rows)
    return "\n\n".join(text)


def without_folders(text: str) -> str:
    """Absolute paths cut down to their last part: the card does not say whose machine it was."""
    return re.sub(r"(?<![\w.~/:-])/(?:[^\s/'\"]+/)+([^\s/'\"]+)", r"\1", text)


def _shown(value: Any) -> str:
    """A value of the report as text; numbers with commas, lists with semicolons."""
    if value is None or value == "":
        return NOT_STATED
    if isinstance(value, list | tuple):
        return "; ".join(map(_shown, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return without_folders(str(value))


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


if __name__ == "__main__":
    main()
