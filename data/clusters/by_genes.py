"""Mean levels of clusters from a matrix that is stored by genes (CSC): two passes over its columns.

Rows of such a matrix cost a walk over all its columns for each few thousand of them (data/build/matrix.py), which is far
too slow for all cells of a large file. The first pass here adds up each cell's counts, the second the levels of each
cluster. The means are those of data.build.rank.mean_levels: each sum has the same terms in the same order.

Axes: R rows that are used, U distinct gene names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.build.matrix import Block, Matrix, column_entries, column_spans, indptr_of
from data.build.rank import COUNTS_PER_CELL, Advance, Genes
from data.meaning.values import check_values


@dataclass(frozen=True)
class MeansByGenes:
    """The means of groups of cells; the counts of the cells are added up once."""

    matrix: Matrix
    genes: Genes
    used: np.ndarray
    """All rows of which means are asked for, increasing."""
    is_log: bool
    """The values are log counts, which are averaged as they are; others are scaled, and their logarithm is averaged."""
    advance: Advance

    @cached_property
    def factors(self) -> np.ndarray:
        """[cells of the file] by what a cell's values are multiplied."""
        totals = np.zeros(self.matrix.n_cells)
        for rows, _, values, _ in self._entries(self.used):
            totals += np.bincount(self.used[rows], weights=values, minlength=len(totals))
        return np.divide(COUNTS_PER_CELL, totals, out=np.ones_like(totals), where=totals > 0)

    def means(self, rows: np.ndarray, owner: np.ndarray, n_groups: int) -> np.ndarray:
        """[n_groups, U] float64 mean levels. rows: increasing, of `used`. owner: [len(rows)] the group of each row."""
        factors = None if self.is_log else self.factors[rows]
        means = np.zeros((n_groups, len(self.genes.names)))
        n_cells = np.bincount(owner, minlength=n_groups)
        several: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # entries of names that several columns have
        for at, columns, values, span in self._entries(rows):
            levels = values if factors is None else np.log1p(values * factors[at])
            ids = self.genes.ids[span]
            shared = self.genes.shared[ids]  # [columns of the span]
            if shared.any():
                apart = shared[columns - span.start]
                several.append((self.genes.ids[columns[apart]], at[apart], levels[apart]))
            groups = owner[at]
            cells = groups * len(ids) + (columns - span.start)
            sums = np.bincount(cells, weights=levels / n_cells[groups], minlength=n_groups * len(ids))
            means[:, ids[~shared]] = sums.reshape(n_groups, len(ids))[:, ~shared]
        if several:
            ids, at, levels = (np.concatenate(parts) for parts in zip(*several, strict=True))
            order = np.lexsort((-levels, at, ids))  # of a cell's columns with one name, the largest value comes first
            ids, at, levels = ids[order], at[order], levels[order]
            first = np.r_[True, (np.diff(ids) != 0) | (np.diff(at) != 0)]
            ids, groups, levels = ids[first], owner[at[first]], levels[first]
            np.add.at(means, (groups, ids), levels / n_cells[groups])
        self.advance(len(rows))
        return means

    def _entries(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, slice]]:
        """(index into rows, column, float64 value) of the expressed genes of some rows, and the columns of this span."""
        indptr = indptr_of(self.matrix)
        position = np.full(self.matrix.n_cells, -1, dtype=np.int32)
        position[rows] = np.arange(len(rows))
        for first, last in column_spans(indptr):
            at, columns, values = column_entries(self.matrix, indptr, position, first, last)
            if self.genes.is_gene is not None:
                kept = self.genes.is_gene[columns]
                at, columns, values = at[kept], columns[kept], values[kept]
            # the entries of a span as those of one row: check_values looks at values only
            whole = Block(rows[:1], np.array([0]), np.array([len(values)]), columns, values)
            check_values(self.matrix, whole, allow_scaled=None)
            values = values.astype(np.float64)
            # the format allows unsorted cells in a column, and several entries of one
            if not ((at[1:] > at[:-1]) | (columns[1:] > columns[:-1])).all():
                keys = columns.astype(np.int64) * len(rows) + at
                keys, back = np.unique(keys, return_inverse=True)
                values = np.bincount(back, weights=values, minlength=len(keys))
                columns, at = keys // len(rows), keys % len(rows)
            if not (expressed := values > 0).all():
                at, columns, values = at[expressed], columns[expressed], values[expressed]
            yield at, columns, values, slice(first, last)
