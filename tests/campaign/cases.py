"""One kind of the campaign: cases drawn from a seed, counted, and written down when they fail.

A kind is a module with

    CASES: tuple of names of what it covers, which take turns
    prepare(folder) -> Any                       # what all its cases use
    play(bench, name, rng, folder)               # one case; returns a remark, "" for none

play raises AssertionError (or anything else) for a fault, and Skipped where this machine cannot do it. All that a case
draws comes from `rng`, which is made of (seed, kind, number): `--only KIND --seed S --case NUMBER` plays it again.
"""

import json
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

FAILED = Path(__file__).with_name("failed")
"""Where failing cases are kept; git ignores it."""


class Skipped(Exception):
    """This machine cannot play the case; the text says what is lacking."""


@dataclass
class Tally:
    """What came of the cases of one kind."""

    kind: str
    played: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    """{name: what is lacking}"""
    remarks: Counter = field(default_factory=Counter)
    seconds: float = 0.0


def case_rng(seed: int, kind: str, number: int) -> random.Random:
    return random.Random(f"{seed}:{kind}:{number}")


def run_kind(module: ModuleType, seed: int, seconds: float, folder: Path, only: int | None = None) -> Tally:
    """Play cases until the time is over, each name at least once; or one case alone."""
    kind = module.__name__.rpartition(".")[2]
    tally, began = Tally(kind), time.monotonic()
    bench = module.prepare(folder)
    for number in count() if only is None else (only,):
        name = module.CASES[number % len(module.CASES)]
        if only is None and number >= len(module.CASES) and time.monotonic() - began > seconds:
            break
        if name in tally.skipped:
            if len(tally.skipped) == len(module.CASES):
                break
            continue
        place = folder / f"{kind}-{number}"
        place.mkdir()
        try:
            remark = module.play(bench, name, case_rng(seed, kind, number), place)
        except Skipped as lacking:
            tally.skipped[name] = str(lacking)
            print(f"[{kind} {number}] {name}: skipped, {lacking}", flush=True)
        except Exception as error:  # the campaign goes on: whatever the case raises is its finding
            tally.played[name] += 1
            tally.failed[name] += 1
            keep_failure(kind, seed, number, name, error, place)
            print(f"[{kind} {number}] {name}: FAILED: {error}", flush=True)
        else:
            tally.played[name] += 1
            if remark:
                tally.remarks[remark] += 1
            print(f"[{kind} {number}] {name}: good{remark and f' ({remark})'}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
    if close := getattr(module, "close", None):
        close(bench)
    tally.seconds = time.monotonic() - began
    return tally


def keep_failure(kind: str, seed: int, number: int, name: str, error: Exception, place: Path) -> Path:
    """Write a failing case down: how to play it again, what went wrong, and the small files it left in `place`."""
    target = FAILED / f"{kind}-seed{seed}-{number}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(place.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.stat().st_size < 1 << 20:
            copy = target / file.relative_to(place)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    words = {
        "kind": kind,
        "seed": seed,
        "case": number,
        "name": name,
        "again": f"python -m tests.campaign --only {kind} --seed {seed} --case {number}",
        "error": f"{type(error).__name__}: {error}",
        "trace": traceback.format_exc()[-6000:],
    }
    (target / "case.json").write_text(json.dumps(words, indent=1, ensure_ascii=False) + "\n", errors="replace")
    return target


def table(tallies: list[Tally]) -> str:
    """The summary: a line per kind and name."""
    lines = [f"{'kind':10} {'case':44} {'played':>7} {'failed':>7}"]
    for tally in tallies:
        for name in sorted({*tally.played, *tally.skipped}):
            if name in tally.skipped:
                lines.append(f"{tally.kind:10} {name[:44]:44} skipped: {tally.skipped[name]}")
            else:
                lines.append(f"{tally.kind:10} {name[:44]:44} {tally.played[name]:7} {tally.failed[name]:7}")
        remarks = ", ".join(f"{n} x {remark}" for remark, n in tally.remarks.most_common(6))
        total = f"{sum(tally.played.values()):7} {sum(tally.failed.values()):7}"
        lines.append(f"{tally.kind:10} {f'all, in {tally.seconds / 60:.1f} minutes':44} {total}")
        if remarks:
            lines.append(f"{'':10} {remarks}")
    return "\n".join(lines)


def until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `holds`. Raises AssertionError when it does not come in time."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return found
