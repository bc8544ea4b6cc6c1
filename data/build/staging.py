"""The unfinished part of a build on disk, and the worker processes that fill it.

A build keeps, in a folder beside its output, one file per finished .h5ad file: a header (what it was made of, its part of
the report) and its puzzles. A build that is killed goes on from there; everything passes through these files, so that
the bytes of a resumed build are those of an unbroken one.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.errors import RunError
from data.processes import end_with_parent
from data.puzzles import Puzzle

FORMAT = 2
"""Changes when files of an older version may no longer be used."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Staging:
    """The folder of a build's finished files."""

    folder: Path

    def fingerprint(self, path: Path, settings: dict[str, Any], assignment: dict[str, str]) -> str:
        """Of all that the puzzles of a file depend on; the content stands in by size and time of change."""
        stat = path.stat()
        made_of = [FORMAT, settings, sorted(assignment.items()), stat.st_size, stat.st_mtime_ns]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def save(self, path: Path, fingerprint: str, splits: dict[str, list[Puzzle]], report: dict[str, Any]) -> None:
        """Write the puzzles and the report of a file, whole or not at all; the last line is the hash of those before it."""
        target = self._file(path)
        partial = target.with_name(target.name + f".partial-{os.getpid()}")
        rows = ([split, puzzle.to_row()] for split, puzzles in splits.items() for puzzle in puzzles)
        digest = hashlib.sha256()
        with open(partial, "wb") as file:
            for item in chain([{"fingerprint": fingerprint, "report": report}], rows):
                line = f"{json.dumps(item, ensure_ascii=False)}\n".encode()
                digest.update(line)
                file.write(line)
            file.write(f"{json.dumps(digest.hexdigest())}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)

    def has(self, path: Path, fingerprint: str) -> bool:
        """Whether the file was finished with these settings, and nothing of it was lost since."""
        if not self._file(path).is_file():
            return False
        *lines, last = self._file(path).read_bytes().splitlines(keepends=True) or [b""]
        whole = last == f"{json.dumps(hashlib.sha256(b''.join(lines)).hexdigest())}\n".encode()
        return whole and json.loads(lines[0])["fingerprint"] == fingerprint

    def load(self, path: Path) -> tuple[list[tuple[str, Puzzle]], dict[str, Any]]:
        """([(split, puzzle)], report) of a finished file. Gene names are shared, so that many puzzles fit in memory."""
        with open(self._file(path), encoding="utf-8") as file:
            report = json.loads(file.readline())["report"]
            items = filter(lambda item: isinstance(item, list), map(json.loads, file))  # not the hash
            puzzles = [(split, _shared(Puzzle.from_row(row))) for split, row in items]
        return puzzles, report

    def finished(self) -> int:
        return len(list(self.folder.glob("*.jsonl"))) if self.folder.is_dir() else 0

    def drop_files(self) -> None:
        """Forget the finished files."""
        for file in self.folder.glob("*.jsonl*"):
            file.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, path: Path) -> Path:
        return self.folder / f"{path.stem}.jsonl"


def _shared(puzzle: Puzzle) -> Puzzle:
    for genes in puzzle.cells:
        genes[:] = map(sys.intern, genes)
    return puzzle


Advance = Callable[[int, int], None]
_counters: Any = None
"""In a worker: [2 * calls] shared (done, total) of each call."""


def run_all(
    task: Callable[..., Any],
    calls: list[tuple],
    workers: int,
    watch: Callable[[int, int], None] = lambda done, total: None,
    finished: Callable[[int, Any], None] = lambda number, result: None,
) -> list[Any]:
    """[task(*call, advance)] of each call, in as many processes; with one worker in this one.

    task: a module's function whose last argument is told (more done, total). watch: told (done, total) over all calls.
    finished: told of each call that is done. The processes end with this one (Linux). Raises a call's ValueError, and
    RunError when a process is killed.
    """
    if workers == 1 or len(calls) <= 1:
        return _run_here(task, calls, watch, finished)
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2 * len(calls), lock=False)
    results: dict[int, Any] = {}
    with ProcessPoolExecutor(min(workers, len(calls)), context, _begin, (counters, os.getpid())) as pool:
        waiting: dict[Future, int] = {pool.submit(_call, task, i, call): i for i, call in enumerate(calls)}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                watch(sum(counters[::2]), sum(counters[1::2]))
                for future in done:
                    number = waiting.pop(future)
                    results[number] = _result_of(future)
                    finished(number, results[number])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what runs is finished and kept
            raise
    return [results[i] for i in range(len(calls))]


def _run_here(task: Callable, calls: list[tuple], watch: Callable, finished: Callable) -> list[Any]:
    results: list[Any] = []
    counts = [0] * (2 * len(calls))
    for number, call in enumerate(calls):

        def advance(more: int, total: int, number: int = number) -> None:
            counts[2 * number] += more
            counts[2 * number + 1] = total
            watch(sum(counts[::2]), sum(counts[1::2]))

        results.append(task(*call, advance))
        finished(number, results[-1])
    return results


def _begin(counters: Any, parent: int) -> None:
    """In a worker, first of all."""
    global _counters
    _counters = counters
    end_with_parent(parent)


def _call(task: Callable, number: int, call: tuple) -> Any:
    """In a worker: one call, with its progress in the shared counters."""

    def advance(more: int, total: int) -> None:
        _counters[2 * number] += more
        _counters[2 * number + 1] = total

    return task(*call, advance)


def _result_of(future: Future) -> Any:
    from concurrent.futures.process import BrokenProcessPool

    try:
        return future.result()
    except BrokenProcessPool:
        raise RunError(
            "a process that read a file was killed (out of memory?); go on with --resume and fewer --workers"
        ) from None
