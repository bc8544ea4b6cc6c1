"""Look for leaks between files of puzzles: shared cells, donors and batches, near-duplicate gene lists.

python launch/audit.py train.parquet test.parquet
"""

import dataclasses
import json
import os
from pathlib import Path

import click

from data.audit import audit, audit_text, refuse_to_replace, tell_sources_apart
from data.errors import UserError
from data.files import write_whole
from data.folder import read_splits
from launch.options import Command


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, metavar="FILE FILE [FILE ...]", type=click.Path())
@click.option("--json", "json_file", type=click.Path(), metavar="FILE", help="Also write the audit as JSON.")
@click.option("--allow-leaks", is_flag=True, help="Exit with 0 even when leaks are found.")
@click.option(
    "--same-donors", is_flag=True, help="Shared donors are intended (--split cell): a warning instead of a leak."
)
def main(files: tuple[str, ...], json_file: str | None, allow_leaks: bool, same_donors: bool) -> None:
    """Look for leaks between files of puzzles, ours or the published ones. Name the file that was trained on first.

    Exit code 0: no leak. 1: leaks found. 2: a file does not hold puzzles.
    """
    real_paths = list(map(os.path.realpath, files))
    if json_file is not None and (Path(json_file).is_dir() or os.path.realpath(json_file) in real_paths):
        raise UserError(f"--json {json_file}: is a folder or a file to read; name another file to write")
    refuse_to_replace(json_file)
    splits, warnings = tell_sources_apart(files, read_splits(files))
    found = audit(splits, donors_apart=not same_donors)
    found = dataclasses.replace(found, warnings=(*warnings, *found.warnings))
    click.echo(audit_text(found))
    if len(set(real_paths)) < len(files):
        click.echo("note: the same file is given more than once; everything in it leaks into itself")
    if len(files) == 1:
        click.echo("note: one file only, so nothing was compared; give the test file too")
    if json_file is not None:
        write_whole(json_file, json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n")
        click.echo(f"written to {json_file}")
    if found.leaks and not allow_leaks:
        click.get_current_context().exit(1)


if __name__ == "__main__":
    main()
