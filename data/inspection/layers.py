"""Which matrix of a file holds counts, log-normalised or scaled values, judged from a sample of it."""

import os

import numpy as np

from data.build.matrix import LARGEST_LOG, Matrix, open_matrix, row_blocks, value_kind
from data.errors import UserError
from data.inspection.facts import LayerFacts

SAMPLE_ROWS = 64
"""Cells whose sums are compared."""
SPOTS, SPOT_VALUES = 8, 20_000
"""Places of a matrix at which stored values are read, and how many at each."""
BUDGET_BYTES = 100_000_000
"""A dense matrix is sampled by whole rows when this many bytes are enough; else by a part of its columns."""
EQUAL_SUMS = 0.01
"""Cells that were scaled to one depth have sums that differ by less than this, as a share of their mean."""
BEST_FIRST = ("counts", "counts with fractions", "log-normalised", "normalised")


def layer_facts(path: str | os.PathLike, layer: str) -> LayerFacts:
    """What one layer holds. A layer that cannot be read is described, too."""
    try:
        with open_matrix(path, layer) as matrix:
            try:
                values = _kind(matrix)
            except UserError as error:
                kind = "scaled" if "scaled" in str(error) else "cannot be used"
                return LayerFacts(layer, kind, False, matrix.encoding, matrix.n_genes, _without_path(error, path))
            empty = int((np.diff(matrix.node["indptr"][:]) == 0).sum()) if matrix.encoding == "csr" else 0
            return LayerFacts(layer, values, values in BEST_FIRST, matrix.encoding, matrix.n_genes, "", empty)
    except UserError as error:
        return LayerFacts(layer, "cannot be read", False, "", 0, _without_path(error, path))


def best_layer(layers: list[LayerFacts]) -> str | None:
    """The layer that a build should read; None when there is none.

    raw.X, or X where there is no raw, as a build does by itself; X where it has more genes than raw; the layer nearest
    to counts where these cannot be ranked.
    """
    usable = {layer.name: layer for layer in layers if layer.usable}
    automatic = "raw" if any(layer.name == "raw" for layer in layers) else "X"
    if automatic in usable:
        if "X" in usable and usable["X"].n_genes > usable[automatic].n_genes:
            return "X"
        return automatic
    return min(usable, key=lambda name: BEST_FIRST.index(usable[name].values), default=None)


def _kind(matrix: Matrix) -> str:
    """The kind of a layer's values. Raises UserError, as a build does, for values that cannot be ranked."""
    stored = _stored(matrix)
    if not np.isfinite(stored).all():
        return "NaN or infinite values"
    if stored.size and stored.min() < 0:
        return "scaled (negative values)"
    if not stored.any():
        return "only zeros"
    if _rows_are_expensive(matrix):
        whole = bool((stored == np.rint(stored)).all())
        return "counts" if whole else "log-normalised" if stored.max() <= LARGEST_LOG else "normalised"
    kind = value_kind(matrix, np.arange(matrix.n_cells))
    if kind == "counts":
        return kind
    rows = np.unique(np.linspace(0, matrix.n_cells - 1, SAMPLE_ROWS).astype(np.int64))
    sums = [
        [values.sum(), np.expm1(np.minimum(values, LARGEST_LOG)).sum()]
        for block in row_blocks(matrix, rows)
        for _, values in map(block.row, range(len(block.rows)))
        if len(values)
    ]
    depth, exp_depth = np.array(sums or [[0.0, 0.0]]).T
    if kind == "log counts":
        # shallow counts with fractions have small values too; logarithms of one depth show in the sums
        fractions = _mostly_whole(stored) and not _equal(exp_depth)
        return "counts with fractions" if fractions else "log-normalised"
    return "normalised" if _equal(depth) else "counts with fractions"


def _equal(sums: np.ndarray) -> bool:
    return bool(sums.std() <= EQUAL_SUMS * sums.mean())


def _mostly_whole(values: np.ndarray) -> bool:
    """Whether half of the values are whole numbers, as where a program took a little ambient RNA off some counts."""
    return bool((values == np.rint(values)).mean() >= 0.5)


def _rows_are_expensive(matrix: Matrix) -> bool:
    """Whether a few whole rows cost more than BUDGET_BYTES, or the whole matrix: CSC is stored by genes."""
    if matrix.encoding == "csc":
        return matrix.node["data"].shape[0] * matrix.node["data"].dtype.itemsize > BUDGET_BYTES // 4
    if matrix.encoding == "csr":
        return False
    chunk = matrix.node.chunks[0] if matrix.node.chunks else 1
    return SPOTS * max(16, chunk) * matrix.n_genes * matrix.node.dtype.itemsize > BUDGET_BYTES


def _stored(matrix: Matrix) -> np.ndarray:
    """A sample of the stored values, from evenly spaced places of the file. Order and place do not matter."""
    if matrix.encoding != "dense":
        data = matrix.node["data"]
        starts = np.linspace(0, max(0, data.shape[0] - SPOT_VALUES), SPOTS).astype(np.int64)
        return np.concatenate([data[start : start + SPOT_VALUES] for start in sorted(set(starts.tolist()))])
    columns = min(matrix.n_genes, 500)
    rows = max(1, min(matrix.n_cells, SPOT_VALUES // columns))
    starts = np.linspace(0, matrix.n_cells - rows, SPOTS).astype(np.int64)
    parts = [matrix.node[start : start + rows, :columns].ravel() for start in sorted(set(starts.tolist()))]
    return np.concatenate(parts)


def _without_path(error: UserError, path: str | os.PathLike) -> str:
    return str(error).removeprefix(f"{path}: ")
