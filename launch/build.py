"""Build CellPuzzles from .h5ad files: train.parquet, test.parquet, unseen.parquet and report.json in one folder.

python launch/build.py --h5ad atlas.h5ad --out puzzles --seed 0
python launch/build.py atlases/*.h5ad --out puzzles
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from data.build.build import BuildConfig, BuildProgress, build_puzzles
from data.build.staging import Staging
from data.errors import UserError
from data.files import flush, reason_of
from data.puzzles import Puzzle, save_rows
from launch.options import command, option

FORMATS = {"parquet": ("parquet",), "jsonl": ("jsonl",), "both": ("parquet", "jsonl")}
PLAIN_SECONDS = 30.0
"""Between two lines of progress off a terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BuildConfig):
    """The settings of a build (data.build.settings.BuildConfig) and where it reads and writes."""

    h5ad: tuple[str, ...] = option((), "File of cells, CELLxGENE's layout; repeatable, or name files without a flag.")
    out: str = option(dataclasses.MISSING, "Folder to write; puzzles in it, of either format, and report are replaced.")
    format: str = option("parquet", "What to write; the rows are the same.", tuple(FORMATS))
    workers: int | None = option(None, "Processes, a file each; default one per core. The bytes do not depend on it.")
    resume: bool = option(False, "Go on with a build that was stopped: finished files are not read again.")


@command(Config)
def main(config: Config) -> None:
    """Build puzzles from .h5ad files of any size, with a report of what was kept, dropped and why."""
    files, out = files_of(config, click.get_current_context()), out_of(config.out)
    settings = BuildConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(BuildConfig)})
    workers = config.workers if config.workers is not None else len(os.sched_getaffinity(0))
    with told_in_one_sentence(out, files), staged(out, config.resume) as staging, watching() as watch:
        for note in without_effect(settings):
            watch.say(f"note: {note}")
        splits, report = build_puzzles(files, settings, workers=workers, staging=staging, watch=watch)
        write_build(out, splits, report, FORMATS[config.format])
        staging.remove()
    click.echo(summary_table(report))
    click.echo(f"written to {click.format_filename(out)}")


main.allow_extra_args = True  # files without a flag, as a shell writes *.h5ad
main.options_metavar = "[FILE.h5ad ...] [OPTIONS]"


def files_of(config: Config, context: click.Context) -> tuple[str, ...]:
    """The files of --h5ad and those without a flag; both win over a recipe's."""
    given = context.get_parameter_source("h5ad") is click.core.ParameterSource.COMMANDLINE
    return (*(config.h5ad if given or not context.args else ()), *context.args)


def out_of(folder: str) -> Path:
    """The folder to write, by its own name, for the unfinished part is kept beside it. Raises UserError without one."""
    out = Path(os.path.realpath(folder))
    if not folder or not out.name:
        raise UserError(f"--out {folder!r}: is no folder that can be written; name one")
    return out


def without_effect(config: BuildConfig) -> list[str]:
    """A sentence for each option that was given a value and does nothing here."""
    default, notes = BuildConfig(), []
    if config.test_puzzles_per_n != default.test_puzzles_per_n and not config.unseen_disease:
        if config.split_mode == "instance":
            notes.append("--test-puzzles-per-n has no effect: --split instance takes --test-fraction of the puzzles")
        elif not config.test_fraction:
            notes.append("--test-puzzles-per-n has no effect: --test-fraction is 0")
    if config.hvg_genes != default.hvg_genes and config.rank != "hvg":
        notes.append("--hvg-genes has no effect without --rank hvg")
    return notes


@contextlib.contextmanager
def told_in_one_sentence(out: Path, files: tuple[str, ...] = ()) -> Iterator[None]:
    """A disk that is full or may not be written to, or a file that may not be read, as a sentence."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file, not a folder")
        yield
    except BrokenPipeError:
        raise  # nobody reads what is said any more: click ends the process without a word
    except OSError as error:
        reason = reason_of(error)
        if error.filename is not None and str(error.filename) in {str(Path(file)) for file in files}:
            raise UserError(
                f"{error.filename}: cannot be read ({reason}); give permission, or name another file"
            ) from None
        raise UserError(
            f"--out {out}: cannot be written ({reason}); make room or give permission, or name another folder"
        ) from None


@contextlib.contextmanager
def staged(out: Path, resume: bool) -> Iterator[Staging]:
    """The folder of finished files beside `out`, one build at a time; kept when a build ends early with some finished."""
    staging = Staging(out.with_name(f".{out.name}.building"))
    existed = staging.folder.parent.exists()
    staging.folder.mkdir(parents=True, exist_ok=True)
    with open(staging.folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {out}: another build is writing there; wait for it, or name another folder"
            ) from None
        if not resume and (left := staging.finished()):
            click.echo(f"note: {left} finished files of a build that was stopped are dropped (--resume would use them)")
            staging.drop_files()
        try:
            yield staging
        finally:
            if not staging.finished():
                staging.remove()
                if not existed:
                    _remove_empty(staging.folder.parent)
            elif sys.exc_info()[0] is not None:
                click.echo(f"note: {staging.finished()} finished files are kept; --resume uses them", err=True)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def watching() -> Iterator[BuildProgress]:
    """A bar with rate and time left on a terminal, plain lines elsewhere."""
    bars: dict[str, tqdm] = {}

    def say(text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()

    def progress(phase: str, done: int, total: int) -> None:
        if phase not in bars:
            unit = unit_of(phase)
            bars[phase] = tqdm(desc=phase, unit=unit, unit_scale=unit == "cell", total=total, leave=False)
        bars[phase].total = max(total, done)
        bars[phase].update(done - bars[phase].n)

    try:
        yield BuildProgress(say=say, progress=progress if sys.stderr.isatty() else plain_progress())
    finally:
        for bar in bars.values():
            bar.close()


def unit_of(phase: str) -> str:
    return "file" if phase == "looking at files" else "cell"


def plain_progress(
    say: Callable[[str], None] = lambda text: click.echo(text, err=True), clock: Callable[[], float] = time.monotonic
) -> Callable[[str, int, int], None]:
    """What tells progress in lines, PLAIN_SECONDS or more apart: how far a phase is, its rate and the time left."""
    began: dict[str, float] = {}
    last = 0.0

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if phase not in began:
            began[phase] = last = now
        if now - last < PLAIN_SECONDS or not done:
            return
        last, rate = now, done / (now - began[phase])
        left = tqdm.format_interval(max(0, total - done) / rate)
        say(f"{phase}: {done:,} of {total:,} {unit_of(phase)}s, {rate:,.1f} per second, {left} left")

    return progress


def write_build(
    out: Path, splits: dict[str, list[Puzzle]], report: dict[str, Any], formats: tuple[str, ...] = ("parquet",)
) -> None:
    """Write a file per split and report.json, all into a sibling folder first, so that none is half-written.

    What an older build wrote in another format goes: it is not what the report tells of.
    """
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    example = next((puzzles[:1] for puzzles in splits.values() if puzzles), [])
    try:
        partial.mkdir(parents=True)
        for split, puzzles in splits.items():
            for ending in formats:
                rows = [puzzle.to_row() for puzzle in puzzles]
                save_rows(partial / f"{split}.{ending}", rows, like=[puzzle.to_row() for puzzle in example])
        (partial / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir()):
            flush(file)
            os.replace(file, out / file.name)
        for ending in FORMATS["both"]:
            for split in splits if ending not in formats else ():
                (out / f"{split}.{ending}").unlink(missing_ok=True)
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
    leaks = report["audit"]["leaks"]
    lines += [f"leak: {leak}" for leak in leaks] or ["leak audit: no shared cell, donor, batch or near-duplicate list"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
