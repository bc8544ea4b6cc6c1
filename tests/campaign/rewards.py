"""Rewards that raise, hang, fork, print, leak, kill their process, or return something odd.

What is declared (reward/README.md): a failure gives no reward and is never a 0; under `stop` the run ends with exit code
2, names puzzle and reason and keeps the response; under `drop` the response is left out and counted.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import psutil

from data.puzzles import Puzzle
from reward import Status
from reward.scoring import Scorer
from tests.campaign.cases import until
from tests.campaign.jobs import make_bench
from tests.campaign.running import Running, refused_in_one_sentence

BAD = {
    # name: (what the body does for a bad completion, the statuses that are right for it)
    "raises": ("raise ValueError('no' + chr(0xd800))", {Status.ERROR}),
    "raises BaseException": ("raise BaseException", {Status.ERROR}),
    "raises SystemExit": ("raise SystemExit(0)", {Status.ERROR}),
    "raises KeyboardInterrupt": ("raise KeyboardInterrupt", {Status.ERROR}),
    "raises GeneratorExit": ("raise GeneratorExit", {Status.ERROR}),
    "raises CancelledError": ("import asyncio; raise asyncio.CancelledError", {Status.ERROR}),
    "raises MemoryError": ("raise MemoryError", {Status.ERROR}),
    "raises without a text": ("raise Mute", {Status.ERROR}),
    "raises a group": ("raise BaseExceptionGroup('g', [ValueError(1), KeyboardInterrupt()])", {Status.ERROR}),
    "recurses": ("return fn(completion, puzzle)", {Status.ERROR}),
    "hangs": ("time.sleep(1000)", {Status.TIMEOUT}),
    "hangs in C": ("import hashlib; hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)", {Status.TIMEOUT}),
    "hangs and ignores signals": (
        "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15, 14)]; time.sleep(1000)",
        {Status.TIMEOUT},
    ),
    "forks": ("os.fork(); return 1.0", {Status.OK}),
    "forks and the child raises": ("\n    if os.fork() == 0: raise ValueError\n    return 1.0", {Status.OK}),
    "leaves a sleeping child": ("subprocess.Popen(['sleep', '1000']); return 1.0", {Status.OK}),
    "fills stdout": ("print('x' * 3_000_000, flush=True); return 1.0", {Status.OK}),
    "fills stderr": ("print('x' * 3_000_000, file=sys.stderr, flush=True); return 1.0", {Status.OK}),
    "writes to all descriptors": (
        '\n    for n in range(3, 40):\n        try: os.set_blocking(n, False); os.write(n, b\'{"index": 0, "total": 9}\\n\')\n'
        "        except OSError: pass\n    return 1.0",
        {Status.OK, Status.ERROR, Status.TIMEOUT},
    ),
    "closes all descriptors": ("os.closerange(0, 60); return 1.0", {Status.ERROR, Status.TIMEOUT}),
    "leaks 100 MB": ("leak.append(bytearray(os.urandom(1)) * 100_000_000); return 1.0", {Status.OK}),
    "kills its process": ("os.kill(os.getpid(), signal.SIGKILL)", {Status.ERROR}),
    "kills its group": ("os.killpg(0, signal.SIGKILL)", {Status.ERROR}),
    "exits": ("os._exit(0)", {Status.ERROR}),
    "crashes": ("import ctypes; ctypes.string_at(0)", {Status.ERROR}),
    "changes its folder and its mask": ("os.chdir('/'); os.umask(0o777); return 1.0", {Status.OK}),
    "returns None": ("return None", {Status.ERROR}),
    "returns a text": ("return '1.0'", {Status.ERROR}),
    "returns nan": ("return math.nan", {Status.ERROR}),
    "returns infinity": ("return -math.inf", {Status.ERROR}),
    "returns 1e308": ("return 1e308", {Status.ERROR}),
    "returns a large integer": ("return 10 ** 4000", {Status.ERROR}),
    "returns a complex number": ("return 1j", {Status.ERROR}),
    "returns a list": ("return [1.0]", {Status.ERROR}),
    "returns a dict": ("return {'score': 1.0}", {Status.ERROR}),
    "returns an array of two": ("import numpy; return numpy.ones(2)", {Status.ERROR}),
    "returns a number of numpy": ("import numpy; return numpy.float32(1.0)", {Status.OK}),
    "returns a Fraction": ("from fractions import Fraction; return Fraction(1)", {Status.OK}),
    "returns a Decimal": ("from decimal import Decimal; return Decimal(1)", {Status.ERROR}),
    "returns True": ("return True", {Status.OK}),
    "returns a class": ("return Reward", {Status.ERROR}),
    "returns a generator": ("return (i for i in range(3))", {Status.ERROR}),
    "returns an endless repr": ("return Endless()", {Status.ERROR}),
    "returns a float that lies": ("return Liar(1.0)", {Status.ERROR, Status.OK}),
    "returns odd parts": ("return Reward(total=1.0, parts={'a': None})", {Status.ERROR}),
    "returns parts of nan": ("return Reward(total=1.0, parts={'a': math.nan})", {Status.ERROR}),
    "returns parts that are no dict": ("return Reward(total=1.0, parts=[1])", {Status.ERROR}),
    "returns an odd status": ("return Reward(total=1.0, status='great')", {Status.ERROR}),
    "returns half a character": ("return Reward(total=1.0, message=chr(0xd800), parts={chr(0xdfff): 1})", {Status.OK}),
}
HEAD = """
import math, os, signal, subprocess, sys, time
from reward import Reward

leak = []

class Mute(Exception):
    def __str__(self):
        raise ValueError

class Endless:
    def __repr__(self):
        return "x" * 10_000_000

class Liar(float):
    def __float__(self):
        raise ValueError
    def __abs__(self):
        return "no number"

"""
CASES = (*BAD, *(f"run: {name}" for name in BAD))
SECONDS = 3.0
PUZZLE = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["B cell", "T cell"], answer=["T cell", "B cell"])


@dataclass
class Bench:
    folder: Path
    jobs: object = None


def prepare(folder: Path) -> Bench:
    return Bench(folder)


def close(bench: Bench) -> None:
    if bench.jobs is not None:
        bench.jobs.close()


def file_of(name: str, test: str, folder: Path, style: str) -> Path:
    """A reward that is 1.0, and does what `name` says for a completion for which `test` is true."""
    body = BAD[name][0].lstrip("\n").lstrip()
    lines = [line for line in body.split("\n")]
    inner = "\n".join(" " * 8 + line.removeprefix("    ") for line in lines)
    text = f"{HEAD}{style} fn(completion, puzzle):\n    if {test}:\n{inner}\n    return 1.0\n"
    (folder / "bad.py").write_text(text)
    return folder / "bad.py"


def play(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    if name.startswith("run: "):
        return whole_run(bench, name.removeprefix("run: "), rng, folder)
    style = "def" if name == "recurses" else rng.choice(("def", "async def"))
    file = file_of(name, "completion == 'bad'", folder, style)
    texts = ["good"] * rng.randint(1, 6)
    texts.insert(rng.randrange(len(texts) + 1), "bad")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    memory = psutil.Process().memory_info().rss
    scorer = Scorer(f"{file}:fn", workers=rng.randint(1, 2), seconds=SECONDS)
    try:
        found = scorer.score(texts, [PUZZLE] * len(texts), [False] * len(texts))
        for text, reward in zip(texts, found, strict=True):
            right = BAD[name][1] if text == "bad" else {Status.OK}
            assert reward.status in right, f"{style}: {text} gives {reward}"
            assert math.isnan(reward.total) != (reward.status is Status.OK), reward
            assert reward.status is not Status.OK or reward.total == 1.0, reward
            assert len(reward.message) < 5000, f"a message of {len(reward.message)} characters"
            json.dumps(reward.message).encode()
            reward.message.encode()
    finally:
        scorer.close()
    until(lambda: not new_children(before), 10, "the processes of the reward are gone")
    assert psutil.Process().memory_info().rss - memory < 60e6, "the trainer grew"
    return style


def new_children(before: set[int]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.pid not in before and child.status() != psutil.STATUS_ZOMBIE and "forkserver" not in child.name():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def whole_run(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    """A run in which every third response or so meets it: the declared policy, and --resume with a mended reward."""
    bench.jobs = bench.jobs or make_bench(bench.folder)
    job = bench.jobs.jobs["grpo 1 rank"]
    file = file_of(name, "len(completion) % 3 == 0", folder, "def")
    policy = rng.choice(("stop", "drop"))
    reward = ("--reward", f"{file}:fn", "--reward-seconds", SECONDS, "--steps", 2, "--on-reward-error", policy)
    running = Running(job.verb, *job.words(folder / "job"), *reward, log=folder / "log")
    code = running.end()
    out = folder / "job/run"
    rows = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()] if code == 0 else []
    fails, may_fail = Status.OK not in BAD[name][1], BAD[name][1] != {Status.OK}
    if policy == "stop" and (fails or (may_fail and code)):
        said = refused_in_one_sentence(running, code, lambda said: "--reward" in said)
        assert code == 2 and (out / "reward_failure.json").is_file(), said
    else:
        assert code == 0, running.output[-3000:]
        bad = [row for row in rows if row["status"] in ("error", "timeout")]
        assert fails <= bool(bad) <= may_fail, f"{len(bad)} of {len(rows)} failed"
        assert all(row["advantage"] in (None, 0) or row["status"] == "ok" for row in rows)
    return policy
