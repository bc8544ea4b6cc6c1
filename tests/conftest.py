"""Shared fixtures: a tiny real pipeline (puzzles, traces, checkpoint) made once per session, and a command runner."""

from pathlib import Path

import pytest

from tests.helpers.commands import succeed

LONGEST = (
    "nodes",
    "grpo",
    "precision",
    "sync",
    "sft_run",
    "export",
    "replay",
    "selfdistill",
    "layout",
    "evaluate",
    "sft",
    "vllm_teachers",
    "preflight",
    "scoring",
)
"""Files that take long: they come first, so that no worker begins one when the other has nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A folder with puzzles/, traces.jsonl and base/ (a random 0.2 M-parameter checkpoint), made by the real commands."""
    folder = tmp_path_factory.mktemp("pipeline")
    succeed("simulate", "--out", folder / "atlas.h5ad", "--donors", 18, "--cells-per-type", 6, "--noise", 0.5)
    succeed(
        "build",
        "--h5ad",
        folder / "atlas.h5ad",
        "--out",
        folder / "puzzles",
        "--min-cells",
        3,
        "--max-cells",
        4,
        "--top-genes",
        10,
        "--puzzles-per-n",
        40,
        "--test-puzzles-per-n",
        8,
        "--unseen-disease",
        "Crohn disease",
    )
    succeed("distill", "--puzzles", folder / "puzzles/train.parquet", "--out", folder / "traces.jsonl")
    succeed(
        "create_policy",
        "--puzzles",
        folder / "puzzles/train.parquet",
        "--puzzles",
        folder / "traces.jsonl",
        "--out",
        folder / "base",
        "--hidden",
        64,
        "--layers",
        2,
        "--heads",
        2,
        "--kv-heads",
        2,
        "--intermediate",
        128,
    )
    return folder
