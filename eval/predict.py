"""Greedy answers to puzzles from a checkpoint, or a base checkpoint with an adapter, through vLLM."""

import json
from dataclasses import asdict
from pathlib import Path

from data.puzzles import Puzzle
from eval.metrics import Metrics, score
from rollout import LocalEngine, Sampling


def predict(
    engine: LocalEngine, tokenizer, puzzles: list[Puzzle], prompts: list[list[int]], max_tokens: int
) -> list[dict]:
    """Rows {id, prediction, response_tokens, finish_reason} in puzzle order; greedy decoding. prompts: token ids."""
    greedy = Sampling(n=1, max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=0)
    groups = engine.generate([p.id for p in puzzles], prompts, greedy)
    return [
        {
            "id": puzzle.id,
            "prediction": tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
            "response_tokens": len(rollout.response_ids),
            "finish_reason": rollout.finish_reason,
        }
        for puzzle, (rollout,) in zip(puzzles, groups, strict=True)
    ]


def score_rows(rows: list[dict], puzzles: list[Puzzle]) -> Metrics:
    """The five metrics of saved predictions; response length in the model's tokens where every row has them.

    Raises ValueError when a puzzle has no prediction or a row is not a prediction.
    """
    by_id = {}
    for number, row in enumerate(rows):
        if not isinstance(row.get("prediction"), str):
            raise ValueError(f"prediction row {number}: needs the text column 'prediction'; it has {', '.join(row)}")
        by_id[row.get("id", number)] = row
    if any("id" in row for row in rows):
        missing = [p.id for p in puzzles if p.id not in by_id]
        if missing:
            raise ValueError(f"{len(missing)} of {len(puzzles)} puzzles have no prediction, the first is {missing[0]}")
        rows = [by_id[p.id] for p in puzzles]
    elif len(rows) != len(puzzles):
        raise ValueError(f"{len(rows)} predictions for {len(puzzles)} puzzles, and no 'id' column to match them by")
    lengths = [row["response_tokens"] for row in rows] if all("response_tokens" in row for row in rows) else None
    return score([row["prediction"] for row in rows], puzzles, lengths)


def write_evaluation(out: Path, rows: list[dict], metrics: Metrics) -> None:
    """Write OUT/predictions.jsonl and OUT/metrics.json, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
        ("metrics.json", json.dumps(asdict(metrics), indent=1) + "\n"),
    ):
        partial = out / (name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.rename(out / name)
