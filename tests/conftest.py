"""Shared fixtures: a tiny real pipeline (puzzles, traces, checkpoint) made once per session, and a command runner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = ("nodes", "grpo", "precision", "sync", "sft_run", "export", "replay", "selfdistill", "layout", "evaluate", "sft",
           "vllm_teachers", "preflight", "scoring")  # fmt: skip
"""Files that take long: they come first, so that no worker begins one when the other has nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def run_command(verb: str, *arguments: object, ranks: int | None = None, env: dict | None = None, timeout: int = 240):
    """Run launch/VERB.py as a user would; with `ranks`, under torchrun. Returns the completed process."""
    words = [str(ROOT / "launch" / f"{verb}.py"), *map(str, arguments)]
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    full_env = {**os.environ, **(env or {})}
    return subprocess.run(
        [*launcher, *words], cwd=ROOT, env=full_env, capture_output=True, text=True, timeout=timeout, check=False
    )


def succeed(*args, **kwargs) -> str:
    """run_command that must exit 0; returns its standard output."""
    done = run_command(*args, **kwargs)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A folder with puzzles/, traces.jsonl and base/ (a random 0.2 M-parameter checkpoint), made by the real commands."""
    folder = tmp_path_factory.mktemp("pipeline")
    succeed("simulate", "--out", folder / "atlas.h5ad", "--donors", 18, "--cells-per-type", 6, "--noise", 0.5)
    succeed("build", "--h5ad", folder / "atlas.h5ad", "--out", folder / "puzzles", "--min-cells", 3, "--max-cells", 4,
            "--top-genes", 10,
            "--puzzles-per-n", 40, "--test-puzzles-per-n", 8, "--unseen-disease", "Crohn disease")  # fmt: skip
    succeed("distill", "--puzzles", folder / "puzzles/train.parquet", "--out", folder / "traces.jsonl")
    succeed("create_policy", "--puzzles", folder / "puzzles/train.parquet", "--puzzles", folder / "traces.jsonl",
            "--out", folder / "base", "--hidden", 64, "--layers", 2, "--heads", 2,
            "--kv-heads", 2, "--intermediate", 128)  # fmt: skip
    return folder
