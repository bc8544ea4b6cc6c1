"""kill -9 of a random process of a job at a random moment; then it goes on to its end. Nothing may be lost or differ."""

import random
import time
from pathlib import Path

import psutil

from tests.campaign.jobs import Bench, make_bench
from tests.campaign.running import Running, leaves_nothing

CASES = (
    *("grpo 1 rank", "sft", "build", "ppo", "distill, embedded", "grpo 2 ranks", "distill, endpoint", "evaluate"),
    *("annotate", "grpo split", "grpo sharded", "grpo split, staleness 1"),
)
MOST_KILLS = 3


def prepare(folder: Path) -> Bench:
    return make_bench(folder)


def close(bench: Bench) -> None:
    bench.close()


def play(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    """Kill a job up to three times, let it end, and compare."""
    whole, job, place = bench.whole(name), bench.jobs[name], folder / "job"
    place.mkdir()
    kills = rng.randint(1, MOST_KILLS)
    hit = []
    for _ in range(kills):
        running = job.start(place)
        running.wait_at_most(rng.uniform(0.02, bench.seconds[name]))
        everything = running.all_processes()
        if not running.alive():
            assert running.end() == 0, running.output[-3000:]
            # the machine has become faster since the unbroken run
            bench.seconds[name] = min(bench.seconds[name], time.monotonic() - running.began)
            break
        victim = rng.choice([process for process in everything if not is_pythons_own(process)])
        hit.append(who(victim, running))
        running.kill(victim)
        running.end()
        assert "Traceback" not in running.output, running.output[-3000:]
        leaves_nothing(everything, running.log)
    last = job.start(place)
    code = last.end()
    if code == 2 and ("already holds" in last.output or "all of its" in last.output):
        code = 0  # it had ended before the kill
    assert code == 0, last.output[-3000:]
    job.same(place, whole)
    return f"{len(hit)} kills"


def is_pythons_own(process: psutil.Process) -> bool:
    """The resource tracker of multiprocessing prints tracebacks of its own when it is killed; it holds nothing of ours."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def who(process, running: Running) -> str:
    return "main" if process.pid in [own.pid for own in running.processes] else "worker"
