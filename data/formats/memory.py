"""An AnnData in memory with the few methods of h5py that the readers use, so that one reader serves it and a file.

Nothing is copied but texts: a column or a matrix is wrapped when it is first read.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data.errors import UserError
from data.formats.stores import StoreArray, StoreGroup


class MemoryArray(StoreArray):
    """An array in memory, read like an h5py.Dataset."""

    def __init__(self, values: np.ndarray, file: StoreGroup) -> None:
        self._values, self.file, self.attrs = values, file, {}
        self.shape, self.ndim, self.dtype = values.shape, values.ndim, values.dtype
        self.chunks = None

    def __getitem__(self, selection: Any) -> Any:
        return self._values[selection]

    def missing_files(self) -> int:
        return 0


class MemoryGroup(StoreGroup):
    """Named members that are made when they are first read. A path such as raw/X leads through groups."""

    def __init__(self, members: dict[str, Callable[[], Any]], file: StoreGroup | None, **attrs: Any) -> None:
        self._members, self._made, self.file, self.attrs = members, {}, file or self, attrs

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._members))

    def __contains__(self, name: str) -> bool:
        if name in self._members:
            return True
        head, _, rest = name.partition("/")
        return bool(rest) and head in self._members and isinstance(self[head], MemoryGroup) and rest in self[head]

    def __getitem__(self, name: str) -> Any:
        if name in self._made:
            return self._made[name]
        if name in self._members:
            return self._made.setdefault(name, self._members[name]())
        head, _, rest = name.partition("/")
        if not rest or head not in self._members:
            raise KeyError(name)
        return self[head][rest]


class InMemory:
    """An AnnData that is read in place of a file; where a message names a file, it says adata."""

    name = stem = "adata"

    def __init__(self, adata: Any) -> None:
        """Raises UserError for an AnnData whose matrix is still on disk."""
        if adata.isbacked:
            raise UserError(
                f"adata: its matrix is on disk in {adata.filename}; give that file, or load it with adata.to_memory()"
            )
        root: dict[str, Callable[[], Any]] = {}
        self.file = MemoryGroup(root, None)
        root["obs"] = lambda: _table(adata.obs, self.file)
        root["var"] = lambda: _table(adata.var, self.file)
        texts = {key: value for key, value in adata.uns.items() if isinstance(key, str) and isinstance(value, str)}
        root["uns"] = lambda: MemoryGroup(
            {
                key: lambda text=text: MemoryArray(np.array(text, dtype=object), self.file)
                for key, text in texts.items()
            },
            self.file,
        )
        root["layers"] = lambda: MemoryGroup(
            {key: lambda key=key: _matrix(adata.layers[key], f"layers[{key!r}]", self.file) for key in adata.layers},
            self.file,
        )
        if adata.X is not None:
            root["X"] = lambda: _matrix(adata.X, "X", self.file)
        if adata.raw is not None:
            raw = {
                "X": lambda: _matrix(adata.raw.X, "raw.X", self.file),
                "var": lambda: _table(adata.raw.var, self.file),
            }
            root["raw"] = lambda: MemoryGroup(raw, self.file)

    def __str__(self) -> str:
        return "adata"


def _table(frame: Any, file: StoreGroup) -> MemoryGroup:
    """obs or var. A column whose name is no text cannot be named in a file, and is left out."""
    twice = [key for key in frame.columns[frame.columns.duplicated()] if isinstance(key, str)]
    if twice:
        raise UserError(f"adata: its table has two columns named {twice[0]!r}; rename one of them")
    columns = {key: lambda key=key: _column(frame[key], file) for key in frame.columns if isinstance(key, str)}
    index = {"_index": lambda: MemoryArray(np.array(frame.index.astype(str), dtype=object), file)}
    return MemoryGroup(columns | index, file, _index="_index")


def _column(values: Any, file: StoreGroup) -> MemoryArray | MemoryGroup:
    """A column as anndata writes it: numbers as they are, all others as codes and categories."""
    import pandas as pd  # with anndata, so only where an AnnData is in memory

    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "biuf":
        return MemoryArray(values.to_numpy(), file)
    if not isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(str).where(values.notna()).astype("category")
    codes, categories = values.cat.codes.to_numpy(), np.array(values.cat.categories)
    parts = {"codes": codes, "categories": categories}
    return MemoryGroup({name: lambda part=part: MemoryArray(part, file) for name, part in parts.items()}, file)


def _matrix(matrix: Any, name: str, file: StoreGroup) -> MemoryArray | MemoryGroup:
    """A matrix of numpy or scipy. Raises UserError for another kind, such as one that is computed when it is read."""
    if isinstance(matrix, np.ndarray):
        return MemoryArray(np.asarray(matrix), file)
    if not all(hasattr(matrix, part) for part in ("tocsr", "format", "nnz")):
        raise UserError(f"adata: {name} is a {type(matrix).__name__}; load it with adata.to_memory()")
    matrix = matrix if matrix.format in ("csr", "csc") else matrix.tocsr()
    parts = {part: lambda part=part: MemoryArray(getattr(matrix, part), file) for part in ("data", "indices", "indptr")}
    return MemoryGroup(parts, file, **{"encoding-type": f"{matrix.format}_matrix", "shape": matrix.shape})
