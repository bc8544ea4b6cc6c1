"""Several configurations with several seeds each: read their run folders, compare their answers (launch/ablate.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.prompts import normalise_label
from data.puzzles import Puzzle, read_puzzles
from eval.ablation.made import Point, read_points
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
    curve_puzzles: int = 0
    """How many puzzles these were."""
    points: list[Point] = field(default_factory=list)
    """Its models in the order in which they were made; the last is the one in `evaluated`."""
    samples: Path | None = None
    """Folder of several answers of the last model to each puzzle, where there are some."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration."""

    name: str
    runs: list[Run]


def read_arm(name: str, folders: dict[int, Path], splits: Sequence[str]) -> Arm:
    """folders: {seed: run folder}. Seeds whose trained model has not been evaluated on all splits are left out."""
    runs = []
    for seed, folder in sorted(folders.items()):
        if not all((folder / "eval" / split / "metrics.json").is_file() for split in splits):
            continue
        checkpoints = sorted((folder / "curve").glob("step-*/metrics.json"))
        found = {int(file.parent.name.removeprefix("step-")): read_result(file) for file in checkpoints}
        curve = [(step, one["batch_accuracy"]) for step, one in found.items()]
        samples = folder / "samples" if (folder / "samples/metrics.json").is_file() else None
        runs.append(
            Run(
                seed=seed,
                steps=read_steps(folder / "metrics.jsonl"),  # [] for several commands
                evaluated=folder / "eval",
                curve=curve,
                curve_puzzles=next((one.get("n_puzzles", 0) for one in found.values()), 0),
                points=read_points(folder),
                samples=samples,
            )
        )
    return Arm(name=name, runs=runs)


def scores_of_arm(arm: Arm, split: str, puzzles: Sequence[Puzzle]) -> list[list[PuzzleScore]]:
    """[P][seeds] scores of the answers of a configuration's last models."""
    return scores_in([run.evaluated for run in arm.runs], split, puzzles)


def refuse_other_puzzles(folders: Sequence[Path], files: Sequence[str], limit: int) -> None:
    """Raises UserError when a run was evaluated on other puzzles than the first `limit` of each file."""
    for file in files:
        wanted = puzzles_digest(read_puzzles(file)[:limit])
        for folder in folders:
            whole = {one / Path(file).stem: one for one in (folder / "eval", *sorted(folder.glob("models/*")))}
            whole |= {folder / "samples": folder / "samples"} if file == files[0] else {}
            for place, to_remove in whole.items():
                result = read_result(place / "metrics.json")
                if result and (result.get("puzzles") or {}).get("digest") != wanted:
                    raise UserError(
                        f"--eval-puzzles {limit}: {to_remove} was evaluated on other puzzles of {file}; give the number of "
                        "before, or remove that folder to evaluate again"
                    )


def refuse_other_curves(folders: Sequence[Path], files: Sequence[str], n: int) -> None:
    """Raises UserError when checkpoints of a curve were evaluated on other puzzles than the first n of the first file."""
    for file in files[:1] if n else ():
        wanted = puzzles_digest(read_puzzles(file)[:n])
        for result in [path for folder in folders for path in sorted(folder.glob("curve/step-*/metrics.json"))]:
            if (read_result(result).get("puzzles") or {}).get("digest") != wanted:
                raise UserError(
                    f"--curve-puzzles {n}: {result.parent} was evaluated on other puzzles of {file}; give the number of "
                    f"before, or remove {result.parent.parent} to evaluate again"
                )


def scores_in(evaluated: Sequence[Path], split: str, puzzles: Sequence[Puzzle]) -> list[list[PuzzleScore]]:
    """[P][folders] scores of the answers in each FOLDER/SPLIT. Raises UserError when they are to other puzzles."""
    found = []
    for whole in evaluated:
        folder = whole / split
        known = (read_result(folder / "metrics.json").get("puzzles") or {}).get("digest")
        if known != puzzles_digest(puzzles):
            raise UserError(f"{folder}: evaluated on other puzzles than the other runs; remove {whole} and run again")
        rows = match_rows(read_predictions(folder / "predictions.jsonl"), puzzles, f"{folder}: ")
        found.append([firsts[0] for firsts in scores_of(rows, puzzles)[1]])
    return [list(of_puzzle) for of_puzzle in zip(*found, strict=True)]


def compare_arms(arms: Sequence[Arm], split: str, puzzles: Sequence[Puzzle], seed: int = 0) -> list[dict[str, Any]]:
    """One row per configuration: {name, seeds, metrics, intervals, by_seed, against, sampled, by_size, points}.

    metrics: mean over seeds and puzzles. intervals: 95 %, bootstrap over puzzles of the mean over the seeds, so that they
    cover the choice of puzzles but not the choice of seeds, which by_seed shows ({metric: [value per seed]}). against:
    eval.bootstrap.paired with the first configuration, on the same puzzles; absent for the first. by_size: {cells of a puzzle:
    batch accuracy}. sampled: response tokens sampled for the training, mean over seeds; points: see points_of. Both are absent
    where a run does not know its points.
    """
    scores = [scores_of_arm(arm, split, puzzles) for arm in arms]
    rows = []
    for arm, ours in zip(arms, scores, strict=True):
        by_seed = [metrics_of([of_puzzle[number] for of_puzzle in ours]).to_dict() for number in range(len(arm.runs))]
        row = {
            "name": arm.name,
            "n_puzzles": len(puzzles),
            "seeds": [run.seed for run in arm.runs],
            "metrics": {name: float(np.mean([one[name] for one in by_seed])) for name in SHOWN},
            "by_seed": {name: [one[name] for one in by_seed] for name in SHOWN},
            "intervals": intervals(ours, puzzles, seed),
            "by_size": by_size(ours),
        }
        if all(run.points for run in arm.runs):
            row["sampled"] = float(np.mean([run.points[-1].sampled for run in arm.runs]))
            row["points"] = points_of(arm, split, puzzles, seed)
        if ours is not scores[0]:
            row["against"] = paired(ours, scores[0], puzzles, seed)
        rows.append(row)
    return rows


def points_of(arm: Arm, split: str, puzzles: Sequence[Puzzle], seed: int = 0) -> list[dict[str, Any]]:
    """One row per model that every seed of the configuration has made.

    {name, partial, sampled, value, interval, by_seed, taught}. partial: as in Made; value: batch accuracy,
    mean over seeds; interval: as in compare_arms; taught: means over seeds of Made.taught.
    """
    rows = []
    # by where they were evaluated: a seed that was stopped and went on has a checkpoint more
    places = [{one.evaluated.relative_to(run.evaluated.parent): one for one in run.points} for run in arm.runs]
    for place in [place for place in (places or [{}])[0] if all(place in of for of in places)]:
        of_seed = [of[place] for of in places]
        scores = scores_in([point.evaluated for point in of_seed], split, puzzles)
        rows.append(
            {
                "name": of_seed[0].name,
                "partial": of_seed[0].partial,
                "sampled": float(np.mean([point.sampled for point in of_seed])),
                "value": float(np.mean([score.batch_right for of_puzzle in scores for score in of_puzzle])),
                "interval": intervals(scores, puzzles, seed)["batch_accuracy"],
                "by_seed": [
                    float(np.mean([of_puzzle[i].batch_right for of_puzzle in scores])) for i in range(len(of_seed))
                ],
                "taught": {
                    name: float(np.mean([point.taught[name] for point in of_seed])) for name in of_seed[0].taught
                },
            }
        )
    return rows


def by_size(scores: Sequence[Sequence[PuzzleScore]]) -> dict[str, float]:
    """{cells of a puzzle: batch accuracy on the puzzles of this size}. scores: [P][seeds]."""
    flat = [score for of_puzzle in scores for score in of_puzzle]
    sizes = sorted({score.n_cells for score in flat})
    return {str(n): float(np.mean([score.batch_right for score in flat if score.n_cells == n])) for n in sizes}


def refuse_other_samples(folder: Path, k: int) -> None:
    """Raises UserError where a folder of several answers holds another number of them to a puzzle than k."""
    held = (read_result(folder / "metrics.json").get("k_sample") or {}).get("k", k)
    if held != k:
        raise UserError(f"--samples {k}: {folder} holds {held} answers to each puzzle; give {held}, or remove it")


def variety(arm: Arm, puzzles: Sequence[Puzzle]) -> dict[str, float] | None:
    """{k, distinct, right_once, mean} of k answers of the last models to each puzzle; None where a seed has none.

    distinct: different answers (labels in cell order; all of an invalid format are one) among the k, right_once: share of the
    puzzles with a right answer among them, mean: share of right answers; means over puzzles and seeds.
    """
    if not all(run.samples for run in arm.runs):
        return None
    counts, once, right, k = [], [], [], 0
    for run in arm.runs:
        rows = match_rows(read_predictions(run.samples / "predictions.jsonl"), puzzles, f"{run.samples}: ")
        for of_puzzle in scores_of(rows, puzzles)[1]:
            k = len(of_puzzle)
            counts.append(len({tuple(map(normalise_label, score.labels)) for score in of_puzzle}))
            once.append(any(score.batch_right for score in of_puzzle))
            right.append(np.mean([score.batch_right for score in of_puzzle]))
    names = ("distinct", "right_once", "mean")
    return {"k": k, **{name: float(np.mean(x)) for name, x in zip(names, (counts, once, right), strict=True)}}
