"""Progress of a build: a bar with rate and time left on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click
from tqdm import tqdm

from data.build.build import BuildProgress
from data.status.status import Report

PLAIN_SECONDS = 30.0
"""Least time between two lines of progress where there is no terminal."""


@contextlib.contextmanager
def watching(told: Report | None = None) -> Iterator[BuildProgress]:
    """What a build reports to; its bars are closed at the end of the block. told: of the cells that were read."""
    bars: dict[str, tqdm] = {}

    def say(text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()

    def bar(phase: str, done: int, total: int) -> None:
        if phase not in bars:
            unit = unit_of(phase)
            bars[phase] = tqdm(desc=phase, unit=unit, unit_scale=unit == "cell", total=total, leave=False)
        bars[phase].total = max(total, done)
        bars[phase].update(done - bars[phase].n)

    show = bar if sys.stderr.isatty() else plain_progress()

    def progress(phase: str, done: int, total: int) -> None:
        show(phase, done, total)
        if told is not None and unit_of(phase) == "cell":
            told.progress(done, total)

    try:
        yield BuildProgress(say=say, progress=progress)
    finally:
        for shown in bars.values():
            shown.close()


@contextlib.contextmanager
def watching_cells(phase: str) -> Iterator[Callable[[int, int], None]]:
    """advance(cells read now, cells in all) of one phase, shown as `watching` does."""
    done = 0
    with watching() as shown:

        def advance(read: int, total: int) -> None:
            nonlocal done
            done += read
            shown.progress(phase, done, total)

        yield advance


def unit_of(phase: str) -> str:
    """What a phase of a build counts."""
    return "file" if phase == "looking at files" else "cell"


def plain_progress(
    say: Callable[[str], None] = lambda text: click.echo(text, err=True), clock: Callable[[], float] = time.monotonic
) -> Callable[[str, int, int], None]:
    """A function progress(phase, done, total) that says how far a phase is, its rate and the time left.

    It says so at most every PLAIN_SECONDS.
    """
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
