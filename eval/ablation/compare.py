"""Several configurations with several seeds each: read their run folders, compare their answers (launch/ablate.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.puzzles import Puzzle
from eval.bootstrap import intervals, paired
from eval.evaluation import puzzles_digest
from eval.metrics import PuzzleScore, match_rows, metrics_of, read_predictions, scores_of
from eval.run_files import read_result, read_steps

SHOWN = ("batch_accuracy", "cell_accuracy", "format_validity", "response_length")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One configuration with one seed."""

    seed: int
    steps: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    evaluated: Path
    """Folder with SPLIT/metrics.json and SPLIT/predictions.jsonl of the trained model."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, batch accuracy on test puzzles) of the checkpoints that were evaluated."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration."""

    name: str
    runs: list[Run]


def read_arm(name: str, folders: dict[int, Path]) -> Arm:
    """folders: {seed: run folder}. Seeds whose trained model has not been evaluated are left out."""
    runs = []
    for seed, folder in sorted(folders.items()):
        if not list((folder / "eval").glob("*/metrics.json")):
            continue
        checkpoints = sorted((folder / "curve").glob("step-*/metrics.json"))
        curve = [
            (int(file.parent.name.removeprefix("step-")), read_result(file)["batch_accuracy"]) for file in checkpoints
        ]
        steps = read_steps(folder / "metrics.jsonl")
        runs.append(Run(seed=seed, steps=steps, evaluated=folder / "eval", curve=curve))
    return Arm(name=name, runs=runs)


def scores_of_arm(arm: Arm, split: str, puzzles: Sequence[Puzzle]) -> list[list[PuzzleScore]]:
    """[P][seeds] scores of a configuration's answers. Raises UserError when a run answered other puzzles."""
    of_seed = []
    for run in arm.runs:
        folder = run.evaluated / split
        known = (read_result(folder / "metrics.json").get("puzzles") or {}).get("digest")
        if known != puzzles_digest(puzzles):
            raise UserError(
                f"{folder}: evaluated on other puzzles than the other runs; remove {run.evaluated} and run again"
            )
        rows = match_rows(read_predictions(folder / "predictions.jsonl"), puzzles, f"{folder}: ")
        of_seed.append([firsts[0] for firsts in scores_of(rows, puzzles)[1]])
    return [list(of_puzzle) for of_puzzle in zip(*of_seed, strict=True)]


def compare_arms(arms: Sequence[Arm], split: str, puzzles: Sequence[Puzzle], seed: int = 0) -> list[dict[str, Any]]:
    """One row per configuration: {name, seeds, metrics, intervals, by_seed, against}.

    metrics: mean over seeds and puzzles. intervals: 95 %, bootstrap over puzzles of the mean over the seeds, so that they
    cover the choice of puzzles but not the choice of seeds, which by_seed shows ({metric: [value per seed]}). against:
    eval.bootstrap.paired with the first configuration, on the same puzzles; absent for the first.
    """
    scores = [scores_of_arm(arm, split, puzzles) for arm in arms]
    rows = []
    for arm, ours in zip(arms, scores, strict=True):
        by_seed = [metrics_of([of_puzzle[number] for of_puzzle in ours]).to_dict() for number in range(len(arm.runs))]
        row = {
            "name": arm.name,
            "seeds": [run.seed for run in arm.runs],
            "metrics": {name: float(np.mean([one[name] for one in by_seed])) for name in SHOWN},
            "by_seed": {name: [one[name] for one in by_seed] for name in SHOWN},
            "intervals": intervals(ours, puzzles, seed),
        }
        if ours is not scores[0]:
            row["against"] = paired(ours, scores[0], puzzles, seed)
        rows.append(row)
    return rows


def ablation_markdown(found: dict[str, list[dict[str, Any]]], first: str) -> str:
    """The tables of ablation.md. found: {split: rows of `compare_arms`}."""
    parts = ["# Configurations compared\n"]
    for split, rows in found.items():
        lines = [
            f"## {split}\n",
            "| configuration | seeds | batch accuracy (95 %) | of each seed | cell accuracy | valid format | tokens | against "
            f"{first} |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            values = row["metrics"]
            low, high = row["intervals"]["batch_accuracy"]
            seeds = ", ".join(f"{value:.3f}" for value in row["by_seed"]["batch_accuracy"])
            against = "-"
            if "against" in row:
                pair = row["against"]["batch_accuracy"]
                against = f"{pair['difference']:+.3f} [{pair['interval'][0]:+.3f}, {pair['interval'][1]:+.3f}]"
            lines.append(
                f"| {row['name']} | {len(row['seeds'])} | {values['batch_accuracy']:.3f} [{low:.3f}, {high:.3f}] | {seeds} | "
                f"{values['cell_accuracy']:.3f} | {values['format_validity']:.3f} | {values['response_length']:.1f} | {against} |"
            )
        parts.append("\n".join(lines) + "\n")
    parts.append(
        "Intervals are bootstrap intervals over puzzles of the mean over seeds; `against` is the paired difference in batch "
        "accuracy on the same puzzles. They do not cover the choice of seeds: see the values of each seed."
    )
    return "\n".join(parts) + "\n"
