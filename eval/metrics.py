"""The metrics of a set of answers, and the numbers a run folder holds.

Definitions: Cell-o1, appendix B.1 (arXiv:2506.02911). A batch is one puzzle of N cells of one donor. An answer whose
format is invalid gets 0 of N cells right, and its N cells stay in every denominator.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from data.puzzles import Puzzle, read_rows
from reward.cellpuzzles import normalise_label, parse_response

STAGES = ("base", "sft", "grpo")
SPLITS = ("test", "unseen")


@dataclass(frozen=True)
class PuzzleScore:
    """One answer, scored."""

    id: str
    """The puzzle's id."""
    n_cells: int
    """N, the number of cells of the batch."""
    valid: bool
    """Is the format valid (one <think> block, one <answer> block, N labels)?"""
    problem: str
    """What is wrong with the format; empty when it is valid."""
    labels: list[str]
    """[N] the label given to each cell; empty when the format is invalid."""
    right: list[bool]
    """[N] is the label of cell i right? All False when the format is invalid."""
    n_distinct: int
    """Number of different labels, compared as the reward compares them; 0 when the format is invalid."""
    response_length: float
    """Tokens, or white-space separated words when no token count was given."""

    @property
    def cell_accuracy(self) -> float:
        """Share of this batch's cells that are right."""
        return sum(self.right) / self.n_cells

    @property
    def batch_right(self) -> bool:
        """Is every cell of the batch right?"""
        return all(self.right)

    @property
    def uniqueness(self) -> float:
        """Number of different labels / N."""
        return self.n_distinct / self.n_cells

    def to_dict(self) -> dict[str, Any]:
        """The row to write to a JSON-lines file."""
        shares = {
            "cell_accuracy": self.cell_accuracy,
            "batch_accuracy": float(self.batch_right),
            "uniqueness": self.uniqueness,
        }
        return dataclasses.asdict(self) | shares


@dataclass(frozen=True)
class Metrics:
    """Means over a set of puzzles. All are shares in [0, 1] except the last two."""

    cell_accuracy: float
    """Mean over batches of the share of cells that are right (macro; the definition of B.1)."""
    cell_accuracy_micro: float
    """Cells right / cells, pooled over all batches (how the published Table 3 was computed)."""
    batch_accuracy: float
    """Share of batches in which every cell is right."""
    format_validity: float
    """Share of answers whose format is valid."""
    uniqueness: float
    """Mean over batches of |distinct labels| / N; 0 for an invalid format."""
    response_length: float
    """Mean response length: tokens when token counts were given, else white-space separated words."""
    n_puzzles: int

    def to_dict(self) -> dict[str, float]:
        """Field name -> number, in the order above."""
        return dataclasses.asdict(self)


def score_one(prediction: str, puzzle: Puzzle, token_length: int | None = None) -> PuzzleScore:
    """Score one response (the whole text, reasoning included).

    token_length: tokens of the response; without it the length is counted in white-space separated words.
    """
    n_cells = len(puzzle.cells)
    parsed = parse_response(prediction, n_cells)
    given = [normalise_label(label) for label in parsed.labels] if parsed.valid else [None] * n_cells
    truth = [normalise_label(label) for label in puzzle.answer]
    return PuzzleScore(
        id=puzzle.id,
        n_cells=n_cells,
        valid=parsed.valid,
        problem=parsed.problem,
        labels=parsed.labels,
        right=[a == b for a, b in zip(given, truth, strict=True)],
        n_distinct=len(set(given)) if parsed.valid else 0,
        response_length=float(len(prediction.split()) if token_length is None else token_length),
    )


def score(predictions: list[str], puzzles: list[Puzzle], token_lengths: list[int] | None = None) -> Metrics:
    """Metrics of one response per puzzle, in the same order.

    Raises ValueError when there is nothing to score or the lists differ in length.
    """
    if not puzzles:
        raise ValueError("there is no puzzle to score: the list of puzzles is empty")
    if len(predictions) != len(puzzles):
        raise ValueError(f"{len(predictions)} predictions for {len(puzzles)} puzzles: give one prediction per puzzle")
    if token_lengths is not None and len(token_lengths) != len(puzzles):
        raise ValueError(
            f"{len(token_lengths)} token lengths for {len(puzzles)} puzzles: give one length per prediction"
        )
    lengths = token_lengths if token_lengths is not None else [None] * len(puzzles)
    return summarise([score_one(*row) for row in zip(predictions, puzzles, lengths, strict=True)])


def summarise(scores: list[PuzzleScore]) -> Metrics:
    """The metrics of rows already scored; `scores` must hold at least one."""
    return Metrics(
        cell_accuracy=fmean(row.cell_accuracy for row in scores),
        cell_accuracy_micro=sum(sum(row.right) for row in scores) / sum(row.n_cells for row in scores),
        batch_accuracy=fmean(row.batch_right for row in scores),
        format_validity=fmean(row.valid for row in scores),
        uniqueness=fmean(row.uniqueness for row in scores),
        response_length=fmean(row.response_length for row in scores),
        n_puzzles=len(scores),
    )


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share seen in n independent trials (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def read_summary(run_dir: str | os.PathLike) -> dict[str, Any]:
    """summary.json of a run folder: summary[stage][split] is a `Metrics` dict, summary["run"] the settings.

    Raises ValueError naming the file and the command that writes it when it is missing or not a JSON object.
    """
    path = Path(run_dir) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `make demo` (launch/demo.py) writes one at the end of its run")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); write it again with `make demo` (launch/demo.py)") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: must be an object with the stages {', '.join(STAGES)}; `make demo` writes one")
    return summary


def read_steps(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl that have a `step`, in file order; none when the file is not there."""
    return [row for row in read_rows(path) if "step" in row] if Path(path).is_file() else []
