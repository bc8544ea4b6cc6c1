"""Say what a file of cells holds and how to build puzzles from it. The matrix is not loaded.

python launch/inspect_h5ad.py atlas.h5ad
python launch/inspect_h5ad.py atlas.zarr --json
"""

import json
from dataclasses import dataclass

import click

from data.build.h5ad import OtherKind
from data.inspection.inspection import inspect_file
from data.inspection.text import facts_text
from launch.options import argument, command, option


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    file: str = argument("An .h5ad file or a zarr store of anndata.")
    json: bool = option(False, "Print JSON instead of text.")


@command(InspectConfig)
def main(config: InspectConfig) -> None:
    """Say what a file of cells holds: matrices, genes, labels, donors, what is dropped, and the command to build it.

    A file of another kind is named, with the one thing to do, and the exit code is 2.
    """
    try:
        facts = inspect_file(config.file)
    except OtherKind as error:
        if config.json:
            found = {"path": config.file, "kind": error.kind.kind, "remedy": error.kind.remedy, "error": str(error)}
            click.echo(json.dumps(found, indent=2))
        raise
    click.echo(json.dumps(facts.to_dict(), indent=2) if config.json else facts_text(facts))


if __name__ == "__main__":
    main()
