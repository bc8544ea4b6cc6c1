"""Commands that the campaign starts, watches, kills and starts again: one process, or the ranks of one run."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.campaign.cases import until
from tests.helpers.commands import ROOT, command_of, rank_commands
from tests.helpers.forked import ForkedProcess

HANGS = 180.0
"""Seconds after which a command counts as hanging; the machine may be busy."""
GONE = 30.0
"""Seconds that the processes of a killed command have to be gone."""
ALONE = 120.0
"""Seconds after which the ranks that are left get SIGTERM, which torchrun sends at once: they have --hang-seconds to name
one that was killed."""
REFUSED = 2
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
assert all(os.environ.get(name) == value for name, value in THREADS.items()), f"start the campaign with {THREADS}"


class Running:
    """A started command; what all its processes print goes to one file."""

    def __init__(
        self, verb: str, *words: object, log: Path, ranks: int = 1, env: dict | None = None, largest: int | None = None
    ) -> None:
        """largest: bytes of the largest file it may write (RLIMIT_FSIZE)."""
        self.log, self.words = log, (verb, *words)
        command, self.store = command_of(verb, words, env, ROOT), None
        if ranks > 1:
            commands, self.store = rank_commands(command, ranks)
        else:
            commands = [command]
        with open(log, "ab") as handle:
            self.processes = [ForkedProcess(command, handle.fileno(), handle.fileno()) for command in commands]
        if largest is not None:
            for process in self.processes:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest, largest))
        self.began = time.monotonic()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def failed(self) -> bool:
        return any(process.poll() for process in self.processes)

    def wait_at_most(self, seconds: float) -> None:
        """Until it has ended, or so many seconds have passed since it began."""
        while self.alive() and time.monotonic() < self.began + seconds:
            time.sleep(0.01)

    def all_processes(self) -> list[psutil.Process]:
        """The command's own processes and all below them."""
        found = []
        for process in self.processes:
            try:
                own = psutil.Process(process.pid)
                found += [own, *own.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, process: psutil.Process) -> None:
        """kill -9."""
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def end(self, seconds: float = HANGS) -> int:
        """The exit code; 1 for ranks of which one failed, as from torchrun. Raises AssertionError for a hang."""
        try:
            if len(self.processes) > 1:
                until(lambda: not self.alive() or self.failed(), seconds, f"{self.words[0]} hangs")
                self.wait_at_most(time.monotonic() - self.began + ALONE)  # the ranks notice by themselves
                for process in self.processes:
                    process.send_signal(signal.SIGTERM)
            until(lambda: not self.alive(), seconds, f"{self.words[0]} hangs")
        except AssertionError:
            self.clear()
            raise
        codes = [process.returncode for process in self.processes]
        return codes[0] if len(codes) == 1 else int(any(codes))

    def clear(self) -> None:
        """Kill what is left of it."""
        for process in self.all_processes():
            self.kill(process)

    def sentence(self) -> str:
        """The last line that it printed."""
        return (self.output.strip().splitlines() or [""])[-1]


def leaves_nothing(before: list[psutil.Process], log: Path) -> None:
    """All these processes are gone soon. A zombie waits for its parent only."""

    def left() -> list[str]:
        found = []
        for process in before:
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[-80:]}")
            except psutil.NoSuchProcess:
                continue
        return found

    deadline = time.monotonic() + GONE
    while found := left():
        if time.monotonic() > deadline:
            for process in before:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            raise AssertionError(f"left behind after {GONE:g} s: {found}; see {log}")
        time.sleep(0.05)


def refused_in_one_sentence(running: Running, code: int, names: Callable[[str], bool] = bool) -> str:
    """The sentence of a command that ended with exit code 1 or 2; names(sentence): does it name what it must?"""
    said = running.output
    assert code in (1, REFUSED), f"exit code {code}: {said[-2000:]}"
    assert "Traceback" not in said, f"a traceback: {said[-3000:]}"
    errors = [line for line in said.splitlines() if line.startswith(("Error: ", "Usage:"))]
    assert errors, f"no sentence: {said[-2000:]}"
    assert names(said), f"not named: {errors[-1]}"
    return errors[-1]


def same_files(ours: Path, theirs: Path, names: tuple[str, ...]) -> None:
    """The files of two folders hold the same bytes. names: globs; each must match at least one file of `theirs`."""
    for name in names:
        expected = sorted(path.relative_to(theirs) for path in theirs.glob(name))
        assert expected, f"{theirs} has no {name}"
        found = sorted(path.relative_to(ours) for path in ours.glob(name))
        assert found == expected, f"{ours}: {name} gives {found}, the unbroken run has {expected}"
        for path in expected:
            assert (ours / path).read_bytes() == (theirs / path).read_bytes(), f"{path} differs from the unbroken run's"


if sys.platform != "linux":
    raise SystemExit("the campaign needs Linux")
