"""The tables of .h5ad files (obs columns, cell ids, gene names), read through h5py without loading the whole file.

Files come from many sources and versions of anndata. Every encoding that this reader does not know is refused with one
sentence. Zarr stores of anndata have the same layout and are read by the same code (data/formats/stores.py).
Format: https://anndata.readthedocs.io/en/stable/fileformat-prose.html
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.build.columns import Column, clean_text, is_missing_name, is_placeholder, one_line
from data.errors import UserError
from data.formats.checksum import refuse_damaged
from data.formats.filters import ensure_filters, filter_sentence
from data.formats.foreign import ForeignKind
from data.formats.hdf5_kinds import foreign_layout
from data.formats.kinds import foreign_file, foreign_folder
from data.formats.locks import open_hdf5
from data.formats.memory import InMemory
from data.formats.stores import Store, StoreGroup, is_dataset, is_group, open_store, store_root

VALUES_PER_BLOCK = 200_000
"""Values of a text column in memory at once."""
RESAVE = "re-save it with anndata 0.8 or later"
PARTS = frozenset({"codes", "categories", "values", "mask", "indptr"})
"""Members of a group that is one column or one sparse matrix."""


def sorted_files(files: Sequence[str | Path]) -> list[Path]:
    """The files sorted by name, so that their order on the command line does not matter.

    Raises UserError when there is none, or two files have the same name, which is also the name of the dataset.
    """
    paths = sorted(map(Path, files), key=lambda path: (path.stem, str(path)))
    if not paths:
        raise UserError("no .h5ad file was given; name one with --h5ad")
    for one, other in zip(paths, paths[1:], strict=False):
        if one.stem == other.stem:
            raise UserError(f"{one} and {other} would both be dataset {one.stem!r}; give each file once, or rename one")
    return paths


class OtherKind(UserError):
    """The file is of a kind that is not read here. The message says what it is and what to do with it."""

    def __init__(self, path: Path, kind: ForeignKind) -> None:
        super().__init__(f"{path}: {kind.sentence}")
        self.kind = kind


@contextlib.contextmanager
def open_h5ad(path: str | os.PathLike | InMemory, cache_bytes: int = 1 << 20) -> Iterator[h5py.File | StoreGroup]:
    """Open an .h5ad file or a zarr store of anndata (a folder, or a .zip of it). An AnnData in memory is open already.

    Damage that is found while the file is read also raises UserError with the file's name.
    cache_bytes: memory for decompressed chunks, per dataset. Raises UserError when the file is missing, not readable,
    empty or incomplete, and OtherKind when it is something else.
    """
    if isinstance(path, InMemory):
        yield path.file
        return
    path = Path(path)
    _check_is_there(path)
    root = store_root(path)
    if root is None:
        _check_is_hdf5(path)
        refuse_damaged(path)
    with _opened(path, root, cache_bytes) as file:
        try:
            _check_layout(file, path)
            yield file
        except (OSError, RuntimeError) as error:
            # the message of HDF5 for a filter that is absent names a folder of plug-ins, not the filter
            if isinstance(file, h5py.File) and (sentence := filter_sentence(file)):
                raise UserError(f"{path}: {sentence}") from None
            raise UserError(
                f"{path}: cannot be read to its end, was the download cut short? ({_one_line(error)})"
            ) from None


def _opened(path: Path, root: str | None, cache_bytes: int) -> h5py.File | Store:
    """The opened file or store. Raises UserError when it cannot be opened."""
    try:
        return open_hdf5(path, "r", rdcc_nbytes=cache_bytes) if root is None else open_store(path, root)
    except OSError as error:
        raise UserError(f"{path}: {_why_not_opened(_one_line(error))}") from None


def _why_not_opened(reason: str) -> str:
    """What HDF5's reason for not opening a file means, and what to do."""
    if "unable to lock file" in reason:
        return f"is open for writing in another program; close it there, or copy the file first ({reason})"
    if "already open for write" in reason:
        return f"was not closed by the program that wrote it; write it again, or run h5clear -s on a copy ({reason})"
    size = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", reason)
    has = f"it has {int(size[1]):,} of {int(size[2]):,} bytes" if size else reason
    return f"cannot be opened, was the download cut short? Download it again ({has})"


def _check_is_there(path: Path) -> None:
    """Raise UserError, with the remedy, when the path is no file or folder that can be read."""
    try:
        path.stat()
    except PermissionError:
        raise UserError(
            f"{path}: you have no permission to enter a folder on the way to it; its owner can give it (chmod a+x FOLDER)"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{path}: you have no permission to read it; give yourself permission (chmod -R u+rX)")
        return
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file; name an .h5ad file on disk")
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except PermissionError:
        raise UserError(f"{path}: you have no permission to read it; give yourself permission (chmod u+r)") from None
    if not head:
        raise UserError(f"{path}: the file is empty (0 bytes)")


def _check_is_hdf5(path: Path) -> None:
    """Raise OtherKind for the things that users give instead of an .h5ad file or a zarr store."""
    kind = foreign_folder(path) if path.is_dir() else foreign_file(path)
    if kind is not None:
        raise OtherKind(path, kind)


def _check_layout(file: h5py.File | StoreGroup, path: Path) -> None:
    """Raise UserError when the file does not hold the two tables of an AnnData, by its kind where that is known."""
    tables = {table: open_node(file, table, path) for table in ("obs", "var")}
    absent = [table for table, node in tables.items() if not is_group(node)]
    # a MuData file has obs and var of its own, over all modalities
    if (absent or "mod" in file) and (kind := foreign_layout(file, path)) is not None:
        raise OtherKind(path, kind)
    if absent and is_dataset(tables[absent[0]]) and tables[absent[0]].dtype.names:  # one record for each cell or gene
        raise UserError(
            f"{path}: was written by anndata 0.6 or earlier; write it again in Python: "
            f"anndata.read_h5ad({path.name!r}).write_h5ad({f'{path.stem}-again.h5ad'!r})"
        )
    if absent:
        raise UserError(
            f"{path}: holds no {absent[0]!r} table, so it is not an .h5ad of anndata 0.7 or later; {RESAVE}"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def open_node(group: h5py.Group | StoreGroup, name: str, where: str | os.PathLike) -> Any:
    """group[name], or None when the group has no such member. Raises UserError when the member cannot be opened."""
    try:
        # a broken link is not `in` the group although it has an entry: opening it raises KeyError
        node = group[name] if name in group or group.get(name, getlink=True) is not None else None
        ensure_filters(node)
        return node
    except (KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{where}: {name!r} cannot be opened, is the file damaged? ({_one_line(error)})") from None


def _vector(group: h5py.Group, name: str, where: str) -> np.ndarray:
    """A one-dimensional dataset of whole numbers or booleans, as an array."""
    node = open_node(group, name, where)
    if not is_dataset(node) or node.ndim != 1 or node.dtype.kind not in "biu":
        raise UserError(f"{where}: its {name} are not one row of whole numbers; {RESAVE}")
    return node[:]


def nearest_names(name: str, names: Iterable[str], n: int = 8) -> str:
    """The n names most similar to `name`, joined for a message."""
    by_lower = {other.lower(): other for other in sorted(names)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.0)
    return ", ".join(repr(by_lower[other]) for other in close) or "none"


def obs_columns(path: str | os.PathLike) -> list[str]:
    """The names of the obs columns, without the index."""
    with open_h5ad(path) as file:
        return column_names(file["obs"])


def read_obs(path: str | os.PathLike, keys: Sequence[str]) -> dict[str, Column]:
    """{key: column} of all cells. Raises UserError when a column is missing or has an unknown encoding."""
    with open_h5ad(path) as file:
        return {key: read_column(file, "obs", key, path) for key in dict.fromkeys(keys)}


def read_cell_ids(path: str | os.PathLike, rows: Sequence[int]) -> list[str]:
    """The obs names of some rows. A name that several cells of the file share gets its row appended: `name#row`."""
    with open_h5ad(path) as file:
        order, back = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        index = table_index(file, "obs", path)
        names = _names_at(index, order)
        cells_of = dict.fromkeys(names, 0)  # {name: cells of the file with it}; only the requested names
        for start in range(0, index.shape[0], VALUES_PER_BLOCK):
            for name in index[start : start + VALUES_PER_BLOCK]:
                if name in cells_of:
                    cells_of[name] += 1
    texts = [as_text(name, f"{path}: the names of obs") for name in names]
    ids = [f"{text}#{row}" if cells_of[name] > 1 else text for name, text, row in zip(names, texts, order, strict=True)]
    return [ids[i] for i in back]


def _names_at(index: h5py.Dataset, order: np.ndarray) -> list:
    """The values of a dataset at increasing positions. Blocks are read, since h5py is slow for single positions."""
    names: list = []
    for start in range(0, index.shape[0], VALUES_PER_BLOCK):
        here = order[(order >= start) & (order < start + VALUES_PER_BLOCK)]
        if len(here):
            block = index[start : here[-1] + 1]
            names += list(block[here - start])
    return names


def read_column(file: h5py.File, table: str, key: str, path: str | os.PathLike) -> Column:
    """A column of obs, var or raw/var. Raises UserError, with its name, when it is missing or cannot be read."""
    group = file[table]
    if key not in column_names(group):
        raise UserError(f"{path}: {table} has no column {key!r} (nearest: {nearest_names(key, column_names(group))})")
    where = f"{path}: {table} column {key!r}"
    codes, raw = _factorise(open_node(group, key, path), group, where, key)
    n_rows = table_index(file, table, path).shape[0]
    if len(codes) != n_rows:
        raise UserError(
            f"{where} has {len(codes)} values for {n_rows} rows, so nobody knows which row has which; write the file again "
            "from its source, or name another column"
        )
    is_missing = is_placeholder if table == "obs" else is_missing_name  # UNK is a gene
    texts = [one_line(value) for value in raw]
    code_of: dict[str, int] = {}
    # cleaning can make two values equal ("T  cell", "T cell"): they get one code
    new = [-1 if is_missing(text) else code_of.setdefault(text, len(code_of)) for text in texts]
    placeholders = tuple(dict.fromkeys(text for text, code in zip(texts, new, strict=True) if code < 0))
    return Column(np.array([*new, -1], dtype=np.int32)[codes], list(code_of), placeholders)


def _factorise(node: Any, group: h5py.Group, where: str, key: str | None = None) -> tuple[np.ndarray, list]:
    """([C] index of each value or -1, distinct values) of a column in any of anndata's encodings.

    where: the file, table and column, for messages. key: the column's name; None for a part of a column.
    """
    if is_group(node):
        if {"codes", "categories"} <= set(node):
            return _checked_codes(_vector(node, "codes", where), open_node(node, "categories", where), where)
        if {"values", "mask"} <= set(node):  # a nullable array of pandas
            codes, values = _factorise(open_node(node, "values", where), group, where)
            mask = _vector(node, "mask", where)
            if len(mask) != len(codes):
                raise UserError(f"{where} has {len(codes)} values and a mask of {len(mask)}; {RESAVE}")
            return np.where(mask.astype(bool), -1, codes), values
        if {"levels", "values"} <= set(node) and (
            codes := _whole_numbers(open_node(node, "values", where))
        ) is not None:
            # h5Seurat: codes begin with 1; a file in which 0 occurs was converted, and its codes begin with 0
            return _factor(codes - int(0 not in codes), open_node(node, "levels", where), where)
    elif is_dataset(node) and node.ndim == 1:
        if "categories" in node.attrs:  # anndata 0.7: codes with a reference to a dataset of categories
            referred = _referred(group, node.attrs["categories"])
            return _checked_codes(node[:], referred if referred is not None else _old_categories(group, key), where)
        levels = _old_categories(group, key)
        if levels is not None and (codes := _whole_numbers(node)) is not None:
            return _factor(codes, levels, where)
        if node.dtype.kind in "biuf":
            values, codes = np.unique(node[:], return_inverse=True)
            return codes, _scalars(values)
        if node.dtype.kind in "SO":
            return _factorise_text(node, where)
    encoding = node.attrs.get("encoding-type", "none") if node is not None else "none"
    raise UserError(f"{where} has an encoding that is not known here ({encoding}); {RESAVE}")


def _referred(group: h5py.Group, reference: Any) -> Any:
    """The object that an HDF5 reference points to, or None when it points to nothing."""
    try:
        return group[reference] if isinstance(reference, h5py.Reference) and reference else None
    except (KeyError, ValueError):
        return None


def _old_categories(group: h5py.Group, key: str | None) -> Any:
    """The names in `__categories/KEY`, or None. SeuratDisk writes a factor as codes beside them, without a reference.

    https://github.com/mojaveazure/seurat-disk/issues/138
    """
    name = f"__categories/{key}"
    return open_node(group, name, key) if key is not None and name in group else None


def has_categories_beside(table: h5py.Group, key: str) -> bool:
    """Whether a column of numbers is a factor whose names are stored beside it."""
    return _old_categories(table, key) is not None


def _whole_numbers(node: Any) -> np.ndarray | None:
    """The numbers of a dataset as int64, -1 for NaN. None when they are not one row of whole numbers."""
    if not is_dataset(node) or node.ndim != 1 or node.dtype.kind not in "biuf":
        return None
    values = np.nan_to_num(node[:], nan=-1) if node.dtype.kind == "f" else node[:]
    return values.astype(np.int64) if (values == np.rint(values)).all() else None


def _factor(codes: np.ndarray, levels: Any, where: str) -> tuple[np.ndarray, list]:
    """A factor of R. Its missing values are the smallest integer in R and -1 in pandas: all codes below 0 are missing."""
    return _checked_codes(np.maximum(codes, -1), levels, where)


def _scalars(values: np.ndarray) -> list:
    """The values as a list. float32 stays float32: as float64 the text of 27.3 would be 27.299999237."""
    return list(values) if values.dtype.kind == "f" and values.dtype.itemsize < 8 else values.tolist()


def _checked_codes(codes: np.ndarray, categories: Any, where: str) -> tuple[np.ndarray, list]:
    """(codes, categories) of a categorical. Raises UserError for a code without a category."""
    if is_group(categories):  # nullable categories
        categories = open_node(categories, "values", where)
    if not is_dataset(categories) or categories.ndim != 1 or codes.dtype.kind not in "iu":
        raise UserError(f"{where} is a categorical without readable codes and categories; {RESAVE}")
    values = [as_text(v, where) if isinstance(v, bytes) else v for v in _scalars(categories[:])]
    if codes.size and not -1 <= int(codes.min()) <= int(codes.max()) < len(values):
        bad = int(codes.max()) if int(codes.max()) >= len(values) else int(codes.min())
        raise UserError(f"{where} holds the code {bad}, but has {len(values)} categories: the file is damaged")
    return codes.astype(np.int64), values


def _factorise_text(node: h5py.Dataset, where: str) -> tuple[np.ndarray, list[str]]:
    """(codes, distinct texts) of a text column; only the distinct texts are kept in memory."""
    index: dict[bytes, int] = {}
    codes = [
        np.fromiter((index.setdefault(value, len(index)) for value in node[start : start + VALUES_PER_BLOCK]), np.int64)
        for start in range(0, node.shape[0], VALUES_PER_BLOCK)
    ]
    return np.concatenate(codes or [np.zeros(0, np.int64)]), [as_text(value, where) for value in index]


def as_text(value: Any, where: str) -> str:
    """A value of a text dataset as str. Raises UserError for bytes that are not UTF-8."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where} holds text that is not UTF-8 ({value[:30]!r}); {RESAVE}") from None


def table_index(file: h5py.File, table: str, path: str | os.PathLike) -> h5py.Dataset:
    """The index of a table: the names of its cells or genes. Raises UserError when there is none."""
    group = file[table]
    index = open_node(group, index_key(group), path)
    if is_group(index):  # nullable strings of pandas
        index = open_node(index, "values", path)
    if not is_dataset(index) or index.ndim != 1:
        raise UserError(f"{path}: the {table} table has no index ({index_key(group)!r}); {RESAVE}")
    return index


def index_key(table: h5py.Group) -> str:
    """The name of the member that holds a table's index."""
    key = table.attrs.get("_index", "_index")
    key = key if isinstance(key, bytes) else str(key).encode(errors="replace")  # h5py gives bad UTF-8 as surrogates
    return key.decode(errors="replace")


def column_names(table: h5py.Group) -> list[str]:
    """The names of a table's columns, without the index. A column called "cell/type" lies in a group "cell"."""
    # h5py gives bytes instead of str for a name that is not UTF-8; __categories belongs to anndata 0.7
    names = [name for name in table if isinstance(name, str) and name not in (index_key(table), "__categories")]
    return [leaf for name in names for leaf in nested_names(table, name)]


def nested_names(group: h5py.Group, name: str) -> list[str]:
    """The elements under a member: its own name, or `name/...` when anndata split the name of an element at a slash."""
    try:
        node = group[name]
    except (KeyError, OSError, RuntimeError):  # a broken link: whoever reads it gets the message
        return [name]
    is_element = not is_group(node) or "encoding-type" in node.attrs or PARTS & set(node)
    inner = [] if is_element else [n for n in node if isinstance(n, str)]
    return [leaf for n in inner for leaf in nested_names(group, f"{name}/{n}")] or [name]


def is_null(group: h5py.Group, name: str) -> bool:
    """Whether a member is anndata's null (None): an HDF5 dataset without a shape, or a marked array."""
    try:
        node = group[name]
    except (KeyError, OSError, RuntimeError):  # a broken link: whoever reads it gets the message
        return False
    return is_dataset(node) and (node.shape is None or node.attrs.get("encoding-type") in ("null", b"null"))


def uns_text(path: str | os.PathLike, names: Sequence[str]) -> str | None:
    """The first of some single values of `uns`, as cleaned text. None when no name is there, or its value is unknown."""
    with open_h5ad(path) as file:
        uns = open_node(file, "uns", path)
        for name in names if is_group(uns) else ():
            node = open_node(uns, name, path)
            if is_dataset(node) and node.shape in ((), (1,)):  # R writes a text as a vector of one
                return clean_text(as_text(node[()] if node.shape == () else node[0], f"{path}: uns {name!r}"))
    return None
