"""Reading .h5ad files without loading them: obs columns, gene names, and the top genes of chosen cells.

Only the rows asked for are read, in blocks, so memory grows with the puzzles and not with the cells of the file.
Layers are called `X`, `raw` (raw.X) or by their name in `layers`; `auto` is raw.X where the file has it, else X.
Format: https://anndata.readthedocs.io/en/stable/fileformat-prose.html
"""

import contextlib
import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from data.contexts import CONTEXT_COLUMNS, clean

COLUMN_FLAGS = {
    "cell_type": "--cell-type-key",
    "donor_id": "--donor-key",
    "suspension_type": "--suspension-key",
    "tissue": "--tissue-key",
    "disease": "--disease-key",
    "batch": "--batch-key",
    "sex": "--sex-key",
    "development_stage": "--development-stage-key",
    "self_reported_ethnicity": "--ethnicity-key",
}
"""CELLxGENE obs column -> flag of launch/build.py that names it in files that call it otherwise."""
GENE_CLASSES = {
    "ribosomal": re.compile(r"RP[LS]\d+[AXYL]?\d*$|RPLP\d$|RPSA$"),
    "mitochondrial": re.compile(r"MT-"),
}
"""Gene class -> symbols of its genes, matched at their beginning."""
REQUIRED_COLUMNS = ("cell_type", "donor_id", "suspension_type", "tissue", "disease")

Groups = dict[tuple[str, str], dict[str, list[int]]]
"""(donor, batch) -> {cell type: row numbers}."""
ROWS_PER_BLOCK = 256
NONZEROS_PER_BLOCK = 4_000_000
_ENSEMBL_SUFFIX = re.compile(r"_ENSG\d+(\.\d+)?$")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sorted_files(files: Sequence[str | Path]) -> list[Path]:
    """Files by name, so that their order on the command line does not matter."""
    paths = sorted(map(Path, files), key=lambda path: (path.stem, str(path)))
    if not paths:
        raise ValueError("no .h5ad file was given; name one with --h5ad")
    for one, other in zip(paths, paths[1:], strict=False):
        if one.stem == other.stem:
            raise ValueError(
                f"{one} and {other} would both be dataset {one.stem!r}; give each file once, or rename one"
            )
    return paths


@contextlib.contextmanager
def open_h5ad(path: str | os.PathLike) -> Iterator[h5py.File]:
    """The open HDF5 file. Raises ValueError, naming the file, when it is missing, empty, cut short or not an h5ad."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path}: not an .h5ad file (no HDF5 signature)")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened, was the download cut short? ({error})") from None
    with file:
        for table in ("obs", "var"):
            if not isinstance(file.get(table), h5py.Group):
                raise ValueError(
                    f"{path}: holds no {table!r} table, so it is not an .h5ad of anndata 0.7 or later; re-save it"
                )
        yield file


def nearest(name: str, names: Iterable[str], n: int = 8) -> str:
    """The n names most like `name`, joined for a message."""
    by_lower = {other.lower(): other for other in sorted(names)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.0)
    return ", ".join(repr(by_lower[other]) for other in close) or "none"


def obs_columns(path: str | os.PathLike) -> list[str]:
    """Names of the obs columns, without the index."""
    with open_h5ad(path) as file:
        return _column_names(file["obs"])


def read_obs(path: str | os.PathLike, keys: Sequence[str]) -> pd.DataFrame:
    """The obs columns `keys` of all cells as cleaned text categories; the index is the row number in the file.

    Values that stand for "not known" (data.contexts.MISSING_VALUES) are missing. Raises ValueError for an absent one.
    """
    with open_h5ad(path) as file:
        columns = {key: _as_text(_read_column(file, "obs", key, path)) for key in keys}
        return pd.DataFrame(columns, index=pd.RangeIndex(_n_rows(file["obs"])))


def parse_constants(items: Iterable[str], keys: dict[str, str]) -> dict[str, str]:
    """{column: value} of NAME=VALUE items; keys as in resolve_columns. Raises ValueError for a name without use."""
    constants, names = {}, {*keys, *keys.values(), *CONTEXT_COLUMNS}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not clean(value):
            raise ValueError(f"--constant {item}: must be NAME=VALUE with a known value")
        if name not in names:
            raise ValueError(f"--constant {item}: no column {name!r} is used (nearest: {nearest(name, names)})")
        constants[name] = clean(value)
    return constants


def resolve_columns(
    path: str | os.PathLike, keys: dict[str, str], constants: dict[str, str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """({name: obs column}, {name: constant}, notes) of the columns a build uses.

    keys: {name of COLUMN_FLAGS: obs column asked for}; constants: {name or obs column: value}, where the file lacks it.
    Raises ValueError for an absent column that is required or was asked for by another name.
    """
    present, columns, supplied, notes = obs_columns(path), {}, {}, []
    optional = {name: name for name in (*CONTEXT_COLUMNS, "is_primary_data") if name not in keys}
    for name, key in {**keys, **optional}.items():
        value = constants.get(name, constants.get(key))
        if key in present:
            columns[name] = key
            if value:
                notes.append(f"--constant {name}={value} is not used: the file has an obs column {key!r}")
        elif value:
            supplied[name] = value
        elif name in REQUIRED_COLUMNS or key != name:
            raise ValueError(
                f"{path}: no obs column {key!r} (nearest: {nearest(key, present)}); name the column with "
                f"{COLUMN_FLAGS[name]} COLUMN, or supply its value with --constant {name}=VALUE"
            )
    return columns, supplied, notes


def read_cells(
    path: str | os.PathLike, keys: dict[str, str], constants: dict[str, str]
) -> tuple[pd.DataFrame, dict[str, int], list[str]]:
    """(usable cells, {reason: cells dropped}, notes).

    Usable: suspension type "cell", primary data, with a known cell type and donor. Columns of the table: the names of
    COLUMN_FLAGS and of data.contexts, text or missing (batch: "" where unknown); its index: row numbers in the file.
    """
    columns, supplied, notes = resolve_columns(path, keys, constants)
    cells = read_obs(path, list(columns.values())).set_axis(list(columns), axis=1)
    for name, value in supplied.items():
        cells[name] = pd.Categorical([value] * len(cells))
    if "batch" not in cells:
        notes.append("no obs column for the experimental batch: cells are grouped by donor only")
        cells["batch"] = ""
    if "is_primary_data" not in cells:
        notes.append("no obs column 'is_primary_data': all cells count as primary data")
        cells["is_primary_data"] = "True"
    unusable = {
        "suspension_type is not 'cell'": cells["suspension_type"] != "cell",
        "is_primary_data is not True": cells["is_primary_data"] != "True",
        "no cell type": cells["cell_type"].isna(),
        "no donor": cells["donor_id"].isna(),
    }
    kept, dropped = np.ones(len(cells), dtype=bool), {}
    for reason, bad in unusable.items():  # a cell counts under the first reason only
        dropped[reason] = int((kept & bad.to_numpy()).sum())
        kept &= ~bad.to_numpy()
    return cells[kept].astype({"batch": object}).fillna({"batch": ""}), dropped, notes


def groups_of(cells: pd.DataFrame) -> Groups:
    """Rows by donor and batch, then by cell type; everything in sorted order."""
    groups: Groups = {}
    keys = ["donor_id", "batch", "cell_type"]
    for (donor, batch, cell_type), rows in sorted(cells[keys].astype(object).groupby(keys).groups.items()):
        groups.setdefault((donor, batch), {})[cell_type] = rows.tolist()
    return groups


def check_labels(path: Path, labels: Sequence[str]) -> None:
    """A label with the answer's separator, or two that differ only in case, cannot be told apart in an answer."""
    by_case: dict[str, str] = {}
    for label in sorted(labels):
        if "|" in label:
            raise ValueError(f"{path}: the cell type {label!r} holds '|', which separates answers; rename it")
        other = by_case.setdefault(label.lower(), label)
        if other != label:
            raise ValueError(f"{path}: the cell types {other!r} and {label!r} differ only in case; give them one name")


def read_cell_ids(path: str | os.PathLike, rows: Sequence[int]) -> list[str]:
    """obs names of `rows`; a name that several of them share gets its row number appended (`name#row`)."""
    with open_h5ad(path) as file:
        order = np.unique(np.asarray(rows, dtype=np.int64))
        raw = file["obs"][_index_key(file["obs"])][order]
    names = pd.Series([n.decode() if isinstance(n, bytes) else str(n) for n in raw], index=order, dtype=object)
    shared = names[names.duplicated(keep=False)]
    names.update(pd.Series([f"{name}#{row}" for row, name in shared.items()], index=shared.index, dtype=object))
    return names.loc[list(rows)].tolist()


def resolve_layer(path: str | os.PathLike, layer: str) -> str:
    """`X`, `raw` or a name in layers, with `auto` decided. Raises ValueError when the file lacks it."""
    with open_h5ad(path) as file:
        present = _layers(file)
        wanted = ("raw" if "raw" in present else "X") if layer == "auto" else layer
        if wanted not in present:
            raise ValueError(f"{path}: has no layer {wanted!r}; --layer can be one of {', '.join(present) or 'none'}")
        return wanted


def read_gene_names(path: str | os.PathLike, gene_key: str = "feature_name", layer: str = "X") -> np.ndarray:
    """[genes] gene names of a layer, the `_ENSG...` suffix stripped; a missing name is replaced by the var index.

    gene_key: a var column, or `index`. Raises ValueError when the column is absent or a name cannot stand in a puzzle.
    """
    with open_h5ad(path) as file:
        table = "raw/var" if layer == "raw" else "var"
        index = pd.Index([str(name) for name in read_elem(file[table][_index_key(file[table])])])
        if gene_key == "index":
            names = pd.Series(index)
        elif gene_key in file[table]:
            names = pd.Series(_as_text(_read_column(file, table, gene_key, path)))
        else:
            names = _names_through_var(file, index, gene_key, table, path)
    names = names.astype(object).where(names.notna(), index)
    names = names.map(lambda name: _ENSEMBL_SUFFIX.sub("", name))
    bad = names[names.str.contains(", ") | names.str.contains("\n")]
    if len(bad):
        raise ValueError(f"{path}: the gene name {bad.iloc[0]!r} holds the separator of the gene list; see --gene-key")
    return names.to_numpy(dtype=object)


def top_genes(
    path: str | os.PathLike,
    row_indices: Sequence[int],
    n_top: int,
    *,
    layer: str = "auto",
    gene_key: str = "feature_name",
    allow_scaled: bool = False,
    drop: Sequence[str] = (),
) -> list[list[str]]:
    """[len(row_indices)][<= n_top] gene names per cell, most expressed first.

    A gene that is not expressed (value <= 0) is never listed, so a list may be short or empty. Equal values are ordered
    by gene name; of several genes with one name the larger value counts. Raises ValueError, naming the layer, when the
    rows hold NaN, or negative values, which mean scaled data that cannot be ranked by expression. `drop` names the
    GENE_CLASSES that are never listed.
    """
    layer = resolve_layer(path, layer)
    names, name_ids, copies = np.unique(
        read_gene_names(path, gene_key, layer).astype(str), return_inverse=True, return_counts=True
    )
    rows, back = np.unique(np.asarray(row_indices, dtype=np.int64), return_inverse=True)
    listed = np.array([not any(GENE_CLASSES[kind].match(name) for kind in drop) for name in names])
    keep = n_top * int(copies.max(initial=1))
    ranked: list[list[str]] = []
    with open_h5ad(path) as file:
        for block in _expression_blocks(file[_element(layer)], rows):
            _check_values(block, allow_scaled, f"{path}: layer {layer!r}", _layers(file))
            for columns, values in _row_entries(block):
                wanted = listed[name_ids[columns]]
                ranked.append(names[_rank(name_ids[columns[wanted]], values[wanted], n_top, keep)].tolist())
    return [ranked[i] for i in back]


def _rank(gene_ids: np.ndarray, values: np.ndarray, n_top: int, keep: int) -> np.ndarray:
    """Ids of the n_top largest values; ids are in alphabetical order of the names, so they break ties."""
    if len(values) > keep:  # sort the head only; all entries that tie with the last one stay in
        head = values >= np.partition(values, -keep)[-keep]
        gene_ids, values = gene_ids[head], values[head]
    order = gene_ids[np.lexsort((gene_ids, -values))]
    _, first = np.unique(order, return_index=True)
    return order[np.sort(first)][:n_top]


def _row_entries(block: np.ndarray | sparse.csr_matrix) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(columns, values) of the expressed genes of each row; float64, since -x of an unsigned count is not negative."""
    for i in range(block.shape[0]):
        if sparse.issparse(block):
            span = slice(block.indptr[i], block.indptr[i + 1])
            columns, values = block.indices[span], block.data[span].astype(np.float64)
        else:
            columns, values = np.arange(block.shape[1]), block[i].astype(np.float64)
        expressed = values > 0
        yield columns[expressed], values[expressed]


def _expression_blocks(node: h5py.Group | h5py.Dataset, rows: np.ndarray) -> Iterator[np.ndarray | sparse.csr_matrix]:
    """The given (increasing) rows of a matrix, in blocks [R, genes]."""
    if isinstance(node, h5py.Group) and (matrix := sparse_dataset(node)).format == "csc":
        yield _rows_of_csc(matrix, node["indptr"][:], rows)
        return
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        yield node[block] if isinstance(node, h5py.Dataset) else matrix[block].tocsr()


def _rows_of_csc(matrix, indptr: np.ndarray, rows: np.ndarray) -> sparse.csr_matrix:
    """Some rows of a backed CSC matrix; a row index on it would load all of it, so walk over blocks of columns."""
    parts, start = [], 0
    while start < len(indptr) - 1:
        stop = int(np.searchsorted(indptr, indptr[start] + NONZEROS_PER_BLOCK, side="right")) - 1
        stop = max(stop, start + 1)
        parts.append(matrix[:, start:stop].tocsr()[rows])
        start = stop
    return sparse.hstack(parts, format="csr")


def _check_values(block: np.ndarray | sparse.csr_matrix, allow_scaled: bool, where: str, layers: list[str]) -> None:
    values = block.data if sparse.issparse(block) else block
    if np.isnan(values).any():
        raise ValueError(f"{where} holds NaN; choose another with --layer (this file has {', '.join(layers)})")
    if values.size and values.min() < 0 and not allow_scaled:
        raise ValueError(
            f"{where} holds negative values, so it looks scaled and gives no order of expression; choose unscaled "
            f"values with --layer raw or --layer NAME (this file has {', '.join(layers)}), or go on with --allow-scaled"
        )


def _names_through_var(file: h5py.File, index: pd.Index, gene_key: str, table: str, path) -> pd.Series:
    """Names of raw genes by way of `var`, for a raw.var without such a column where var covers all its genes."""
    if table == "raw/var" and gene_key in file["var"]:
        var_index = [str(name) for name in read_elem(file["var"][_index_key(file["var"])])]
        names = pd.Series(_as_text(_read_column(file, "var", gene_key, path)), index=var_index)
        if names.index.is_unique and index.isin(names.index).all():
            return names.loc[index].reset_index(drop=True)
    raise ValueError(
        f"{path}: {table} has no column {gene_key!r} (nearest: {nearest(gene_key, _column_names(file[table]))}); "
        "name the column of gene names with --gene-key, or --gene-key index for the index"
    )


def _as_text(values) -> pd.Categorical:
    """A column as categories of cleaned text; each distinct value is cleaned once."""
    codes, uniques = pd.factorize(values)
    text_codes, names = pd.factorize(np.array([clean(value) for value in uniques] + [None], dtype=object))
    return pd.Categorical.from_codes(text_codes[codes], categories=pd.Index(names, dtype=object))  # code -1: the None


def _read_column(file: h5py.File, table: str, key: str, path):
    group = file[table]
    if key not in _column_names(group):
        raise ValueError(f"{path}: {table} has no column {key!r} (nearest: {nearest(key, _column_names(group))})")
    if (
        "__categories" in group
    ):  # anndata 0.7 keeps the categories beside the columns; only the whole table decodes them
        return read_elem(group)[key]
    return read_elem(group[key])


def _layers(file: h5py.File) -> list[str]:
    raw = ["raw"] if "X" in file.get("raw", {}) else []
    return (["X"] if "X" in file else []) + raw + sorted(file.get("layers", {}))


def _element(layer: str) -> str:
    return {"X": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")


def _index_key(table: h5py.Group) -> str:
    return table.attrs.get("_index", "_index")


def _n_rows(table: h5py.Group) -> int:
    return table[_index_key(table)].shape[0]


def _column_names(table: h5py.Group) -> list[str]:
    return [name for name in table if name not in (_index_key(table), "__categories")]
