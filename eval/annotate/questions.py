"""Puzzles about the clusters of a file: which clusters and which labels stand in a puzzle together.

A model that was trained on CellPuzzles knows one question: N cells of one donor and N labels, each label for one cell.
A user's file has C clusters per sample and M candidate labels, and neither number fits: there are more clusters than a
puzzle holds, more labels than clusters, and often two clusters of one type. So the model is asked in two stages, each
time in the format that it was trained on (a cluster stands in the place of a cell):

Screening. Which labels are plausible for a cluster? Clusters that look different form a set of N; the labels are dealt
    out in hands of N, so that the set meets every label once per pass. In most of these puzzles the true label of a
    cluster is missing, and its answer is noise; but noise spreads over many labels, and the true label wins nearly
    always when it is there. A label's belief is its share of wins among the puzzles that offered it.
Voting. Every round divides the clusters of a sample into sets of N again, and each set gets the N labels of the best
    one-to-one assignment by belief: so each cluster meets its favourite, and the favourites of its neighbours compete
    for it. In even rounds similar clusters meet (correlation of mean profiles), which the model has to tell apart; in
    odd rounds it is chance who meets. Two clusters with the same favourite are kept apart, because one of them would be
    forced to another label: this is what lets two clusters get the same label over all puzzles, though never in one.
    Only the answers of this stage are votes.

The genes of a cluster are listed in turns by expression, as a model of CellPuzzles was trained, and by the difference from
the sample's other clusters, which leaves out what all of them express.

A set that cannot be filled is completed with clusters that have had their turn, so puzzles overlap. The order of cells
and of labels is drawn anew for every puzzle, from the seed and the puzzle's place. A sample of one cluster is asked in
the format of a single cell (data/prompts.py), and without candidates the question is the open-ended one.
Cluster names are in no prompt: an old label that serves as a name would give the answer away.

What was tried instead, on held-out donors of the simulated atlas, is in tests/bench/README.md.

Axes: C clusters of a sample, M candidate labels, N cells of a puzzle.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from data.clusters.profiles import ClusterProfile
from data.puzzles import Puzzle, content_id
from rollout import stable_seed

SCREEN, VOTE = "screen", "vote"
"""The two stages."""
GENES_BY = ("both", "difference", "expression")
"""How the genes of a cluster are ranked in a prompt; both: in turns, a pass or two rounds each."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the clusters of a file are asked about."""

    max_cells: int
    """Most cells of a puzzle."""
    genes_by: str = "both"
    """One of GENES_BY."""
    keep_apart: bool = True
    """May two clusters have the same label, so that those with the same favourite should not meet?"""
    seed: int = 0


@dataclass(frozen=True)
class Question:
    """A puzzle about clusters of one sample."""

    puzzle: Puzzle
    """Its answer is empty: nobody knows it."""
    clusters: tuple[str, ...]
    """[N] the cluster that stands in the place of each cell."""
    stage: str
    """SCREEN or VOTE."""
    sample: str
    """The donor or sample of the clusters."""
    labels: tuple[str, ...] = ()
    """[M] the candidates of the sample, of which the puzzle offers some; () when it is open-ended."""


class SampleQuestions:
    """The questions about one sample. Its clusters are numbered as in `profiles`, its labels as in `labels`."""

    def __init__(self, number: int, profiles: Sequence[ClusterProfile], labels: Sequence[str], layout: Layout) -> None:
        """number: of the sample, for the names of its puzzles. profiles: [C] of this sample. labels: [M]; [] to ask
        open-ended."""
        assert profiles and len(labels) != 1
        self.number, self.profiles, self.labels, self.layout = number, list(profiles), list(labels), layout
        self.size = min(layout.max_cells, len(profiles), len(labels) or layout.max_cells)
        """N."""
        self.likeness = likeness([profile.mean for profile in profiles])

    def screening(self, passes: int) -> list[Question]:
        """Each cluster meets each label `passes` times. [] without candidates."""
        found = []
        hand = self.size if self.size > 1 else min(self.layout.max_cells, len(self.labels))
        for number in range(passes if self.labels else 0):
            rng = self._rng(SCREEN, number)
            sets = divide(self.size, -self.likeness, np.zeros(self.likeness.shape, bool), rng)
            for place, members in enumerate(sets):
                for at, dealt in enumerate(deal(len(self.labels), max(2, hand), rng)):
                    found.append(self._question(SCREEN, f"{number}-{place}-{at}", members, dealt, number))
        return found

    def voting(self, rounds: Sequence[int], belief: np.ndarray) -> list[Question]:
        """A puzzle for every cluster in every round; some clusters are in two of a round.

        belief: [C, M] how plausible each label is, from `beliefs`; [C, 0] without candidates.
        """
        found = []
        apart = np.zeros(self.likeness.shape, bool)
        if self.labels and self.layout.keep_apart:
            favourite = belief.argmax(axis=1)
            apart = (favourite[:, None] == favourite[None, :]) & ~np.eye(len(favourite), dtype=bool)
        for number in rounds:
            rng = self._rng(VOTE, number)
            chance = np.array([[rng.random() for _ in self.profiles] for _ in self.profiles])
            alike = self.likeness if number % 2 == 0 else chance
            for place, members in enumerate(divide(self.size, alike, apart, rng)):
                offered = self._offered(members, belief)
                # two rounds with the same list of genes: one of similar clusters, one of clusters by chance
                found.append(self._question(VOTE, f"{number}-{place}", members, offered, number // 2))
        return found

    def _offered(self, members: list[int], belief: np.ndarray) -> list[int]:
        """The labels that a set is offered: those of the best one-to-one assignment; for one cluster the most plausible."""
        if not self.labels:
            return []
        if len(members) == 1:
            most = max(2, min(self.layout.max_cells, len(self.labels)))
            return np.argsort(-belief[members[0]], kind="stable")[:most].tolist()
        return linear_sum_assignment(belief[members], maximize=True)[1].tolist()

    def _question(self, stage: str, place: str, members: list[int], offered: list[int], turn: int) -> Question:
        """turn: which list of genes is shown, where a cluster has several."""
        rng = self._rng(stage, f"order {place}")
        members, offered = rng.sample(members, len(members)), rng.sample(offered, len(offered))
        of_set = [self.profiles[i] for i in members]
        of_genes = [gene_lists(profile, self.layout.genes_by) for profile in of_set]
        # the clusters of a sample share their donor; where a fact differs, the commonest context stands for all
        (context, _), *_ = Counter(profile.context for profile in of_set).most_common(1)
        puzzle = Puzzle(
            id="",
            context=context,
            cells=[lists[turn % len(lists)] for lists in of_genes],
            candidates=[self.labels[i] for i in offered],
            answer=[],
        )
        name = f"{stage}-{self.number}-{place}-{content_id(puzzle.user_message)}"
        named = Puzzle(id=name, context=context, cells=puzzle.cells, candidates=puzzle.candidates, answer=[])
        return Question(
            named, tuple(profile.cluster for profile in of_set), stage, of_set[0].sample, tuple(self.labels)
        )

    def _rng(self, *names: object) -> random.Random:
        return random.Random(stable_seed("annotate", self.layout.seed, self.number, *names))


def gene_lists(profile: ClusterProfile, genes_by: str) -> list[list[str]]:
    """The lists of genes that describe a cluster in prompts, a prompt showing one of them. genes_by: one of GENES_BY.

    The only cluster of a sample has no difference to others: its expression counts.
    """
    lists = {"expression": profile.by_expression, "difference": profile.by_difference}
    chosen = list(lists.values()) if genes_by == "both" else [lists[genes_by]]
    return [genes for genes in chosen if genes] or [profile.by_expression]


def likeness(means: Sequence[np.ndarray]) -> np.ndarray:
    """[C, C] Pearson correlation of mean profiles; 0 beside a profile that is the same for all genes.

    >>> likeness([np.array([1.0, 2, 3]), np.array([2.0, 4, 6]), np.array([3.0, 2, 1]), np.ones(3)])[0].round(6).tolist()
    [1.0, 1.0, -1.0, 0.0]
    """
    centred = np.array([mean - mean.mean() for mean in means], dtype=float)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(lengths > 0, lengths, 1.0)
    return unit @ unit.T


def divide(size: int, affinity: np.ndarray, apart: np.ndarray, rng: random.Random) -> list[list[int]]:
    """Sets of at most `size` of C clusters that cover all of them; a set grows by who has most affinity to its members.

    affinity: [C, C]. apart: [C, C] bool, symmetric: pairs that must not meet. A set that no waiting cluster fits is
    completed with clusters that are in a set already. Where nobody fits, it stays smaller; but not a single cluster:
    then a pair that should be kept apart meets.

    >>> near = np.array([[0, 0.9, 0.1, 0.2], [0.9, 0, 0.2, 0.1], [0.1, 0.2, 0, 0.8], [0.2, 0.1, 0.8, 0]])
    >>> sorted(map(sorted, divide(2, near, np.zeros((4, 4), bool), random.Random(0))))
    [[0, 1], [2, 3]]
    """
    order = rng.sample(range(len(affinity)), len(affinity))
    waiting, sets = set(order), []
    for first in order:
        if first not in waiting:
            continue
        waiting.remove(first)
        members = [first]
        while len(members) < size:
            kept_apart, near = apart[:, members].any(axis=1), affinity[:, members].mean(axis=1)
            others = [c for c in range(len(affinity)) if c not in members]
            fitting = [c for c in others if not kept_apart[c]]
            if not fitting and len(members) > 1:
                break
            pool = fitting or others
            # who has not had a turn comes first, then who is nearest; ties go to the smaller number
            best = max(pool, key=lambda c: (c in waiting, near[c], -c))
            members.append(best)
            waiting.discard(best)
        sets.append(members)
    return sets


def deal(n: int, size: int, rng: random.Random) -> list[list[int]]:
    """0 .. n-1 in random order in hands of `size`; the last one is completed with numbers of the other hands.

    >>> sorted(map(len, deal(7, 3, random.Random(0))))
    [3, 3, 3]
    """
    order = rng.sample(range(n), n)
    hands = [order[i : i + size] for i in range(0, n, size)]
    others = [i for i in order if i not in hands[-1]]
    hands[-1] += rng.sample(others, min(size - len(hands[-1]), len(others)))
    return hands
