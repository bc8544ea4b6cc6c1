"""What a build knows of its labels: their cells, their tissues, and their ids in the Cell Ontology.

It becomes `labels` of report.json and the file labels.json (data/clusters/known.py), which a trained model takes along.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.build.cells import Cells
from data.build.columns import Column
from data.build.h5ad import obs_columns, read_obs
from data.clusters.known import KnownLabel
from data.errors import UserError
from data.meaning.labels import is_term_id

TERM_COLUMN = "cell_type_ontology_term_id"
AGREE = 0.9
"""A label gets the id that at least this share of its cells with an id have: other names than `cell_type` may be coarser."""


@dataclass(frozen=True)
class LabelCounts:
    """The usable cells of a file, counted."""

    cells: Counter[tuple[str, str, str]]
    """{(label, donor, tissue): cells}; the tissue is "unknown" where it is not known."""
    terms: Counter[tuple[str, str]]
    """{(label, id of the Cell Ontology): cells}, of the cells that have an id."""


def count_labels(path: str | os.PathLike, cells: Cells) -> LabelCounts:
    """Count the usable cells of a file."""
    named = [cells.columns[name] for name in ("cell_type", "donor_id", "tissue")]
    return LabelCounts(
        cells=Counter({_texts(named, key): n for key, n in _distinct(named)}),
        terms=_count_terms(path, cells),
    )


def _count_terms(path: str | os.PathLike, cells: Cells) -> Counter[tuple[str, str]]:
    if TERM_COLUMN not in obs_columns(path):
        return Counter()
    try:
        terms = read_obs(path, [TERM_COLUMN])[TERM_COLUMN][cells.rows]
    except UserError:  # a build does not need the ids
        return Counter()
    named = [cells.columns["cell_type"], terms]
    counts: Counter[tuple[str, str]] = Counter()
    for key, n in _distinct(named):
        label, term = _texts(named, key)
        term = term.replace("_", ":")
        if is_term_id(term):
            counts[label, term] += n
    return counts


def _distinct(columns: list[Column]) -> Iterator[tuple[tuple[int, ...], int]]:
    """(codes, number of cells) of each combination of values."""
    # one number for each combination: np.unique is slow on several rows of a million
    keys = np.zeros(len(columns[0].codes), dtype=np.int64)
    for column in columns:
        keys = keys * (len(column.names) + 1) + column.codes + 1
    found, counts = np.unique(keys, return_counts=True)
    for key, n in zip(found.tolist(), counts.tolist(), strict=True):
        codes = []
        for column in reversed(columns):
            key, code = divmod(key, len(column.names) + 1)
            codes.append(code - 1)
        yield tuple(reversed(codes)), n


def _texts(columns: list[Column], codes: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(c.names[code] if code >= 0 else "unknown" for c, code in zip(columns, codes, strict=True))


def known_labels(counts: Iterable[LabelCounts], donors: set[str], wanted: set[str]) -> dict[str, KnownLabel]:
    """{label: what the cells of some donors say of it}, sorted. wanted: the labels; ids are taken from all donors."""
    tissues: dict[str, set[str]] = {label: set() for label in wanted}
    n_cells: Counter[str] = Counter()
    terms: dict[str, Counter[str]] = {label: Counter() for label in wanted}
    for of_file in counts:
        for (label, donor, tissue), n in of_file.cells.items():
            if label in wanted and donor in donors:
                n_cells[label] += n
                tissues[label] |= {tissue} - {"unknown"}
        for (label, term), n in of_file.terms.items():
            if label in wanted:
                terms[label][term] += n
    return {
        label: KnownLabel(_agreed(terms[label]), tuple(sorted(tissues[label])), n_cells[label])
        for label in sorted(wanted)
    }


def _agreed(terms: Counter[str]) -> str | None:
    """The id on which nearly all cells agree, or None."""
    term = min(terms, key=lambda name: (-terms[name], name), default=None)
    return term if term is not None and terms[term] >= AGREE * terms.total() else None
