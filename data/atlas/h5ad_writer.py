"""Write an .h5ad file that is larger than memory: cells arrive in blocks and are written at once, as CSR, CSC or dense.

Axes: C cells, G genes, R cells of a block. anndata itself writes the empty file, so the format is its own; the datasets
then grow with each block. CSC needs temporary files, because the values of one column come from every block.
Format: https://anndata.readthedocs.io/en/stable/fileformat-prose.html
"""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy import sparse
from tqdm import tqdm

from data.files import require_free_space

COMPRESSIONS = MappingProxyType({"gzip": "gzip", "lzf": "lzf", "none": None})
"""Name -> filter of h5py. gzip has level 4, as in anndata."""
CHUNK = 65_536
"""Values per HDF5 chunk of X."""
OBS_CHUNK = 8192
"""Values per HDF5 chunk of an obs column."""
VALUES_IN_MEMORY = 4_000_000
"""Values of CSC columns or dense rows in memory at once."""
ROOM = 64_000_000
"""Bytes that stay free on the disk. HDF5 buffers chunks and crashes when it cannot write them at the end."""


class GrowingH5ad:
    """An .h5ad file that grows by one block of cells with each `append`. `finish` completes it."""

    def __init__(
        self,
        file: h5py.File,
        var: pd.DataFrame,
        categories: dict[str, list[str] | None],
        uns: dict[str, Any],
        encoding: str,
        compression: str,
        folder: Path,
    ) -> None:
        """Write the empty tables.

        file: an open and empty HDF5 file.
        var: [G] table of genes.
        categories: {obs column: all its possible values}; None for a column of booleans.
        encoding, compression: of X; keys of ENCODINGS and COMPRESSIONS.
        folder: an empty folder for the temporary files of CSC, 8 bytes per value.
        """
        self.categories, self.n_cells = categories, 0
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        empty = {
            name: np.zeros(0, dtype=bool) if values is None else pd.Categorical([], categories=values)
            for name, values in categories.items()
        }
        kwargs = {"compression": COMPRESSIONS[compression]}
        growing = {**kwargs, "chunks": (OBS_CHUNK,), "maxshape": (None,)}  # HDF5 resizes only chunked datasets
        self._x = ENCODINGS[encoding](file, len(var), COMPRESSIONS[compression], folder)
        write_elem(file, "obs", pd.DataFrame(empty, index=pd.Index([], dtype=object)), dataset_kwargs=growing)
        write_elem(file, "var", var, dataset_kwargs=kwargs)
        for name in ("obsm", "varm", "obsp", "varp", "layers"):
            write_elem(file, name, {})
        write_elem(file, "uns", uns)
        self._obs = file["obs"]

    def append(self, counts: sparse.csr_matrix, obs: pd.DataFrame) -> None:
        """Append a block. counts: [R, G] float32 with sorted indices. obs: [R] rows; columns hold text or booleans."""
        numbers = range(self.n_cells, self.n_cells + len(obs))
        _extend(self._obs["_index"], np.array([f"cell_{i:06d}" for i in numbers], dtype=object))
        for name, values in self.categories.items():
            if values is None:
                _extend(self._obs[name], obs[name].to_numpy())
            else:
                _extend(self._obs[f"{name}/codes"], pd.Categorical(obs[name], categories=values).codes)
        self._x.append(counts)
        self.n_cells += len(obs)

    def finish(self) -> None:
        """Write the parts that need all blocks: the shape, and the columns of CSC."""
        self._x.finish()


class _Csr:
    """X as CSR: blocks are appended as they are."""

    def __init__(self, file: h5py.File, n_genes: int, compression: str | None, folder: Path) -> None:
        self.n_genes = n_genes
        self.node = _empty_sparse(file, sparse.csr_matrix((0, n_genes), dtype=np.float32), compression)

    def append(self, block: sparse.csr_matrix) -> None:
        # the block's indptr counts from 0, the file's from the values that are already there
        _extend(self.node["indptr"], len(self.node["data"]) + block.indptr[1:].astype(np.int64))
        _extend(self.node["indices"], block.indices)
        _extend(self.node["data"], block.data)

    def finish(self) -> None:
        self.node.attrs["shape"] = (len(self.node["indptr"]) - 1, self.n_genes)


class _Dense:
    """X as a dense matrix, with chunks of whole rows."""

    def __init__(self, file: h5py.File, n_genes: int, compression: str | None, folder: Path) -> None:
        chunks = (max(1, CHUNK // n_genes), n_genes)  # whole rows: a reader wants all genes of a cell
        kwargs = {"compression": compression, "chunks": chunks, "maxshape": (None, n_genes)}
        write_elem(file, "X", np.zeros((0, n_genes), dtype=np.float32), dataset_kwargs=kwargs)
        self.node = file["X"]

    def append(self, block: sparse.csr_matrix) -> None:
        rows = max(1, VALUES_IN_MEMORY // block.shape[1])
        for start in range(0, block.shape[0], rows):
            _extend(self.node, block[start : start + rows].toarray())

    def finish(self) -> None:
        """Nothing is left to write."""


class _Csc:
    """X as CSC. Each block is converted to CSC and appended to temporary files, in the order of its columns.

    `finish` collects each range of columns from all blocks.
    """

    def __init__(self, file: h5py.File, n_genes: int, compression: str | None, folder: Path) -> None:
        self.node = _empty_sparse(file, sparse.csc_matrix((0, n_genes), dtype=np.float32), compression)
        self.folder, self.n_genes, self.n_cells, self.n_values, self.n_blocks = folder, n_genes, 0, 0, 0
        self.of_column = np.zeros(n_genes, dtype=np.int64)

    def append(self, block: sparse.csr_matrix) -> None:
        block = block.tocsc()
        # starts: [blocks, G + 1] positions in the files `rows` and `values`
        self._put("starts", self.n_values + block.indptr.astype(np.int64))
        self._put("rows", (self.n_cells + block.indices).astype(np.int32))
        self._put("values", block.data)
        self.of_column += np.diff(block.indptr)
        self.n_cells += block.shape[0]
        self.n_values += block.nnz
        self.n_blocks += 1

    def finish(self) -> None:
        ends = np.cumsum(self.of_column)
        self.node["indptr"][1:] = ends
        self.node.attrs["shape"] = (self.n_cells, self.n_genes)
        start = 0
        with tqdm(total=self.n_genes, desc="columns", unit="gene", disable=None) as bar:
            while start < self.n_genes:
                done = ends[start - 1] if start else 0  # values of the columns written so far
                # as many columns as fit in memory, at least one
                stop = max(start + 1, int(np.searchsorted(ends, done + VALUES_IN_MEMORY, side="right")))
                self._write_columns(start, stop)
                bar.update(stop - start)
                start = stop

    def _write_columns(self, start: int, stop: int) -> None:
        """Collect the columns start to stop - 1 from the temporary files and append them to X."""
        columns, rows, values = [], [], []
        for block in range(self.n_blocks):
            starts = self._get("starts", np.int64, stop - start + 1, block * (self.n_genes + 1) + start)
            columns.append(np.repeat(np.arange(start, stop, dtype=np.int32), np.diff(starts)))
            rows.append(self._get("rows", np.int32, starts[-1] - starts[0], starts[0]))
            values.append(self._get("values", np.float32, starts[-1] - starts[0], starts[0]))
        order = np.argsort(np.concatenate(columns), kind="stable")  # stable: blocks, and so rows, stay in order
        _extend(self.node["indices"], np.concatenate(rows)[order])
        _extend(self.node["data"], np.concatenate(values)[order])

    def _put(self, name: str, values: np.ndarray) -> None:
        require_free_space(self.folder, ROOM + values.nbytes)
        with open(self.folder / name, "ab") as file:
            values.tofile(file)

    def _get(self, name: str, dtype: type, count: int, first: int) -> np.ndarray:
        offset = int(first) * np.dtype(dtype).itemsize
        return np.fromfile(self.folder / name, dtype, int(count), offset=offset)


ENCODINGS = MappingProxyType({"csr": _Csr, "csc": _Csc, "dense": _Dense})


def _empty_sparse(file: h5py.File, empty: sparse.spmatrix, compression: str | None) -> h5py.Group:
    """X without cells, as anndata writes it. indptr has 64 bits, because it counts all values of the file."""
    kwargs = {"compression": compression, "chunks": (CHUNK,), "indptr_dtype": np.int64}
    write_elem(file, "X", empty, dataset_kwargs=kwargs)
    return file["X"]


def _extend(dataset: h5py.Dataset, values: np.ndarray) -> None:
    """Append values to a dataset. Raises OSError while the file can still be closed when the disk is nearly full."""
    require_free_space(Path(dataset.file.filename).parent, ROOM + values.nbytes)
    n = len(dataset)
    dataset.resize(n + len(values), axis=0)
    dataset[n:] = values
