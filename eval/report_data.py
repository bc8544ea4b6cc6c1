"""What a run folder holds for the report page: the answers of every stage, scored, and what was said about them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.puzzles import Puzzle, read_puzzles, read_rows
from eval.breakdowns import breakdowns, size_of
from eval.metrics import SPLITS, STAGES, PuzzleScore, score_one
from eval.published import comparable, published_rows


@dataclass(frozen=True)
class Answered:
    """One puzzle with a stage's answer to it."""

    puzzle: Puzzle
    prediction: str
    finish_reason: str
    score: PuzzleScore


@dataclass(frozen=True)
class Evaluation:
    """What a stage did on a split; each part may be missing from the folder."""

    answers: list[Answered]
    """In the order of predictions.jsonl; empty without predictions or puzzles."""
    result: dict[str, Any]
    """The content of metrics.json; empty without it."""
    found: dict[str, Any]
    """The breakdowns of metrics.json, or what the answers say where it has none; empty without either."""

    @property
    def variant(self) -> str | None:
        """Of the puzzles, "batch", "cell" or "open"; None where nothing says so."""
        if self.answers:
            return self.answers[0].puzzle.variant
        return self.result.get("puzzles", {}).get("variant")

    @property
    def sizes(self) -> list[int]:
        """[P] the number of cells of each puzzle, as far as known."""
        if self.answers:
            return [size_of(answered.puzzle) for answered in self.answers]
        return [group["value"] for group in self.found.get("n_cells", []) for _ in range(group["n_puzzles"])]


Evaluations = dict[str, dict[str, Evaluation]]
"""{split: {stage: what it did}}, only of what is there."""


def read_evaluations(run_dir: Path) -> Evaluations:
    """Everything under eval/. Raises ValueError when a file of it cannot be read or answers other puzzles."""
    found: Evaluations = {}
    for split in SPLITS:
        puzzles_file = run_dir / "puzzles" / f"{split}.parquet"
        puzzles = read_puzzles(puzzles_file) if puzzles_file.is_file() else []
        for stage in STAGES:
            one = read_evaluation(run_dir / "eval" / stage / split, puzzles, puzzles_file)
            if one.answers or one.result:
                found.setdefault(split, {})[stage] = one
    return found


def read_evaluation(folder: Path, puzzles: list[Puzzle], puzzles_file: Path) -> Evaluation:
    """What an evaluation left in its folder, matched with the puzzles."""
    answers = read_answers(folder / "predictions.jsonl", puzzles, puzzles_file) if puzzles else []
    result = read_result(folder / "metrics.json")
    found = result.get("breakdowns") or {}
    if not found and answers:
        found = breakdowns([one.score for one in answers], [one.puzzle for one in answers], 0)
    return Evaluation(answers, result, found)


def read_answers(path: Path, puzzles: list[Puzzle], puzzles_file: Path) -> list[Answered]:
    """Scored answers in the order of the file, by id or, where no row has one, by place; none when there is no file."""
    rows = read_rows(path) if path.is_file() else []
    if not any("id" in row for row in rows):
        if len(rows) > len(puzzles):
            raise ValueError(
                f"{path}: {len(rows)} predictions without an id for the {len(puzzles)} puzzles of {puzzles_file}; "
                "run launch/evaluate.py again"
            )
        rows = [row | {"id": puzzle.id} for row, puzzle in zip(rows, puzzles, strict=False)]
    by_id = {puzzle.id: puzzle for puzzle in puzzles}
    answers = []
    for number, row in enumerate(rows, start=1):
        puzzle, text = by_id.get(row.get("id")), _text(row)
        if puzzle is None:
            raise ValueError(f"{path}: puzzle {row.get('id')} is not in {puzzles_file}; run launch/evaluate.py again")
        if text is None:
            raise ValueError(f"{path}, line {number}: has no text 'prediction'; run launch/evaluate.py again")
        score = score_one(text, puzzle, row.get("response_tokens"))
        answers.append(Answered(puzzle, text, row.get("finish_reason") or "", score))
    return answers


def _text(row: dict[str, Any]) -> str | None:
    """The response of a row, the first of several."""
    samples = row.get("samples")
    text = row.get("prediction", samples[0] if isinstance(samples, list) and samples else None)
    return text if isinstance(text, str) else None


def read_result(path: Path) -> dict[str, Any]:
    """The content of a metrics.json; empty when there is none. Raises ValueError naming a file that holds no object."""
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run launch/evaluate.py again") from None
    if not isinstance(result, dict):
        raise ValueError(f"{path}: holds no metrics; run launch/evaluate.py again")
    return result


def completed(summary: dict[str, Any], evaluations: Evaluations) -> dict[str, Any]:
    """The summary with what only the metrics.json files say: intervals, and evaluations made after the run."""
    whole = {**summary, **{stage: dict(summary.get(stage) or {}) for stage in STAGES}}
    for split, of_stage in evaluations.items():
        for stage, one in of_stage.items():
            numbers = {k: v for k, v in one.result.items() if isinstance(v, int | float) or k == "intervals"}
            if numbers:
                whole[stage][split] = numbers | (whole[stage].get(split) or {})
    return whole


def published_beside(split: str, of_stage: dict[str, Evaluation]) -> tuple[str, list[dict[str, Any]]]:
    """(which of the paper's puzzles, published rows to show beside a split); no row where its puzzles are not known."""
    known = next((one for one in reversed(of_stage.values()) if one.variant), None)
    if known is None:
        return "", []
    if known.variant != "batch":
        rows = comparable(known.variant, [])["rows"]
        return f"{rows[0]['table']}, {'single cells' if known.variant == 'cell' else 'open-ended'}", rows
    if split == "test":
        return "Table 2, the paper's test set", [row.to_dict() for row in published_rows("Table 2")]
    diseases = [str(group["value"]) for group in known.found.get("disease", [])]
    rows = [row for row in comparable("batch", diseases)["rows"] if row["table"] == "Table 3"]
    if rows:
        named = dict.fromkeys(row["setting"] for row in rows if row["setting"] != "average")
        return f"Table 3, {', '.join(named)}", rows
    average = [row.to_dict() for row in published_rows("Table 3", "average")]
    return "Table 3, average over four diseases that are others than ours", average
