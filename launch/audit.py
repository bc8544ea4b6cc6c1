"""Look for leaks between files of puzzles: shared cells, donors and batches, near-duplicate gene lists.

python launch/audit.py train.parquet test.parquet
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import click

from data.audit import MIN_GENES, Audit, audit
from data.errors import UserError
from data.files import write_whole
from data.puzzles import Puzzle, read_puzzles, read_rows
from launch.options import Command


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, metavar="FILE FILE [FILE ...]", type=click.Path())
@click.option("--json", "json_file", type=click.Path(), metavar="FILE", help="Also write what was found as JSON.")
@click.option("--allow-leaks", is_flag=True, help="Exit with 0 even where leaks are found.")
@click.option("--same-donors", is_flag=True, help="Donors in common are meant (--split cell): a warning, not a leak.")
def main(files: tuple[str, ...], json_file: str | None, allow_leaks: bool, same_donors: bool) -> None:
    """Look for leaks between files of puzzles, the one that was trained on first; ours or the published ones.

    Exit code 0: no leak. 1: leaks found. 2: a file is not one of puzzles.
    """
    if json_file is not None and (
        Path(json_file).is_dir() or os.path.realpath(json_file) in map(os.path.realpath, files)
    ):
        raise UserError(f"--json {json_file}: is a folder or a file to read; name another file to write")
    splits, warnings = told_apart(files, read_splits(files))
    found = audit(splits, donors_apart=not same_donors)
    found = dataclasses.replace(found, warnings=(*warnings, *found.warnings))
    click.echo(audit_table(found))
    repeats = len(files) - len({os.path.realpath(file) for file in files})
    if repeats:
        click.echo("note: the same file is given more than once; everything in it leaks into itself")
    if len(files) == 1:
        click.echo("note: one file only, so nothing was compared; give the test file too")
    if json_file is not None:
        write_whole(json_file, json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n")
        click.echo(f"written to {json_file}")
    if found.leaks and not allow_leaks:
        click.get_current_context().exit(1)


def read_splits(files: Sequence[str]) -> dict[str, list[Puzzle]]:
    """{name: puzzles} of files, named by their stems; by folder too, or by a number, where two stems are equal.

    An empty file is an empty set. Raises UserError that names the file (and row) that is not one of puzzles, or says that
    none of the files holds a puzzle.
    """
    places = [(Path(os.path.abspath(file)).parent.name, Path(file).stem) for file in files]
    splits: dict[str, list[Puzzle]] = {}
    for i, (file, (folder, stem)) in enumerate(zip(files, places, strict=True)):
        ambiguous = any(other == stem and beside != folder for beside, other in places)
        number = 1 + places[:i].count((folder, stem))
        name = (f"{folder}/{stem}" if ambiguous else stem) + (f" ({number})" if number > 1 else "")
        splits[name] = read_puzzles(file) if read_rows(file) else []  # a build without unseen puzzles has an empty file
    if not any(splits.values()):
        raise UserError(f"{files[0]}: holds no puzzle; build some with launch/build.py")
    return splits


def told_apart(files: Sequence[str], splits: dict[str, list[Puzzle]]) -> tuple[dict[str, list[Puzzle]], list[str]]:
    """(the splits, warnings): sources of one name of which the builds' reports state different hashes get other names.

    files: those that the splits were read from, in their order.
    """
    hashes = [_hashes_beside(file) for file in files]
    of_name: dict[str, set[str]] = {}
    for name, digest in chain.from_iterable(of_file.items() for of_file in hashes):
        of_name.setdefault(name, set()).add(digest)
    several = {name for name, digests in of_name.items() if len(digests) > 1}
    warnings = [
        f"{len(of_name[name])} different files are called {name} (by the report.json beside the puzzles): their cells are "
        "told apart, even where ids are alike"
        for name in sorted(several)
    ]

    def renamed(puzzle: Puzzle, of_file: dict[str, str]) -> Puzzle:
        source = puzzle.meta.get("source")
        if not isinstance(source, str) or source not in several & of_file.keys():
            return puzzle
        return dataclasses.replace(puzzle, meta=puzzle.meta | {"source": f"{source} {of_file[source]}"})

    pairs = zip(splits.items(), hashes, strict=True)
    return {name: [renamed(puzzle, of_file) for puzzle in puzzles] for (name, puzzles), of_file in pairs}, warnings


def _hashes_beside(file: str) -> dict[str, str]:
    """{.h5ad file: its hash} in the report.json of a build beside a file of puzzles; empty where there is none."""
    try:
        report = json.loads((Path(file).parent / "report.json").read_text(encoding="utf-8"))
        return {str(one["file"]): str(one["sha256"]) for one in report["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def audit_table(found: Audit) -> str:
    """Numbers of every set, of every pair, then leaks and warnings, as text."""
    short = f"lists < {MIN_GENES} genes"
    rows = [("set", "puzzles", "cells", "distinct cells", "donors", "duplicate puzzles", short)]
    rows += [
        (
            one.name,
            one.puzzles,
            one.cells,
            one.distinct_cells,
            one.donors if one.puzzles_with_donor else "not stated",
            one.duplicate_puzzles,
            one.short_lists,
        )
        for one in found.splits
    ]
    lines = _aligned(rows)
    rows = [("pair", "shared cells", "puzzles with one", "shared donors", "near-duplicate lists", "same batches")]
    rows += [
        (
            f"{pair.first} -> {pair.second}",
            pair.shared_cells,
            f"{pair.puzzles_with_shared_cell} ({100 * pair.share_with_shared_cell:.1f} %)",
            "not stated" if pair.shared_donors is None else len(pair.shared_donors),
            pair.near_duplicate_lists,
            pair.same_batches,
        )
        for pair in found.pairs
    ]
    lines += ["", *_aligned(rows), ""] if found.pairs else [""]
    lines += [f"warning: {sentence}" for sentence in found.warnings]
    lines += [f"leak: {sentence}" for sentence in found.leaks] or ["no leak found"] * bool(found.pairs)
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [
                f"{row[0]!s:<{widths[0]}}",
                *(f"{cell!s:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
