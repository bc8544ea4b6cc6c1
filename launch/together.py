"""Two builds trained on together: their puzzles, traces and labels as one file each (launch/demo.py --cells-h5ad)."""

import functools
from pathlib import Path

from data.clusters.known import LABELS, KnownLabels, read_labels
from data.files import write_whole
from data.puzzles import read_rows, write_rows


def write_both(sources: tuple[Path, Path], out: Path) -> None:
    """Write the rows of two files, one file after the other, where `out` holds others. The trainers shuffle them.

    Both number their puzzles from 0, so the ids of the second file get a prefix.
    """
    if out.is_file() and not all(file.is_file() for file in sources):
        return
    first, second = map(read_rows, sources)
    for row in second:
        row |= {name: f"cells-{row[name]}" for name in ("id", "puzzle_id") if name in row}
    if not out.is_file() or read_rows(out) != [*first, *second]:  # the same rows keep their bytes
        write_rows(out, [*first, *second])


def write_labels(out: Path, sources: list[str]) -> None:
    """Write what the models of this run know to OUT/labels.json, beside the traces, where launch/sft.py looks for it."""
    files = [out / (name or "puzzles") / LABELS for name in sources]
    if all(file.is_file() for file in files):  # a build of an earlier version wrote none
        known = functools.reduce(KnownLabels.joined, map(read_labels, files))
        write_whole(out / LABELS, known.to_json())
