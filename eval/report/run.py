"""Read a run folder for the report page: the answers of every stage with their scores, and the metrics beside them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.puzzles import Puzzle, id_text, read_puzzles, read_rows
from eval.breakdowns import breakdowns, size_of
from eval.metrics import METRICS, PuzzleScore, metrics_of, score_one, token_counts
from eval.published import comparable, published_rows
from eval.reasons import ScoredAnswer, faults_of
from eval.report.html import count
from eval.run_files import SPLITS, STAGES, held_out_files, read_result, read_summary, without_breakdowns


@dataclass(frozen=True)
class Answered:
    """A puzzle with a stage's answer to it."""

    puzzle: Puzzle
    prediction: str
    finish_reason: str
    score: PuzzleScore


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a stage on a split; each part may be missing from the folder."""

    answers: list[Answered]
    """In the order of predictions.jsonl; empty without predictions or puzzles."""
    result: dict[str, Any]
    """The content of metrics.json; empty without it."""
    found: dict[str, Any]
    """The breakdowns of metrics.json; where it has none, computed from the answers; empty without either."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know about the numbers, one sentence each."""
    faults: dict[str, Any] = field(default_factory=dict)
    """The result of eval.reasons.faults_of, from metrics.json; where it has none, counted from the answers."""

    @property
    def variant(self) -> str | None:
        """The variant of the puzzles: "batch", "cell" or "open"; None when unknown."""
        if self.answers:
            return self.answers[0].puzzle.variant
        return self.result.get("puzzles", {}).get("variant")

    @property
    def digest(self) -> str | None:
        """Of the puzzles that were answered; None in an older file."""
        return (self.result.get("puzzles") or {}).get("digest")

    @property
    def sizes(self) -> list[int]:
        """[P] number of cells of each of the P puzzles, as far as known."""
        if self.answers:
            return [size_of(answered.puzzle) for answered in self.answers]
        return [group["value"] for group in self.found.get("n_cells", []) for _ in range(group["n_puzzles"])]


Evaluations = dict[str, dict[str, Evaluation]]
"""{split: {stage: evaluation}}, of those that exist."""


def read_evaluations(run_dir: Path, summary: dict[str, Any] | None = None) -> Evaluations:
    """Everything under eval/. summary: the content of summary.json.

    Raises UserError when a file cannot be read, or answers other puzzles.
    """
    found: Evaluations = {}
    for split in SPLITS:
        puzzles_file = run_dir / "puzzles" / f"{split}.parquet"
        puzzles = read_puzzles(puzzles_file) if str(puzzles_file) in held_out_files(run_dir) else []
        for stage in STAGES:
            folder, stated = (
                evaluation_folder(run_dir, stage, split),
                ((summary or {}).get(stage) or {}).get(split) or {},
            )
            evaluation = read_evaluation(folder, puzzles, puzzles_file, stated)
            if evaluation.answers or evaluation.result:
                found.setdefault(split, {})[stage] = evaluation
    return found


def evaluation_folder(run_dir: Path, stage: str, split: str) -> Path:
    """eval/STAGE/SPLIT; or eval/STAGE, where the evaluation of a single file was written there.

    The single file counts as "test", unless it is called "unseen".
    """
    folder = run_dir / "eval" / stage / split
    alone = read_result(folder.parent / "metrics.json")
    if not alone or folder.is_dir():
        return folder
    stem = Path((alone.get("puzzles") or {}).get("file", "")).stem
    return folder.parent if split == (stem if stem in SPLITS else "test") else folder


def read_evaluation(folder: Path, puzzles: list[Puzzle], puzzles_file: Path, summary: dict[str, Any]) -> Evaluation:
    """The evaluation in a folder, matched with the puzzles. summary: the numbers of summary.json."""
    every = read_answers(folder / "predictions.jsonl", puzzles, puzzles_file) if puzzles else []
    answers, result = _first_answers(every, puzzles), read_result(folder / "metrics.json")
    found, notes = result.get("breakdowns") or {}, list(result.get("notes") or [])
    if not found and answers:
        # seed 0, as in launch/evaluate.py by default: the same answers give the same intervals
        found = breakdowns([answered.score for answered in answers], [answered.puzzle for answered in answers], 0)
    if answers:
        file = f"{folder.parent.name}/{folder.name}/predictions.jsonl"
        if len(every) > len(answers):
            notes.append(
                f"{file} answers {count(len(every) - len(answers), 'puzzle')} again: the first answer to each is shown"
            )
        notes += mismatches(file, answers, result, summary, len(puzzles))
    return Evaluation(answers, result, found, notes, faults_in(result, answers))


def faults_in(result: dict[str, Any], answers: list[Answered]) -> dict[str, Any]:
    """What is wrong with the answers, see eval.reasons.faults_of; {} when neither metrics.json nor answers say it.

    metrics.json counts all samples; `answers` has the first sample of each puzzle.
    """
    if "invalid_reasons" in result and "label_problems" in result:
        return {name: result[name] for name in ("invalid_reasons", "label_problems")}
    if not answers:
        return {}
    return faults_of(
        [
            ScoredAnswer(puzzle=one.puzzle, text=one.prediction, finish_reason=one.finish_reason, score=one.score)
            for one in answers
        ]
    )


def mismatches(
    file: str, answers: list[Answered], result: dict[str, Any], summary: dict[str, Any], n_puzzles: int
) -> list[str]:
    """A sentence when predictions do not fit the metrics.json beside them, or summary.json, or lack puzzles."""
    source, stated = ("the metrics.json beside it", result) if result else ("summary.json", summary)
    numbers = metrics_of([answered.score for answered in answers]).to_dict()
    compared = [name for name in ("n_puzzles", "batch_accuracy", "cell_accuracy") if name in stated]
    if any(abs(numbers[name] - stated[name]) > 1e-9 for name in compared):
        return [
            f"{file} is not the file that {source} was made from, whose numbers the table shows: run "
            "launch/evaluate.py again"
        ]
    if not compared and len(answers) < n_puzzles:
        return [f"{file} answers {len(answers):,} of {count(n_puzzles, 'puzzle')}: the others are left out"]
    return []


def _first_answers(answers: list[Answered], puzzles: list[Puzzle]) -> list[Answered]:
    """The answers, at most as many per puzzle as the puzzle occurs."""
    left = Counter(puzzle.id for puzzle in puzzles)
    firsts = []
    for answered in answers:
        left[answered.puzzle.id] -= 1
        firsts += [answered] if left[answered.puzzle.id] >= 0 else []
    return firsts


def read_answers(path: Path, puzzles: list[Puzzle], puzzles_file: Path) -> list[Answered]:
    """The scored answers of a file, in its order; [] when there is no file.

    Rows match by id, or by order when no row has one.
    """
    rows = read_rows(path) if path.is_file() else []
    # older files have no ids: their rows are in puzzle order
    if not any("id" in row for row in rows):
        if len(rows) > len(puzzles):
            raise UserError(
                f"{path}: {len(rows)} predictions without an id for the {len(puzzles)} puzzles of {puzzles_file}; "
                "run launch/evaluate.py again"
            )
        rows = [row | {"id": puzzle.id} for row, puzzle in zip(rows, puzzles, strict=False)]
    by_id, in_tokens = {puzzle.id: puzzle for puzzle in puzzles}, all(token_counts(row) is not None for row in rows)
    answers = []
    for number, row in enumerate(rows, start=1):
        name = row.get("id")
        puzzle, text = None if isinstance(name, list | dict) else by_id.get(id_text(name)), _text(row)
        if puzzle is None:
            raise UserError(f"{path}: puzzle {name} is not in {puzzles_file}; run launch/evaluate.py again")
        if text is None:
            raise UserError(f"{path}, line {number}: has no text 'prediction'; run launch/evaluate.py again")
        score = score_one(text, puzzle, token_counts(row)[0] if in_tokens else None)
        answers.append(Answered(puzzle, text, row.get("finish_reason") or "", score))
    return answers


def _text(row: dict[str, Any]) -> str | None:
    """The response of a row, the first of several."""
    samples = row.get("samples")
    text = row.get("prediction", samples[0] if isinstance(samples, list) and samples else None)
    return text if isinstance(text, str) else None


def read_run(run_dir: Path) -> tuple[dict[str, Any], Evaluations]:
    """(summary, evaluations) of a run folder. The summary is summary.json, if there is one, after `completed`.

    Raises UserError when a file cannot be read.
    """
    summary: dict[str, Any] = {}
    if (run_dir / "summary.json").is_file():
        summary = read_summary(run_dir)
    else:
        options = read_result(run_dir / "puzzles/report.json").get("options") or {}
        summary["run"] = {"split": options["split"]} if "split" in options else {}
    evaluations = read_evaluations(run_dir, summary)
    return completed(summary, evaluations), evaluations


def completed(summary: dict[str, Any], evaluations: Evaluations) -> dict[str, Any]:
    """The summary with the numbers of the metrics.json files in place of its own.

    Answers without any numbers are scored.

    All numbers of a split come from one evaluation: an interval that metrics.json lacks is not taken from the summary.
    """
    whole = {**summary, **{stage: dict(summary.get(stage) or {}) for stage in STAGES}}
    for split, of_stage in evaluations.items():
        for stage, evaluation in of_stage.items():
            numbers = without_breakdowns(evaluation.result)
            if any(name in numbers for name in METRICS):
                whole[stage][split] = numbers
            elif evaluation.answers and not whole[stage].get(split):
                whole[stage][split] = metrics_of([answered.score for answered in evaluation.answers]).to_dict()
    return whole


def on_other_puzzles(of_stage: dict[str, Evaluation]) -> list[str]:
    """The stages of a split that answered other puzzles than the last one did: their numbers do not compare with its own."""
    last = next((one.digest for one in reversed(of_stage.values()) if one.digest), None)
    return [stage for stage, one in of_stage.items() if one.digest not in (None, last)]


def variant_of_split(of_stage: dict[str, Evaluation]) -> str | None:
    """The variant of a split's puzzles, according to the last stage that knows it."""
    return next((evaluation.variant for evaluation in reversed(of_stage.values()) if evaluation.variant), None)


def published_beside(split: str, of_stage: dict[str, Evaluation]) -> tuple[str, list[dict[str, Any]]]:
    """(name of the paper's puzzles, published rows to show beside a split).

    No rows when the puzzles of the split are unknown, or of another variant than those of Tables 2 and 3.
    """
    if variant_of_split(of_stage) != "batch":
        return "", []
    if split != "unseen":
        return "Table 2, the paper's test set", [row.to_dict() for row in published_rows("Table 2")]
    known = next(evaluation for evaluation in reversed(of_stage.values()) if evaluation.variant)
    diseases = [str(group["value"]) for group in known.found.get("disease", [])]
    rows = [row for row in comparable("batch", diseases)["rows"] if row["table"] == "Table 3"]
    if rows:
        named = dict.fromkeys(row["setting"] for row in rows if row["setting"] != "average")
        return f"Table 3, {', '.join(named)}", rows
    average = [row.to_dict() for row in published_rows("Table 3", "average")]
    return "Table 3, average over four diseases that are others than ours", average
