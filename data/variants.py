"""The paper's two variants of a batch-level puzzle (Cell-o1, arXiv:2506.02911), and single cells back to batches.

- cell-level (appendix C, Table 11): every cell of a batch alone, with the batch's context and all N candidates.
- open-ended (appendix D, Table 12): the whole batch without its candidates. Our rewards and metrics require the gold
  label itself; the cell-level accuracy of Table 12 takes a label as right when its MedCPT score, a similarity to the
  gold label, exceeds 0.8 (eval/similarity.py, launch/evaluate.py --medcpt).
The system message of the first is the paper's (Table 10); the paper shows none for the second (data/prompts.py).

Example: a puzzle "test-7" of 3 cells gives "test-7/cell-1", "test-7/cell-2", "test-7/cell-3", or "test-7/open".

A variant keeps the batch's metadata columns (also `n_cells`, the size of the batch) and adds `batch_id`; a single cell
also gets `cell_index`, from 0. A variant drops what belongs to the batch's own prompt and answer: a system message
other than the usual one, and a reasoning trace.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from data.errors import UserError
from data.prompts import RESPONSE_LAYOUT, RESPONSE_TAGS, answer_text
from data.puzzles import Puzzle, cell_ids_problem

VARIANTS = ("cell", "open")
_OF_THE_BATCH_ROW = ("system_msg", "assistant_msg")


def cell_level(puzzle: Puzzle) -> list[Puzzle]:
    """[N] puzzles of one cell each, in cell order. Where the batch has `cell_ids`, each puzzle gets the id of its cell.

    Raises UserError that names the puzzle when it is not a batch-level puzzle, or has a single cell.
    """
    meta = _batch_meta(puzzle)
    if len(puzzle.cells) == 1:
        raise UserError(f"puzzle {puzzle.id} has a single cell, which is nothing to decompose: leave it out")
    cell_ids = puzzle.meta.get("cell_ids")
    if problem := cell_ids_problem(puzzle):
        raise UserError(f"puzzle {puzzle.id} has {problem}: give one per cell")
    of_cell = [{"cell_index": i} | ({"cell_ids": [cell_ids[i]]} if cell_ids else {}) for i in range(len(puzzle.cells))]
    return [
        dataclasses.replace(
            puzzle, id=f"{puzzle.id}/cell-{i + 1}", cells=[puzzle.cells[i]], answer=[puzzle.answer[i]], meta=meta | own
        )
        for i, own in enumerate(of_cell)
    ]


def open_ended(puzzle: Puzzle) -> Puzzle:
    """The batch without its candidates. Raises UserError that names the puzzle when it is not a batch-level puzzle."""
    return dataclasses.replace(puzzle, id=f"{puzzle.id}/open", candidates=[], meta=_batch_meta(puzzle))


def convert(puzzles: Iterable[Puzzle], variant: str) -> list[Puzzle]:
    """Batch-level puzzles converted to the variant "cell" or "open", in order.

    Raises UserError for another variant, for a puzzle that is not a batch-level puzzle, and for an id that occurs
    twice, because answers to the variants of the two puzzles could not be told apart.
    """
    if variant not in VARIANTS:
        raise UserError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    puzzles = list(puzzles)
    for name, count in Counter(puzzle.id for puzzle in puzzles).items():
        if count > 1:
            raise UserError(f"puzzle {name} occurs {count} times: keep it once, or give each its own id")
    if variant == "open":
        return [open_ended(puzzle) for puzzle in puzzles]
    return [cell for puzzle in puzzles for cell in cell_level(puzzle)]


def regroup(predictions: list[str], puzzles: list[Puzzle], invalid_label: str = "") -> tuple[list[str], list[Puzzle]]:
    """(one answer per batch, the batches) from answers to single cells: the arguments of eval.metrics.score.

    predictions[i] is the whole response to puzzles[i]. The cells may come in any order; a batch takes the position of
    its first cell. An answer is "<think></think><answer>a | b</answer>" with the labels in cell order. A response whose
    format is invalid (by the rules of reward.cellpuzzles.parse_response(response, 1)) contributes `invalid_label`.

    With the default "", one invalid cell makes its batch's answer invalid, with 0 of N cells right. This is the rule
    for an answer to a batch-level puzzle (B.1), and it gives the share of batches with a valid format. To count an
    invalid cell as wrong by itself only, pass a label that no cell has, such as "no valid answer": then every format is
    valid, cell accuracy and uniqueness change, and batch accuracy stays the same. The paper does not say which of the
    two rules its Table 11 uses; its instruction-tuned Qwen has uniqueness .5978 above format validity .5955, which the
    first rule cannot give. The response lengths of Table 11 are those of single cells: score the cells themselves for
    them.

    A batch equals the puzzle that `cell_level` got, without its system message and reasoning trace. Raises UserError
    that names the puzzle, or the batch one of whose cells is missing, comes twice or belongs to another batch.
    """
    if len(predictions) != len(puzzles):
        raise UserError(f"{len(predictions)} predictions for {len(puzzles)} puzzles: give one prediction per puzzle")
    batches: dict[str, list[tuple[Puzzle, str]]] = {}
    for puzzle, prediction in zip(puzzles, predictions, strict=True):
        of_batch = "batch_id" in puzzle.meta and isinstance(puzzle.meta.get("cell_index"), int)
        if puzzle.variant != "cell" or not of_batch:
            raise UserError(
                f"puzzle {puzzle.id} is not a cell of a batch (one cell, with the columns batch_id and cell_index): "
                "make cell-level puzzles with launch/variant.py"
            )
        batches.setdefault(puzzle.meta["batch_id"], []).append((puzzle, prediction))
    answers, whole = [], []
    for name, answered in batches.items():
        answered.sort(key=lambda pair: pair[0].meta["cell_index"])
        whole.append(_batch(name, [cell for cell, _ in answered]))
        labels = [_label(prediction) or invalid_label for _, prediction in answered]
        answers.append(f"<think></think><answer>{answer_text(labels)}</answer>")
    return answers, whole


def _batch_meta(puzzle: Puzzle) -> dict[str, Any]:
    """The metadata that the variants of a batch get. Raises UserError when the puzzle is not a batch-level puzzle."""
    counts = len(puzzle.cells), len(puzzle.candidates), len(puzzle.answer)
    if puzzle.variant != "batch" or len(set(counts)) > 1:
        raise UserError(
            f"puzzle {puzzle.id} is not a batch-level puzzle ({counts[0]} cells, {counts[1]} candidates, {counts[2]} "
            "answers): convert the batch-level file it was made from"
        )
    for column in ("batch_id", "cell_index"):
        if column in puzzle.meta:
            raise UserError(f"puzzle {puzzle.id} already has a column {column}, which its variants need: rename it")
    return {key: value for key, value in puzzle.meta.items() if key not in _OF_THE_BATCH_ROW} | {"batch_id": puzzle.id}


def _batch(name: str, cells: list[Puzzle]) -> Puzzle:
    """The batch-level puzzle of its cells, which are sorted by `cell_index`. Raises UserError that names the batch."""
    first = cells[0]
    count = Counter(cell.meta["cell_index"] for cell in cells)
    expected = range(len(first.candidates))
    missing = [f"cell-{index + 1}" for index in expected if index not in count]
    if missing:
        raise UserError(
            f"batch {name}: {len(missing)} of its {len(expected)} cells have no prediction ({', '.join(missing)}): "
            "answer every cell of a batch"
        )
    again = [f"cell-{index + 1}" for index, times in count.items() if times > 1 or index not in expected]
    if again or any((cell.context, cell.candidates) != (first.context, first.candidates) for cell in cells):
        what = f"{again[0]} comes twice or is none of it" if again else "its cells differ in context or candidates"
        raise UserError(f"batch {name}: {what}: regroup the cells of one file, each once")
    meta = {
        key: value for key, value in first.meta.items() if key not in ("batch_id", "cell_index", *_OF_THE_BATCH_ROW)
    }
    if "cell_ids" in meta:
        meta["cell_ids"] = [cell_id for cell in cells for cell_id in cell.meta["cell_ids"]]
    return Puzzle(
        id=name,
        context=first.context,
        cells=[cell.cells[0] for cell in cells],
        candidates=first.candidates,
        answer=[cell.answer[0] for cell in cells],
        meta=meta,
    )


def _label(prediction: str) -> str:
    """The label that a response gives to its one cell; "" where the format is invalid."""
    match = RESPONSE_LAYOUT.fullmatch(prediction)
    if match is None or any(prediction.count(tag) != 1 for tag in RESPONSE_TAGS) or "|" in match["answer"]:
        return ""
    return match["answer"].strip()
