"""Baseline annotators that need no GPU, to compare a model with: chance, markers, nearest profile.

    random            a random assignment of the candidates; right in 1/N of the cells, and in 1/N! of the batches
    markers           counts each candidate's markers among each cell's genes, then takes the assignment with the
                      largest sum (Hungarian method, scipy's linear_sum_assignment)
    nearest           gives every cell the candidate whose mean profile in the training cells is nearest, as
                      cell-by-cell annotation does; labels may repeat
    nearest-assigned  uses the same similarities, but each candidate once (Hungarian method)

The answers have a model's format, with an empty reasoning, and are scored like a model's. Ties are broken at random,
with a seed derived from the seed and the puzzle's id, so the order of cells or candidates does not matter.

Example: answer("markers", puzzles, 0, train)[0][0] == {"id": "test-0", "prediction": "<think></think>\\n<answer>..."}
"""

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from data.atlas.markers import as_in_table, read_markers
from data.audit import audit
from data.distill.embedded_teacher import MarkerTable, marker_table
from data.errors import UserError
from data.puzzles import Puzzle
from eval.metrics import answer_of
from reward.cellpuzzles import normalise_label
from rollout import stable_seed

BASELINES = ("random", "markers", "nearest", "nearest-assigned")
NEEDS_TRAINING = ("nearest", "nearest-assigned")


def answer(
    name: str, puzzles: Sequence[Puzzle], seed: int, train: Sequence[Puzzle] | None = None
) -> tuple[list[dict], list[str]]:
    """(rows {id, prediction} in puzzle order, candidates that the baseline has no knowledge of).

    name: one of BASELINES. train: puzzles to learn from: profiles, and the markers of labels that
    data/atlas/markers.tsv lacks. Raises UserError for another name, for an open-ended puzzle, and for a baseline that
    needs training puzzles and has none.
    """
    if name not in BASELINES:
        raise UserError(f"--baseline {name}: choose one of {', '.join(BASELINES)}")
    if name in NEEDS_TRAINING and not train:
        raise UserError(f"--baseline {name}: learns from training puzzles; name their file with --train")
    without = next((puzzle.id for puzzle in puzzles if not puzzle.candidates), None)
    if without is not None:
        raise UserError(
            f"puzzle {without} has no candidates (open-ended), and a baseline can only choose among candidates"
        )
    labels = {label for puzzle in puzzles for label in puzzle.candidates}
    fit, known = _nothing_known, {normalise_label(label) for label in labels}
    if name == "markers":
        table = known_markers(train or ())
        fit, known = partial(overlap, table=table), table.keys()
    elif name in NEEDS_TRAINING:
        profiles = Profiles(train)
        fit, known = profiles.similarity, profiles.types.keys()
    pick = each_by_itself if name == "nearest" else one_to_one
    rows = [
        {"id": p.id, "prediction": answer_of(assign(p, fit(p), pick, stable_seed(seed, name, p.id)))} for p in puzzles
    ]
    return rows, sorted(label for label in labels if normalise_label(label) not in known)


def cautions(name: str | None, puzzles: Sequence[Puzzle], train: Sequence[Puzzle] | None) -> list[str]:
    """Reasons to distrust a baseline's numbers: leaks from its training puzzles, or genes that it does not know.

    name: None where no baseline answers.
    """
    if name in (None, "random"):
        return []
    leaks = audit({"--train": train, "--puzzles": puzzles}).leaks if train else ()
    notes = [f"the training puzzles leak into these, so expect too good numbers: {'; '.join(leaks)}"] if leaks else []
    markers = known_markers(train or ()).values() if name == "markers" else ()
    known = {gene for genes in markers for gene in genes}
    if name in NEEDS_TRAINING:
        known = {gene for puzzle in train or () for cell in puzzle.cells for gene in cell}
    cells = [cell for puzzle in puzzles for cell in puzzle.cells]
    strange = sum(known.isdisjoint(cell) for cell in cells)
    if 2 * strange > len(cells):
        notes.append(
            f"{strange:,} of {len(cells):,} cells list no gene that baseline {name} knows, so their labels are chance; "
            f"it knows {', '.join(sorted(known)[:3])} and others, and these may be of another species or written in "
            "another way"
        )
    return notes


def assign(puzzle: Puzzle, fit: np.ndarray, pick: Callable[[np.ndarray], Sequence[int]], seed: int) -> list[str]:
    """[cells] labels.

    fit: [cells, candidates], larger is better. pick: gives the column of each row; it gets rows and columns shuffled,
    so that ties are broken at random.
    """
    rng = random.Random(seed)
    cells, candidates = list(range(fit.shape[0])), list(range(fit.shape[1]))
    # scipy breaks ties by position, so the positions must be random
    rng.shuffle(cells)
    rng.shuffle(candidates)
    labels = [""] * len(cells)
    for cell, column in zip(cells, pick(fit[np.ix_(cells, candidates)]), strict=True):
        labels[cell] = puzzle.candidates[candidates[column]]
    return labels


def one_to_one(fit: np.ndarray) -> list[int]:
    """[cells] the column of each row in the one-to-one assignment with the largest sum (cells <= candidates)."""
    return [int(column) for column in linear_sum_assignment(fit, maximize=True)[1]]


def each_by_itself(fit: np.ndarray) -> list[int]:
    """[cells] the best column of each row."""
    return [int(column) for column in fit.argmax(axis=1)]


def known_markers(train: Iterable[Puzzle]) -> MarkerTable:
    """{normalised label: marker genes} from data/atlas/markers.tsv; for labels not in it, learned from `train`."""
    learned = {normalise_label(label): genes for label, genes in marker_table(train).items()}
    # the table wins, also for a label that the puzzles write with other capitals
    return learned | {normalise_label(label): list(entry.markers) for label, entry in read_markers().items()}


def overlap(puzzle: Puzzle, table: MarkerTable) -> np.ndarray:
    """[cells, candidates] number of the candidate's markers among the cell's genes; 0 for a label without markers."""
    cells = [as_in_table(genes) for genes in puzzle.cells]
    markers = [as_in_table(table.get(normalise_label(label), ())) for label in puzzle.candidates]
    return np.array([[len(genes & of_label) for of_label in markers] for genes in cells], dtype=float)


def _nothing_known(puzzle: Puzzle) -> np.ndarray:
    return np.zeros((len(puzzle.cells), len(puzzle.candidates)))


class Profiles:
    """The mean expression profile of each cell type of the training puzzles, as far as ranked gene lists show it.

    The gene at rank r (from 0) of M has the weight (M - r) / M: 1 for the first, 1 / M for the last, 0 for genes not
    listed. A type's profile is the mean over its training cells; the similarity is the cosine.
    """

    def __init__(self, train: Sequence[Puzzle]) -> None:
        """train: at least one puzzle. A cell that is in several puzzles counts once per puzzle."""
        pairs = [pair for puzzle in train for pair in zip(puzzle.cells, puzzle.answer, strict=True)]
        self.genes = {gene: i for i, gene in enumerate(dict.fromkeys(g for cell, _ in pairs for g in cell))}
        self.types = {label: i for i, label in enumerate(dict.fromkeys(normalise_label(label) for _, label in pairs))}
        of_cell = np.array([self.types[normalise_label(label)] for _, label in pairs])
        cells = self.vectors([cell for cell, _ in pairs])
        # [types, cells] membership, so that one sparse product sums the cells of every type
        member = csr_matrix((np.ones(len(pairs)), (of_cell, np.arange(len(pairs)))), (len(self.types), len(pairs)))
        means = (member @ cells).toarray() / np.bincount(of_cell)[:, None]
        self.profiles = means / np.linalg.norm(means, axis=1, keepdims=True)
        """[types, genes] unit vectors."""

    def vectors(self, cells: Sequence[Sequence[str]]) -> csr_matrix:
        """[cells, genes] sparse rank weights. Genes that no training cell lists are left out."""
        rows, columns, weights = [], [], []
        for row, cell in enumerate(cells):
            for rank, gene in enumerate(cell):
                if gene in self.genes:
                    rows.append(row)
                    columns.append(self.genes[gene])
                    weights.append((len(cell) - rank) / len(cell))
        return csr_matrix((weights, (rows, columns)), (len(cells), len(self.genes)))

    def similarity(self, puzzle: Puzzle) -> np.ndarray:
        """[cells, candidates] cosines; 0 for a candidate without training cells, or a cell without a known gene."""
        cells = self.vectors(puzzle.cells)
        lengths = np.sqrt(np.asarray(cells.multiply(cells).sum(axis=1)).ravel())
        found = np.zeros((len(puzzle.cells), len(puzzle.candidates)))
        for column, label in enumerate(puzzle.candidates):
            place = self.types.get(normalise_label(label))
            if place is not None:
                # profiles are unit vectors: only the cell's own length is left to divide by
                found[:, column] = cells @ self.profiles[place] / np.where(lengths > 0, lengths, 1.0)
        return found
