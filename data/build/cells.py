"""The cells of an .h5ad file that can be part of a puzzle, grouped by donor, experimental batch and cell type.

C is the number of usable cells. A row is the number of a cell in the file.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.build.columns import Column, clean_text, constant_column, whole_numbers
from data.build.contexts import CONTEXT_COLUMNS, without_unfit
from data.build.h5ad import nearest_names, obs_columns, open_h5ad, read_obs, table_index, uns_text
from data.errors import UserError
from data.meaning.labels import (
    clusters_among_words,
    columns_like_cell_types,
    hint_of_cell_types,
    is_cluster,
    kept_label,
    names_no_cell_type,
    names_state,
    only_clusters,
    only_codes,
    same_name,
    transposed,
)
from data.meaning.words import NO, YES, ages_in_words, suspension_kind, with_usual_words
from data.prompts import normalise_label

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
    for organism, others in {
        "Homo sapiens": ("NCBITaxon:9606", "human", "H. sapiens", "hsapiens", "homo_sapiens"),
        "Mus musculus": ("NCBITaxon:10090", "mouse", "house mouse", "M. musculus", "mmusculus", "mus_musculus"),
    }.items()
    for name in (organism, *others)
}
"""Name, usual word or taxon, in lower case -> name. Other organisms keep the name that the file gives them."""
POOLED = re.compile(r"pooled( (donors?|samples?|individuals?|subjects?|patients?|cells))?", re.IGNORECASE)
"""CELLxGENE's donor_id for cells of several individuals that were not told apart. In other columns: not known."""
SUSPENSION_KINDS = ("cell", "nucleus", "na")
NO_COLUMN = "none"
"""As the name of a column that a context states: the file's column is not read, and no context states it."""
MAY_BE_ABSENT = ("tissue", "disease", "sex", "development_stage", "self_reported_ethnicity")
NUMERIC_REFUSED = ("tissue", "disease", "sex", "development_stage", "self_reported_ethnicity")
"""Columns whose values are words; a file in which one holds only numbers has lost the words."""
FREE_TEXT = ("lung_condition", "harm_condition", "author_tumor_subsite", "harm_tumor.type")
"""Context columns without a flag whose value is quoted; numbers are left out of the context."""


@dataclass(frozen=True)
class CellRules:
    """Which cells of a file a build uses. The fields are those of data.build.settings.BuildConfig."""

    organism: str | None = None
    """Use the cells of this organism only; all cells of a file that states none count as of it."""
    include_non_primary: bool = False
    suspension: tuple[str, ...] = ("cell",)
    """Of "cell", "nucleus" and "na" (not known)."""
    keep_label: tuple[str, ...] = ()
    """Labels that are used although they look like "doublet" or "unassigned"."""
    allow_numeric_labels: bool = False


LONGEST_LABEL = 500
"""Longer labels are texts: the longest name of the Cell Ontology has fewer than 200 letters."""
NO_CELL_TYPE_LABEL = "the label names no cell type"
NON_PRIMARY = "is_primary_data is not True"
ANOTHER_DONOR = "--donor-key COLUMN or --constant donor_id=NAME"

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
    """The organism of the usable cells; None when neither the file nor --organism states it."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the report about missing columns and assumptions."""
    remedies: dict[str, str] = field(default_factory=dict)
    """{reason of `dropped`: the option that keeps these cells}."""

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, rows: Sequence[int]) -> dict[str, Column]:
        """The columns for some rows of the file. Every row must be a usable cell."""
        positions = np.searchsorted(self.rows, rows)
        return {name: column[positions] for name, column in self.columns.items()}


def read_cells(
    path: str | os.PathLike, keys: dict[str, str], constants: dict[str, str], rules: CellRules = CellRules()
) -> Cells:
    """The usable cells of a file: suspension type "cell", primary data, known cell type, one donor, one organism.

    keys, constants: as in resolve_columns. Raises UserError when a column is missing or cannot be read, when labels are
    only numbers, or when the cells are of several organisms.
    """
    columns, supplied, notes = resolve_columns(path, keys, constants)
    n_read = count_cells(path)
    organisms = read_organisms(path, n_read)
    cells, more = read_in_words(path, columns, supplied, n_read)
    notes += more
    absent = [name for name in MAY_BE_ABSENT if keys.get(name) == NO_COLUMN and name not in cells]
    cells |= {name: Column(np.full(n_read, -1, dtype=np.int32), []) for name in absent}
    if "batch" not in cells:
        notes.append("no obs column for the experimental batch: cells are grouped by donor only")
        cells["batch"] = constant_column("", n_read)
    if "is_primary_data" not in cells:
        notes.append("no obs column 'is_primary_data': all cells count as primary data")
    elif not rules.include_non_primary:
        notes += _notes_on_primary(cells["is_primary_data"])
    if "cell_type" in columns and not rules.allow_numeric_labels:
        _refuse_clusters(path, cells["cell_type"], columns["cell_type"], rules)
    unusable, remedies = _unusable(cells, rules)
    cells.pop("is_primary_data", None)
    if rules.organism and organisms is None:
        notes.append(f"the file states no organism: all its cells count as {rules.organism}")
    elif rules.organism:
        wanted = organisms.where(lambda name: name.lower() == organism_name(rules.organism).lower())
        held = sorted(organisms.counts())
        others = "" if wanted.any() else f" (the file has {', '.join(held)})"
        of_organism = f"organism is not {rules.organism!r}{others}"
        unusable[of_organism] = ~wanted
        if others:
            remedies[of_organism] = f"--organism {held[0]!r}"
    kept, dropped = np.ones(n_read, dtype=bool), {}
    for reason, bad in unusable.items():
        dropped[reason] = int((kept & bad).sum())
        if reason == NO_CELL_TYPE_LABEL:
            notes.append(_note_on_labels(cells["cell_type"][kept & bad]))
        if reason.startswith("suspension_type") and bad.any() and not bad.all():
            notes.append(_note_on_suspension(cells["suspension_type"][bad], remedies[reason]))
        kept &= ~bad
    batch, kept_rows = cells["batch"], np.flatnonzero(kept)
    # cells without a known batch of one donor form one group: their batch is "", the last name
    cells["batch"] = Column(np.where(batch.codes < 0, len(batch.names), batch.codes), [*batch.names, ""])
    if n_unknown := int((batch.codes[kept_rows] < 0).sum()):
        notes.append(f"{n_unknown} cells have no known batch: they are grouped by donor only")
    usable = {name: column[kept_rows] for name, column in cells.items()}
    stated = organism_name(rules.organism) if rules.organism else None
    organism = one_organism(path, organisms[kept_rows]) if organisms else stated
    if not rules.allow_numeric_labels:
        if "cell_type" in columns:
            _refuse_clusters(path, usable["cell_type"], columns["cell_type"], rules)
        # other animals are not counted in years
        if "development_stage" in usable and organism in (None, "Homo sapiens"):
            usable["development_stage"], more = ages_in_words(usable["development_stage"])
            notes += more
            if more and organism is None:
                notes.append("the file states no organism: its ages count as years of people; else give --organism")
        notes += _check_numbers(path, usable, {name: columns[name] for name in usable.keys() & columns.keys()})
    notes += notes_on_tissue_type(path, kept_rows)
    notes += _notes_on_kept_labels(usable["cell_type"], rules)
    notes += _notes_on_states(usable["cell_type"])
    if "donor_id" in columns:
        notes += _notes_on_unknown_donors(cells["donor_id"])
    return Cells(
        rows=kept_rows,
        columns=usable,
        n_read=n_read,
        dropped=dropped,
        organism=organism,
        notes=notes,
        remedies=remedies,
    )


def read_in_words(
    path: str | os.PathLike, columns: dict[str, str], supplied: dict[str, str], n_cells: int
) -> tuple[dict[str, Column], list[str]]:
    """({CELLxGENE name: column of the file, in the usual words and without what no context states}, notes).

    columns, supplied: as resolve_columns gives them.
    """
    obs, notes = read_obs(path, list(columns.values())), []
    cells = {name: obs[key] if name == "donor_id" else _without_pooled(obs[key]) for name, key in columns.items()}
    cells |= {name: constant_column(value, n_cells) for name, value in supplied.items()}
    cells |= {name: whole_numbers(cells[name]) for name in ("donor_id", "batch") if name in cells}
    for name in cells:
        cells[name], more = with_usual_words(name, cells[name])
        notes += more
        if name in CONTEXT_COLUMNS:
            cells[name], more = without_unfit(name, cells[name])
            notes += more
    return cells, notes


def _without_pooled(column: Column) -> Column:
    """A column in which "pooled" is a missing value: a sex or tissue of several donors is not known."""
    pooled = [i for i, name in enumerate(column.names) if POOLED.fullmatch(name)]
    if not pooled:
        return column
    return Column(np.where(np.isin(column.codes, pooled), -1, column.codes).astype(np.int32), column.names)


def _unusable(cells: dict[str, Column], rules: CellRules) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({reason: [cells of the file] bool}, {reason: option that keeps these cells}) of the cells that cannot be used.

    A cell counts under its first reason, and the report lists the reasons in this order.
    """
    suspension, label, donor = (cells[name] for name in ("suspension_type", "cell_type", "donor_id"))
    kinds = [suspension_kind(name) for name in suspension.names]
    kind = np.array([*map(SUSPENSION_KINDS.index, kinds), SUSPENSION_KINDS.index("na")])[suspension.codes]
    right = np.isin(kind, [SUSPENSION_KINDS.index(name) for name in rules.suspension])
    of_suspension = f"suspension_type is not {' or '.join(map(repr, rules.suspension))}"
    others = [name for i, name in enumerate(SUSPENSION_KINDS) if name in rules.suspension or (kind == i).any()]
    not_primary = np.zeros(len(label.codes), dtype=bool)
    if "is_primary_data" in cells and not rules.include_non_primary:
        not_primary = ~cells["is_primary_data"].where(lambda name: name.lower() in YES)
    unusable = {
        of_suspension: ~right,
        NON_PRIMARY: not_primary,
        "no cell type": label.codes < 0,
    }
    remedies = {"no cell type": "--cell-type-key COLUMN (or annotate them first)", "no donor": ANOTHER_DONOR}
    is_kept = kept_label(rules.keep_label)
    clusters = set() if rules.allow_numeric_labels else clusters_among_words(label)
    if (
        set_aside := label.where(
            lambda n: (n in clusters or not is_cluster(n) and names_no_cell_type(n)) and not is_kept(n)
        )
    ).any():
        unusable[NO_CELL_TYPE_LABEL] = set_aside
    remedies[NO_CELL_TYPE_LABEL] = "--keep-label NAME" + (
        ", or name another column with --cell-type-key COLUMN" if clusters & set(label[set_aside].counts()) else ""
    )
    unusable["no donor"] = donor.codes < 0
    if (pooled := donor.where(lambda name: POOLED.fullmatch(name) is not None)).any():
        names = sorted({name.lower() for name in donor[pooled].counts()})
        of_pool = f"donor is {' or '.join(map(repr, names))}, which means several"
        unusable[of_pool] = pooled
        remedies[of_pool] = ANOTHER_DONOR
    remedies |= {
        of_suspension: f"--suspension {','.join(others)}",
        NON_PRIMARY: "--include-non-primary",
    }
    return unusable, remedies


def _note_on_labels(labels: Column) -> str:
    """What was left out because its label names no cell type. labels: of the cells that were left out."""
    listed = ", ".join(
        f"{name!r} ({n})" for name, n in sorted(labels.counts().items(), key=lambda item: (-item[1], item[0]))
    )
    n_cells = f"{len(labels.codes)} cell{'s' if len(labels.codes) != 1 else ''}"
    return f"{n_cells} with a label that names no cell type are left out: {listed}; --keep-label NAME keeps one"


def _notes_on_kept_labels(labels: Column, rules: CellRules) -> list[str]:
    """A note for each --keep-label that no usable cell has."""
    used = {name.lower() for name in labels.counts()}
    missing = [name for name in rules.keep_label if name.strip().lower() not in used]
    return [f"--keep-label {name}: no cell has this label" for name in missing]


def _note_on_suspension(suspension: Column, remedy: str) -> str:
    """What was left out because of its suspension type. suspension: of the cells that were left out."""
    counts = suspension.counts()
    listed = [f"{name!r} ({n})" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    n_unknown = len(suspension.codes) - sum(counts.values())
    listed += [f"not known ({n_unknown})"] if n_unknown else []
    return f"cells of another suspension type are left out: {', '.join(listed)}; {remedy} keeps them"


def _notes_on_primary(flags: Column) -> list[str]:
    """A note on values of is_primary_data that are neither true nor false."""
    strange = {name: n for name, n in flags.counts().items() if name.lower() not in YES | NO}
    listed = ", ".join(f"{name!r} ({n})" for name, n in sorted(strange.items()))
    return [f"is_primary_data is not understood where it is {listed}: read as not True"] if strange else []


def _notes_on_states(labels: Column) -> list[str]:
    """A note on labels such as "cycling", which the build uses."""
    states = {name: n for name, n in labels.counts().items() if names_state(name)}
    listed = ", ".join(f"{name!r} ({n})" for name, n in sorted(states.items()))
    return [f"labels that name a state rather than a cell type are used as they are: {listed}"] if states else []


def _notes_on_unknown_donors(donors: Column) -> list[str]:
    """A note when a text that may be somebody's code, such as "ND", was read as "not known"."""
    doubtful = [text for text in donors.placeholders if text and text.isalpha() and text.lower() in ("nd", "na", "unk")]
    return [
        f'the donor {text!r} is read as "not known": rename it in the file if it is the code of a donor'
        for text in doubtful
    ]


def notes_on_tissue_type(path: str | os.PathLike, rows: np.ndarray) -> list[str]:
    """A note when cells are of an organoid or a culture (tissue_type of CELLxGENE since schema 4)."""
    if "tissue_type" not in obs_columns(path):
        return []
    counts = read_obs(path, ["tissue_type"])["tissue_type"][rows].counts()
    if not counts.keys() - {"tissue"}:
        return []
    listed = ", ".join(f"{n} {name!r}" for name, n in sorted(counts.items()))
    return [f"tissue_type of the cells kept: {listed}; the context names the tissue as the file does"]


def _refuse_clusters(path: str | os.PathLike, labels: Column, key: str, rules: CellRules) -> None:
    """Raise UserError when labels are only numbers, ids or names of clusters, unless --keep-label names one of them."""
    what, shown = only_clusters(labels)
    if what and not any(map(kept_label(rules.keep_label), labels.counts())):
        only = what if what.startswith("hardly") else f"only {what}"
        raise UserError(
            f"{path}: the obs column {key!r} holds {only} ({_first(shown)}), which are no cell types; name the column of "
            f"cell types with --cell-type-key ({hint_of_cell_types(path)}), or insist with --allow-numeric-labels"
        )


def _first(shown: Sequence[str]) -> str:
    return ", ".join(shown) + (", ..." if len(shown) > 2 else "")


def _check_numbers(path: str | os.PathLike, cells: dict[str, Column], columns: dict[str, str]) -> list[str]:
    """Raise UserError when a column of words holds only numbers. Returns notes on context columns that are left out.

    cells: {CELLxGENE name: values of the usable cells}; a context column of numbers is removed from it.
    columns: {CELLxGENE name: obs column} of those that the file has.
    """
    for name in NUMERIC_REFUSED:
        what, shown = only_codes(cells[name]) if name in columns else ("", [])
        if shown:
            holds = f"{path}: the obs column {columns[name]!r} holds only {what} ({_first(shown)})"
            flag = COLUMN_FLAGS[name]
            # one word for all cells is right only where all cells have one value
            constant = f"supply the value with --constant {name}=VALUE, " if len(cells[name].counts()) == 1 else ""
            raise UserError(
                f"{holds}, so its words were lost; name another column with {flag}, {constant}leave it out of the context "
                f"with {flag} {NO_COLUMN}, or insist with --allow-numeric-labels"
            )
    held = {name: only_codes(cells[name])[0] for name in FREE_TEXT if name in columns}
    lost = {name: what for name, what in held.items() if what}
    for name in lost:
        del cells[name]
    return [f"the obs column {name!r} holds only {what}: no context states it" for name, what in lost.items()]


def resolve_columns(
    path: str | os.PathLike,
    keys: dict[str, str],
    constants: dict[str, str],
    required: Sequence[str] = REQUIRED_COLUMNS,
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Find the columns that a build uses. Returns ({CELLxGENE name: obs column}, {CELLxGENE name: constant}, notes).

    keys: {CELLxGENE name: obs column}, as the flags of COLUMN_FLAGS give it. constants: {CELLxGENE name or obs column:
    value}, used instead of a column. required: CELLxGENE names that the file must have. Raises UserError for a missing
    column that is required or that a flag names.
    """
    present, columns, supplied, notes = obs_columns(path), {}, {}, []
    optional = {name: name for name in (*CONTEXT_COLUMNS, "is_primary_data") if name not in keys}
    for name, key in {**keys, **optional}.items():
        value = constants.get(name, constants.get(key))
        if value:
            supplied[name] = value
            if key in present:
                notes.append(f"--constant {name}={value} is used instead of the obs column {key!r}")
        elif key in present:
            columns[name] = key
        elif name in MAY_BE_ABSENT and key == NO_COLUMN:
            continue
        elif name == "cell_type" and key == name:
            raise UserError(_no_cell_types(path, present))
        elif name in required or key != name:
            raise UserError(
                f"{path}: no obs column {key!r} (nearest: {nearest_names(key, present)}); name the column with "
                f"{COLUMN_FLAGS[name]} COLUMN, or supply its value with --constant {name}=VALUE"
            )
    return columns, supplied, notes


def _no_cell_types(path: str | os.PathLike, present: list[str]) -> str:
    """The message on a file without the column cell_type."""
    likely = columns_like_cell_types(path)
    if not likely and (why := transposed(path)):
        return (
            f"{path}: has no cell types and looks transposed, with genes as rows ({why}); turn it in Python: "
            f"anndata.read_h5ad({Path(path).name!r}).T.write_h5ad({f'{Path(path).stem}-turned.h5ad'!r})"
        )
    if not likely:
        return (
            f"{path}: no obs column 'cell_type' (nearest: {nearest_names('cell_type', present)}) and none that looks "
            "like cell types: this file has no cell types; a build needs them, so annotate the cells first, or name "
            "the column that has them with --cell-type-key"
        )
    return (
        f"{path}: no obs column 'cell_type' (nearest: {nearest_names('cell_type', present)}); name the column with "
        f"--cell-type-key COLUMN (columns that look like cell types: {', '.join(map(repr, likely[:5]))})"
    )


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


def count_cells(path: str | os.PathLike) -> int:
    """The number of cells of a file. Raises UserError when it holds none."""
    with open_h5ad(path) as file:
        n_cells = table_index(file, "obs", path).shape[0]
    if not n_cells:
        raise UserError(f"{path}: holds no cells; choose another file")
    return n_cells


def organism_name(text: str) -> str:
    """The name of an organism that is given by name or taxon: NCBITaxon:9606 is Homo sapiens."""
    return ORGANISMS.get(text.lower(), text)


def read_organisms(path: str | os.PathLike, n_cells: int) -> Column | None:
    """The organism of each cell, from obs or, as in later CELLxGENE schemas, from uns. None when neither states it."""
    present = obs_columns(path)
    named = [name for name in ORGANISM_COLUMNS if name in present][:1]  # the name is preferred to the id
    column = read_obs(path, named)[named[0]] if named else None
    if column is None or (column.codes < 0).all():
        stated = uns_text(path, ORGANISM_COLUMNS)  # of the whole file
        return constant_column(organism_name(stated), n_cells) if stated else None
    names = list(dict.fromkeys(map(organism_name, column.names)))
    code_of = np.array([*(names.index(organism_name(name)) for name in column.names), -1], dtype=np.int32)
    return Column(code_of[column.codes], names)


def one_organism(path: str | os.PathLike, column: Column) -> str | None:
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
    which rewards ignore, or in how one name is written (T cell, T cells, T-cell).
    """
    by_name: dict[str, str] = {}
    for label in sorted(labels):
        if "|" in label:
            raise UserError(f"{path}: the cell type {label!r} holds '|', which separates answers; rename it")
        if "<" in label and ">" in label:
            raise UserError(f"{path}: the cell type {label!r} looks like a tag of the answer format; rename it")
        if len(label) > LONGEST_LABEL:
            raise UserError(f"{path}: the cell type {label[:40] + '...'!r} has {len(label)} letters; shorten it")
        other = by_name.setdefault(same_name(normalise_label(label)), label)
        if other != label:
            only = "case" if other.lower() == label.lower() else "case, blanks, hyphens or a plural s"
            raise UserError(f"{path}: the cell types {other!r} and {label!r} differ only in {only}; give them one name")
