"""The CellPuzzles rewards (Cell-o1, arXiv:2506.02911, Eq. 2 and the ablations of section 5).

A valid response is exactly one `<think>...</think>` followed by exactly one `<answer>...</answer>`, with only white
space outside and between them. The answer has one non-empty label per cell, separated by `|`.
Only the answer block is read. A tag that occurs twice anywhere, also inside the reasoning, makes the response invalid:
the authors' scorer can be tricked into reading a line of the reasoning instead of the answer.
"""

from dataclasses import dataclass

from data.prompts import RESPONSE_LAYOUT as _RESPONSE
from data.prompts import RESPONSE_TAGS as _TAGS
from data.prompts import normalise_label
from data.puzzles import Puzzle
from reward import Reward, Status


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """The labels of a response. When the format is invalid, `labels` is empty and `problem` says why."""

    valid: bool
    labels: list[str]
    """[N] labels in cell order, as written, without white space around them."""
    problem: str
    """Why the format is invalid; "" when it is valid."""


def parse_response(text: str, n_cells: int) -> ParsedResponse:
    """Parse a response to a puzzle of `n_cells` cells. A bad response is a result, not an error: this never raises.

    >>> parse_response("<think>CD3D is a marker of T cells.</think><answer>T cell | B cell</answer>", n_cells=2).labels
    ['T cell', 'B cell']
    >>> parse_response("<think>CD3D is a marker of T cells.</think><answer>T cell</answer>", n_cells=2).problem
    'the answer has 1 labels for 2 cells'
    """
    for tag in _TAGS:
        if text.count(tag) != 1:
            return _invalid(f"{tag} occurs {text.count(tag)} times, not once")
    match = _RESPONSE.fullmatch(text)
    if match is None:
        return _invalid("the text is not <think>...</think> then <answer>...</answer> with nothing else around them")
    labels = [label.strip() for label in match["answer"].split("|")]
    if len(labels) != n_cells:
        return _invalid(f"the answer has {len(labels)} labels for {n_cells} cells")
    if "" in labels:
        return _invalid(f"label {labels.index('') + 1} of the answer is empty")
    return ParsedResponse(valid=True, labels=labels, problem="")


def cells_right(labels: list[str], answer: list[str]) -> int:
    """The number of cells whose label is the correct one. labels, answer: [N]."""
    return sum(normalise_label(label) == normalise_label(gold) for label, gold in zip(labels, answer, strict=True))


def batch_reward(completion: str, puzzle: Puzzle) -> Reward:
    """Eq. (2): -1 for an invalid format, 1 when every label is right, else 0.

    >>> puzzle = Puzzle(
    ...     id="blood-1",
    ...     context="The cell is from a female, originating from the blood.",
    ...     cells=[["CD3D", "IL7R"], ["CD79A", "MS4A1"]],
    ...     candidates=["B cell", "T cell"],
    ...     answer=["T cell", "B cell"],
    ... )
    >>> batch_reward("<think>CD3D, MS4A1</think><answer>T cell | B cell</answer>", puzzle).total
    1.0
    >>> batch_reward("<think>CD3D, MS4A1</think><answer>B cell | T cell</answer>", puzzle).total
    0.0
    >>> batch_reward("T cell | B cell", puzzle).total
    -1.0
    """
    return _reward(completion, puzzle, lambda cell_accuracy: float(cell_accuracy == 1.0))  # n / n is exactly 1


def mixed_reward(completion: str, puzzle: Puzzle) -> Reward:
    """Ablation D: -1 for an invalid format, else the mean of cell-level and batch-level accuracy."""
    return _reward(completion, puzzle, lambda cell_accuracy: (cell_accuracy + float(cell_accuracy == 1.0)) / 2)


def strict_reward(completion: str, puzzle: Puzzle) -> Reward:
    """`batch_reward` with another rule of the authors' code: -1 when two cells get the same label.

    Their rule of -1 for a wrong number of labels is part of the format here.
    """
    reward = batch_reward(completion, puzzle)
    labels = parse_response(completion, len(puzzle.cells)).labels
    if len({normalise_label(label) for label in labels}) < len(labels):
        problem = "two cells have the same label"
        return Reward(total=-1.0, parts=reward.parts, status=Status.INVALID_FORMAT, message=problem)
    return reward


def _reward(completion: str, puzzle: Puzzle, total_of) -> Reward:
    """The reward of a response. total_of(cell accuracy in [0, 1]): the total for a valid format."""
    parsed = parse_response(completion, len(puzzle.cells))
    if not parsed.valid:
        parts = {"cell_accuracy": 0.0, "batch_accuracy": 0.0, "format_validity": 0.0}
        return Reward(total=-1.0, parts=parts, status=Status.INVALID_FORMAT, message=parsed.problem)
    cell_accuracy = cells_right(parsed.labels, puzzle.answer) / len(puzzle.answer)
    parts = {"cell_accuracy": cell_accuracy, "batch_accuracy": float(cell_accuracy == 1.0), "format_validity": 1.0}
    return Reward(total=total_of(cell_accuracy), parts=parts)


def _invalid(problem: str) -> ParsedResponse:
    return ParsedResponse(valid=False, labels=[], problem=problem)
