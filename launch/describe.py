"""Describe puzzles: the paper's tables (statistics.md), its figure (statistics.png) and a data card (data_card.md).

python launch/describe.py --puzzles puzzles/train.parquet --puzzles puzzles/test.parquet --out puzzles
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

import click

from data.card import write_description
from data.errors import UserError
from data.folder import read_report, read_splits, report_beside
from launch.options import command, option


@dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    puzzles: tuple[str, ...] = option(MISSING, "File of puzzles, one per split; repeatable.")
    out: str = option(MISSING, "Folder for statistics.md, statistics.png and data_card.md.")
    report: str | None = option(None, "report.json of the build; default: the one beside the puzzles, if any.")


@command(DescribeConfig)
def main(config: DescribeConfig) -> None:
    """Write tables, a figure and a data card of any set of puzzles, ours or the published ones."""
    if not config.puzzles:
        raise UserError("--puzzles: name at least one file of puzzles")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise UserError(f"--out {config.out}: is a file, not a folder")
    report = read_report(config.report) if config.report else report_beside(config.puzzles, click.echo)
    for file in write_description(config.out, read_splits(config.puzzles), report):
        click.echo(f"written to {file}")


if __name__ == "__main__":
    main()
