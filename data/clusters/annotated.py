"""Labels written onto the cells of a copy of the user's file. The input is never changed, and its matrix is never read.

The copy is made byte by byte, so matrices keep their layout and compression; columns of obs and one member of uns are then
added with anndata's own writer, in encodings that anndata knows since 0.8. Memory grows with obs, not with the matrix.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from data.build.h5ad import column_names, open_h5ad, table_index
from data.errors import UserError
from data.files import reason_of, replacing, require_free_space
from data.formats.checksum import add_checksum, drop_checksum
from data.formats.filters import load_plugins
from data.formats.locks import open_hdf5
from data.formats.stores import content_stamp, store_root

UNS_KEY = "cell_type_llm"
ROOM = 64_000_000
"""Bytes that stay free on the disk. HDF5 cannot always close a file on a full disk."""
BYTES_PER_VALUE = 16
"""At most, of a written column."""
LARGEST_INT = 2**63 - 1


def write_annotated(
    source: Path, out: Path, columns: dict[str, np.ndarray], uns: dict[str, Any], stamp: list[int] | None = None
) -> list[str]:
    """Write a copy of an .h5ad file with more columns of obs and more members of uns. Returns notes on what was replaced.

    columns: {name: [C] values}. Texts, in an array or a pandas.Categorical, become a categorical, in which None and NaN
        are missing; numbers and booleans stay what they are.
    uns: {name: value}, JSON-able values. A list of texts or numbers becomes an array; what HDF5 has no form for (None, a
        list of lists, a dictionary with '/' in a key) is written as its JSON text.
    stamp: content_stamp(source) when the cells were read, to which the columns belong; None: just now.
    The file is written completely or not at all. Raises UserError, with one sentence, when the source is no .h5ad file,
    `out` is the source, the source was changed after `stamp`, or `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    refuse_copy(source, out)
    refuse_changed(source, stamp)
    with open_h5ad(source) as file:
        n_cells = table_index(file, "obs", source).shape[0]
    for name, values in columns.items():
        assert len(values) == n_cells, f"{name} has {len(values)} values for {n_cells} cells"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        require_free_space(out.parent, source.stat().st_size + ROOM + BYTES_PER_VALUE * n_cells * len(columns))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({reason_of(error)}); make room or name another place") from None
    with replacing(out) as partial:
        shutil.copyfile(source, partial)
        refuse_changed(source, stamp)
        drop_checksum(partial)  # of an atlas that we simulated
        load_plugins()
        with open_hdf5(partial, "r+") as file:
            notes = _write_columns(file, columns)
            notes += _write_uns(file, uns)
        add_checksum(partial)
    return notes


def refuse_changed(source: Path, stamp: list[int] | None) -> None:
    """Raise UserError when the file is another than when its cells were read. stamp: its content_stamp then."""
    if stamp is not None and content_stamp(source) != stamp:
        raise UserError(
            f"{source}: was changed while the model answered, and the labels belong to the cells as they were; start again "
            "(--resume uses the answers if all questions are still the same)"
        )


def holds_uns(path: Path, key: str) -> bool:
    """Whether a file is an .h5ad with this entry of uns."""
    try:
        with open_hdf5(path, "r") as file:
            return f"uns/{key}" in file
    except OSError:  # no HDF5
        return False


def texts_of_uns(path: Path, key: str) -> dict[str, str]:
    """{name: text} of the members of an entry of uns that are texts, in a file that has it."""
    with open_hdf5(path, "r") as file:
        members = {name: member[()] for name, member in file[f"uns/{key}"].items() if isinstance(member, h5py.Dataset)}
    return {name: value.decode() for name, value in members.items() if isinstance(value, bytes)}


def refuse_copy(source: Path, out: Path) -> None:
    """Raise UserError when the source cannot be copied as a file, or would be overwritten."""
    # os.path: a folder that may not be entered is for the reader to name
    if os.path.isdir(source) and os.access(source, os.R_OK) and store_root(source) is None:
        with open_h5ad(source):  # it says what kind of folder this is
            pass
    if os.path.isdir(source) or (os.path.isfile(source) and store_root(source) is not None):
        raise UserError(
            f"{source}: is a zarr store, to which no labels are written; make an .h5ad file of it in Python: "
            f"anndata.read_zarr({source.name!r}).write_h5ad({source.stem + '.h5ad'!r})"
        )
    if out.suffix != ".h5ad":
        raise UserError(f"--out {out}: the file name must end in .h5ad")
    if os.path.isdir(out):
        raise UserError(f"--out {out}: is a folder; name a file that ends in .h5ad")
    if os.path.exists(out) and os.path.exists(source) and os.path.samefile(source, out):
        raise UserError(f"--out {out}: is the input, which is never changed; name another file")


def _write_columns(file: h5py.File, columns: dict[str, np.ndarray]) -> list[str]:
    """Write the columns to obs. Returns a note for those that were replaced."""
    obs = file["obs"]
    stated = obs.attrs.get("column-order", column_names(obs))
    order = [name.decode() if isinstance(name, bytes) else str(name) for name in stated]
    replaced = [name for name in columns if name in obs]
    for name, values in columns.items():
        if name in obs:
            del obs[name]
        write_elem(obs, name, _storable_column(values), dataset_kwargs={"compression": "gzip"})
        if name not in order:
            order.append(name)
    obs.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())
    return _note_on_replaced("obs columns", replaced)


def _storable_column(values: Any) -> np.ndarray | pd.Categorical:
    """A column in an encoding that anndata 0.10 reads: categorical, numbers or booleans."""
    if isinstance(values, pd.Categorical):
        values = values.remove_unused_categories()  # CELLxGENE's validator refuses unused ones
        names = np.array([str(name) for name in values.categories], dtype=object)
        return pd.Categorical.from_codes(values.codes, categories=names)
    values = np.asarray(values)
    if values.dtype.kind in "biuf":
        return values
    codes, names = pd.factorize(values, sort=False)
    # sorted by name, as anndata sorts, so that equal values give equal bytes in any order of cells
    order = sorted(range(len(names)), key=lambda i: str(names[i]))
    rank = np.empty(len(names) + 1, dtype=np.int64)
    rank[order], rank[-1] = np.arange(len(names)), -1  # the code -1 of a missing value takes the last entry
    return pd.Categorical.from_codes(rank[codes], categories=np.array([str(names[i]) for i in order], dtype=object))


def _write_uns(file: h5py.File, uns: dict[str, Any]) -> list[str]:
    """Write the members of uns. Returns a note for those that were replaced."""
    if "uns" not in file:
        write_elem(file, "uns", {})
    group = file["uns"]
    replaced = [name for name in uns if name in group]
    for name, value in uns.items():
        if name in group:
            del group[name]
        write_elem(group, name, storable(value))
    return _note_on_replaced("members of uns", replaced)


def _note_on_replaced(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"the {what} {', '.join(map(repr, names))} of the input are replaced in the copy; the input keeps them"]


def storable(value: Any) -> Any:
    """A JSON-able value as anndata writes it into uns; the JSON text of what HDF5 has no form for."""
    if isinstance(value, dict):
        keys = [str(key) for key in value]
        if not value or any("/" in key or key in ("", ".", "..") for key in keys):
            return json.dumps(value, ensure_ascii=False)
        return {str(key): storable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        kinds = {type(item) for item in value}
        if kinds == {str}:
            return np.array(value, dtype=object)
        if kinds and (kinds <= {int, float} or kinds == {bool}) and all(map(_fits, value)):
            return np.array(value)
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, int) and not _fits(value):
        return json.dumps(value)
    return value


def _fits(number: float) -> bool:
    return not isinstance(number, int) or -LARGEST_INT <= number <= LARGEST_INT
