"""Zarr stores of anndata (a folder or a .zip, zarr v2 and v3) with the few methods of h5py that the readers use.

A zarr group or array is wrapped, so that one reader serves both formats. Differences that the wrappers hide: texts are
Python objects, members are listed by name, errors of damaged stores are OSError, and single values are Python values.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.files import sha256

MARKS = (".zgroup", ".zmetadata", "zarr.json")
"""The files that mark the root of a group: zarr v2 (two of them) and v3."""
DAMAGE = (KeyError, ValueError, TypeError, RuntimeError, NotImplementedError, zipfile.BadZipFile, json.JSONDecodeError)
"""What zarr and its codecs raise for a damaged store, next to OSError."""


class StoreArray:
    """An array of a zarr store, read like an h5py.Dataset."""

    def __init__(self, array: Any, file: "StoreGroup") -> None:
        self._array, self.file = array, file
        self.attrs = dict(array.attrs)
        self.shape, self.ndim = tuple(array.shape), len(array.shape)
        self.chunks = tuple(array.chunks) or None
        self._is_text = np.dtype(array.dtype).kind in "TU"
        # h5py gives texts as objects, and so do these arrays
        self.dtype = np.dtype(object) if self._is_text else np.dtype(array.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, selection: Any) -> Any:
        try:
            values = self._array[selection]
        except DAMAGE as error:
            raise OSError(f"{self._array.path}: {error}") from None
        if isinstance(values, np.ndarray) and values.shape == ():
            return values.item()
        return values.astype(object) if self._is_text and isinstance(values, np.ndarray) else values

    @property
    def n_files(self) -> int:
        """The number of chunks, or of shards that hold several chunks, of a complete array."""
        size = self._array.shards or self._array.chunks
        return math.prod(-(-length // part) for length, part in zip(self.shape, size, strict=True))

    def missing_files(self) -> int:
        """How many of them are not in the store. Zarr reads them as zeros, whether or not they were ever written."""
        per_file = math.prod(
            -(-part // chunk) for part, chunk in zip(self._array.shards or self.chunks, self.chunks, strict=True)
        )
        return max(0, self.n_files - self._array.nchunks_initialized // per_file)


class StoreGroup:
    """A group of a zarr store, read like an h5py.Group; the root is read like an h5py.File."""

    def __init__(self, group: Any, file: "StoreGroup | None" = None) -> None:
        self._group, self.file = group, file or self
        self.attrs = dict(group.attrs)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._group))

    def keys(self) -> list[str]:
        return list(self)

    def __contains__(self, name: str) -> bool:
        return name in self._group

    def __getitem__(self, name: str) -> "StoreGroup | StoreArray":
        try:
            node = self._group[name]
        except DAMAGE as error:
            raise KeyError(f"{name}: {error}") from None
        return StoreArray(node, self.file) if hasattr(node, "dtype") else StoreGroup(node, self.file)

    def get(self, name: str, default: Any = None, getlink: bool = False) -> Any:
        """The member, or the default. Zarr has no links, so getlink changes nothing."""
        return self[name] if name in self else default


def is_group(node: Any) -> bool:
    """Whether an opened member is a group, of HDF5 or zarr."""
    return isinstance(node, h5py.Group | StoreGroup)


def is_dataset(node: Any) -> bool:
    """Whether an opened member is an array, of HDF5 or zarr."""
    return isinstance(node, h5py.Dataset | StoreArray)


def store_root(path: Path) -> str | None:
    """The place of the root group in a zarr store: "" for a folder or a zip of its content. None for other files.

    A zip of the folder itself has the folder's name before every member.
    """
    if path.is_dir():
        return "" if any((path / mark).is_file() for mark in MARKS) else None
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return None
        with zipfile.ZipFile(path) as archive:
            roots = [name.rpartition("/")[0] for name in archive.namelist() if name.rpartition("/")[2] in MARKS]
    except (OSError, zipfile.BadZipFile):
        return None
    root = min(roots, key=lambda name: (name.count("/") + bool(name), name), default=None)
    return root if root is None or root.count("/") == 0 else None


class Store(StoreGroup):
    """An open zarr store: its root group, to be closed like an h5py.File."""

    def __init__(self, group: Any, store: Any) -> None:
        super().__init__(group)
        self._store = store

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self._store.close()


def open_store(path: Path, root: str) -> Store:
    """Open a zarr store for reading. root: as store_root gives it. Raises OSError when it is damaged."""
    import numcodecs.registry
    import zarr  # half a second, and only stores need it

    # a pickle runs code where it is read; what a store compressed with it is then refused by its name
    numcodecs.registry.codec_registry.pop("pickle", None)
    try:
        if path.is_dir():
            store = zarr.storage.LocalStore(path, read_only=True)
        else:
            store = zarr.storage.ZipStore(path, mode="r")
        return Store(zarr.open_group(store, path=root or None, mode="r"), store)
    except DAMAGE as error:
        raise OSError(str(error)) from None


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder: of the names and hashes of its files in the order of their names."""
    if not path.is_dir():
        return sha256(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def content_stamp(path: Path) -> list[int]:
    """[bytes, time of the last change in ns] of a file, or of all files in a folder: whether it changed, at no cost."""
    stats = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat()]
    return [sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]
