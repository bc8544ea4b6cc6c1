"""Which matrix of a file holds counts, log-normalised or scaled values, judged from a sample of it."""

import os

import numpy as np

from data.build.matrix import Matrix, open_matrix
from data.errors import UserError
from data.inspection.facts import LayerFacts
from data.meaning.genes import gene_table
from data.meaning.values import are_negative_counts, kind_of_stored, value_kind

SPOTS, SPOT_VALUES = 8, 20_000
"""Places of a matrix at which stored values are read, and how many at each."""
BUDGET_BYTES = 100_000_000
"""A dense matrix is sampled by whole rows when this many bytes are enough; else by a part of its columns."""
CALLED = {"fractional counts": "counts with fractions", "log counts": "log-normalised"}
"""Kind of values (data/meaning/values.py) -> its name in an inspection, where that is another."""
PROBLEMS = {"one value only": "presence only", "looks scaled": "scaled"}
"""Words of the sentence that refuses a layer -> what the layer holds."""
BEST_FIRST = ("counts", "counts with fractions", "log-normalised", "normalised")


def layer_facts(path: str | os.PathLike, layer: str, gene_key: str = "feature_name") -> LayerFacts:
    """What one layer holds. A layer that cannot be read is described, too. gene_key: tells which columns are genes."""
    try:
        with open_matrix(path, layer) as matrix:
            try:
                values = _kind(matrix, _is_gene(matrix, gene_key))
            except UserError as error:
                kind = next((kind for words, kind in PROBLEMS.items() if words in str(error)), "cannot be used")
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


def _is_gene(matrix: Matrix, gene_key: str) -> np.ndarray | None:
    """[G] bool: False for columns that are no genes, whose values do not matter. None when all are genes."""
    for key in (gene_key, "index"):
        try:
            is_gene = gene_table(matrix, key).is_gene
        except UserError:
            continue
        return None if is_gene.all() else is_gene
    return None


def _kind(matrix: Matrix, is_gene: np.ndarray | None) -> str:
    """The kind of a layer's values. Raises UserError, as a build does, for values that cannot be ranked."""
    stored = _stored(matrix, is_gene)  # values from more places than the rows of value_kind
    if not np.isfinite(stored).all():
        return "NaN or infinite values"
    if stored.size and stored.min() < 0:
        return "negative counts" if are_negative_counts(stored) else "scaled (negative values)"
    if not stored.any():
        return "only zeros"
    if _rows_are_expensive(matrix):
        if stored[stored > 0].min() == stored.max() and (stored > 0).sum() >= SPOT_VALUES:
            return "presence only"
        kind = kind_of_stored(stored[stored > 0].astype(np.float64))
    else:
        kind = value_kind(matrix, np.arange(matrix.n_cells), is_gene=is_gene)
    return CALLED.get(kind, kind)


def _rows_are_expensive(matrix: Matrix) -> bool:
    """Whether a few whole rows cost more than BUDGET_BYTES, or the whole matrix: CSC is stored by genes."""
    if matrix.encoding == "csc":
        return matrix.node["data"].shape[0] * matrix.node["data"].dtype.itemsize > BUDGET_BYTES // 4
    if matrix.encoding == "csr":
        return False
    chunk = matrix.node.chunks[0] if matrix.node.chunks else 1
    return SPOTS * max(16, chunk) * matrix.n_genes * matrix.node.dtype.itemsize > BUDGET_BYTES


def _stored(matrix: Matrix, is_gene: np.ndarray | None) -> np.ndarray:
    """A sample of the stored values of genes, from evenly spaced places of the file. Order and place do not matter."""
    if matrix.encoding == "dense":
        n_columns = min(matrix.n_genes, 500)
        columns = slice(None) if is_gene is None else is_gene[:n_columns]
        rows = max(1, min(matrix.n_cells, SPOT_VALUES // n_columns))
        starts = np.linspace(0, matrix.n_cells - rows, SPOTS).astype(np.int64)
        parts = [matrix.node[start : start + rows, :n_columns][:, columns] for start in sorted(set(starts.tolist()))]
        return np.concatenate([part.ravel() for part in parts])
    data = matrix.node["data"]
    starts = np.linspace(0, max(0, data.shape[0] - SPOT_VALUES), SPOTS).astype(np.int64)
    spans = [slice(start, start + SPOT_VALUES) for start in sorted(set(starts.tolist()))]
    values = np.concatenate([data[span] for span in spans])
    if is_gene is None:
        return values
    if matrix.encoding == "csr":
        columns = np.concatenate([matrix.node["indices"][span] for span in spans])
    else:
        places = np.concatenate([np.arange(*span.indices(data.shape[0])) for span in spans])
        columns = np.searchsorted(matrix.node["indptr"][:], places, side="right") - 1
    return values[is_gene[np.clip(columns, 0, matrix.n_genes - 1)]]  # a build refuses numbers outside


def _without_path(error: UserError, path: str | os.PathLike) -> str:
    return str(error).removeprefix(f"{path}: ")
