"""The top genes of cells, or of cell types, in the order in which a puzzle lists them.

--rank expression   by expression, as in the paper (arXiv:2506.02911, section 3.1)
--rank hvg          the same, among the highly variable genes of the train cells (ours)
--rank deg          by how far a gene lies above the mean of the cell's donor and batch (ours); with --profile cluster,
                    how far a type's mean lies above the mean of the types there
--profile cell      one cell stands for its type
--profile cluster   the mean of the type's cells, the paper's "cluster centroid"

Axes: G genes (columns of the layer), U distinct gene names, M genes listed per cell. A profile is what gets one gene
list: a cell, or the mean of several.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from data.build.matrix import Block, Matrix, open_matrix
from data.meaning.genes import gene_table
from data.meaning.values import check_values, gene_blocks, value_kind

GENE_CLASSES = {
    "ribosomal": re.compile(r"RP[LS]\d+[AXYL]{0,2}\d*$|RPLP\d$|RPSA$", re.IGNORECASE),
    "mitochondrial": re.compile(r"MT-", re.IGNORECASE),
}
"""Gene class -> pattern for the beginning of its symbols, human (RPL3) or mouse (Rpl3)."""
RANKS = ("expression", "hvg", "deg")
PROFILES = ("cell", "cluster")
COUNTS_PER_CELL = 1e4
"""The sum to which a cell's counts are scaled before cells are compared or averaged."""
MEANS_PER_BLOCK = 16_000_000
"""Values of mean profiles in memory at once (float64)."""
SAME_LEVEL = 1e-9
"""A relative difference of two levels of expression below this is rounding error, not biology."""
HVG_BINS = 20
"""Bins of mean expression within which dispersions are compared."""

Scale = Callable[[np.ndarray], np.ndarray]
Advance = Callable[[int], None]


class Profile(NamedTuple):
    """A cell, or several cells whose mean is ranked: it gets one gene list."""

    group: int
    """Number of its donor and batch."""
    rows: np.ndarray
    """Rows of the file, increasing. One row: that cell; several: their mean."""


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """How genes are ranked. The fields have the names and meaning of those of data.build.settings.BuildConfig."""

    top_genes: int
    layer: str = "auto"
    gene_key: str = "feature_name"
    allow_scaled: bool = False
    drop_genes: Sequence[str] = ()
    rank: str = "expression"
    hvg_genes: int = 2000


@dataclass(frozen=True)
class Genes:
    """The genes of a layer by name. Several columns may have the same name."""

    names: np.ndarray
    """[U] distinct names in alphabetical order, which is the order of ties."""
    ids: np.ndarray
    """[G] index into names of each column."""
    shared: np.ndarray
    """[U] bool, True for names that several columns have."""
    listed: np.ndarray
    """[U] bool, False for genes that are never listed."""
    is_gene: np.ndarray | None
    """[G] bool, False for columns that are no genes (tags, spike-ins), which are not read. None when all are genes."""
    notes: list[str]
    """Sentences for the report."""

    def of_cell(self, columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(distinct indices into names, values) of a cell's columns; the largest value of columns with one name."""
        ids = self.ids[columns]
        several = np.flatnonzero(self.shared[ids])  # few names are shared, so most cells return here
        if len(several) < 2:
            return ids, values
        several = several[np.lexsort((-values[several], ids[several]))]
        smaller = several[1:][ids[several[1:]] == ids[several[:-1]]]
        return np.delete(ids, smaller), np.delete(values, smaller)

    def ranked(self, ids: np.ndarray, scores: np.ndarray, n_top: int) -> list[str]:
        """Names of the n_top genes with the largest scores. ids: distinct indices into names."""
        wanted = self.listed[ids]
        if not wanted.all():
            ids, scores = ids[wanted], scores[wanted]
        if len(scores) > n_top:  # sort only the largest scores; entries that tie with the last one must stay
            head = scores >= np.partition(scores, -n_top)[-n_top]
            ids, scores = ids[head], scores[head]
        # by score, then by id; ids are in alphabetical order of names, so ties are too
        return self.names[ids[np.lexsort((ids, -scores))][:n_top]].tolist()


def top_genes(path: str | os.PathLike, rows: Sequence[int], n_top: int, **settings) -> list[list[str]]:
    """The top genes of some cells: [len(rows)][<= n_top] gene names, most expressed first. settings: as RankSettings.

    A gene that is not expressed (value <= 0) is never listed, so a list may be short or empty. Equal values are ordered
    by gene name. With rank="deg" cells are compared with the mean of the given cells. Raises UserError, with the
    layer's name, when the rows hold NaN or negative values: scaled data cannot be ranked by expression.
    """
    distinct, back = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)  # blocks need increasing rows
    profiles = [Profile(0, distinct[i : i + 1]) for i in range(len(distinct))]
    asked = RankSettings(top_genes=n_top, **settings)
    with open_matrix(path, asked.layer) as matrix:
        is_gene = genes_of(matrix, asked).is_gene
        kind = value_kind(matrix, distinct, asked.allow_scaled, is_gene) if len(distinct) else None
    ranked = ranked_genes(path, profiles, distinct, [distinct], kind, asked)
    return [ranked[i] for i in back]


def ranked_genes(
    path: str | os.PathLike,
    profiles: Sequence[Profile],
    train_rows: np.ndarray,
    peers: Sequence[np.ndarray],
    kind: str | None,
    settings: RankSettings,
    advance: Advance = lambda n_rows: None,
) -> list[list[str]]:
    """[len(profiles)][<= M] gene names of each profile, in one or a few passes over the file.

    train_rows: cells from which --rank hvg learns which genes vary.
    peers: [groups] increasing rows of cells; --rank deg compares single cells with their mean. Empty when it compares
        the profiles of a group with each other.
    kind: the result of value_kind; None when there is no cell. advance(n_rows) is called when rows have been read.
    """
    if not profiles:
        return []
    assert kind is not None
    with open_matrix(path, settings.layer) as matrix:
        genes = genes_of(matrix, settings)
        reader = Reader(matrix, settings.allow_scaled, advance, genes.is_gene)
        if settings.rank == "hvg":
            genes.listed[~highly_variable(reader, genes, train_rows, kind, settings.hvg_genes)] = False
        if all(len(profile.rows) == 1 for profile in profiles) and (peers or settings.rank != "deg"):
            return _rank_cells(reader, genes, profiles, peers, kind, settings)
        return _rank_means(reader, genes, profiles, kind, settings)


def genes_of(matrix: Matrix, settings: RankSettings) -> Genes:
    """The genes of a layer. Genes of the dropped classes are marked as not listed.

    Raises UserError as data.meaning.genes.gene_table does.
    """
    table = gene_table(matrix, settings.gene_key)
    names, ids, copies = np.unique(table.names.astype(str), return_inverse=True, return_counts=True)
    listed, notes = np.ones(len(names), dtype=bool), list(table.notes)
    for kind in settings.drop_genes:
        dropped = np.array([GENE_CLASSES[kind].match(name) is not None for name in names])
        if not dropped.any():
            notes.append(f"--drop-genes {kind}: no gene has such a name, so nothing is dropped")
        listed &= ~dropped
    return Genes(names.astype(object), ids, copies > 1, listed, None if table.is_gene.all() else table.is_gene, notes)


def scale_for(kind: str) -> Scale:
    """The function that makes cells comparable: counts are scaled to the sum COUNTS_PER_CELL, other values are kept."""
    if kind not in ("counts", "fractional counts"):
        return lambda values: values
    return lambda values: values * (COUNTS_PER_CELL / total) if (total := values.sum()) > 0 else values


def log_for(kind: str) -> Scale:
    """The function to the log scale on which expression is compared: log(1 + x), or nothing for log counts."""
    return (lambda values: values) if kind == "log counts" else np.log1p


def _compose(outer: Scale, inner: Scale) -> Scale:
    return lambda values: outer(inner(values))


@dataclass(frozen=True)
class Reader:
    """Reads rows of a layer, refuses values that cannot be ranked, and reports progress."""

    matrix: Matrix
    allow_scaled: bool | None
    """As data.meaning.values.check_values takes it."""
    advance: Advance
    is_gene: np.ndarray | None = None
    """[G] bool: the columns that are read. None: all."""

    def rows(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(row, columns, values) of the expressed genes of each row."""
        for block in gene_blocks(self.matrix, rows, self.is_gene):
            yield from self._of(block)
            self.advance(len(block.rows))

    def _of(self, block: Block) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        check_values(self.matrix, block, self.allow_scaled)
        for i, row in enumerate(block.rows.tolist()):
            yield row, *block.row(i)


def _rank_cells(
    reader: Reader,
    genes: Genes,
    profiles: Sequence[Profile],
    peers: Sequence[np.ndarray],
    kind: str,
    settings: RankSettings,
) -> list[list[str]]:
    """Gene lists of single cells, in one pass over the file.

    --rank deg makes two passes, one for the means of groups and one for the cells, over as many groups at a time as
    have room for their means.
    """
    groups, is_deg = _indices_by_group(profiles), settings.rank == "deg"
    # a mean has U values per group: take only as many groups at a time as fit in memory
    most = max(1, MEANS_PER_BLOCK // len(genes.names)) if is_deg else len(groups)
    level = _compose(log_for(kind), scale_for(kind))
    ranked: list[list[str]] = [[]] * len(profiles)
    for start in range(0, len(groups), most):
        members = list(chain.from_iterable(groups[start : start + most]))
        place: dict[int, list[int]] = {}  # {row: profiles}: a cell that was drawn for two splits is read once
        for i in members:
            place.setdefault(int(profiles[i].rows[0]), []).append(i)
        group_of = {int(profiles[i].rows[0]): profiles[i].group for i in members}
        means = _group_means(reader, genes, {g: peers[g] for g in group_of.values()}, level) if is_deg else {}
        for row, columns, values in reader.rows(np.array(sorted(place), dtype=np.int64)):
            if is_deg:
                ids, scores = _above_mean(means[group_of[row]], *genes.of_cell(columns, level(values)))
            else:
                ids, scores = genes.of_cell(columns, values)
            listed = genes.ranked(ids, scores, settings.top_genes)
            for i in place[row]:
                ranked[i] = listed
    return ranked


def _above_mean(mean: np.ndarray, ids: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, difference from the mean) of the genes whose level lies above the mean."""
    differences = levels - mean[ids]
    above = differences > SAME_LEVEL * levels
    return ids[above], differences[above]


def _group_means(reader: Reader, genes: Genes, peers: dict[int, np.ndarray], level: Scale) -> dict[int, np.ndarray]:
    """{group: [U] mean level of expression over its peer cells}."""
    rows = np.concatenate(list(peers.values()))
    owner = np.repeat(np.arange(len(peers)), [len(of_group) for of_group in peers.values()])
    order = np.argsort(rows, kind="stable")
    return dict(zip(peers, mean_levels(reader, genes, rows[order], owner[order], len(peers), level), strict=True))


def mean_levels(
    reader: Reader, genes: Genes, rows: np.ndarray, owner: np.ndarray, n_groups: int, level: Scale
) -> np.ndarray:
    """[n_groups, U] float64 mean level of expression of groups of cells, in one pass over their rows.

    rows: increasing. owner: [len(rows)] the group of each row. level: from a cell's values to those that are averaged.
    """
    means = np.zeros((n_groups, len(genes.names)))
    n_cells = np.bincount(owner, minlength=n_groups)
    for group, (_, columns, values) in zip(owner.tolist(), reader.rows(rows), strict=True):
        ids, levels = genes.of_cell(columns, level(values))
        means[group][ids] += levels / n_cells[group]  # genes that are not stored count as 0
    return means


def _rank_means(
    reader: Reader, genes: Genes, profiles: Sequence[Profile], kind: str, settings: RankSettings
) -> list[list[str]]:
    """Gene lists of mean profiles, for as many groups at a time as fit in memory."""
    scale, log = scale_for(kind), log_for(kind)
    ranked: list[list[str]] = [[]] * len(profiles)
    for members in _blocks_of_groups(profiles, max(1, MEANS_PER_BLOCK // len(genes.names))):
        # owner[k] is the profile, numbered within the block, to which the k-th of all its rows belongs
        owner = np.concatenate([np.full(len(profiles[i].rows), n) for n, i in enumerate(members)])
        rows = np.concatenate([profiles[i].rows for i in members])
        order = np.argsort(rows, kind="stable")
        # rows are read once and in increasing order, whatever the profiles to which they belong
        distinct, first = np.unique(rows[order], return_index=True)
        owners = np.split(owner[order], first[1:])
        means = np.zeros((len(members), len(genes.names)))
        for (_, columns, values), of_row in zip(reader.rows(distinct), owners, strict=True):
            ids, values = genes.of_cell(columns, scale(values))
            for n in of_row:  # a cell may belong to profiles of two splits
                means[n, ids] += values
        means /= np.array([[len(profiles[i].rows)] for i in members])
        of_group: dict[int, np.ndarray] = {}
        if settings.rank == "deg":
            for number in {profiles[i].group for i in members}:
                in_group = [m for m, j in enumerate(members) if profiles[j].group == number]
                of_group[number] = log(means[in_group]).mean(axis=0)
        for n, i in enumerate(members):
            scores, least = means[n], 0.0
            if settings.rank == "deg":
                scores, least = log(means[n]) - of_group[profiles[i].group], SAME_LEVEL * log(means[n])
            listed = np.flatnonzero((scores > least) & (means[n] > 0) & genes.listed)
            order = listed[np.lexsort((listed, -scores[listed]))][: settings.top_genes]
            ranked[i] = genes.names[order].tolist()
    return ranked


def _indices_by_group(profiles: Sequence[Profile]) -> list[list[int]]:
    """Indices of the profiles of each group."""
    by_group: dict[int, list[int]] = {}
    for i, profile in enumerate(profiles):
        by_group.setdefault(profile.group, []).append(i)
    return list(by_group.values())


def _blocks_of_groups(profiles: Sequence[Profile], most: int) -> Iterator[list[int]]:
    """Indices of the profiles in blocks of whole groups, at most `most` profiles each unless one group has more."""
    block: list[int] = []
    for members in _indices_by_group(profiles):
        if block and len(block) + len(members) > most:
            yield block
            block = []
        block = block + members
    yield block


def highly_variable(reader: Reader, genes: Genes, rows: np.ndarray, kind: str, n_genes: int) -> np.ndarray:
    """[U] bool: the n_genes genes with the largest normalised dispersion over the cells `rows`.

    As scanpy's flavor 'seurat' (Satija et al. 2015, doi:10.1038/nbt.3192): dispersion is log(variance / mean) of the
    scaled expression, standardised within HVG_BINS bins of log(1 + mean). Logarithms are taken to be ln(1 + x), as scanpy
    takes them; of values with base 2 or 10 about one gene in ten is another.
    """
    scale = scale_for(kind)
    total, squares = np.zeros(len(genes.names)), np.zeros(len(genes.names))  # [U] sums over cells: one pass, no matrix
    for _, columns, values in reader.rows(rows):
        ids, values = genes.of_cell(columns, np.expm1(values) if kind == "log counts" else scale(values))
        total[ids] += values
        squares[ids] += values**2
    mean = total / len(rows)
    # unbiased variance; rounding can make the difference slightly negative
    variance = np.maximum(squares / len(rows) - mean**2, 0) * len(rows) / max(1, len(rows) - 1)
    seen = np.flatnonzero((mean > 0) & (variance > 0))
    if not len(seen):
        return np.zeros(len(mean), dtype=bool)
    dispersion, level = np.log(variance[seen] / mean[seen]), np.log1p(mean[seen])
    edges = np.linspace(level.min(), level.max(), HVG_BINS + 1)[1:-1]
    bins = np.digitize(level, edges)
    normalised = np.empty(len(seen))
    for number in np.unique(bins):
        inside = bins == number
        spread = dispersion[inside].std(ddof=1) if inside.sum() > 1 else 0.0
        centre = dispersion[inside].mean() if spread > 0 else 0.0
        # as in scanpy, a gene that is alone in its bin counts as one standard deviation above the mean
        normalised[inside] = (dispersion[inside] - centre) / spread if spread > 0 else 1.0
    best = seen[np.lexsort((seen, -normalised))][:n_genes]
    chosen = np.zeros(len(mean), dtype=bool)
    chosen[best] = True
    return chosen
