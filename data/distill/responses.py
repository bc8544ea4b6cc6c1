"""The raw file of a distillation: every response is on disk before it is judged, one JSON object per line.

- The first line is {"settings": {...}}, the settings on which the meaning of the responses depends.
- A response is {"puzzle_id", "attempt", "hinted", "text", "finish_reason", "prompt_tokens", "completion_tokens",
  "model"} and "reasoning" when the endpoint returned it separately. A request that failed for good has "error" instead
  of the fields after "hinted".
- When prices are known, a line {"sent": worst_cost, ...} comes before a request's first try, and a line {"lost":
  worst_cost, "error", ...} after a try that may have been charged and returned nothing. So a budget holds across kills.
  Responses of a run without prices count with the prices of a later run; its lost tries do not.
- Every line ends with "row_checksum", so that a flipped bit is seen; lines of older versions have none.

Only one process writes the file, and it only appends. After a kill, an incomplete last line is cut off; all others
count.
"""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.distill.distill import Completion, RequestKey
from data.distill.meter import Meter
from data.errors import RunError, UserError
from data.files import locked_or_said, naming_what_cannot_be_written, parse_json, sealed_row, unsealed_row
from data.puzzles import Puzzle

REMOVED = "{}: was removed or replaced while responses were written to it; start again"
_TYPES: dict[str, tuple[type, ...]] = {
    "puzzle_id": (str,),
    "attempt": (int,),
    "hinted": (bool,),
    "text": (str,),
    "reasoning": (str,),
    "finish_reason": (str,),
    "prompt_tokens": (int, type(None)),
    "completion_tokens": (int, type(None)),
    "model": (str,),
    "error": (str,),
    "sent": (int, float),
    "lost": (int, float),
}
"""Allowed types of each field of a line."""


def prompts_hash(puzzles: Iterable[Puzzle]) -> str:
    """The first 16 hex digits of the SHA-256 over ids, prompts and answers of a puzzle file."""
    digest = hashlib.sha256()
    for puzzle in puzzles:
        digest.update(json.dumps([puzzle.id, puzzle.chat(), puzzle.answer]).encode())
    return digest.hexdigest()[:16]


class RawFile:
    """An open raw file. `completions` has the responses of earlier runs, without errors.

    Raises UserError when the file exists and neither `resume` nor `replace` allows that, when `resume` finds no file,
    when its settings differ, when a line is damaged, or when another process writes it. A context manager that closes
    the file.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        meter: Meter,
        *,
        resume: bool,
        replace: bool,
        sync: bool,
        worst_cost: Callable[[RequestKey], float] = lambda key: 0.0,
    ) -> None:
        """The cost of earlier runs is added to the meter.

        replace: an old file of the same teacher may be overwritten, because its responses cost nothing.
        sync: append returns only when the line is on disk, not just handed to the operating system.
        worst_cost(key): largest possible cost of a request; used for responses without token counts of a run without
        prices.
        """
        self.path, self.sync, self.worst_cost, self.lock = path, sync, worst_cost, threading.Lock()
        self.completions: dict[RequestKey, Completion] = {}
        self.broken = ""
        if resume and not path.is_file():
            raise UserError(f"--resume: there is no {path}; leave --resume out to start anew")
        with naming_what_cannot_be_written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._begin(settings, meter, resume, replace)
        except ValueError:
            os.close(self.handle)
            raise

    def _begin(self, settings: dict[str, Any], meter: Meter, resume: bool, replace: bool) -> None:
        """Lock the file, read what an earlier run wrote, and cut off an incomplete last line."""
        try:
            locked_or_said(self.handle, self.path)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing it; wait, or name another --out") from None
        head, end, torn = self.path.read_bytes().rpartition(b"\n")
        lines = [self._parse(number, line) for number, line in enumerate(head.split(b"\n"), start=1)] if end else []
        # a run that was refused at once leaves a file with the settings line only: that one may be overwritten
        begun = len(lines) > 1 or (lines and "settings" not in lines[0])
        ours = b'{"settings"'
        torn = torn.strip(b"\0")  # which a power cut may leave
        if torn and not lines and torn[: len(ours)] != ours[: len(torn)]:  # the first line of no file of ours
            raise UserError(f"{self.path}: holds something else than responses; move it, or name another --out")
        if begun and not resume:
            if not (replace and lines[0].get("settings", {}).get("teacher") == settings["teacher"]):
                raise UserError(
                    f"{self.path}: already holds responses; add --resume to use them, or name another --out"
                )
        if not (begun and resume):
            lines, head, end = [], b"", b""
        if lines:
            self._compare(lines[0].get("settings", {}), settings)
            self._load(lines[1:], meter)
        if lines and torn:
            print(f"note: {self.path}: its last line was cut off, and is left out", file=sys.stderr, flush=True)
        os.ftruncate(self.handle, len(head) + len(end))  # cut off an incomplete last line
        if not lines:
            self.write({"settings": settings})
            self.flush()

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = unsealed_row(parse_json(line))
        except ValueError:
            raise self._damaged(number) from None
        if not isinstance(row.get("settings", {}), dict):
            raise self._damaged(number)
        return row

    def _damaged(self, number: int) -> UserError:
        return UserError(f"{self.path}, line {number}: damaged; remove that line to go on without its response")

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name in {**now, **before}:
            if name == "model_files" and name not in before:
                continue  # of a run before 2026-11-28
            if before.get(name) != now.get(name):
                what = "--puzzles" if name == "prompts" else name
                raise UserError(
                    f"--resume: {what} was {before.get(name)!r} in {self.path}, now {now.get(name)!r}; "
                    "give the same again, or another --out"
                )

    def _load(self, rows: list[dict[str, Any]], meter: Meter) -> None:
        """Take over the responses of earlier runs, and their cost. rows: the lines after the settings."""
        sent: dict[RequestKey, float] = {}
        for number, row in enumerate(rows, start=2):
            if not _whole(row):
                raise self._damaged(number)
            key = (row["puzzle_id"], row["attempt"], row["hinted"])
            if "sent" in row:
                meter.lost += sent.get(key, 0.0)  # sent before, and the run was killed before the response arrived
                sent[key] = row["sent"]
            elif "lost" in row:
                meter.lost += row["lost"]
            else:
                worst = sent.pop(key, 0.0)
                completion = Completion(**row)
                if not completion.error:
                    if worst == 0 and None in (completion.prompt_tokens, completion.completion_tokens):
                        worst = self.worst_cost(key)
                    meter.count(completion.prompt_tokens, completion.completion_tokens, worst)
                    self.completions[key] = completion
        meter.lost += sum(sent.values())

    def append(self, completion: Completion) -> None:
        """Append a completion. Raises RunError when it cannot be written."""
        row = asdict(completion)
        if completion.error:
            row = {name: row[name] for name in ("puzzle_id", "attempt", "hinted", "error")}
        self.write({name: value for name, value in row.items() if name not in ("error", "reasoning") or value})

    def write(self, row: dict[str, Any]) -> None:
        """Append a line. Any thread may call it."""
        # json.dumps gives ASCII, which can hold half a surrogate pair too
        line = (json.dumps(sealed_row(row)) + "\n").encode()
        with self.lock:
            if self.broken:
                raise RunError(self.broken)  # nothing may follow an incomplete line
            try:
                while line:  # os.write may take only a part
                    line = line[os.write(self.handle, line) :]
                if self.sync:
                    os.fsync(self.handle)
            except OSError as error:
                self.broken = f"{self.path}: cannot be written ({error.strerror}); make room, then add --resume"
                raise RunError(self.broken) from None
            if not self._is_there():
                self.broken = REMOVED.format(self.path)
                raise RunError(self.broken)

    def _is_there(self) -> bool:
        """Is the open file still the one under its name? What is written to a removed file is lost."""
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        except OSError:
            return False

    def flush(self) -> None:
        """Wait until all lines are on disk."""
        os.fsync(self.handle)

    def __enter__(self) -> "RawFile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.flush()
        there = self._is_there()
        os.close(self.handle)
        if kind is None and not there:
            raise RunError(REMOVED.format(self.path))


def _whole(row: dict[str, Any]) -> bool:
    """Whether a row is one that a run wrote: a response, an error, or a line about cost."""
    named = {"puzzle_id", "attempt", "hinted"} <= row.keys() and row.keys() & {"text", "error", "sent", "lost"}
    return bool(named) and all(isinstance(value, _TYPES.get(name, ())) for name, value in row.items())
