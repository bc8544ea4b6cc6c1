"""Columns of obs and var that hold the numbers of their categories, as SeuratDisk writes the factors of R."""

import os
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from data.build.columns import Column, clean_text
from data.build.h5ad import RESAVE, as_text, open_h5ad, open_node, read_column, table_index
from data.errors import UserError


def read_obs_columns(path: str | os.PathLike, keys: Sequence[str]) -> dict[str, Column]:
    """{key: column} of all cells. A column of numbers whose categories lie beside it gets their names.

    Raises UserError as data.build.h5ad.read_column does, and for a number without a category.
    """
    with open_h5ad(path) as file:
        return {key: read_table_column(file, "obs", key, path) for key in dict.fromkeys(keys)}


def read_table_column(file: h5py.File, table: str, key: str, path: str | os.PathLike) -> Column:
    """One column of obs, var or raw/var; see read_obs_columns."""
    where = f"{path}: {table} column {key!r}"
    found = _codes_and_levels(file[table], key, where)
    if found is None:
        return read_column(file, table, key, path)
    codes, levels = found
    n_rows = table_index(file, table, path).shape[0]
    if len(codes) != n_rows:
        raise UserError(f"{where} has {len(codes)} values for {n_rows} rows; {RESAVE}")
    if codes.size and int(codes.max()) >= len(levels):
        raise UserError(
            f"{where} holds the code {int(codes.max())}, but has {len(levels)} categories: the file is damaged"
        )
    number: dict[str, int] = {}
    # cleaning can make two values equal ("T  cell", "T cell"): they get one code
    new = [number.setdefault(text, len(number)) if (text := clean_text(value)) else -1 for value in levels]
    # R writes a missing factor as the smallest integer, pandas as -1
    return Column(np.array([*new, -1], dtype=np.int32)[np.where(codes < 0, -1, codes)], list(number))


def is_factor(table: h5py.Group, key: str, where: str) -> bool:
    """Whether a column of numbers has its names beside it."""
    return _codes_and_levels(table, key, where) is not None


def _codes_and_levels(table: h5py.Group, key: str, where: str) -> tuple[np.ndarray, list] | None:
    """([C] 0-based codes, names) of a factor that is stored as numbers. None for any other column."""
    node = open_node(table, key, where)
    if isinstance(node, h5py.Group) and {"levels", "values"} <= set(node):  # h5Seurat: codes begin with 1
        values, levels = _numbers(open_node(node, "values", where)), _texts(open_node(node, "levels", where), where)
        # a file in which 0 occurs was converted: its codes begin with 0
        return (values - int(0 not in values), levels) if values is not None and levels is not None else None
    if not isinstance(node, h5py.Dataset) or "categories" in node.attrs:
        return None
    beside = open_node(table, "__categories", where)
    levels = _texts(open_node(beside, key, where) if isinstance(beside, h5py.Group) else None, where)
    codes = _numbers(node) if levels is not None else None
    return (codes, levels) if codes is not None else None


def _numbers(node: Any) -> np.ndarray | None:
    """The whole numbers of a dataset, -1 for NaN. None when it holds anything else."""
    if not isinstance(node, h5py.Dataset) or node.ndim != 1 or node.dtype.kind not in "iuf":
        return None
    values = np.nan_to_num(node[:], nan=-1) if node.dtype.kind == "f" else node[:]
    return values.astype(np.int64) if (values == np.rint(values)).all() else None


def _texts(node: Any, where: str) -> list | None:
    """The values of a dataset of names, or None when there is none."""
    if isinstance(node, h5py.Group):  # nullable strings of pandas
        node = open_node(node, "values", where)
    if not isinstance(node, h5py.Dataset) or node.ndim != 1:
        return None
    return [as_text(value, where) if isinstance(value, bytes) else value for value in node[:].tolist()]
