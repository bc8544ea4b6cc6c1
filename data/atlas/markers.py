"""The marker table data/atlas/markers.tsv: the marker genes of each cell type, its tissues, and the sources."""

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError

MARKERS_FILE = Path(__file__).with_name("markers.tsv")
COLUMNS = ("cell_type", "lineage", "tissues", "markers", "source")
TERM_COLUMN = "ontology_term_id"
"""A last column that a table may have."""


@dataclass(frozen=True)
class MarkerEntry:
    """One cell type of the marker table."""

    cell_type: str
    """Name in the Cell Ontology. Example: "natural killer cell"."""
    lineage: str
    """Group of related types. Example: "T and NK cells"."""
    tissues: tuple[str, ...]
    """Uberon names of the tissues in which the type occurs."""
    markers: tuple[str, ...]
    """HGNC gene symbols, strongest first."""
    source: str
    """DOIs of the atlases or databases that list these markers."""
    ontology_term_id: str | None = None
    """Id of the type in the Cell Ontology; None in a table without the column."""


RENAMED = {"CIMIP1": "C20orf85", "CIMAP3": "PIFO"}
"""{symbol of today: the one in our table}. The table stays as it is: the bytes of the simulated atlas depend on it."""


def name_in_table(gene: str) -> str:
    """A gene under the name that the marker table has for it."""
    return RENAMED.get(gene, gene)


def as_in_table(genes: Iterable[str]) -> set[str]:
    """Genes under the names of the marker table."""
    return set(map(name_in_table, genes))


def read_markers(path: str | os.PathLike = MARKERS_FILE) -> dict[str, MarkerEntry]:
    """{cell type: entry} of a marker table, in file order. Empty lines and lines that begin with `#` are skipped.

    Raises UserError, with file and line, for a missing or wrong header, a line without all columns filled, a cell type
    that occurs twice, or a line that lists a gene or a tissue twice. The columns are COLUMNS, and TERM_COLUMN after them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such marker table")
    entries: dict[str, MarkerEntry] = {}
    columns: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if not columns:
            columns = tuple(fields)
            if columns not in (COLUMNS, (*COLUMNS, TERM_COLUMN)):
                raise UserError(f"{path}, line {number}: the header must be, tab separated, {', '.join(COLUMNS)}")
            continue
        try:
            entry = _entry(columns, fields)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if entry.cell_type in entries:
            raise UserError(f"{path}, line {number}: '{entry.cell_type}' is listed twice; merge the two lines")
        entries[entry.cell_type] = entry
    if not entries:
        raise UserError(f"{path}: holds no cell type; it needs the header {', '.join(COLUMNS)} and a line per type")
    return entries


@functools.cache
def ontology_term_ids() -> dict[str, str]:
    """{cell type: its id in the Cell Ontology}, of the types of markers.tsv."""
    return {name: entry.ontology_term_id for name, entry in read_markers().items() if entry.ontology_term_id}


def _entry(columns: tuple[str, ...], fields: list[str]) -> MarkerEntry:
    """The entry for the fields of one line."""
    if len(fields) != len(columns):
        raise UserError(f"has {len(fields)} tab-separated columns, needs {len(columns)}: {', '.join(columns)}")
    for column, field in zip(columns, fields, strict=True):
        if not field:
            raise UserError(f"column {column} is empty")
    cell_type, lineage, tissue_text, marker_text, source, *term = fields
    tissues, markers = _split("tissues", tissue_text), _split("markers", marker_text)
    return MarkerEntry(cell_type, lineage, tissues, markers, source, *term)


def _split(column: str, text: str) -> tuple[str, ...]:
    """The comma-separated names of one field. Raises UserError when one is empty or occurs twice."""
    names = tuple(name.strip() for name in text.split(","))
    for position, name in enumerate(names):
        if not name:
            raise UserError(f"column {column} has an empty name: remove the extra comma")
        if name in names[:position]:
            raise UserError(f"column {column} lists {name} twice; remove one")
    return names
