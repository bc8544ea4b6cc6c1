"""What several answers to one puzzle say together: a one-to-one vote, its runner-up, and the cells on which they disagree.

Only answers of a valid format vote; who calls says which these are. Evaluation (eval/metrics.py) and the workflows of
distillation (data/distill/workflow.py) use the same vote.

Shapes: S valid answers, N cells of a puzzle, C candidates.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.prompts import normalise_label


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """One label per cell, and how many of the answers agree with it."""

    labels: list[str]
    """[N] as the candidates spell them; without candidates (open-ended) as first written."""
    shares: list[float]
    """[N] share of the S answers that give the cell this label."""
    votes: np.ndarray
    """[N, C] number of answers that give candidate j to cell i; [N, 0] without candidates."""
    chosen: list[int]
    """[N] the candidate of each cell; empty without candidates."""

    def rival(self) -> list[int] | None:
        """[N] the one-to-one assignment with most votes of all that differ from `chosen`; None when no other got a vote.

        Each of the best assignments without one of the chosen pairs is found, and the best of them is the second best of
        all (Murty 1968, doi:10.1287/opre.16.3.682). It got a vote when an answer agrees with it on a cell where it differs
        from `chosen`. Among equals one that got a vote, then the one that changes the first cell.
        """
        found: tuple[float, bool, list[int]] | None = None
        for cell, column in enumerate(self.chosen):
            others = self.votes.astype(float)
            # so low that no sum of votes makes up for it, and the pair is taken only where there is no other
            others[cell, column] = -1.0 - len(self.chosen) * self.votes.max()
            rival = best_assignment(others)
            total = float(others[np.arange(len(rival)), rival].sum())
            voted = any(
                ours != new and self.votes[i, new] for i, (ours, new) in enumerate(zip(self.chosen, rival, strict=True))
            )
            if rival[cell] != column and (found is None or (total, voted) > found[:2]):
                found = (total, voted, rival)
        return found[2] if found is not None and found[1] else None


def consensus(answers: Sequence[Sequence[str]], candidates: Sequence[str]) -> Consensus | None:
    """The one-to-one assignment of candidates to cells with the largest sum of votes. None without answers.

    answers: [S][N] labels. Labels are compared as in the reward; one that is no candidate is no vote. Without candidates
    each cell takes its most frequent label, the first one among equals.

    >>> found = consensus([["T", "B"], ["T", "B"], ["B", "B"]], ["B", "T"])
    >>> found.labels, [round(share, 2) for share in found.shares]
    (['T', 'B'], [0.67, 1.0])
    >>> found.rival()  # the swap, which got the third answer's vote for cell 1
    [0, 1]
    """
    if not answers:
        return None
    given = np.array([[normalise_label(label) for label in labels] for labels in answers])  # [S, N]
    if not candidates:
        labels = [_most_frequent([of_answer[i] for of_answer in answers]) for i in range(given.shape[1])]
        shares = (given == np.array([normalise_label(label) for label in labels])).mean(axis=0)
        return Consensus(labels=labels, shares=shares.tolist(), votes=np.zeros((given.shape[1], 0), int), chosen=[])
    names = np.array([normalise_label(label) for label in candidates])
    votes = (given[:, :, None] == names).sum(axis=0)  # [N, C]
    chosen = best_assignment(votes)
    shares = [float(votes[i, j]) / len(answers) for i, j in enumerate(chosen)]
    return Consensus(labels=[candidates[j] for j in chosen], shares=shares, votes=votes, chosen=chosen)


def best_assignment(votes: np.ndarray) -> list[int]:
    """[N] the columns of the one-to-one assignment with the largest sum of votes. votes: [N, C], N <= C."""
    from scipy.optimize import linear_sum_assignment  # here: reading puzzles must not wait for it

    _, chosen = linear_sum_assignment(votes, maximize=True)
    return [int(j) for j in chosen]


def _most_frequent(labels: Sequence[str]) -> str:
    """The most frequent label, compared as in the reward and spelled as first written; the first one among equals."""
    keys = [normalise_label(label) for label in labels]
    (winner, _), *_ = Counter(keys).most_common(1)
    return labels[keys.index(winner)]
