"""What a command tells its owner: status.json, rewritten whole as the work goes on, and the command of --notify at the end.

A training run tells of every step (trainer/record/runfolder.py); the other long commands tell through `reporting`. The keys
of the file are in launch/README.md.
"""

import datetime
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import unlock_folder, write_whole
from data.processes import module_environment

NOTIFY_SECONDS = 60.0
"""How long a command that is over waits for the command of --notify, which goes on after that."""
EVERY_SECONDS = 2.0
"""Least time between two writes of a command that counts cells, puzzles or questions: writing waits for the disk."""
FILES = (".jsonl", ".parquet", ".h5ad")
"""Endings of what a command writes where it writes a file, and no folder."""
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a command that was asked to stop while a stage of it ran."""
NOTIFY = "Shell command for the end of the run, also a failed or killed one; it gets RUN_OUT, RUN_STATE, RUN_ERROR, ..."
"""The help of --notify."""
KILLED = (
    "the process was killed, or ended without a word; the same command goes on, with --resume if it has that option"
)


def without_notify(words: Sequence[str]) -> str:
    """A command line for a record, without --notify, which may hold an address or a key."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--notify="):
            kept += [] if word == "--notify" else [word]
        skip = word == "--notify" and not skip
    return shlex.join(kept)


class RunStatus:
    """The status file of one command that has begun, and the messenger that will run its --notify."""

    def __init__(
        self,
        out: Path,
        notify: str = "",
        *,
        path: Path | None = None,
        unit: str = "step",
        proof: Path | None = None,
        killed: str = KILLED,
    ) -> None:
        """Write the file. Raises UserError when it cannot be written.

        out: what the command writes, RUN_OUT. notify: a shell command to run at the end, or "". path: of the file; default
        status.json in `out`. unit: what is counted. proof: what is there as long as nobody removed the folder; default the
        folder of the file. killed: the error of a command that was killed.
        """
        self.path = path or out / "status.json"
        self.proof = proof or self.path.parent
        self.lock, self.stopping, self.written = threading.Lock(), False, False
        self.recent: deque[float] = deque(maxlen=20)  # seconds of the last steps
        self.shown: dict[str, Any] = {"state": "running", "unit": unit, "step": None, "steps": None}
        self.shown |= {
            "seconds_per_step": None,
            "seconds_left": None,
            "waiting_for": "",
            "error": "",
            "exit_code": None,
        }
        self.shown |= {"host": socket.gethostname(), "process": os.getpid(), "began": utc_now()}
        self.write()
        self.messenger = None
        if notify:
            self.messenger = subprocess.Popen(
                [sys.executable, "-m", "data.status.notify"],
                stdin=subprocess.PIPE,
                env=module_environment(),
                start_new_session=True,  # what ends this run must not end it
            )
            told = {"command": notify, "status": str(self.path.resolve()), "out": str(out.resolve()), "killed": killed}
            self.tell(told)

    def write(self, **changes: Any) -> None:
        """Change some values and rewrite the file. Any thread may call it. Raises UserError when it cannot be written."""
        with self.lock:
            # else the folder would come back, with what is written from now on
            if self.written and not (self.path.is_file() or self.proof.exists()):
                raise UserError(f"{self.path.parent}: was removed while the run was writing there; start it again")
            self.shown |= {**changes, "updated": utc_now()}
            write_whole(self.path, json.dumps(self.shown, indent=1, ensure_ascii=False) + "\n")
            self.written = True

    def step(self, step: int, steps: int, seconds: float) -> None:
        """A step, counted from 1, took so many seconds."""
        self.recent.append(seconds)
        self.counted(step, steps, sum(self.recent) / len(self.recent))

    def counted(self, step: int, steps: int, mean: float | None) -> None:
        """So many of all are done, each in `mean` seconds. Raises UserError when the file cannot be written."""
        left = None if mean is None else round(mean * (steps - step), 1)
        mean = None if mean is None else round(mean, 3)
        self.write(step=step, steps=steps, seconds_per_step=mean, seconds_left=left, waiting_for="")

    def waits(self, who: str) -> None:
        """The watch says for whom this rank has been waiting."""
        with suppress(UserError):  # the disk is full: the run itself will say so
            self.write(waiting_for=who)

    def end(self, error: BaseException | None, code: int | None = None, wait: float = NOTIFY_SECONDS) -> None:
        """The run is over. Waits for the command of --notify, `wait` seconds at most; it goes on after that.

        code: the exit code, where the error does not say it.
        """
        step = self.shown["step"]
        cut = self.stopping and (step is None or step != self.shown["steps"])
        state = "failed" if error else "stopped" if cut else "finished"
        if code is None:
            code = 0 if error is None else 2 if isinstance(error, UserError) else 1
        text = " ".join(f"{type(error).__name__ + ': ' if code == 1 else ''}{error}".split()) if error else ""
        with suppress(UserError):
            self.write(state=state, error=text, exit_code=code, waiting_for="", seconds_left=None if error else 0.0)
        unlock_folder(self.path.parent)  # before the command, which may start the run again
        if self.messenger is not None:
            self.tell({name: self.shown[name] for name in ("state", "error", "exit_code", "step", "steps")})
            with suppress(subprocess.TimeoutExpired):
                self.messenger.wait(timeout=wait)
            self.messenger = None

    def tell(self, message: dict[str, Any]) -> None:
        """Send a line to the process that runs the command."""
        with suppress(OSError):  # it is gone
            self.messenger.stdin.write((json.dumps(message) + "\n").encode())
            self.messenger.stdin.flush()


class Report:
    """What `reporting` yields: the status of a command that counts. Its file appears with the first thing that is counted."""

    def __init__(self, out: Path, notify: str, unit: str, beside: bool) -> None:
        self.out, self.notify, self.unit, self.beside = out, notify, unit, beside
        self.status: RunStatus | None = None
        self.ended = False
        self.first = (0, 0.0)
        """What was done when the counting began, and when that was."""
        self.counted = (0, 0)
        """What was done at last, and of how many."""
        self.last = 0.0
        """When the file was written."""

    def begin(self) -> RunStatus:
        """The status, written now unless it is there. Raises UserError when it cannot be written."""
        if self.status is None:
            self.status = RunStatus(self.out, self.notify, path=status_path(self.out, self.beside), unit=self.unit)
        return self.status

    def progress(self, done: int, total: int) -> None:
        """So many of all are done. The file is rewritten at most every EVERY_SECONDS, and at the last."""
        now = time.monotonic()
        if self.status is None:
            self.last = -EVERY_SECONDS
        # a command may count a second stage from 0, or to another number: its seconds are its own
        if self.status is None or done < self.counted[0] or total != self.counted[1]:
            self.first = (done, now)
        self.counted = (done, total)
        before, began = self.first
        if now - self.last < EVERY_SECONDS and done != total:
            return
        self.last = now
        status = self.begin()
        with suppress(UserError):  # a full disk, a removed folder: the command itself says so
            status.counted(done, total, (now - began) / (done - before) if done > before else None)

    def stop(self, code: int) -> None:
        """The command ends early because it was asked to, with this exit code."""
        status = self.begin()
        status.stopping = self.ended = True
        status.end(None, code)

    def end(self, error: BaseException | None) -> None:
        """The command is over. One that was refused before it had begun to count leaves no file."""
        if self.ended or (error is not None and self.status is None):
            return
        code = None
        if isinstance(error, SystemExit) and error.code in STOPPED:
            return self.stop(error.code)
        if isinstance(error, SystemExit):  # a stage of it was refused or failed, and has said why
            code = error.code if isinstance(error.code, int) else 1
            error = UserError("a stage failed, see what it printed") if code else None
        self.ended = True
        with suppress(UserError):  # work that is done stays done where the disk has no room for its status
            self.begin().end(error, code)


@contextmanager
def reporting(out: str | os.PathLike, notify: str, unit: str, beside: bool = False) -> Iterator[Report]:
    """Around the work of a command: its status file is kept, and at the end --notify is run.

    out: the folder or file that it writes. unit: what is counted, such as "puzzle". beside: see `status_path`.
    """
    report = Report(Path(out), notify, unit, beside)
    try:
        yield report
    except BaseException as error:  # also an exit, or Ctrl-C
        report.end(error)
        raise
    report.end(None)


def status_path(out: Path, beside: bool) -> Path:
    """Where the status of a command lies: runs/rounds/status.json of a folder, traces.status.json of the file traces.jsonl.

    beside: the folder appears as a whole at the end, with the same bytes each time; then it is puzzles.status.json beside it.
    """
    if beside:
        return out.with_name(f"{out.name}.status.json")
    return out.with_suffix(".status.json") if out.suffix in FILES else out / "status.json"


def utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
