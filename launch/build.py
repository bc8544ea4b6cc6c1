"""Build CellPuzzles from files of cells: train.parquet, test.parquet, unseen.parquet and report.json in one folder.

python launch/build.py --h5ad atlas.h5ad --out puzzles --seed 0
python launch/build.py atlases/*.h5ad --out puzzles
"""

import contextlib
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import click

from data.audit import leak_lines
from data.build.build import BuildConfig, build_puzzles
from data.errors import UserError
from data.folder import FORMATS, naming_the_file, staged, write_build
from data.inspection.inspection import first_lines
from data.processes import usable_cores
from data.status.status import NOTIFY, reporting
from launch.options import command, option
from launch.progress import watching

files_and_run = functools.partial(option, section="Files and run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildCommandConfig(BuildConfig):
    """The settings of a build (data.build.settings.BuildConfig), and where it reads and writes."""

    h5ad: tuple[str, ...] = files_and_run(
        (), "An .h5ad file or a zarr store of anndata, CELLxGENE's layout; repeatable, or name files without a flag."
    )
    out: str = files_and_run(
        dataclasses.MISSING, "Folder to write; its puzzles (of any format) and report are replaced."
    )
    format: str = files_and_run("parquet", "What to write; the rows are the same.", tuple(FORMATS))
    workers: int | None = files_and_run(
        None, "Processes, each reading one file at a time; default: one per core. The output does not depend on it."
    )
    resume: bool = files_and_run(False, "Continue a build that was stopped: finished files are not read again.")
    notify: str = files_and_run("", NOTIFY)


@command(BuildCommandConfig)
def main(config: BuildCommandConfig) -> None:
    """Build puzzles from .h5ad files and zarr stores of any size, with a report of what was kept, dropped and why."""
    files, out = files_of(config, click.get_current_context()), out_of(config.out)
    settings = BuildConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(BuildConfig)})
    workers = config.workers if config.workers is not None else usable_cores()
    with (
        reporting(out, config.notify, "cell", beside=True) as told,
        naming_the_file(out, files),
        staged(out, config.resume) as staging,
        watching(told) as watch,
    ):
        for note in without_effect(settings):
            watch.say(f"note: {note}")
        for file in files:
            with contextlib.suppress(UserError):  # the build itself refuses the file, in its own order
                for line in first_lines(file, settings):
                    watch.say(line.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        splits, report = build_puzzles(files, settings, workers=workers, staging=staging, watch=watch)
        write_build(out, splits, report, FORMATS[config.format])
        staging.remove()
    click.echo(summary_text(report))
    click.echo(f"written to {click.format_filename(out)}")


main.allow_extra_args = True  # files without a flag, as a shell writes *.h5ad
main.options_metavar = "[FILE.h5ad|STORE.zarr ...] [OPTIONS]"


def files_of(config: BuildCommandConfig, context: click.Context) -> tuple[str, ...]:
    """The files of --h5ad and the files without a flag. Either kind overrides the files of a recipe."""
    given = context.get_parameter_source("h5ad") is click.core.ParameterSource.COMMANDLINE
    return (*(config.h5ad if given or not context.args else ()), *context.args)


def out_of(folder: str) -> Path:
    """The folder to write, resolved to its own name, because files are staged beside it.

    Raises UserError without a name.
    """
    out = Path(os.path.realpath(folder))
    if not folder or not out.name:
        raise UserError(f"--out {folder!r}: is no folder that can be written; name one")
    return out


def without_effect(config: BuildConfig) -> list[str]:
    """A sentence for each option that was given a value and has no effect with the other options."""
    default, notes = BuildConfig(), []
    if config.test_puzzles_per_n != default.test_puzzles_per_n and not config.unseen_disease:
        if config.split_mode == "instance":
            notes.append("--test-puzzles-per-n has no effect: --split instance takes --test-fraction of the puzzles")
        elif not config.test_fraction:
            notes.append("--test-puzzles-per-n has no effect: --test-fraction is 0")
    if config.hvg_genes != default.hvg_genes and config.rank != "hvg":
        notes.append("--hvg-genes has no effect without --rank hvg")
    return notes


def summary_text(report: dict[str, Any]) -> str:
    """The report in short: cells read and dropped per file, counts per split, notes and leaks."""
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
    lines += leak_lines(report["audit"])
    return "\n".join(lines)


if __name__ == "__main__":
    main()
