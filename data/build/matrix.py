"""The expression matrix of an .h5ad file: chosen rows, read in blocks. Memory does not grow with the number of cells.

Axes: C cells of the file, G genes (columns), R rows of a block. Encodings: CSR, CSC and dense.

Names of layers: `X`; `raw` for raw.X; otherwise the name in `layers` (`layers/X` and `layers/raw` for layers that have
one of the first two names). `auto` is raw.X when the file has it, else X.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from data.build.h5ad import (
    RESAVE,
    is_null,
    nested_names,
    open_h5ad,
    open_node,
    table_index,
)
from data.errors import UserError
from data.formats.memory import InMemory
from data.formats.stores import StoreArray, StoreGroup, is_dataset, is_group

NONZEROS_PER_BLOCK = 4_000_000
"""Stored values of a sparse matrix in memory at once."""
DENSE_VALUES_PER_BLOCK = 8_000_000
"""Values of a dense matrix in memory at once."""
CACHE_BYTES = 32 << 20
"""Memory for decompressed chunks, per dataset: a chunk that two blocks share is decompressed once."""


@dataclass(frozen=True)
class Block:
    """Some rows of the matrix, in a layout like CSR. An entry that is not stored is 0."""

    rows: np.ndarray
    """[R] row numbers in the file, increasing."""
    starts: np.ndarray
    stops: np.ndarray
    """[R] where each row's entries begin and end in `columns` and `values`."""
    columns: np.ndarray
    values: np.ndarray
    """Gene number and stored value of each entry. Entries between two rows belong to rows that were not requested."""

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(columns, float64 values) of the expressed genes (value > 0) of the i-th row. Each column occurs once."""
        span = slice(self.starts[i], self.stops[i])
        columns, values = self.columns[span], self.values[span].astype(np.float64)
        # the sparse formats allow unsorted columns, and several entries of one column
        if not (columns[1:] > columns[:-1]).all():
            columns, values = _summed(columns, values)
        expressed = values > 0
        return (columns, values) if expressed.all() else (columns[expressed], values[expressed])


def _summed(columns: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up the entries of each column. The value of a column with several entries is their sum."""
    distinct, index = np.unique(columns, return_inverse=True)
    return (columns, values) if len(distinct) == len(columns) else (distinct, np.bincount(index, weights=values))


@dataclass(frozen=True)
class Matrix:
    """One layer of an open file."""

    path: Path | InMemory
    layer: str
    node: h5py.Group | h5py.Dataset | StoreGroup | StoreArray
    encoding: str
    """csr, csc or dense."""
    n_cells: int
    n_genes: int
    layers: list[str]
    """The names of all layers of the file, for messages."""

    def __str__(self) -> str:
        return f"{self.path}: layer {self.layer!r}"


@contextlib.contextmanager
def open_matrix(path: str | os.PathLike | InMemory, layer: str = "auto") -> Iterator[Matrix]:
    """Open a layer and check its format. Raises UserError, with file and layer, when it cannot be read."""
    with open_h5ad(path, CACHE_BYTES) as file:  # a block may end within a chunk, which the next block needs again
        layer, layers = _resolve_layer(file, layer, path)
        node = open_node(file, _element(layer), path)
        place = path if isinstance(path, InMemory) else Path(path)
        matrix = Matrix(place, layer, node, _encoding(node, f"{path}: layer {layer!r}"), *_shape(node), layers)
        _check_shape(file, matrix)
        yield matrix


def _resolve_layer(file: h5py.File | StoreGroup, layer: str, path) -> tuple[str, list[str]]:
    """(name of the layer, names of all layers of the file)."""
    present = layer_names(file, path)
    wanted = ("raw" if "raw" in present else "X") if layer == "auto" else layer
    if wanted not in present and f"layers/{wanted}" in present:
        wanted = f"layers/{wanted}"
    if wanted not in present:
        empty = " (X is stored as null, which means no matrix)" if wanted == "X" and "X" in file else ""
        remedy = f"--layer can be one of {', '.join(present)}"
        if not present:
            remedy = "the file has no matrix, so add its counts as a layer and name it with --layer"
        elif wanted == "X" and (counts := named_counts(present)):
            remedy = f"take the counts with --layer {shlex.quote(counts)} ({remedy})"
        raise UserError(f"{path}: has no layer {wanted!r}{empty}; {remedy}")
    return wanted, present


def layer_names(file: h5py.File | StoreGroup, path: str | os.PathLike) -> list[str]:
    """The names of the layers of a file: X and raw where they hold a matrix, then the members of `layers` by name."""
    raw, layers = (open_node(file, name, path) for name in ("raw", "layers"))
    present = ["X"] if "X" in file and not is_null(file, "X") else []
    present += ["raw"] if is_group(raw) and "X" in raw and not is_null(raw, "X") else []
    named = [n for n in layers if isinstance(n, str)] if is_group(layers) else []
    named = [leaf for n in named for leaf in nested_names(layers, n) if not is_null(layers, leaf)]
    return present + [f"layers/{n}" if n in ("X", "raw") else n for n in sorted(named)]


def note_on_raw(matrix: Matrix, asked: str) -> list[str]:
    """A note when the layer that --layer auto takes, raw, has fewer genes than X. asked: the value of --layer."""
    if asked != "auto" or matrix.layer != "raw" or "X" not in matrix.layers:
        return []
    n_genes = table_index(matrix.node.file, "var", matrix.path).shape[0]
    if matrix.n_genes >= n_genes:
        return []
    return [
        f"the layer raw is read and has {matrix.n_genes} genes, fewer than the {n_genes} of X; --layer X reads those"
    ]


def likely_counts(layers: Sequence[str]) -> str | None:
    """The layer whose name says that it holds counts, or the only layer; else None."""
    return named_counts(layers) or (layers[0] if len(layers) == 1 else None)


def named_counts(layers: Sequence[str]) -> str | None:
    """The layer whose name says that it holds counts, else None."""
    named = [name for name in layers if "count" in name.lower() or name.lower() in ("umi", "umis", "raw")]
    # of "counts" and "normalised_counts" the shorter name is the plain one
    return min(named, key=len) if named else None


def other_layers(matrix: Matrix, wanted: str = "values that can be ranked") -> str:
    """The remedy, for a message, for a layer that cannot be used: the other matrices of the file, if there are any."""
    others = sorted(name for name in matrix.layers if name != matrix.layer)
    others.sort(key=lambda name: (name != "raw", name != likely_counts(others)))
    if others:
        named = " or ".join(f"--layer {shlex.quote(name)}" for name in others[:2])
        return f"choose {wanted} with {named}" + (f" (this file has {', '.join(matrix.layers)})" if others[2:] else "")
    if places := _matrices_elsewhere(matrix):
        name = places[0]
        return (
            f"this file has no other layer, but obsm[{name!r}] has a column for each gene: copy it "
            f"(adata.layers[{name!r}] = adata.obsm[{name!r}]), save the file and name it with --layer"
        )
    return "this file has no other matrix, so add its counts as a layer and name it with --layer"


def _matrices_elsewhere(matrix: Matrix) -> list[str]:
    """The members of obsm that have as many columns as the layer has genes."""
    obsm = open_node(matrix.node.file, "obsm", matrix.path)
    nodes = {name: obsm.get(name) for name in (obsm if is_group(obsm) else ()) if isinstance(name, str)}
    return [name for name, node in nodes.items() if node is not None and _shape(node)[1] == matrix.n_genes]


def _element(layer: str) -> str:
    """The place of a layer in the file."""
    return {"X": "X", "raw": "raw/X"}.get(layer, f"layers/{layer.removeprefix('layers/')}")


def _encoding(node: h5py.Group | h5py.Dataset, where: str) -> str:
    """The encoding: "csr", "csc" or "dense". Raises UserError for another encoding, or values that are not numbers."""
    if is_dataset(node):
        if node.ndim == 2 and node.dtype.kind in "biuf":
            return "dense"
        raise UserError(f"{where} is not a matrix of numbers (shape {node.shape}, type {node.dtype}); {RESAVE}")
    stated = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "none"))  # the second: anndata 0.6
    stated = stated.decode(errors="replace") if isinstance(stated, bytes) else str(stated)
    encoding = stated.removesuffix("_matrix")
    parts = [open_node(node, name, where) for name in ("data", "indices", "indptr")]
    if encoding not in ("csr", "csc") or not all(is_dataset(p) and p.ndim == 1 for p in parts):
        raise UserError(f"{where} is stored in a way that is not known here (encoding {stated!r}); {RESAVE}")
    if parts[0].dtype.kind not in "biuf" or parts[1].dtype.kind not in "iu" or parts[2].dtype.kind not in "iu":
        raise UserError(f"{where} does not hold numbers (data of type {parts[0].dtype}); {RESAVE}")
    for name, part in zip(("data", "indices"), parts, strict=False):
        # a sparse matrix has no chunk of zeros only, so such a chunk was lost
        if isinstance(part, StoreArray) and (lost := part.missing_files()):
            raise UserError(f"{where} lacks {lost} of {part.n_files} chunks of {name!r}, was it copied to its end?")
    return encoding


def _shape(node: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    """(cells, genes), or (-1, -1) when the file does not state two numbers."""
    shape = node.shape if is_dataset(node) else node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    sizes = np.asarray(shape if shape is not None else 0)
    return (int(sizes[0]), int(sizes[1])) if sizes.shape == (2,) and sizes.dtype.kind in "iu" else (-1, -1)


def _check_shape(file: h5py.File, matrix: Matrix) -> None:
    """Raise UserError when the matrix does not fit the tables of cells and genes, is empty, or contradicts itself."""
    var = "raw/var" if matrix.layer == "raw" else "var"
    if not is_group(open_node(file, var, matrix.path)):
        raise UserError(f"{matrix} has no table of genes ({var}); {RESAVE}")
    n_obs, n_var = (table_index(file, table, matrix.path).shape[0] for table in ("obs", var))
    if (matrix.n_cells, matrix.n_genes) != (n_obs, n_var):
        shape = f"the shape {matrix.n_cells} x {matrix.n_genes}" if matrix.n_cells >= 0 else "no shape of two numbers"
        again = "write the file again, or download it again"
        remedy = other_layers(matrix, "another matrix") if len(matrix.layers) > 1 else again
        raise UserError(f"{matrix} has {shape}, but there are {n_obs} cells and {n_var} genes; {remedy}")
    if not n_obs or not n_var:
        raise UserError(f"{matrix} is empty ({n_obs} cells x {n_var} genes); choose another file or --layer")
    if matrix.encoding == "dense":
        return
    n_major = n_obs if matrix.encoding == "csr" else n_var
    indptr, n_values = matrix.node["indptr"], matrix.node["data"].shape[0]
    # only the first and the last number are read here; indptr_of checks the rest when it is needed
    ends = indptr[:: max(1, n_major)] if indptr.shape[0] == n_major + 1 else [-1]
    if matrix.node["indices"].shape[0] != n_values or ends[0] != 0 or ends[-1] != n_values:
        raise UserError(f"{matrix} is inconsistent (indptr, indices and data do not fit each other); {RESAVE}")


def row_blocks(matrix: Matrix, rows: Sequence[int]) -> Iterator[Block]:
    """Yield some rows in blocks. rows: increasing, distinct. Raises UserError when the matrix is inconsistent."""
    rows = np.asarray(rows, dtype=np.int64)
    if not len(rows):
        return
    # the blocks rely on this order, so a caller that breaks it has a bug
    assert rows[0] >= 0 and rows[-1] < matrix.n_cells and (np.diff(rows) > 0).all()
    blocks = {"csr": _csr_blocks, "csc": _csc_blocks, "dense": _dense_blocks}[matrix.encoding]
    for block in blocks(matrix, rows):
        if len(block.columns) and not 0 <= int(block.columns.min()) <= int(block.columns.max()) < matrix.n_genes:
            raise UserError(f"{matrix} holds a gene number outside 0 to {matrix.n_genes - 1}: the file is damaged")
        yield block


def indptr_of(matrix: Matrix) -> np.ndarray:
    """Where each row (CSR) or column (CSC) begins. Raises UserError when the numbers decrease."""
    indptr = matrix.node["indptr"][:].astype(np.int64)
    if (np.diff(indptr) < 0).any():
        raise UserError(f"{matrix} is inconsistent (indptr decreases); {RESAVE}")
    return indptr


def _csr_blocks(matrix: Matrix, rows: np.ndarray) -> Iterator[Block]:
    """Blocks of a CSR matrix. Rows close to each other are read together, with what lies between them."""
    data, indices, indptr = matrix.node["data"], matrix.node["indices"], indptr_of(matrix)
    # HDF5 decompresses whole chunks: reading a gap shorter than a chunk costs less than a second read
    gap = max(1 << 16, *(dataset.chunks[0] if dataset.chunks else 0 for dataset in (data, indices)))
    starts, stops = indptr[rows], indptr[rows + 1]
    first = 0
    while first < len(rows):
        last = int(np.searchsorted(stops, starts[first] + NONZEROS_PER_BLOCK, side="right"))
        last = max(last, first + 1)  # a single row may be larger than a block
        far = np.flatnonzero(starts[first + 1 : last] - stops[first : last - 1] > gap)
        last = first + 1 + int(far[0]) if len(far) else last
        lo, hi = starts[first], stops[last - 1]
        span = slice(first, last)
        yield Block(rows[span], starts[span] - lo, stops[span] - lo, indices[lo:hi], data[lo:hi])
        first = last


def _dense_blocks(matrix: Matrix, rows: np.ndarray) -> Iterator[Block]:
    """Blocks of a dense matrix, in which every value counts as stored."""
    per_block = max(1, DENSE_VALUES_PER_BLOCK // matrix.n_genes)
    gap = max(1, matrix.node.chunks[0] if matrix.node.chunks else 1)
    first = 0
    while first < len(rows):
        last = int(np.searchsorted(rows, rows[first] + per_block))
        far = np.flatnonzero(np.diff(rows[first:last]) > gap)
        last = first + 1 + int(far[0]) if len(far) else last
        span = slice(first, last)
        # a slice, then the rows in memory: h5py is slow for lists of rows
        values = matrix.node[rows[first] : rows[last - 1] + 1][rows[span] - rows[first]]
        offsets = np.arange(len(values)) * matrix.n_genes
        columns = np.tile(np.arange(matrix.n_genes), len(values))
        yield Block(rows[span], offsets, offsets + matrix.n_genes, columns, values.ravel())
        first = last


def _csc_blocks(matrix: Matrix, rows: np.ndarray) -> Iterator[Block]:
    """Blocks of a CSC matrix. All columns are read, in spans, and the entries of the requested rows are kept.

    When the requested rows have too many entries to be in memory at once, all columns are read several times.
    """
    indptr = indptr_of(matrix)
    per_row = max(1.0, indptr[-1] / matrix.n_cells)  # stored values of an average row
    n_walks = int(np.ceil(len(rows) * per_row / (2 * NONZEROS_PER_BLOCK)))
    for part in np.array_split(rows, max(1, n_walks)):
        # position[row] is the row's place in `part`, -1 for rows that were not requested
        position = np.full(matrix.n_cells, -1, dtype=np.int32)
        position[part] = np.arange(len(part))
        kept = [column_entries(matrix, indptr, position, *span) for span in column_spans(indptr)]
        owners, columns, values = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
        by_row = np.argsort(owners, kind="stable")  # stable: the columns of a row stay increasing
        starts = np.searchsorted(owners[by_row], np.arange(len(part) + 1))
        yield Block(part, starts[:-1], starts[1:], columns[by_row], values[by_row])


def column_spans(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, last) of spans of columns with at most NONZEROS_PER_BLOCK values, or of one column that has more."""
    first = 0
    while first < len(indptr) - 1:
        last = int(np.searchsorted(indptr, indptr[first] + NONZEROS_PER_BLOCK, side="right")) - 1
        yield first, max(last, first + 1)
        first = max(last, first + 1)


def column_entries(matrix: Matrix, indptr: np.ndarray, position: np.ndarray, first: int, last: int):
    """(position of the row, column, value) of the entries of the requested rows in the columns first to last - 1."""
    lo, hi = indptr[first], indptr[last]
    cells = matrix.node["indices"][lo:hi]
    if len(cells) and not 0 <= int(cells.min()) <= int(cells.max()) < matrix.n_cells:
        raise UserError(f"{matrix} holds a cell number outside 0 to {matrix.n_cells - 1}: the file is damaged")
    owners = position[cells]
    wanted = owners >= 0
    columns = np.repeat(np.arange(first, last, dtype=np.int32), np.diff(indptr[first : last + 1]))
    return owners[wanted], columns[wanted], matrix.node["data"][lo:hi][wanted]
