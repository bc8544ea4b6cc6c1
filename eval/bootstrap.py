"""Uncertainty of metrics: percentile bootstrap intervals over batches, and the paired bootstrap between two models.

A batch is drawn as a whole: its cells, its k samples and, in a cell-level file, its N puzzles share a donor and are not
independent. Efron & Tibshirani 1993, An Introduction to the Bootstrap (doi:10.1201/9780429246593), ch. 13.
Every metric is a ratio of two sums over batches. A resample is a count of how often each batch is drawn.

Shapes: P puzzles, k answers per puzzle, U units that are drawn (batches), M metrics, B resamples.

Example: intervals([[score] for score in scores], puzzles)["batch_accuracy"] == [0.31, 0.42]
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.puzzles import Puzzle
from eval.metrics import METRICS, PuzzleScore
from rollout import stable_seed

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 2_000_000
"""Counts held in memory at a time (resamples x batches)."""


@dataclass(frozen=True)
class Sums:
    """Each unit's contribution to the numerator and denominator of each metric.

    A metric is the ratio of the two sums.
    """

    numerators: np.ndarray
    """[U, M] float64."""
    denominators: np.ndarray
    """[U, M] float64, not negative."""

    def values(self) -> np.ndarray:
        """[M] metrics; nan where the denominators sum to 0."""
        return _ratio(self.numerators.sum(axis=0), self.denominators.sum(axis=0))

    def draws(self, *names: object, resamples: int = RESAMPLES) -> np.ndarray:
        """[B, M] metrics of `resamples` resamples of the U units. The seed is derived from `names`."""
        # numerator and denominator of a resample must count the same units: one product for both
        both = np.concatenate([self.numerators, self.denominators], axis=1)
        sums = np.concatenate([counts @ both for counts in _counts(len(both), resamples, names)])
        return _ratio(*np.split(sums, 2, axis=1))


def sums_of(samples: Sequence[Sequence[PuzzleScore]], units: Sequence[Hashable]) -> Sums:
    """The contributions to the six metrics, in the order of METRICS.

    samples: [P][k] scores; a puzzle contributes its mean over k. units: [P] the unit of each puzzle; puzzles of one
    unit are added up.
    """
    rows = [[_parts(score) for score in of_puzzle] for of_puzzle in samples]
    numerators = np.array([np.mean([parts for parts, _ in row], axis=0) for row in rows])
    # only the second metric, cell_accuracy_micro, divides by cells; the others divide by batches
    denominators = np.array([[1.0, row[0][1], 1.0, 1.0, 1.0, 1.0] for row in rows])
    return added_up(numerators, denominators, units)


def added_up(numerators: np.ndarray, denominators: np.ndarray, units: Sequence[Hashable]) -> Sums:
    """Rows [P, M] of the same unit added up; units in the order in which they first occur."""
    place = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    of_row = np.array([place[unit] for unit in units])
    sums = [np.zeros((len(place), numerators.shape[1])) for _ in range(2)]
    np.add.at(sums[0], of_row, numerators)
    np.add.at(sums[1], of_row, denominators)
    return Sums(*sums)


def units_of(puzzles: Sequence[Puzzle]) -> list[Hashable]:
    """[P] the unit that the bootstrap draws: the puzzle itself, or for a cell-level puzzle the batch of the cell."""
    return [(p.meta.get("batch_id", i) if p.variant == "cell" else i) for i, p in enumerate(puzzles)]


def n_units(puzzles: Sequence[Puzzle]) -> int:
    """How many units there are to draw."""
    return len(set(units_of(puzzles)))


def intervals(
    samples: Sequence[Sequence[PuzzleScore]], puzzles: Sequence[Puzzle], *names: object
) -> dict[str, list[float]]:
    """{metric: [low, high]}, 95 % percentile intervals of the mean over samples and puzzles.

    samples: [P][k]. names: the seed is derived from them.
    """
    draws = sums_of(samples, units_of(puzzles)).draws(*names)
    return dict(zip(METRICS, percentile_intervals(draws), strict=True))


def percentile_intervals(draws: np.ndarray) -> list[list[float] | None]:
    """[M] intervals [low, high] of [B, M] draws.

    Draws without a value (nan) are left out; None when no draw has one.
    """
    edge = 100 * (1 - LEVEL) / 2
    found: list[list[float] | None] = []
    for column in draws.T:
        known = column[~np.isnan(column)]
        found.append([float(x) for x in np.percentile(known, [edge, 100 - edge])] if len(known) else None)
    return found


def paired(
    ours: Sequence[Sequence[PuzzleScore]],
    theirs: Sequence[Sequence[PuzzleScore]],
    puzzles: Sequence[Puzzle],
    *names: object,
) -> dict[str, dict]:
    """{metric: {ours, theirs, difference, interval, p}} of two models on the same puzzles; difference = ours - theirs.

    Both models are scored on the same resamples of batches. p is two-sided: twice the share of resamples on the far
    side of 0, with one resample added to both counts (Davison & Hinkley 1997, doi:10.1017/CBO9780511802843, section
    4.2), so that it is never 0; at most 1.
    """
    units = units_of(puzzles)
    one, other = sums_of(ours, units), sums_of(theirs, units)
    # one draw for both models: a pair is compared on the same resample
    both = Sums(
        np.concatenate([one.numerators, other.numerators], axis=1),
        np.concatenate([one.denominators, other.denominators], axis=1),
    )
    first, second = np.split(both.draws("paired", *names), 2, axis=1)
    differences = first - second
    limits = percentile_intervals(differences)
    tail = np.minimum((differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0))
    p = np.minimum(1.0, 2 * (1 + tail) / (1 + len(differences)))
    values = zip(METRICS, one.values(), other.values(), limits, p, strict=True)
    return {
        name: {"ours": float(a), "theirs": float(b), "difference": float(a - b), "interval": limit, "p": float(chance)}
        for name, a, b, limit, chance in values
    }


def _counts(n_units: int, resamples: int, names: tuple) -> Iterator[np.ndarray]:
    """[b, U] how often each resample draws each unit; all resamples, in pieces that fit in memory."""
    rng = np.random.default_rng(stable_seed("bootstrap", *names))
    per_piece = max(1, CHUNK // n_units)
    for start in range(0, resamples, per_piece):
        b = min(per_piece, resamples - start)
        # shift resample i by i * n_units, so that a single bincount counts all resamples
        drawn = rng.integers(n_units, size=(b, n_units)) + n_units * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * n_units).reshape(b, n_units).astype(float)


def _parts(score: PuzzleScore) -> tuple[list[float], float]:
    """([6] numerators of one answer in the order of METRICS, its number of cells)."""
    numerators = [
        score.cell_accuracy,
        float(sum(score.right)),
        float(score.batch_right),
        float(score.valid),
        score.uniqueness,
        score.response_length,
    ]
    return numerators, float(score.n_cells)


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    return np.divide(numerators, denominators, out=np.full(numerators.shape, np.nan), where=denominators > 0)
