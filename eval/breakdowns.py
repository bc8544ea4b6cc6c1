"""Accuracy by group: by N, tissue, disease, donor and cell type; per batch; of single cells as batches; over k samples.

Everything is a plain dict, ready for metrics.json. Paper: Cell-o1 (arXiv:2506.02911), Figure 4 and Tables 3 and 11.
Tissue and disease of a published row, which has no metadata, are read from its context sentence (data/describe.py).

Shapes: P puzzles, k answers per puzzle.

Example: breakdowns(scores, puzzles)["n_cells"][0] == {"value": 8, "n_puzzles": 137, "cells": 1096, "cell_accuracy":
..., ...}
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.describe import NOT_STATED, disease_of, tissue_of
from data.puzzles import Puzzle
from data.variants import regroup
from eval.bootstrap import LEVEL, RESAMPLES, added_up, intervals, n_units, percentile_intervals, sums_of, units_of
from eval.metrics import (
    METRICS,
    PuzzleScore,
    cell_vote,
    consensus_of,
    majority_vote,
    metrics_of,
    pass_at_k,
    score_all,
    wilson_interval,
)
from reward.cellpuzzles import normalise_label

Scores = Sequence[PuzzleScore]
REUSED = 0.8
"""Distinct cells per place in the puzzles below which a reader is told."""
FEW_DONORS = 5
"""Below so many donors a reader is told."""
HEALTHY = "normal"
"""The disease of a healthy donor in CELLxGENE."""
NO_LABEL = "no valid answer"
"""The label of a cell without a valid answer, when other cells of its batch keep theirs. No cell type has this name."""


def donor_of(puzzle: Puzzle) -> str:
    """The donor column; 'not stated' for a row without one."""
    donor = puzzle.meta.get("donor")
    return NOT_STATED if donor in (None, "") else str(donor)


def cells_of(puzzle: Puzzle) -> list[tuple[str, str]] | None:
    """[N] (file, id) of each cell; None where the puzzle does not state them."""
    ids = puzzle.meta.get("cell_ids")
    if not isinstance(ids, list | tuple) or len(ids) != len(puzzle.cells):
        return None
    return [(str(puzzle.meta.get("source")), str(one)) for one in ids]


def notes_on_reuse(puzzles: Sequence[Puzzle]) -> list[str]:
    """What the intervals of these puzzles do not cover: a sentence where cells are asked again, one where donors are few."""
    stated, notes = [cells_of(puzzle) for puzzle in puzzles], []
    places, donors = sum(len(puzzle.cells) for puzzle in puzzles), {donor_of(puzzle) for puzzle in puzzles}
    if None not in stated:
        distinct = len({cell for cells in stated for cell in cells or ()})
        if distinct < REUSED * places:
            notes.append(
                f"{distinct:,} distinct cells fill the {places:,} places of these puzzles, so the intervals, over puzzles, are "
                "narrower than those of as many new cells would be"
            )
    if 0 < len(donors) < FEW_DONORS and NOT_STATED not in donors:
        notes.append(
            f"the puzzles are of {'one donor' if len(donors) == 1 else f'{len(donors)} donors'} only: the intervals do not cover "
            "how donors differ"
        )
    return notes


def size_of(puzzle: Puzzle) -> int:
    """N, the number of cells of the batch; for a cell-level puzzle, of the batch that the cell comes from."""
    return len(puzzle.candidates) if puzzle.variant == "cell" else len(puzzle.cells)


DIMENSIONS: dict[str, Callable[[Puzzle], Any]] = {
    "n_cells": size_of,
    "tissue": tissue_of,
    "disease": disease_of,
    "donor": donor_of,
}


def breakdowns(scores: Scores, puzzles: Sequence[Puzzle], *names: object) -> dict[str, Any]:
    """All breakdowns of one answer per puzzle, as metrics.json holds them.

    names: the bootstrap's seed is derived from them.

    n_cells, tissue, disease, donor: [{value, <the metrics>, batches, cells, intervals}], with N ascending and the other values
        by descending number of puzzles; empty when no puzzle states the value.
    disease_average: see `average_over`; "normal" is no disease; absent with fewer than two diseases.
    batch_distribution: see `distribution`. cell_type: see `cell_types`. confusion: {true type: {given label: cells}} of
        valid answers.
    """
    found: dict[str, Any] = {}
    for dimension, value_of in DIMENSIONS.items():
        members = group(puzzles, value_of)
        found[dimension] = [
            {"value": value, **group_metrics([scores[i] for i in places], [puzzles[i] for i in places], *names)}
            for value, places in members.items()
        ]
        # a breakdown into one unknown group says nothing
        if set(members) == {NOT_STATED}:
            found[dimension] = []
    diseases = {v: places for v, places in group(puzzles, disease_of).items() if v not in (NOT_STATED, HEALTHY)}
    if len(diseases) > 1:
        sets = {
            value: ([scores[i] for i in places], [puzzles[i] for i in places]) for value, places in diseases.items()
        }
        found["disease_average"] = average_over(sets, *names)
    confusion = confusion_counts(scores, puzzles)
    return found | {
        "batch_distribution": distribution(scores),
        "cell_type": cell_types(scores, puzzles, confusion),
        "confusion": confusion,
    }


def group(puzzles: Sequence[Puzzle], value_of: Callable[[Puzzle], Any]) -> dict[Any, list[int]]:
    """{value: indices of its puzzles}; numbers in ascending order, names by descending number of puzzles."""
    places: dict[Any, list[int]] = defaultdict(list)
    for i, puzzle in enumerate(puzzles):
        places[value_of(puzzle)].append(i)
    numbers = all(isinstance(value, int) for value in places)
    return {v: places[v] for v in sorted(places, key=lambda v: v if numbers else (-len(places[v]), v))}


def group_metrics(scores: Scores, puzzles: Sequence[Puzzle], *names: object) -> dict[str, Any]:
    """The metrics of a group of answers, its number of cells, and 95 % bootstrap intervals over batches."""
    return {
        **metrics_of(scores).to_dict(),
        "batches": n_units(puzzles),
        "cells": sum(score.n_cells for score in scores),
        "intervals": intervals([[score] for score in scores], puzzles, *names),
    }


def n_batches(group: dict[str, Any]) -> int:
    """The number of batches of cells that a group's intervals were drawn from; those of one alone would have no width.

    Cell-level puzzles of one batch are drawn together. Older files have the number of puzzles only.
    """
    known = (
        group.get("batches"),
        (group.get("interval") or {}).get("batches"),
        group.get("n_puzzles"),
        group.get("smallest"),
    )
    return next((n for n in known if n is not None), 2)


def average_over(sets: dict[str, tuple[Scores, Sequence[Puzzle]]], *names: object) -> dict[str, Any]:
    """{<metrics>, intervals, over, smallest}: the unweighted mean over sets of puzzles, like the 'Average' of Table 3.

    sets: {name: (scores, puzzles)}. The bootstrap resamples the batches within each set, so every resample contains all
    sets. `smallest` is the smallest number of batches of a set; with 1 the intervals are too narrow.
    """
    sums = {name: sums_of([[score] for score in scores], units_of(puzzles)) for name, (scores, puzzles) in sets.items()}
    draws = np.mean([one.draws("average", name, *names) for name, one in sums.items()], axis=0)
    values = np.mean([one.values() for one in sums.values()], axis=0)
    return {
        **{metric: float(value) for metric, value in zip(METRICS, values, strict=True)},
        "intervals": dict(zip(METRICS, percentile_intervals(draws), strict=True)),
        "over": list(sets),
        "smallest": min(len(one.numerators) for one in sums.values()),
    }


def distribution(scores: Scores) -> dict[str, Any]:
    """{bins, quartiles, mean}: the distribution of the cell accuracies of single batches (Figure 4B).

    bins: [{from, to, batches}]. Batches with no cell right and batches with every cell right have bins of their own;
    the bins between are (0, 0.1), [0.1, 0.2), ..., [0.9, 1). quartiles: 25, 50 and 75 %, with linear interpolation.
    """
    right = [sum(score.right) for score in scores]
    bins: Counter = Counter()
    for n, score in zip(right, scores, strict=True):
        # whole numbers: 1 of 10 cells right must fall into [0.1, 0.2), whatever the rounding of 1 / 10
        bins["none" if n == 0 else "all" if n == score.n_cells else 10 * n // score.n_cells] += 1
    shares = [score.cell_accuracy for score in scores]
    edges = [("none", 0.0, 0.0), *((i, i / 10, (i + 1) / 10) for i in range(10)), ("all", 1.0, 1.0)]
    return {
        "bins": [{"from": low, "to": high, "batches": bins[key]} for key, low, high in edges],
        "quartiles": [float(x) for x in np.percentile(shares, [25, 50, 75])],
        "mean": float(np.mean(shares)),
    }


def confusion_counts(scores: Scores, puzzles: Sequence[Puzzle]) -> dict[str, dict[str, int]]:
    """{true type: {given label: cells}} over answers of a valid format; true types by name, labels by descending count.

    Labels that compare as equal are counted together, and spelled as in the first answer key or candidate list.
    """
    spelling = spellings(puzzles)
    counts: dict[str, Counter] = defaultdict(Counter)
    for score, puzzle in zip(scores, puzzles, strict=True):
        for truth, given in zip(puzzle.answer, score.labels, strict=False):  # an invalid format has no labels
            key = normalise_label(given)
            counts[spelling[normalise_label(truth)]][spelling.setdefault(key, given)] += 1
    return {
        truth: dict(sorted(of.items(), key=lambda item: (-item[1], item[0]))) for truth, of in sorted(counts.items())
    }


def spellings(puzzles: Sequence[Puzzle]) -> dict[str, str]:
    """{normalised label: its first spelling in the puzzles}"""
    found: dict[str, str] = {}
    for puzzle in puzzles:
        for label in (*puzzle.answer, *puzzle.candidates):
            found.setdefault(normalise_label(label), label)
    return found


def cell_types(
    scores: Scores, puzzles: Sequence[Puzzle], confusion: dict[str, dict[str, int]], most: int = 3
) -> list[dict[str, Any]]:
    """[{cell_type, cells, distinct_cells, right, accuracy, interval, answered, most_confused}], the most frequent type first.

    cells: places in puzzles. distinct_cells: the cells that fill them; absent where a puzzle does not state its cells.
    accuracy: right / cells, where all cells of an invalid answer are wrong. interval: 95 %, Wilson's, because a batch
    holds one cell of a type; over the distinct cells, since the answers to one cell in several puzzles are much alike.
    answered: cells in answers of a valid format. most_confused: the `most` most frequent [wrong label, cells].
    """
    cells: Counter = Counter()
    right: Counter = Counter()
    distinct: dict[str, set] = defaultdict(set)
    for score, puzzle in zip(scores, puzzles, strict=True):
        stated = cells_of(puzzle) or [None] * len(puzzle.answer)
        for label, ok, cell in zip(puzzle.answer, score.right, stated, strict=True):
            key = normalise_label(label)
            cells[key] += 1
            right[key] += ok
            distinct[key].add(cell)
    names, rows = spellings(puzzles), []
    for key in sorted(cells, key=lambda key: (-cells[key], key)):
        given = confusion.get(names[key], {})
        wrong = [[label, n] for label, n in given.items() if normalise_label(label) != key]
        share, known = right[key] / cells[key], None not in distinct[key]
        rows.append(
            {
                "cell_type": names[key],
                "cells": cells[key],
                **({"distinct_cells": len(distinct[key])} if known else {}),
                "right": right[key],
                "accuracy": share,
                "interval": list(wilson_interval(share, len(distinct[key]) if known else cells[key])),
                "answered": sum(given.values()),
                "most_confused": wrong[:most],
            }
        )
    return rows


def decomposition(
    predictions: Sequence[str], puzzles: Sequence[Puzzle], scores: Scores, *names: object
) -> dict[str, Any]:
    """Table 11: answers to single cells combined into batches, in the two ways that the paper's text allows.

    "spoiled": a cell without a valid answer makes its batch's answer invalid, with 0 of N right, as for a batch-level
    answer. "wrong_alone": such a cell is wrong by itself only. Both hold the metrics and their intervals over batches
    (n_puzzles counts batches); response_length is that of the answers to single cells. `cell_format_validity` is the
    share of cells with a valid answer.
    """
    # regroup makes up the text of a batch's answer, so its length means nothing
    lengths = {"response_length": metrics_of(scores).response_length}
    length_interval = intervals([[score] for score in scores], puzzles, "cells", *names)["response_length"]
    found: dict[str, Any] = {"cell_format_validity": metrics_of(scores).format_validity}
    for way, label in (("spoiled", ""), ("wrong_alone", NO_LABEL)):
        answers, batches = regroup(list(predictions), list(puzzles), label)
        scored = score_all(answers, batches)
        if label:  # the words that stand for an invalid answer are no label
            scored = [
                replace(s, n_distinct=len({*map(normalise_label, s.labels)} - {normalise_label(label)})) for s in scored
            ]
        found[way] = group_metrics(scored, batches, way, *names) | lengths
        if label:  # and its format is not valid
            cells = intervals([[score] for score in scores], puzzles, "cells", *names)
            found[way]["format_validity"] = found["cell_format_validity"]
            found[way]["intervals"]["format_validity"] = cells["format_validity"]
        found[way]["intervals"]["response_length"] = length_interval
    return found


def k_sample(
    texts: Sequence[Sequence[str]], samples: Sequence[Scores], puzzles: Sequence[Puzzle], *names: object
) -> dict[str, Any]:
    """{k, mean, pass_at_k, majority_vote, cell_vote} of k answers per puzzle.

    texts, samples: [P][k]. mean: each metric over all samples. pass_at_k: {k': {value, interval}} of batch accuracy for
    k' = 1..k. majority_vote, cell_vote: the metrics of the voted answers; their response_length is the sum over the k
    answers, because a vote costs all of them.
    """
    k = len(samples[0])
    everything = [score for of_puzzle in samples for score in of_puzzle]
    found: dict[str, Any] = {
        "k": k,
        "mean": {
            **metrics_of(everything).to_dict(),
            "batches": n_units(puzzles),
            "n_puzzles": len(puzzles),
            "intervals": intervals(samples, puzzles, "mean", *names),
        },
    }
    right = [sum(score.batch_right for score in of_puzzle) for of_puzzle in samples]
    passes = np.array([[pass_at_k(k, n, draws) for draws in range(1, k + 1)] for n in right])  # [P, k]
    limits = percentile_intervals(added_up(passes, np.ones_like(passes), units_of(puzzles)).draws("pass@k", *names))
    found["pass_at_k"] = {
        str(i + 1): {"value": float(passes[:, i].mean()), "interval": limit} for i, limit in enumerate(limits)
    }
    # a vote needs all k answers, so it costs all of them
    lengths = [sum(score.response_length for score in of_puzzle) for of_puzzle in samples]
    for name, vote in (("majority_vote", majority_vote), ("cell_vote", cell_vote)):
        answers = [vote(of_puzzle, puzzle) for of_puzzle, puzzle in zip(texts, puzzles, strict=True)]
        found[name] = group_metrics(score_all(answers, puzzles, lengths), puzzles, name, *names)
    return found


def greedy_answers(rows: Sequence[dict], puzzles: Sequence[Puzzle], unit: str, *names: object) -> dict[str, Any]:
    """{"greedy": the metrics of one answer per puzzle at temperature 0}; {} where a row holds none.

    unit: of the lengths of the sampled answers; greedy ones are counted in the same.
    """
    texts = [row.get("greedy") for row in rows]
    if not all(isinstance(text, str) for text in texts):
        return {}
    counts = [row.get("greedy_tokens") for row in rows]
    known = unit == "tokens" and all(isinstance(n, int | float) and math.isfinite(n) for n in counts)
    return {"greedy": group_metrics(score_all(texts, puzzles, counts if known else None), puzzles, "greedy", *names)}


CONFIDENCE = ("cells_confident", "cell_accuracy", "batches_confident", "batch_accuracy")


def vote_confidence(
    texts: Sequence[Sequence[str]], puzzles: Sequence[Puzzle], threshold: float, *names: object
) -> dict[str, Any]:
    """How far the one-to-one vote (`cell_vote`) can be trusted: {threshold, cells_confident, cell_accuracy,
    batches_confident, batch_accuracy, intervals}.

    A cell is confident when at least `threshold` of its puzzle's valid answers give it the label of the vote, and a batch
    when all its cells are; a batch without a valid answer has no label and no confident cell. cells_confident and
    batches_confident are shares of all cells and batches; the accuracies are those of the confident ones, None where
    there is none. The vote itself labels every cell whatever the threshold: its metrics are those of `cell_vote`.
    """
    numerators, denominators = [], []
    for of_puzzle, puzzle in zip(texts, puzzles, strict=True):
        found, n = consensus_of(of_puzzle, puzzle), len(puzzle.cells)
        shares, labels = (found.shares, found.labels) if found else ([-1.0] * n, [""] * n)
        # 6 of 8 answers are 0.75 whatever the rounding
        sure = [share >= threshold - 1e-9 for share in shares]
        right = [
            ok and normalise_label(label) == normalise_label(truth)
            for ok, label, truth in zip(sure, labels, puzzle.answer, strict=True)
        ]
        numerators.append([sum(sure), sum(right), all(sure), all(right)])
        denominators.append([len(sure), sum(sure), 1, all(sure)])
    sums = added_up(np.array(numerators, float), np.array(denominators, float), units_of(puzzles))
    limits = percentile_intervals(sums.draws("consensus", *names))
    values = [None if np.isnan(value) else float(value) for value in sums.values()]
    return {
        "threshold": threshold,
        **dict(zip(CONFIDENCE, values, strict=True)),
        "intervals": dict(zip(CONFIDENCE, limits, strict=True)),
    }


def interval_method(puzzles: Sequence[Puzzle]) -> dict[str, Any]:
    """How the intervals of an evaluation were computed, for metrics.json."""
    return {
        "method": "percentile bootstrap over batches",
        "level": LEVEL,
        "resamples": RESAMPLES,
        "batches": n_units(puzzles),
    }
