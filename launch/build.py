"""Build CellPuzzles from .h5ad files: train.parquet, test.parquet, unseen.parquet and report.json in one folder.

python launch/build.py --h5ad atlas.h5ad --out puzzles --seed 0
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from data.build import BuildConfig, Watch, build_puzzles
from data.puzzles import Puzzle, save_rows
from data.staging import Staging
from launch.options import command, option

FORMATS = {"parquet": ("parquet",), "jsonl": ("jsonl",), "both": ("parquet", "jsonl")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BuildConfig):
    """The settings of a build (data.settings.BuildConfig) and where it reads and writes."""

    h5ad: tuple[str, ...] = option(dataclasses.MISSING, "File of cells, CELLxGENE's layout, repeatable.")
    out: str = option(dataclasses.MISSING, "Folder to write; existing puzzles and report in it are replaced.")
    format: str = option("parquet", "What to write; the rows are the same.", tuple(FORMATS))
    workers: int | None = option(None, "Processes, a file each; default one per core. The bytes do not depend on it.")
    resume: bool = option(False, "Go on with a build that was stopped: finished files are not read again.")


@command(Config)
def main(config: Config) -> None:
    """Build puzzles from .h5ad files of any size, with a report of what was kept, dropped and why."""
    out = Path(config.out)
    settings = BuildConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(BuildConfig)})
    workers = config.workers if config.workers is not None else len(os.sched_getaffinity(0))
    with told_in_one_sentence(out), staged(out, config.resume) as staging, watching() as watch:
        splits, report = build_puzzles(config.h5ad, settings, workers=workers, staging=staging, watch=watch)
        write_build(out, splits, report, FORMATS[config.format])
        staging.remove()
    click.echo(summary_table(report))
    click.echo(f"written to {out}")


@contextlib.contextmanager
def told_in_one_sentence(out: Path) -> Iterator[None]:
    """A disk that is full or may not be written to, as a sentence."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, not a folder")
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise ValueError(
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
            raise ValueError(
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
def watching() -> Iterator[Watch]:
    """A bar with rate and time left on a terminal, plain lines elsewhere."""
    bars: dict[str, tqdm] = {}

    def progress(phase: str, done: int, total: int) -> None:
        if phase not in bars:
            unit = "file" if phase == "looking at files" else "cell"
            bars[phase] = tqdm(desc=phase, unit=unit, unit_scale=unit == "cell", total=total, disable=None, leave=False)
        bars[phase].total = max(total, done)
        bars[phase].update(done - bars[phase].n)

    try:
        yield Watch(say=lambda text: tqdm.write(text), progress=progress)
    finally:
        for bar in bars.values():
            bar.close()


def write_build(
    out: Path, splits: dict[str, list[Puzzle]], report: dict[str, Any], formats: tuple[str, ...] = ("parquet",)
) -> None:
    """Write a file per split and report.json, all into a sibling folder first, so that none is half-written."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for split, puzzles in splits.items():
            for ending in formats:
                save_rows(partial / f"{split}.{ending}", [puzzle.to_row() for puzzle in puzzles])
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
    leaks = report["audit"]["leaks"]
    lines += [f"leak: {leak}" for leak in leaks] or ["leak audit: no shared cell, donor, batch or near-duplicate list"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
