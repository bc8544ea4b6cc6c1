"""From answers to labels: votes of clusters, their beliefs, one label per cluster with its share and second choice.

Only answers of a valid format vote, and of their labels only the candidates of the sample; so a label outside them is
never written. A candidate that the puzzle did not offer counts: a trained model that names it against the question has a
reason. Without candidates (open-ended) every label of a valid answer votes.

Shapes: C clusters, M labels, N cells of a puzzle.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from data.prompts import normalise_label
from eval.annotate.questions import VOTE, Question
from reward.cellpuzzles import parse_response

SHARING = ("auto", "always", "never")
"""May two clusters have one label: where the votes say so, never (one-to-one always), or regardless of the others."""


@dataclass(frozen=True)
class Reading:
    """An answer to a question, read."""

    question: Question
    text: str
    labels: tuple[str | None, ...]
    """[N] the label of each cell, as the candidates spell it; None for one that is no candidate. Empty when the format
    is invalid."""
    problem: str
    """What is wrong with the format; "" when it is valid."""


def read_answer(question: Question, text: str) -> Reading:
    """The labels of one answer. Never raises."""
    puzzle = question.puzzle
    parsed = parse_response(text, len(puzzle.cells))
    known = {normalise_label(label): label for label in question.labels}
    labels = tuple(known.get(normalise_label(x)) if known else x for x in parsed.labels)
    return Reading(question, text, labels, parsed.problem)


def beliefs(readings: Iterable[Reading], clusters: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """[C, M] the share of the puzzles that offered a label to a cluster in which the cluster got it.

    A label that the cluster got without an offer counts as offered. One imagined puzzle, in which chance decides, is
    counted with the real ones: so a label that was never offered stays possible, and one win of one is worth less than
    nine of nine.
    """
    row, column = ({name: i for i, name in enumerate(names)} for names in (clusters, labels))
    won, offered = np.zeros((len(clusters), len(labels))), np.zeros((len(clusters), len(labels)))
    chance = 0.0
    for reading in readings:
        chance = max(chance, 1 / max(1, len(reading.question.puzzle.candidates)))
        at = [column[label] for label in reading.question.puzzle.candidates if label in column]
        for cluster, label in zip(reading.question.clusters, reading.labels, strict=False):
            if cluster in row and label in column:
                offered[row[cluster], at] += 1
                offered[row[cluster], column[label]] += column[label] not in at
                won[row[cluster], column[label]] += 1
    return (won + chance) / (offered + 1)


@dataclass
class Tally:
    """The votes of one cluster."""

    votes: Counter = field(default_factory=Counter)
    """{label: answers that gave it to the cluster}"""
    by_sample: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    """{sample: its part of `votes`}"""
    asked: int = 0
    """Answers about the cluster, invalid ones too."""

    @property
    def valid(self) -> int:
        """Votes in all."""
        return sum(self.votes.values())

    def share_of_answers(self, label: str | None) -> float:
        """The share of all answers about the cluster that gave it the label; one that cannot be used gave none."""
        return self.votes[label] / self.asked if self.asked else 0.0


def count_votes(readings: Iterable[Reading], clusters: Sequence[str]) -> dict[str, Tally]:
    """{cluster: its votes}, from the answers of the second stage, pooled over samples.

    Open-ended labels that differ only in case or white space are one label, in their commonest spelling.
    """
    tallies = {cluster: Tally() for cluster in clusters}
    spelled: dict[str, Counter] = defaultdict(Counter)
    given: list[tuple[str, str, str]] = []
    for reading in readings:
        if reading.question.stage != VOTE:
            continue
        for cluster in reading.question.clusters:
            tallies[cluster].asked += 1
        for cluster, label in zip(reading.question.clusters, reading.labels, strict=False):
            if label is not None:
                key = normalise_label(label)
                spelled[key][" ".join(label.split())] += 1
                given.append((cluster, reading.question.sample, key))
    for cluster, sample, key in given:
        label = spelled[key].most_common(1)[0][0]
        tallies[cluster].votes[label] += 1
        tallies[cluster].by_sample[sample][label] += 1
    return tallies


def decide(votes: np.ndarray, sharing: str) -> list[int | None]:
    """[C] the column of each cluster's label; None for a cluster without votes, or left over by "always".

    votes: [C, M]. sharing: one of SHARING.
    - "never": each cluster its favourite (most votes; ties go to the smaller column).
    - "always": the one-to-one assignment with most votes; a cluster that it gives a label without a vote gets none.
    - "auto": a cluster with more than half of its votes for one label keeps it, whoever else has it. The others are
      undecided: they are matched one-to-one to the labels that no decided cluster has. A cluster takes the label that it
      gets so if it has at least half as many votes as its favourite; otherwise it keeps its favourite.

    >>> votes = np.array([[6, 2, 0], [5, 3, 0], [3, 0, 3]])  # clusters 0 and 1 are both of type 0
    >>> decide(votes, "never"), decide(votes, "always"), decide(votes, "auto")
    ([0, 0, 0], [0, 1, 2], [0, 0, 2])
    """
    total = votes.sum(axis=1)
    favourites = [int(row.argmax()) if n else None for row, n in zip(votes, total, strict=True)]
    if sharing == "never":
        return favourites
    decided = [sharing == "auto" and n > 0 and 2 * row.max() > n for row, n in zip(votes, total, strict=True)]
    open_rows = [i for i, known in enumerate(decided) if not known]
    taken = {favourites[i] for i, known in enumerate(decided) if known}
    free = [j for j in range(votes.shape[1]) if j not in taken]
    found = list(favourites) if sharing == "auto" else [None] * len(favourites)
    if open_rows and free:
        rows, columns = linear_sum_assignment(votes[np.ix_(open_rows, free)], maximize=True)
        for i, j in zip(rows, columns, strict=True):
            row, own = votes[open_rows[i]], votes[open_rows[i], free[j]]
            if own > 0 and (sharing == "always" or 2 * own >= row.max()):
                found[open_rows[i]] = free[j]
    return found


@dataclass(frozen=True, kw_only=True)
class ClusterLabel:
    """What the votes say of one cluster."""

    cluster: str
    label: str | None
    """None when nothing voted for a label."""
    second: str | None
    """The label with most votes after `label`."""
    share: float
    """Share of the cluster's votes that `label` got."""
    tally: Tally


def label_clusters(tallies: dict[str, Tally], sharing: str) -> dict[str, ClusterLabel]:
    """{cluster: its label}. sharing: see `decide`."""
    labels = sorted({label for tally in tallies.values() for label in tally.votes})
    votes = np.array([[tally.votes[label] for label in labels] for tally in tallies.values()], dtype=float)
    chosen = decide(votes.reshape(len(tallies), len(labels)), sharing)
    found = {}
    for (cluster, tally), column in zip(tallies.items(), chosen, strict=True):
        label = None if column is None else labels[column]
        others = sorted((other for other in tally.votes if other != label), key=lambda other: -tally.votes[other])
        share = tally.votes[label] / tally.valid if label is not None else 0.0
        second = others[0] if others else None
        found[cluster] = ClusterLabel(cluster=cluster, label=label, second=second, share=share, tally=tally)
    return found
