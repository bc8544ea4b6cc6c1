"""A tiny real pipeline, made by the real commands: what tests and the campaign train, evaluate and damage."""

from pathlib import Path

from tests.helpers.commands import succeed

BUILD = (
    *("--min-cells", 3, "--max-cells", 4, "--top-genes", 10, "--puzzles-per-n", 40, "--test-puzzles-per-n", 8),
    *("--unseen-disease", "Crohn disease"),
)
POLICY = ("--hidden", 64, "--layers", 2, "--heads", 2, "--kv-heads", 2, "--intermediate", 128)


def make_pipeline(folder: Path) -> Path:
    """Fill a folder with atlas.h5ad, puzzles/, traces.jsonl and base/ (a random 0.2 M-parameter checkpoint)."""
    succeed("simulate", "--out", folder / "atlas.h5ad", "--donors", 18, "--cells-per-type", 6, "--noise", 0.5)
    succeed("build", "--h5ad", folder / "atlas.h5ad", "--out", folder / "puzzles", *BUILD)
    succeed("distill", "--puzzles", folder / "puzzles/train.parquet", "--out", folder / "traces.jsonl")
    known = ("--puzzles", folder / "puzzles/train.parquet", "--puzzles", folder / "traces.jsonl")
    succeed("create_policy", *known, "--out", folder / "base", *POLICY)
    return folder
