"""The data card of a set of puzzles: sources, filters, splits, leak audit, known limits.

The card is made of the puzzles and, where there is one, of the report.json of their build (data/folder.py).
"""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.audit import audit, tenths
from data.describe import (
    DISEASES,
    NOT_STATED,
    Splits,
    escape,
    markdown_table,
    statistics_markdown,
    statistics_png,
    summary_table,
)
from data.errors import UserError
from data.files import write_whole
from data.near_duplicates import MIN_GENES

NO_REPORT = f"{NOT_STATED.capitalize()}: there is no report.json of a build beside the puzzles."
LIMITS = (
    "A puzzle shows the order of the most expressed genes only: no counts, no genes below the cut, and the order of "
    "genes with equal values means nothing.",
    "Labels are those of the source files and were not checked; they are as right, and as fine, as their annotation.",
    "A puzzle holds one cell of each of its types, so rare types are as frequent as common ones and a label's "
    "frequency is not that of the tissue.",
    "The context names tissue and disease where they are known, so a label may be guessed from them without a gene.",
)
FEW_DONORS = 5
"""A split with fewer donors than this is named among the limits."""
ALL_PRIMARY = "all cells count as primary data"
"""Part of the build's note on a file without the column is_primary_data (data/build/cells.py)."""


def write_description(out: str | os.PathLike, splits: Splits, report: dict[str, Any] | None) -> list[Path]:
    """Write statistics.md, statistics.png and data_card.md into a folder; returns their paths.

    Each file is written whole or not at all.

    splits: {name: puzzles}; empty splits are counted in the tables and left out of the figure.
    report: report.json of the build; None for puzzles that we did not build, whose card says what is not stated.
    Raises UserError when no split holds a puzzle, or the folder cannot be written.
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
    """The card as Markdown. The same puzzles and report give the same bytes.

    summary: the table of `summary_table`. The audit is the report's where that covers these puzzles; otherwise a
    new audit is made.
    """
    found = report.get("audit")
    if not _covers(found, splits):
        by_donor = (report.get("options") or {}).get("split") != "cell"
        # through JSON, so that tuples are lists as in a report: the card does not depend on where the audit came from
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
            "The cells, and what is written of them here, keep the licence of the files they come from; read it, and "
            "cite those data sets, before you pass the puzzles on. Building puzzles adds no right and takes none away."
        ),
    }
    parts = ["# Data card: cell type puzzles", _what(splits)]
    for title, text in sections.items():
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def _covers(found: dict[str, Any] | None, splits: Splits) -> bool:
    """Is this an audit of these very splits?

    They are compared by name and number of puzzles; empty splits do not count.
    """
    if not {"rules", "splits", "pairs", "leaks", "warnings"} <= (found or {}).keys():
        return False
    audited = {split["name"]: split["puzzles"] for split in found["splits"] if split["puzzles"]}
    return audited == {name: len(puzzles) for name, puzzles in splits.items() if puzzles}


def _what(splits: Splits) -> str:
    """The first paragraph: how many puzzles of which kind."""
    puzzles = [puzzle for of_split in splits.values() for puzzle in of_split]
    n_cells = sum(len(puzzle.cells) for puzzle in puzzles)
    longest = max(len(cell) for puzzle in puzzles for cell in puzzle.cells)
    diseases = DISEASES.counts(puzzles)["puzzles"].keys() - {NOT_STATED, "normal"}
    text = [
        f"{_number(len(puzzles), 'puzzle')} in {_number(len(splits), 'split')} ({', '.join(splits)}) of the "
        f"CellPuzzles task of Cell-o1 (arXiv:2506.02911); {n_cells:,} cells, counted once per puzzle; "
        f"{_number(len(diseases), 'disease')} besides normal. A cell is shown as a list of at most {longest} genes, "
        "most expressed first, after a sentence about its donor."
    ]
    kinds = {
        "batch": "A puzzle is a batch of {} of one donor, with the candidate cell types, each of which goes to exactly "
        "one cell.",
        "cell": "A puzzle is one cell of a batch alone, with all candidate cell types of the batch, one of which is "
        "its own.",
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
    return markdown_table(head, rows, left=4)


def _filters(report: dict[str, Any]) -> str:
    """The settings that decide which cells, genes and batches may be in a puzzle, as sentences."""
    options = report.get("options") or {}
    if not options:
        return NO_REPORT
    say = {
        "top_genes": "At most {} genes are listed per cell.",
        "rank": "Genes are ranked by: {}.",
        "profile": "What represents a type in a batch: {} (cell: one of its cells; cluster: the mean of them).",
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
    """The rules by which cells of a file could be left out.

    The rule on primary data is left out where it did not apply.
    """
    any_data = options.get("include_non_primary") or any(ALL_PRIMARY in note for note in file.get("notes") or ())
    return [
        reason for reason in file.get("cells_dropped") or {} if not (any_data and reason.startswith("is_primary_data"))
    ]


def _left_out(report: dict[str, Any]) -> str:
    """Numbers of cells, of donors x batches and of puzzles that are missing, summed over the files."""
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
        empty = sum(of_file.get("puzzles_with_a_cell_without_genes", 0) for of_file in of_split)
        missing = sum(sum((of_file.get("quota_left") or {}).values()) for of_file in of_split)
        rows += [[f"{split} puzzles", "a cell without an expressed gene", f"{empty:,}"]] * bool(empty)
        rows += [[f"{split} puzzles", "asked for, but no other batch of that size to draw", f"{missing:,}"]] * bool(
            missing
        )
    return markdown_table(["what", "why", "number"], rows, left=2)


def _leaks(found: dict[str, Any], splits: Splits) -> str:
    """The audit's numbers per pair of splits, then its sentences."""
    rules = found.get("rules", {})
    text = (
        f"Looked for: the same cell (by source and id, or by an identical list of {rules.get('min_genes', MIN_GENES)} "
        "or more genes), the same donor, the same batch, and near-duplicate lists (at least "
        f"{100 * rules.get('same_genes', 0):.0f} % of the genes in common, rank correlation at least "
        f"{rules.get('same_order', 0):g})."
    )
    head = ["pair", "shared cells", "puzzles with one", "shared donors", "near-duplicate lists", "same batches"]
    rows = [
        [
            f"{pair['first']} -> {pair['second']}",
            f"{pair['shared_cells']:,}",
            f"{pair['puzzles_with_shared_cell']:,} ({tenths(pair['share_with_shared_cell'])} %)",
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
            *([markdown_table(head, rows)] if rows else ["One split with puzzles only: nothing to compare."]),
            _bullets(lines),
        ]
    )


def _own_limits(splits: Splits, report: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Limits of these puzzles in particular, besides LIMITS."""
    limits = []
    for split in found["splits"]:
        if 0 < split["donors"] < FEW_DONORS:
            limits.append(f"{split['name']} has {_number(split['donors'], 'donor')} only: its results depend on them.")
        if split["distinct_cells"] < 0.8 * split["cells"]:
            distinct, places = f"{split['distinct_cells']:,}", f"{split['cells']:,}"
            limits.append(
                f"{split['name']} uses cells again: {distinct} distinct cells fill {places} places in its puzzles."
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
    text += [
        markdown_table(["option", "value"], [[name, without_folders(value)] for name, value in rows], left=2)
    ] * bool(rows)
    return "\n\n".join(text)


def without_folders(text: str) -> str:
    """The text with absolute paths cut down to their last part, so that the card does not reveal a user's folders."""
    return re.sub(r"(?<![\w.~/:-])/(?:[^\s/'\"]+/)+([^\s/'\"]+)", r"\1", text)


def _shown(value: Any) -> str:
    """A value of the report as text: numbers with commas, lists with semicolons, paths without folders."""
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
