"""Build CellPuzzles from .h5ad files: train.parquet, test.parquet, unseen.parquet and report.json in one folder.

python launch/build.py --h5ad atlas.h5ad --out puzzles --seed 0
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import click

from data.build import BuildConfig, build_puzzles
from data.puzzles import Puzzle, write_puzzles
from launch.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BuildConfig):
    """The settings of a build (data.build.BuildConfig) and where it reads and writes."""

    h5ad: tuple[str, ...] = option(dataclasses.MISSING, "File of cells, CELLxGENE's layout, repeatable.")
    out: str = option(dataclasses.MISSING, "Folder to write; existing puzzles and report in it are replaced.")


@command(Config)
def main(config: Config) -> None:
    """Build puzzles from .h5ad files of any size, with a report of what was kept, dropped and why."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    splits, report = build_puzzles(config.h5ad, config)
    write_build(out, splits, report)
    click.echo(summary_table(report))
    click.echo(f"written to {out}")


def write_build(out: Path, splits: dict[str, list[Puzzle]], report: dict[str, Any]) -> None:
    """Write a parquet file per split and report.json, all into a sibling folder first, so that none is half-written."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for split, puzzles in splits.items():
            write_puzzles(partial / f"{split}.parquet", puzzles)
        (partial / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def summary_table(report: dict[str, Any]) -> str:
    """Cells read and dropped per file, counts per split, and the notes, as text."""
    lines = []
    for file in report["files"]:
        dropped = "; ".join(f"{n} dropped: {reason}" for reason, n in file["cells_dropped"].items() if n)
        lines.append(
            f"{file['file']}: {file['cells_read']} cells, {file['cells_kept']} kept" + (dropped and f" ({dropped})")
        )
        lines += [f"  note: {note}" for note in file["notes"]]
    lines += [f"note: {note}" for note in report["notes"]]
    columns = ("puzzles", "distinct_cells", "donors", "tissues", "diseases", "labels")
    lines.append(f"{'split':8}" + "".join(f"{column:>16}" for column in columns) + "  puzzles per N")
    for split, summary in report["splits"].items():
        counts = [value if isinstance(value, int) else len(value) for value in (summary[column] for column in columns)]
        per_n = " ".join(f"{n}:{count}" for n, count in summary["puzzles_per_n"].items())
        lines.append(f"{split:8}" + "".join(f"{count:16}" for count in counts) + f"  {per_n or '-'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
