"""The files of metrics in a run folder: summary.json, metrics.json of an evaluation, metrics.jsonl of a training."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet

from data.errors import UserError
from data.files import parse_json, read_sealed, write_whole
from data.puzzles import read_rows

PARTIAL = "predictions.partial.jsonl"
"""The answers of an evaluation that is not finished."""
STAGES = ("base", "sft", "grpo")
SPLITS = ("test", "unseen", "cells")
"""Held-out puzzles; those of unseen diseases; those of held-out cells of a second file (launch/demo.py --cells-h5ad)."""
BASELINE = "baseline-"
"""How the folder of a baseline under OUT/eval begins."""
HEADLINE = ("batch_accuracy", "cell_accuracy", "format_validity", "uniqueness", "response_length")
"""The metrics that a table on the terminal shows."""


def unfinished(folder: Path) -> list[str]:
    """["--resume"] where an evaluation of one file was stopped, else []."""
    return ["--resume"] if (folder / PARTIAL).is_file() else []


def write_summary(out: Path, run: dict[str, Any]) -> None:
    """Write OUT/summary.json from OUT/eval/STAGE/SPLIT/metrics.json.

    It is {stage: {split: metrics}, "baselines": {name: {split: metrics}}, "run": `run`}.
    """
    summary: dict[str, dict] = {stage: _metrics_of_splits(out / "eval" / stage) for stage in STAGES}
    folders = sorted((out / "eval").glob(f"{BASELINE}*"))
    # the notes say why the numbers of a baseline are too good, or chance
    summary["baselines"] = {
        folder.name.removeprefix(BASELINE): _metrics_of_splits(folder, "notes", "puzzles") for folder in folders
    }
    for of_split in summary["baselines"].values():
        for metrics in of_split.values():
            metrics.pop("response_length", None)  # of an answer without reasoning: no length to compare with a model's
    summary["run"] = run
    write_whole(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def _metrics_of_splits(folder: Path, *more: str) -> dict[str, Any]:
    """{split: metrics} of the metrics.json files below a folder. more: keys that are kept beside the numbers."""
    found = {file.parent.name: read_result(file) for file in sorted(folder.glob("*/metrics.json"))}
    return {
        split: without_breakdowns(result) | {key: result[key] for key in more if result.get(key)}
        for split, result in found.items()
    }


def without_breakdowns(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a metrics.json, their intervals, and how these were made."""
    more = ("intervals", "interval", "response_length_unit")  # the second says of how many batches
    return {key: value for key, value in result.items() if isinstance(value, int | float) or key in more}


def summary_text(run_dir: str | os.PathLike) -> str:
    """The headline metrics of a summary.json as a table."""
    summary = read_summary(run_dir)
    rows = {stage: summary[stage] for stage in STAGES} | (summary.get("baselines") or {})
    wide = max(map(len, rows)) + 2
    lines = [f"{'stage':{wide}}{'split':8}" + "".join(f"{name:>17}" for name in HEADLINE)]
    for name, of_split in rows.items():
        for split, metrics in of_split.items():
            numbers = (metrics.get(column) for column in HEADLINE)
            texts = (f"{'-':>17}" if number is None else f"{number:17.3f}" for number in numbers)
            lines.append(f"{name:{wide}}{split:8}" + "".join(texts))
    return "\n".join(lines)


def held_out_files(run_dir: Path) -> list[str]:
    """The files of RUN/puzzles/SPLIT.parquet that hold a puzzle; the builder writes those of empty splits too.

    Raises UserError when one of them is no Parquet file.
    """
    files = [run_dir / "puzzles" / f"{split}.parquet" for split in SPLITS]
    return [str(file) for file in files if file.is_file() and _rows_in(file) > 0]


def _rows_in(file: Path) -> int:
    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: cannot be read as Parquet ({error}); put a copy back, or build the puzzles again"
        ) from None


def read_summary(run_dir: str | os.PathLike) -> dict[str, Any]:
    """The summary.json of a run folder: summary[stage][split] is a `Metrics` dict, summary["run"] holds the settings.

    Raises UserError that names the file, and the command that writes it, when it is missing or no JSON object.
    """
    path = Path(run_dir) / "summary.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; `make demo` (launch/demo.py) writes one at the end of its run")
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); write it again with `make demo` (launch/demo.py)") from None
    if not isinstance(summary, dict):
        raise UserError(f"{path}: must be an object with the stages {', '.join(STAGES)}; `make demo` writes one")
    return summary


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a metrics.json; empty when there is no such file.

    Raises UserError when it holds no JSON object.
    """
    if not Path(path).is_file():
        return {}
    try:
        result = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); run launch/evaluate.py again") from None
    if not isinstance(result, dict):
        raise UserError(f"{path}: holds no metrics; run launch/evaluate.py again")
    return result


def record_beside(rollouts: Path) -> dict[str, Any]:
    """config.json of the GRPO run that a rollouts.jsonl belongs to; {"settings": {}} where there is none beside it.

    Raises UserError for a run of PPO, whose advantages compare no groups.
    """
    path = rollouts.parent / "config.json"
    record = read_sealed(path) if path.is_file() else {}
    if not isinstance(record.get("settings"), dict):  # of a checkpoint, for example
        return {"settings": {}}
    if "critic_lr" in record["settings"]:
        raise UserError(
            f"{rollouts}: of a PPO run, whose advantages come from a critic; only those of GRPO can be compared"
        )
    return record


def read_steps(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl that have a `step`, in file order; [] when there is no such file."""
    return [row for row in read_rows(path) if "step" in row] if Path(path).is_file() else []
