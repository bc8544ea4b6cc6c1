"""From a share of answers to a confidence that means accuracy: 0.8 is right in about 8 of 10 clusters.

Such a share is no probability: eight answers of one model make the same mistake eight times. calibration.tsv holds
a monotone table of share and accuracy, fitted by isotonic regression on clusters of known type
(tests/bench/annotate.py made it; its header says on what). It was fitted with one small model on a simulated atlas: with
your model, compare with a truth column (--truth-key) before you rely on the numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression

TABLE = Path(__file__).with_name("calibration.tsv")
VOTES = 8
"""Answers about a cluster in that table. Fewer agree more easily: one of one is a share of 1, whatever the model says."""
BINS = 10


def read_calibration(path: Path = TABLE) -> tuple[np.ndarray, np.ndarray]:
    """(shares, confidences) of the table, both increasing from share 0 to share 1."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    shares, confidences = np.array([[float(x) for x in row] for row in rows[1:]]).T
    return shares, confidences


def calibrated(share: float, table: tuple[np.ndarray, np.ndarray]) -> float:
    """The confidence of a share of answers, interpolated in the table; 0 for the share 0 (no vote)."""
    return float(np.interp(share, *table)) if share > 0 else 0.0


def fit_calibration(shares: Sequence[float], right: Sequence[bool], at: Sequence[float]) -> list[float]:
    """The accuracy at each share of `at`, by isotonic regression of right (0 or 1) on share.

    Two imagined clusters, one right and one wrong, stand at share 1, and two at the lowest share that was seen: so a
    small sample gives no confidence of exactly 0 or 1. Below the lowest share the accuracy falls to 0 at share 0.

    The regression is scipy's (pool adjacent violators).
    """
    lowest = min(shares)
    xs = np.array([*shares, 1.0, 1.0, lowest, lowest])
    ys = np.array([*map(float, right), 1.0, 0.0, 1.0, 0.0])
    levels, back, counts = np.unique(xs, return_inverse=True, return_counts=True)
    means = np.bincount(back, weights=ys) / counts
    fitted = isotonic_regression(means, weights=counts.astype(float)).x
    return np.interp(at, [0.0, *levels], [0.0, *fitted]).tolist()


def expected_calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = BINS) -> float:
    """The mean distance of confidence and accuracy, in equal bins of confidence weighted by their number of members.

    Guo et al. 2017 (arXiv:1706.04599), Eq. 3. Bin k holds confidences in (k / bins, (k + 1) / bins], the first also 0.

    >>> expected_calibration_error([0.9, 0.9, 0.6, 0.6], [True, False, True, False], bins=10)  # (0.4 + 0.1) / 2
    0.25
    """
    assert len(confidence) == len(right) > 0
    where = np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)
    gap = 0.0
    for k in np.unique(where):
        inside = where == k
        gap += abs(np.asarray(confidence)[inside].mean() - np.asarray(right, float)[inside].mean()) * inside.mean()
    return float(gap)


def halves(confidence: Sequence[float], right: Sequence[bool]) -> tuple[float, float]:
    """(accuracy of the more confident half, of the other half); ties are divided evenly, as by chance.

    The half is the expectation over all orders of equal confidences, so the result does not depend on their order.

    >>> halves([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
    (0.75, 0.25)
    """
    confidence, correct = np.asarray(confidence, float), np.asarray(right, float)
    n = len(confidence)
    assert n >= 2
    upper, left = 0.0, n / 2
    for level in np.unique(confidence)[::-1]:
        inside = confidence == level
        taken = min(left, inside.sum())
        upper += correct[inside].mean() * taken
        left -= taken
    return float(upper / (n / 2)), float((correct.sum() - upper) / (n / 2))
