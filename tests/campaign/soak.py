"""Many steps: memory, descriptors, threads, files and step time stay flat, and the same steps give the same hashes."""

import json
import os
import random
import statistics
import time
from pathlib import Path

import psutil

from tests.campaign.jobs import Bench, make_bench
from tests.campaign.running import Running

CASES = ("grpo", "ppo", "grpo, hashes")
STEPS = int(os.environ.get("SOAK_STEPS", "400"))
"""Of a case; 2,000 in a long campaign (`SOAK_STEPS=2000 make campaign ONLY=soak`)."""
SECONDS = 9.0 * STEPS
SAMPLE_SECONDS = 0.5
WARM = 0.3
"""The first part of a run is left out: libraries fill their caches."""
MIB = 1 << 20


def prepare(folder: Path) -> Bench:
    return make_bench(folder)


def close(bench: Bench) -> None:
    bench.close()


def play(bench: Bench, name: str, rng: random.Random, folder: Path) -> str:
    job = bench.jobs["ppo" if name == "ppo" else "grpo 1 rank"]
    seed = ("--seed", rng.randrange(1000), "--steps", STEPS, "--save-every", 50, "--keep-checkpoints", 2)
    samples = run(job, folder / "first", seed)
    flat(samples, folder / "first/run")
    if name == "grpo, hashes":
        run(job, folder / "second", seed)
        for file in ("metrics.jsonl", "rollouts.jsonl"):
            assert (folder / "first/run" / file).read_bytes() == (folder / "second/run" / file).read_bytes(), file
    return f"{STEPS} steps"


def run(job, folder: Path, more: tuple) -> list[dict]:
    """What the process was like, while it ran: {"rss", "handles", "threads", "step"} every half a second."""
    folder.mkdir()
    running = Running(job.verb, *job.words(folder), *more, log=folder.with_suffix(".log"))
    samples, process = [], psutil.Process(running.processes[0].pid)
    while running.alive():
        try:
            below = process.children(recursive=True)
            found = {"rss": process.memory_info().rss, "handles": process.num_fds(), "threads": process.num_threads()}
            found |= {"children": len(below), "below": sum(child.memory_info().rss for child in below)}
            samples.append(found)
        except psutil.Error:
            pass
        running.wait_at_most(time.monotonic() - running.began + SAMPLE_SECONDS)
    assert running.end(SECONDS) == 0, running.output[-3000:]
    return samples


def flat(samples: list[dict], out: Path) -> None:
    """Raises AssertionError for what grows. Slopes are medians of thirds, so that one slow moment decides nothing."""
    later = samples[int(WARM * len(samples)) :]
    for name, most in (("rss", 30 * MIB), ("below", 30 * MIB), ("handles", 3), ("threads", 1), ("children", 0)):
        first, last = thirds([sample[name] for sample in later])
        assert last - first <= most, f"{name} grew from {first:,.0f} to {last:,.0f}"
    rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    times = [row["timing_s/step"] for row in rows][int(WARM * STEPS) :]
    # the lowest tenth: what else the machine does makes steps longer, never shorter
    first, last = (statistics.quantiles(part, n=10)[0] for part in parts(times))
    assert last < 1.3 * first, f"a step took {first:.3f} s and now takes {last:.3f} s"
    for name in ("metrics.jsonl", "rollouts.jsonl", "timing.jsonl"):
        lengths = [len(line) for line in (out / name).read_bytes().splitlines()]
        first, last = thirds(lengths[int(WARM * len(lengths)) :])
        assert last < 1.5 * first, f"a line of {name} had {first:.0f} bytes and now has {last:.0f}"
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*")) for path in (out / "checkpoints").iterdir()}
    assert len(sizes) == 2 and max(sizes.values()) < 1.02 * min(sizes.values()), sizes


def parts(values: list[float]) -> tuple[list[float], list[float]]:
    """The first and the last third."""
    third = len(values) // 3
    return values[:third], values[-third:]


def thirds(values: list[float]) -> tuple[float, float]:
    first, last = parts(values)
    return statistics.median(first), statistics.median(last)
