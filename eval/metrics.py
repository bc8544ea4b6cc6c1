"""The metrics of a set of answers, and votes over several answers to one puzzle.

Definitions: Cell-o1, appendix B.1 (arXiv:2506.02911). A batch is one puzzle of N cells of one donor. An answer of an
invalid format has 0 of N cells right, and its N cells stay in every denominator.

Shapes: P puzzles, k answers per puzzle, S valid answers among them, N cells of a puzzle.
"""

import dataclasses
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from data.distill.consensus import Consensus, consensus
from data.errors import UserError
from data.prompts import answer_text
from data.puzzles import Puzzle, id_text, read_rows
from reward.cellpuzzles import normalise_label, parse_response

METRICS = (
    "cell_accuracy",
    "cell_accuracy_micro",
    "batch_accuracy",
    "format_validity",
    "uniqueness",
    "response_length",
)
"""The fields of `Metrics` that are means, in the order of that class."""


@dataclass(frozen=True)
class PuzzleScore:
    """The score of one answer."""

    id: str
    """The puzzle's id."""
    n_cells: int
    """N, the number of cells of the batch."""
    valid: bool
    """Is the format valid (one <think> block, one <answer> block, N labels)?"""
    problem: str
    """What is wrong with the format; empty when it is valid."""
    labels: list[str]
    """[N] the label that the answer gives each cell; empty when the format is invalid."""
    right: list[bool]
    """[N] is the label of cell i right? All False when the format is invalid."""
    n_distinct: int
    """Number of different labels, compared as in the reward; 0 when the format is invalid."""
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
        """The score as a JSON object."""
        shares = {
            "cell_accuracy": self.cell_accuracy,
            "batch_accuracy": float(self.batch_right),
            "uniqueness": self.uniqueness,
        }
        return dataclasses.asdict(self) | shares


@dataclass(frozen=True)
class Metrics:
    """Means over a set of puzzles. All are shares in [0, 1], except the last two."""

    cell_accuracy: float
    """Mean over batches of the share of cells that are right (macro; the definition of B.1)."""
    cell_accuracy_micro: float
    """Right cells / cells, pooled over all batches (the published Table 3 was computed like this)."""
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
    # None equals no label, so an invalid format has no cell right
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

    Raises UserError when there is nothing to score or the lists differ in length.
    """
    return metrics_of(score_all(predictions, puzzles, token_lengths))


def score_all(
    predictions: Sequence[str], puzzles: Sequence[Puzzle], token_lengths: Sequence[int] | None = None
) -> list[PuzzleScore]:
    """[P] the score of each response. Raises UserError as `score` does."""
    if not puzzles:
        raise UserError("there is no puzzle to score: the list of puzzles is empty")
    if len(predictions) != len(puzzles):
        raise UserError(f"{len(predictions)} predictions for {len(puzzles)} puzzles: give one prediction per puzzle")
    if token_lengths is not None and len(token_lengths) != len(puzzles):
        raise UserError(
            f"{len(token_lengths)} token lengths for {len(puzzles)} puzzles: give one length per prediction"
        )
    lengths = token_lengths if token_lengths is not None else [None] * len(puzzles)
    return [score_one(*row) for row in zip(predictions, puzzles, lengths, strict=True)]


def read_predictions(path: str | os.PathLike) -> list[dict]:
    """The rows of a file of predictions. Raises UserError that names the file, and the formats that can be read."""
    try:
        return read_rows(path)
    except ValueError as error:
        if Path(path).suffix in (".jsonl", ".json", ".parquet") or not Path(path).is_file():
            raise
        raise UserError(
            f"{error}; predictions are read from .jsonl, .json or .parquet, columns id, prediction"
        ) from None


def match_rows(rows: Sequence[dict], puzzles: Sequence[Puzzle], where: str = "") -> list[dict]:
    """[P] the prediction row of each puzzle, matched by id, or by order when no row has an id.

    where: begins an error message. Raises UserError when a puzzle has no prediction, when an id has several predictions
    and not as many puzzles, or when a row is no prediction.
    """
    checked = [checked_row(row, f"{where}prediction row {number}") for number, row in enumerate(rows)]
    if not any("id" in row for row in checked):
        if len(checked) != len(puzzles):
            raise UserError(
                f"{where}{len(checked)} predictions for {len(puzzles)} puzzles, and no 'id' column to match them by"
            )
        return checked
    by_id: dict[Any, list[dict]] = defaultdict(list)
    for number, row in enumerate(checked):
        by_id[row.get("id", number)].append(row)
    wanted = Counter(puzzle.id for puzzle in puzzles)
    missing = [puzzle.id for puzzle in puzzles if puzzle.id not in by_id]
    if missing:
        raise UserError(
            f"{where}{len(missing)} of {len(puzzles)} puzzles have no prediction, the first is {missing[0]}"
        )
    for name, count in wanted.items():
        # a puzzle that occurs twice has one prediction for both, or one for each
        if len(by_id[name]) not in (1, count):
            raise UserError(f"{where}puzzle {name} has {len(by_id[name])} predictions: keep the one to score")
    seen: Counter = Counter()
    matched = []
    for puzzle in puzzles:
        of_puzzle = by_id[puzzle.id]
        matched.append(of_puzzle[min(seen[puzzle.id], len(of_puzzle) - 1)])
        seen[puzzle.id] += 1
    return matched


def checked_row(row: dict, where: str) -> dict:
    """The row; one without `prediction` gets its first sample as prediction.

    Raises UserError when it is no prediction.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with the text column 'prediction'")
    if isinstance(row.get("id"), list | dict):
        raise UserError(f"{where}: its id is {str(row['id'])[:40]!r}; write the puzzle's id, a text or a number")
    samples = row.get("samples")
    if samples is not None and not (isinstance(samples, list) and samples and all(isinstance(s, str) for s in samples)):
        raise UserError(f"{where}: 'samples' must be a list of texts")
    if samples and row.get("prediction") is None:
        row = {**row, "prediction": samples[0]}
    if samples and row["prediction"] != samples[0]:
        raise UserError(
            f"{where}: 'prediction' is not the first of its 'samples', which are scored; leave one of the two out"
        )
    if row.get("id") is not None:
        row = {**row, "id": id_text(row["id"])}
    if not isinstance(row.get("prediction"), str):
        held = f"it has {', '.join(row)}"
        if "prediction" in row:
            held = f"it is {str(row['prediction'])[:40]!r}, which is no text"
            if row["prediction"] is None:
                held = "it is null: write an empty text where a model gave no answer"
        raise UserError(f"{where}: needs the text column 'prediction'; {held}")
    return row


def scores_of(
    rows: Sequence[dict], puzzles: Sequence[Puzzle], in_words: bool = False
) -> tuple[list[list[str]], list[list[PuzzleScore]], str]:
    """([P][k] texts, [P][k] scores, unit of length) of matched rows; k is 1 when the rows have no samples.

    The unit is "tokens" when every row has token counts; otherwise, or if in_words, it is "words" (white-space
    separated). Raises UserError when the rows differ in their number of samples.
    """
    texts = [row.get("samples") or [row["prediction"]] for row in rows]
    counts = sorted({len(of_puzzle) for of_puzzle in texts})
    if len(counts) > 1:
        raise UserError(
            f"the predictions have {counts[0]} to {counts[-1]} samples per puzzle: give each the same number"
        )
    tokens = [token_counts(row) for row in rows]
    # a mixture of tokens and words would be a meaningless mean
    in_tokens = not in_words and None not in tokens
    flat = score_all(
        [text for of_puzzle in texts for text in of_puzzle],
        [puzzle for puzzle, of_puzzle in zip(puzzles, texts, strict=True) for _ in of_puzzle],
        [n for of_row in tokens for n in of_row] if in_tokens else None,
    )
    k = counts[0]
    return texts, [flat[i : i + k] for i in range(0, len(flat), k)], "tokens" if in_tokens else "words"


def token_counts(row: dict) -> list[float] | None:
    """[k] the numbers of tokens of a row's answers; None unless all are numbers >= 0 (no text, no NaN)."""
    k = len(row.get("samples") or [None])
    alone = k == 1 and row.get("response_tokens") is not None
    stated = [row["response_tokens"]] if alone else row.get("samples_tokens")
    known = isinstance(stated, list) and len(stated) == k
    known = known and all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in stated)
    return stated if known else None


def lacking_tokens(rows: Sequence[dict]) -> int:
    """The number of rows without usable token counts, when some row states one; 0 when no row states any."""
    lacking = [row for row in rows if token_counts(row) is None]
    stated = any(row.get(name) is not None for row in lacking for name in ("response_tokens", "samples_tokens"))
    return len(lacking) if stated or len(lacking) < len(rows) else 0


def metrics_of(scores: Sequence[PuzzleScore]) -> Metrics:
    """The means of scores. `scores` must hold at least one."""
    return Metrics(
        cell_accuracy=fmean(row.cell_accuracy for row in scores),
        cell_accuracy_micro=sum(sum(row.right) for row in scores) / sum(row.n_cells for row in scores),
        batch_accuracy=fmean(row.batch_right for row in scores),
        format_validity=fmean(row.valid for row in scores),
        uniqueness=fmean(row.uniqueness for row in scores),
        response_length=fmean(row.response_length for row in scores),
        n_puzzles=len(scores),
    )


def pass_rates(rows: Sequence[dict], puzzles: Sequence[Puzzle]) -> list[float]:
    """[P] the share of each puzzle's answers in which every cell is right. rows: matched."""
    _, scores, _ = scores_of(rows, puzzles)
    return [fmean(score.batch_right for score in of_puzzle) for of_puzzle in scores]


def with_pass_rates(puzzles: Sequence[Puzzle], file: str) -> list[Puzzle]:
    """The puzzles with the share of answers in --curriculum that are right. Raises UserError if one has no answer there."""
    if not Path(file).is_file():
        raise UserError(
            f"--curriculum {file}: no such file; launch/evaluate.py --puzzles TRAINING --samples 8 writes a predictions.jsonl"
        )
    rates = pass_rates(match_rows(read_predictions(file), puzzles, f"--curriculum {file}: "), puzzles)
    return [
        dataclasses.replace(puzzle, meta=puzzle.meta | {"pass_rate": rate})
        for puzzle, rate in zip(puzzles, rates, strict=True)
    ]


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that k answers contain a right one, drawn without replacement from n of which `right` are right.

    The unbiased estimator 1 - C(n - right, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374, Eq. 1), for k <= n.
    """
    assert 0 < k <= n and 0 <= right <= n
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_vote(samples: Sequence[str], puzzle: Puzzle) -> str:
    """The assignment of all cells that most valid answers give, as one answer; among equals the first one.

    Only assignments that use each candidate at most once vote. When there is none (as in open-ended puzzles, which have
    no candidates), all answers of a valid format vote. Labels are compared as in the reward. Returns "" (an invalid
    answer) when no sample has a valid format.
    """
    valid = _valid_labels(samples, puzzle)
    # every type occurs once in a batch: an assignment that repeats a label is certainly wrong
    valid = [labels for labels in valid if _one_to_one(labels, puzzle)] or valid
    if not valid:
        return ""
    keys = [tuple(normalise_label(label) for label in labels) for labels in valid]
    (winner, _), *_ = Counter(keys).most_common(1)  # a Counter keeps the order of insertion: the first of equals
    return answer_of(valid[keys.index(winner)])


def cell_vote(samples: Sequence[str], puzzle: Puzzle) -> str:
    """The one-to-one assignment of candidates to cells with the largest sum of votes per cell, as one answer.

    Without candidates (open-ended) each cell takes its most frequent label. Returns "" when no sample has a valid format.
    """
    found = consensus_of(samples, puzzle)
    return answer_of(found.labels) if found else ""


def consensus_of(samples: Sequence[str], puzzle: Puzzle) -> Consensus | None:
    """The one-to-one vote of the samples of a valid format (data/distill/consensus.py); None when there is none."""
    return consensus(_valid_labels(samples, puzzle), puzzle.candidates)


def answer_of(labels: Sequence[str], reasoning: str = "") -> str:
    """A response of a valid format with these labels, one per cell."""
    return f"<think>{reasoning}</think>\n<answer>{answer_text(list(labels))}</answer>"


def _valid_labels(samples: Sequence[str], puzzle: Puzzle) -> list[list[str]]:
    """[S][N] labels of the samples whose format is valid."""
    parsed = [parse_response(text, len(puzzle.cells)) for text in samples]
    return [answer.labels for answer in parsed if answer.valid]


def _one_to_one(labels: Sequence[str], puzzle: Puzzle) -> bool:
    """Is every label a candidate, and is no candidate used more often than it is listed?"""
    given, candidates = (Counter(map(normalise_label, names)) for names in (labels, puzzle.candidates))
    return given <= candidates


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share observed in n independent trials (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # rounding may leave a limit just inside 0 or 1, and a share of 0 or 1 outside its own interval
    return (max(0.0, centre - half) if share > 0 else 0.0), (min(1.0, centre + half) if share < 1 else 1.0)
