"""CellPuzzles from one .h5ad: ours against the Cell-o1 authors' code on the same file, in one run.

    python -m tests.bench.build [--atlas FILE.h5ad] [--authors FOLDER]
    python -m tests.bench.build --memory FILE.h5ad --puzzles-per-n 40     # ours alone, on a file of any size

Ours is the whole of launch/build.py in its own process, including the start of the interpreter, 5 times. It builds at
least as many puzzles as theirs. Theirs is their three scripts for the same job (data/build_context.py, match_qa.py,
split_train_test.py), once, from FOLDER: a checkout of github.com/ncbi-nlp/cell-o1 at commit 34192be. They take half an
hour, because step 1 copies the matrix for each cell. Without FOLDER ours is compared with AUTHORS, 450 s: the time of
their first step alone on another file of this size. On the atlas that is made without --atlas (20,000 cells x 20,000
genes, CSR, gzip) their three steps took 1,750 s of CPU time, 2,318 s on the clock of 2 busy cores (2026-11-21). Prints
puzzles and memory of both sides and RATIO lines, and writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import h5py
import psutil
import pyarrow.parquet

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05
SHAPE = (20_000, 20_000)
"""Cells and genes of the atlas that is made without --atlas."""


@dataclass(frozen=True)
class Measured:
    """The cost of a command."""

    seconds: float
    cpu: float
    """CPU seconds of all its processes; other work on the machine changes this less than `seconds`."""
    largest: int
    """Peak resident bytes of its largest process, from the kernel."""
    tree: int
    """Peak bytes of all its processes together, sampled every POLL_SECONDS; shared pages count once."""
    puzzles: int = 0


AUTHORS = Measured(seconds=450.0, cpu=450.0, largest=605_000_000, tree=605_000_000, puzzles=320)


def measure(words: list, log: Path) -> Measured:
    """Run a command and measure it. If it fails, the benchmark ends and prints the end of its output."""
    with open(log, "wb") as file:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in words], cwd=ROOT, stdout=file, stderr=file)
        peak, done = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, peak, done))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {process.args}\n{log.read_text()[-4000:]}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, peak[0])


def watch(pid: int, peak: list[int], done: threading.Event) -> None:
    """Record in peak[0] the largest memory that process `pid` and its children had together."""
    while not done.wait(POLL_SECONDS):
        try:
            process = psutil.Process(pid)
            pids = [pid, *(child.pid for child in process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        peak[0] = max(peak[0], sum(map(proportional, pids)))


def proportional(pid: int) -> int:
    """Bytes of a process, each page divided by the number of processes that share it; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def ours(atlas: Path, folder: Path, puzzles_per_n: int) -> Measured:
    """Our build of an atlas."""
    words = [sys.executable, "launch/build.py", "--h5ad", atlas, "--out", folder, "--seed", 0]
    found = measure([*words, "--puzzles-per-n", puzzles_per_n], folder.with_suffix(".log"))
    counts = [pyarrow.parquet.read_metadata(path).num_rows for path in folder.glob("*.parquet")]
    return replace(found, puzzles=sum(counts))


def theirs(atlas: Path, authors: Path, folder: Path) -> Measured:
    """Their three steps one after another, each in its own process."""
    (folder / "raw/dataset").mkdir(parents=True)
    (folder / "raw/dataset" / atlas.name).symlink_to(atlas)
    steps = []
    for script, read, write in (
        ("build_context", "raw", "cells"),
        ("match_qa", "cells", "qa"),
        ("split_train_test", "qa", "final"),
    ):
        words = [sys.executable, authors / f"data/{script}.py"]
        words += ["--input_dir", folder / read, "--output_dir", folder / write]
        steps.append(measure(words, folder / f"{script}.log"))
        print(f"theirs: {script} {steps[-1].seconds:.1f} s", flush=True)
    puzzles = sum(len(json.loads(path.read_text())) for path in (folder / "qa").rglob("*_qa.json"))
    return Measured(
        seconds=sum(step.seconds for step in steps),
        cpu=sum(step.cpu for step in steps),
        largest=max(step.largest for step in steps),
        tree=max(step.tree for step in steps),
        puzzles=puzzles,
    )


def print_measured(side: str, found: Measured, cells: int) -> None:
    print(
        f"{side}: {found.seconds:.2f} s ({found.cpu:.2f} of CPU), {cells / found.seconds:.0f} cells per second, "
        f"{found.puzzles} puzzles, "
        f"memory {found.tree / 1e6:.0f} MB (all processes), {found.largest / 1e6:.0f} MB (largest process)",
        flush=True,
    )


def rows_of(table: str, atlas: Path) -> int:
    """Number of rows of obs (cells) or var (genes)."""
    with h5py.File(atlas) as file:
        return len(file[table][file[table].attrs["_index"]])


def compare(atlas: Path, authors: Path | None, folder: Path, arguments: argparse.Namespace) -> dict:
    cells = rows_of("obs", atlas)
    runs = [ours(atlas, folder / f"ours-{turn}", arguments.puzzles_per_n) for turn in range(arguments.repeats)]
    for found in runs:
        print_measured("ours", found, cells)
    other = theirs(atlas, authors, folder / "theirs") if authors else AUTHORS
    print_measured("theirs" if authors else "theirs (a figure, see the docstring)", other, cells)
    fewest = min(found.puzzles for found in runs)
    print(f"puzzles: ours {fewest}, theirs {other.puzzles}")
    if fewest < other.puzzles:
        raise SystemExit("ours built fewer puzzles than theirs, so their times do not compare; raise --puzzles-per-n")
    for name, key in (("time", "seconds"), ("memory", "tree")):
        ratios = sorted(getattr(other, key) / getattr(found, key) for found in runs)
        print(f"RATIO build_theirs_over_ours_{name} {statistics.median(ratios):.2f} {ratios[0]:.2f} {ratios[-1]:.2f}")
    return {"cells": cells, "ours": [asdict(found) for found in runs], "theirs": asdict(other)}


def make_atlas(path: Path) -> Path:
    words = [sys.executable, "launch/simulate.py", "--out", path, "--cells", SHAPE[0], "--genes", SHAPE[1]]
    found = measure(words, path.with_suffix(".log"))
    print(f"atlas: {path.stat().st_size / 1e6:.0f} MB in {found.seconds:.0f} s", flush=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--atlas", type=Path, help="an .h5ad; default: 20,000 x 20,000, made by launch/simulate.py")
    parser.add_argument("--authors", type=Path, help="checkout of github.com/ncbi-nlp/cell-o1")
    parser.add_argument("--memory", type=Path, help="run ours alone on this .h5ad")
    parser.add_argument("--puzzles-per-n", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="runs/bench/build.json")
    arguments = parser.parse_args()
    authors = arguments.authors and arguments.authors.resolve()
    if authors and not (authors / "data/build_context.py").is_file():
        parser.error(f"--authors {arguments.authors}: holds no data/build_context.py; give a checkout of cell-o1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.memory:
            atlas = arguments.memory.resolve()
            print_measured("ours", ours(atlas, folder / "ours", arguments.puzzles_per_n), rows_of("obs", atlas))
            return
        atlas = arguments.atlas.resolve() if arguments.atlas else make_atlas(folder / "atlas.h5ad")
        if not authors and (rows_of("obs", atlas), rows_of("var", atlas)) != SHAPE:
            parser.error("--atlas: their time is known for {} cells x {} genes; give --authors".format(*SHAPE))
        result = compare(atlas, authors, folder, arguments)
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
