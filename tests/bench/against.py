"""Our own sides of the benchmarks in two versions of this repository: is anything slower than before?

    python -m tests.bench.against COMMIT [update sft head sampling sync step files] [--rounds 5]

Unpacks COMMIT into a temporary folder and runs each benchmark's own side there and here, in turns, with the same
interpreter. `update` and `sft` make steps in two processes that wait for each other; the others are run as a whole.
`step` trains the demo's policy for a few steps, each version with its own recipe (after make demo: --model, --puzzles);
`files` builds puzzles and averages clusters of 20,000 cells. Prints RATIO lines, seconds here over seconds there (above 1:
slower), of each round's pair: median, smallest, largest; writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench.side import Failed, Side

ROOT = Path(__file__).resolve().parents[2]
CASES = ((32_000, 2048), (152_064, 1024))
"""(vocabulary, tokens) of the head."""

Found = dict[str, float]
"""Seconds of one round by the name of what was measured."""
Round = Callable[[], Found]

NOT_COMPARED = (Failed, OSError, KeyError, ValueError)
"""What an older version ends in that does not run, or prints other things."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commit")
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"default: all of {' '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="runs/demo/sft/model", help="of `step`")
    parser.add_argument("--puzzles", default="runs/demo/puzzles/train.parquet", help="of `step`")
    parser.add_argument("--steps", type=int, default=6, help="of `step`, in each round")
    parser.add_argument("--json", default="runs/bench/against.json")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    known = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{arguments.commit}^{{commit}}"], cwd=ROOT, capture_output=True
    )
    if known.returncode:
        parser.error(f"{arguments.commit}: no commit of this repository")
    if arguments.steps < 2:
        parser.error("--steps: at least 2, of which the first is left out")
    if unknown := set(arguments.benchmarks) - set(BENCHMARKS):
        parser.error(f"unknown: {' '.join(sorted(unknown))}; choose from {' '.join(BENCHMARKS)}")
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "there"
        unpack(arguments.commit, there)
        for name in arguments.benchmarks or BENCHMARKS:
            found |= compare(there, Path(folder), BENCHMARKS[name], arguments)
            text = json.dumps({"commit": arguments.commit, "seconds": found}, indent=1)
            Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.json).write_text(text + "\n")


def unpack(commit: str, folder: Path) -> None:
    folder.mkdir()
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "x"], cwd=folder, input=packed.stdout, check=True)
    # as it is here, where commands have run
    subprocess.run([sys.executable, "-m", "compileall", "-q", "."], cwd=folder, check=False)


def compare(there: Path, work: Path, benchmark: "Benchmark", arguments: argparse.Namespace) -> dict:
    """{what was measured: {"there": seconds of each round, "here": the same}}; prints a RATIO line for each."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for case in benchmark(work, arguments):
        of_case: dict[str, dict[str, list[float]]] = {}
        try:
            with ExitStack() as stack:
                sides = {"there": case(there, stack), "here": case(ROOT, stack)}
                for turn in range(arguments.rounds):
                    for side, run in list(sides.items())[:: -1 if turn % 2 else 1]:
                        for name, lap in run().items():
                            of_case.setdefault(name, {"there": [], "here": []})[side].append(lap)
        except NOT_COMPARED as error:
            print(f"not compared: {type(error).__name__} {error}", flush=True)
        else:
            seconds |= of_case
    seconds = {name: of for name, of in seconds.items() if of["there"] and of["here"]}  # what both versions measure
    for name, of in seconds.items():
        ratios = sorted(here / there for there, here in zip(of["there"], of["here"], strict=True))
        middle = {side: statistics.median(laps) for side, laps in of.items()}
        print(f"{name}: {middle['there']:.4g} s there, {middle['here']:.4g} s here")
        print(
            f"RATIO {name}_here_over_there {statistics.median(ratios):.3f} {ratios[0]:.3f} {ratios[-1]:.3f}", flush=True
        )
    return seconds


Case = Callable[[Path, ExitStack], Round]
"""Given a tree and what ends with the case, what to call for each round in that tree."""
Benchmark = Callable[[Path, argparse.Namespace], Iterator[Case]]


def environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"}


def called(tree: Path, *words: object) -> str:
    """Run this interpreter in a tree; returns what it prints. Raises Failed if it fails."""
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise Failed(f"{' '.join(command[3:])}: exit code {done.returncode} in {tree.name}: {last}")
    return done.stdout


def served(name: str, module: str, task: dict, side: dict) -> Case:
    """A case whose process makes one step for every line that it is sent (--serve of update and sft)."""

    def start(tree: Path, stack: ExitStack) -> Round:
        running = stack.enter_context(Side(name, module, task, side, tree=tree, environment=environment(tree)))
        running.warm_up()
        return lambda: {name: running.step()["seconds"]}

    return start


def updates(work: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    from tests.bench.update import Task, make_checkpoint

    for model in ("tiny", "embedded", "40M"):
        task = Task(model=model, folder=str(work / f"update-{model}"))
        make_checkpoint(task, Path(task.folder))
        yield served(f"update_{model}", "update", vars(task), {"name": "ours", "packing": "shared"})


def sft_steps(work: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    from tests.bench.sft import Task, make_start

    for model in ("tiny", "40M"):
        task = Task(model=model, folder=str(work / f"sft-{model}"))
        make_start(task)
        yield served(f"sft_{model}", "sft", vars(task), {"name": "ours"})


def heads(work: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    def one(size: tuple[int, int]) -> Case:
        name, words = "head_V{}_T{}".format(*size), ("-m", "tests.bench.memory", "--one", "fused", *size)
        return lambda tree, stack: lambda: {name: json.loads(called(tree, *words))["seconds"]}

    yield from map(one, CASES)


def sampling(work: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    def case(tree: Path, stack: ExitStack) -> Round:
        def run() -> Found:
            called(tree, "-m", "tests.bench.sampling", "--repeats", 5, "--json", work / "sampling.json")
            return {"sampling": statistics.median(json.loads((work / "sampling.json").read_text())["ours"])}

        return run

    yield case


def sync(work: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    def case(tree: Path, stack: ExitStack) -> Round:
        def run() -> Found:
            called(tree, "-m", "tests.bench.sync", "--models", "tiny", "--in-a-row", 20, "--json", work / "sync.json")
            rows = json.loads((work / "sync.json").read_text())
            kinds = ("ours", "ours with canary", "kernel")
            return {
                f"sync_r{row['rank']}_{kind.replace(' ', '_')}": statistics.median(row["seconds"][kind])
                for row in rows
                for kind in kinds
                if kind in row["seconds"]
            }

        return run

    yield case


def steps(work: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    model, puzzles = (Path(path).resolve() for path in (arguments.model, arguments.puzzles))

    def case(tree: Path, stack: ExitStack) -> Round:
        def run() -> Found:
            out = Path(tempfile.mkdtemp(dir=work)) / "run"
            words = ("--recipe", "demo", "--model", model, "--puzzles", puzzles, "--out", out)
            called(tree, "launch/grpo.py", *words, "--steps", arguments.steps)
            rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()][1:]
            return {f"step_{part}": statistics.median(row[f"timing_s/{part}"] for row in rows) for part in PARTS}

        return run

    yield case


def files(work: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    from tests.bench.clusters import make_atlas

    atlas = make_atlas(work / "atlas.h5ad", cells=20_000, genes=20_000, clusters=40)

    def build(tree: Path, stack: ExitStack) -> Round:
        def run() -> Found:
            out, start = Path(tempfile.mkdtemp(dir=work)) / "puzzles", time.perf_counter()
            called(tree, "launch/build.py", "--h5ad", atlas, "--out", out, "--seed", 0, "--puzzles-per-n", 40)
            return {"build": time.perf_counter() - start}

        return run

    def clusters(tree: Path, stack: ExitStack) -> Round:
        words = ("-m", "tests.bench.clusters", "--side", "ours", "--atlas", atlas, "--means", work / "means.npy")
        return lambda: {"clusters": json.loads(called(tree, *words).splitlines()[-1])["wall"]}

    yield build
    yield clusters


PARTS = ("step", "sample", "score", "update", "sync")
BENCHMARKS: dict[str, Benchmark] = {
    "update": updates,
    "sft": sft_steps,
    "head": heads,
    "sampling": sampling,
    "sync": sync,
    "step": steps,
    "files": files,
}

if __name__ == "__main__":
    main()
