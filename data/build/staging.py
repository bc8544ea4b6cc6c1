"""The finished files of an unfinished build on disk, and the worker processes that build them.

A build keeps one staged file for each finished .h5ad file, in a folder beside its output: a header (fingerprint,
report) and the puzzles. A build that was killed goes on from there. Every build, resumed or not, reads its puzzles back
from these files, so both give the same bytes.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.errors import RunError
from data.files import remove_folder
from data.formats.stores import content_stamp
from data.processes import end_with_parent
from data.puzzles import Puzzle

FORMAT = 4
"""Raised when staged files of an older version must not be used."""
POLL_SECONDS = 0.2
"""Time between two reports of progress."""


@dataclass(frozen=True)
class Staging:
    """The folder with the staged files of a build."""

    folder: Path

    def fingerprint(self, path: Path, settings: dict[str, Any], assignment: dict[str, str]) -> str:
        """SHA-256 of everything on which a file's puzzles depend: version, settings, split of its donors, content."""
        # size and modification time represent the content: hashing every file again would cost as much as a build
        made_of = [FORMAT, settings, sorted(assignment.items()), *content_stamp(path)]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def save(self, path: Path, fingerprint: str, splits: dict[str, list[Puzzle]], report: dict[str, Any]) -> None:
        """Write the puzzles and the report of a file, completely or not at all.

        The last line is the SHA-256 of the lines before it.
        """
        target = self._file(path)
        partial = target.with_name(target.name + f".partial-{os.getpid()}")  # a killed build must not leave half a file
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
        """Whether the file was finished with these settings and its staged file is undamaged."""
        if not self._file(path).is_file():
            return False
        *lines, last = self._file(path).read_bytes().splitlines(keepends=True) or [b""]
        whole = last == f"{json.dumps(hashlib.sha256(b''.join(lines)).hexdigest())}\n".encode()
        return whole and json.loads(lines[0])["fingerprint"] == fingerprint

    def load(self, path: Path) -> tuple[list[tuple[str, Puzzle]], dict[str, Any]]:
        """([(split, puzzle)], report) of a finished file. Equal gene names share one string, which saves memory."""
        with open(self._file(path), encoding="utf-8") as file:
            report = json.loads(file.readline())["report"]
            items = filter(lambda item: isinstance(item, list), map(json.loads, file))  # the hash is no list
            puzzles = [(split, _shared(Puzzle.from_row(row))) for split, row in items]
        return puzzles, report

    def finished(self) -> int:
        """The number of finished files."""
        return len(list(self.folder.glob("*.jsonl"))) if self.folder.is_dir() else 0

    def drop_files(self) -> None:
        """Remove the staged files, and keep the folder."""
        for file in self.folder.glob("*.jsonl*"):
            file.unlink()

    def remove(self) -> None:
        """Remove the folder."""
        remove_folder(self.folder)

    def _file(self, path: Path) -> Path:
        return self.folder / f"{path.stem}.jsonl"


def _shared(puzzle: Puzzle) -> Puzzle:
    for genes in puzzle.cells:
        genes[:] = map(sys.intern, genes)
    return puzzle


_counters: Any = None
"""In a worker process: shared memory [2 * calls] with (done, total) of each call."""


def run_all(
    task: Callable[..., Any],
    calls: list[tuple],
    workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_finished: Callable[[int, Any], None] = lambda number, result: None,
) -> list[Any]:
    """[task(*call, advance) for call in calls], in `workers` processes, or in this process when workers is 1.

    task: a function of a module. It calls its last argument, advance(more done, total), to report progress.
    on_progress(done, total) gets the sums over all calls; on_finished(number, result) is called when a call has ended.
    The processes end with this one. Raises the exception of a call, and RunError when a process was killed.
    """
    if workers == 1 or len(calls) <= 1:
        return _run_here(task, calls, on_progress, on_finished)
    context = multiprocessing.get_context("spawn")  # a fork would copy open HDF5 files and threads
    counters = context.Array("q", 2 * len(calls), lock=False)  # no lock: each call writes its own two numbers
    results: dict[int, Any] = {}
    with ProcessPoolExecutor(min(workers, len(calls)), context, _begin, (counters, os.getpid())) as pool:
        waiting: dict[Future, int] = {pool.submit(_call, task, i, call): i for i, call in enumerate(calls)}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                on_progress(sum(counters[::2]), sum(counters[1::2]))
                for future in done:
                    number = waiting.pop(future)
                    results[number] = _result_of(future)
                    on_finished(number, results[number])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # calls that run already go on to their end, and their files are kept
            raise
    return [results[i] for i in range(len(calls))]


def _run_here(task: Callable, calls: list[tuple], on_progress: Callable, on_finished: Callable) -> list[Any]:
    """run_all in this process."""
    results: list[Any] = []
    counts = [0] * (2 * len(calls))
    for number, call in enumerate(calls):

        def advance(more: int, total: int, number: int = number) -> None:
            counts[2 * number] += more
            counts[2 * number + 1] = total
            on_progress(sum(counts[::2]), sum(counts[1::2]))

        results.append(task(*call, advance))
        on_finished(number, results[-1])
    return results


def _begin(counters: Any, parent: int) -> None:
    """The first call in a worker process."""
    global _counters
    _counters = counters
    end_with_parent(parent)


def _call(task: Callable, number: int, call: tuple) -> Any:
    """One call in a worker process; its progress goes to the shared counters."""

    def advance(more: int, total: int) -> None:
        _counters[2 * number] += more
        _counters[2 * number + 1] = total

    return task(*call, advance)


def _result_of(future: Future) -> Any:
    """The result of a call. Raises its exception, or RunError when its process was killed."""
    # BrokenProcessPool is a name of this submodule only
    from concurrent.futures.process import BrokenProcessPool

    try:
        return future.result()
    except BrokenProcessPool:
        raise RunError(
            "a process that read a file was killed (out of memory?); go on with --resume and fewer --workers"
        ) from None
