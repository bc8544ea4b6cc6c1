"""The cells of an .h5ad file that can be part of a puzzle, grouped by donor, experimental batch and cell type.

C is the number of usable cells. A row is the number of a cell in the file.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from data.build.columns import Column, clean_text, constant_column
from data.build.contexts import CONTEXT_COLUMNS
from data.build.h5ad import as_text, nearest_names, obs_columns, open_h5ad, open_node, read_obs, table_index
from data.errors import UserError

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
"""CELLxGENE obs column -> flag of launch/build.py for files in which the column has another name."""
REQUIRED_COLUMNS = ("cell_type", "donor_id", "suspension_type", "tissue", "disease")
ORGANISM_COLUMNS = ("organism", "organism_ontology_term_id")
ORGANISMS = {
    name.lower(): organism
    for organism, taxon in {"Homo sapiens": "NCBITaxon:9606", "Mus musculus": "NCBITaxon:10090"}.items()
    for name in (organism, taxon)
}
"""Name or taxon, in lower case -> name. Other organisms keep the name that the file gives them."""
TRUE = frozenset({"true", "1", "1.0"})
"""Values of is_primary_data, in lower case, that mean yes."""
POOLED = "pooled"
"""CELLxGENE's donor_id for cells of several individuals that were not told apart."""

Groups = dict[tuple[str, str], dict[str, np.ndarray]]
"""(donor, batch) -> {cell type: its rows, increasing}."""


@dataclass(frozen=True)
class Cells:
    """The usable cells of a file."""

    rows: np.ndarray
    """[C] row of each cell in the file, increasing."""
    columns: dict[str, Column]
    """{CELLxGENE column: [C] values}, for the columns of COLUMN_FLAGS and CONTEXT_COLUMNS. An unknown batch is ""."""
    n_read: int
    """Number of cells in the file, usable or not."""
    dropped: dict[str, int]
    """{reason: number of cells dropped for it}. A cell counts under its first reason only."""
    organism: str | None
    """The organism of the usable cells; None when the file does not state it."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the report about missing columns and assumptions."""

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, rows: Sequence[int]) -> dict[str, Column]:
        """The columns for some rows of the file. Every row must be a usable cell."""
        positions = np.searchsorted(self.rows, rows)
        return {name: column[positions] for name, column in self.columns.items()}


def read_cells(
    path: str | os.PathLike,
    keys: dict[str, str],
    constants: dict[str, str],
    organism: str | None = None,
    include_non_primary: bool = False,
) -> Cells:
    """The usable cells of a file: suspension type "cell", primary data, known cell type, one donor, one organism.

    keys, constants: as in resolve_columns. organism: use the cells of this organism only; a file without it gives no
    cells. Raises UserError when a column is missing or cannot be read, or when the cells are of several organisms.
    """
    columns, supplied, notes = resolve_columns(path, keys, constants)
    present = obs_columns(path)
    organism_keys = [name for name in ORGANISM_COLUMNS if name in present][:1]  # the name is preferred to the id
    obs = read_obs(path, [*columns.values(), *organism_keys])
    n_read = _n_cells(path)
    organisms = _organisms(path, obs[organism_keys[0]] if organism_keys else None, n_read)
    cells = {name: obs[key] for name, key in columns.items()}
    cells |= {name: constant_column(value, n_read) for name, value in supplied.items()}
    if "batch" not in cells:
        notes.append("no obs column for the experimental batch: cells are grouped by donor only")
        cells["batch"] = constant_column("", n_read)
    if "is_primary_data" not in cells:
        notes.append("no obs column 'is_primary_data': all cells count as primary data")
    is_primary = cells.pop("is_primary_data", constant_column("True", n_read))
    unusable = {  # in this order: a cell counts under its first reason, and the report lists the reasons so
        "suspension_type is not 'cell'": ~cells["suspension_type"].where(lambda name: name == "cell"),
        "is_primary_data is not True": ~is_primary.where(lambda name: name.lower() in TRUE) & (not include_non_primary),
        "no cell type": cells["cell_type"].codes < 0,
        "no donor": cells["donor_id"].codes < 0,
    }
    if (pooled := cells["donor_id"].where(lambda name: name.lower() == POOLED)).any():
        unusable[f"donor is {POOLED!r}, which means several"] = pooled
    if organism and organisms is None:
        notes.append(f"the file states no organism: all its cells count as {organism}")
    elif organism:
        wanted = organisms.where(lambda name: name.lower() == organism_name(organism).lower())
        others = "" if wanted.any() else f" (the file has {', '.join(sorted(organisms.names))})"
        unusable[f"organism is not {organism!r}{others}"] = ~wanted
    kept, dropped = np.ones(n_read, dtype=bool), {}
    for reason, bad in unusable.items():
        dropped[reason] = int((kept & bad).sum())
        kept &= ~bad
    batch, kept_rows = cells["batch"], np.flatnonzero(kept)
    # cells without a known batch of one donor form one group: their batch is "", the last name
    cells["batch"] = Column(np.where(batch.codes < 0, len(batch.names), batch.codes), [*batch.names, ""])
    if n_unknown := int((batch.codes[kept_rows] < 0).sum()):
        notes.append(f"{n_unknown} cells have no known batch: they are grouped by donor only")
    return Cells(
        rows=kept_rows,
        columns={name: column[kept_rows] for name, column in cells.items()},
        n_read=n_read,
        dropped=dropped,
        organism=_one_organism(path, organisms[kept_rows]) if organisms else None,
        notes=notes,
    )


def resolve_columns(
    path: str | os.PathLike, keys: dict[str, str], constants: dict[str, str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Find the columns that a build uses. Returns ({CELLxGENE name: obs column}, {CELLxGENE name: constant}, notes).

    keys: {CELLxGENE name: obs column}, as the flags of COLUMN_FLAGS give it. constants: {CELLxGENE name or obs column:
    value}, used when the file lacks the column. Raises UserError for a missing column that is required or that a flag
    names.
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
            raise UserError(
                f"{path}: no obs column {key!r} (nearest: {nearest_names(key, present)}); name the column with "
                f"{COLUMN_FLAGS[name]} COLUMN, or supply its value with --constant {name}=VALUE"
            )
    return columns, supplied, notes


def parse_constants(items: Iterable[str], keys: dict[str, str]) -> dict[str, str]:
    """{column: value} of items "NAME=VALUE". keys: as in resolve_columns. Raises UserError for a name without use."""
    constants, names = {}, {*keys, *keys.values(), *CONTEXT_COLUMNS}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not clean_text(value):
            raise UserError(f"--constant {item}: must be NAME=VALUE with a known value")
        if name not in names:
            raise UserError(f"--constant {item}: no column {name!r} is used (nearest: {nearest_names(name, names)})")
        constants[name] = clean_text(value)
    return constants


def _n_cells(path: str | os.PathLike) -> int:
    with open_h5ad(path) as file:
        n_cells = table_index(file, "obs", path).shape[0]
    if not n_cells:
        raise UserError(f"{path}: holds no cells; choose another file")
    return n_cells


def organism_name(text: str) -> str:
    """The name of an organism that is given by name or taxon: NCBITaxon:9606 is Homo sapiens."""
    return ORGANISMS.get(text.lower(), text)


def _organisms(path: str | os.PathLike, column: Column | None, n_cells: int) -> Column | None:
    """The organism of each cell, from obs or, as in later CELLxGENE schemas, from uns. None when neither states it."""
    if column is None or (column.codes < 0).all():
        stated = _organism_of_uns(path)
        return constant_column(organism_name(stated), n_cells) if stated else None
    names = list(dict.fromkeys(map(organism_name, column.names)))
    code_of = np.array([*(names.index(organism_name(name)) for name in column.names), -1], dtype=np.int32)
    return Column(code_of[column.codes], names)


def _organism_of_uns(path: str | os.PathLike) -> str | None:
    """The organism that the table `uns` states for the whole file, or None."""
    with open_h5ad(path) as file:
        uns = open_node(file, "uns", path)
        for name in ORGANISM_COLUMNS if isinstance(uns, h5py.Group) else ():
            node = open_node(uns, name, path)
            if isinstance(node, h5py.Dataset) and node.shape == ():
                return clean_text(as_text(node[()], f"{path}: uns {name!r}"))
    return None


def _one_organism(path: str | os.PathLike, column: Column) -> str | None:
    """The organism of the usable cells, or None. Raises UserError when there are several."""
    names = sorted(column.names[code] for code in np.unique(column.codes) if code >= 0)
    if len(names) > 1:
        raise UserError(
            f"{path}: holds cells of {len(names)} organisms ({', '.join(names)}), whose genes have other names; keep "
            f"one with --organism {names[0]!r}"
        )
    return names[0] if names else None


def groups_of(cells: Cells) -> Groups:
    """The rows of usable cells by (donor, batch), then by cell type; names and rows in sorted order."""
    # one lexsort over the whole file instead of a pass over its cells for each group
    groups: Groups = {}
    columns = [cells.columns[name] for name in ("donor_id", "batch", "cell_type")]
    # codes are in the order of the file: replace them by the alphabetical rank of their names
    orders = [np.argsort(np.argsort(np.array(column.names, dtype=object))) for column in columns]
    ranks = [order[column.codes] for order, column in zip(orders, columns, strict=True)]
    by_key = np.lexsort((cells.rows, *reversed(ranks)))  # np.lexsort takes its most important key last
    keys = np.stack([rank[by_key] for rank in ranks], axis=1)
    starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)]) if len(by_key) else []
    for members in np.split(by_key, starts[1:]) if len(by_key) else []:
        donor, batch, cell_type = (column.names[column.codes[members[0]]] for column in columns)
        groups.setdefault((donor, batch), {})[cell_type] = cells.rows[members]
    return groups


def check_labels(path: Path, labels: Iterable[str]) -> None:
    """Raise UserError for labels that an answer cannot tell apart.

    Such a label contains '|', which separates the labels of an answer, or a tag; or two labels differ only in case,
    which rewards ignore.
    """
    by_case: dict[str, str] = {}
    for label in sorted(labels):
        if "|" in label:
            raise UserError(f"{path}: the cell type {label!r} holds '|', which separates answers; rename it")
        if "<" in label and ">" in label:
            raise UserError(f"{path}: the cell type {label!r} looks like a tag of the answer format; rename it")
        other = by_case.setdefault(label.lower(), label)
        if other != label:
            raise UserError(f"{path}: the cell types {other!r} and {label!r} differ only in case; give them one name")
