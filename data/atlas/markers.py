"""The marker table: which genes tell which cell type, in which tissues, and who says so (data/atlas/markers.tsv)."""

import os
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError

MARKERS_FILE = Path(__file__).with_name("markers.tsv")
COLUMNS = ("cell_type", "lineage", "tissues", "markers", "source")


@dataclass(frozen=True)
class MarkerEntry:
    """One cell type of the marker table."""

    cell_type: str
    """Cell Ontology name, e.g. "natural killer cell"."""
    lineage: str
    """Group of related types, e.g. "T and NK cells"."""
    tissues: tuple[str, ...]
    """Uberon names of the tissues the type lives in."""
    markers: tuple[str, ...]
    """HGNC gene symbols, strongest first."""
    source: str
    """DOIs of the atlases or databases that list these markers."""


def read_markers(path: str | os.PathLike = MARKERS_FILE) -> dict[str, MarkerEntry]:
    """The entries of a marker table by cell type, in file order; `#` lines and empty lines are skipped.

    Raises UserError naming the file and line of a missing or wrong header, a line without its five filled columns, a
    cell type that comes twice, or a line that lists a gene or a tissue twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such marker table")
    entries: dict[str, MarkerEntry] = {}
    header_seen = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if not header_seen:
            if tuple(fields) != COLUMNS:
                raise UserError(f"{path}, line {number}: the header must be, tab separated, {', '.join(COLUMNS)}")
            header_seen = True
            continue
        try:
            entry = _entry(fields)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if entry.cell_type in entries:
            raise UserError(f"{path}, line {number}: '{entry.cell_type}' is listed twice; merge the two lines")
        entries[entry.cell_type] = entry
    if not entries:
        raise UserError(f"{path}: holds no cell type; it needs the header {', '.join(COLUMNS)} and a line per type")
    return entries


def _entry(fields: list[str]) -> MarkerEntry:
    """The entry of one line's fields."""
    if len(fields) != len(COLUMNS):
        raise UserError(f"has {len(fields)} tab-separated columns, needs {len(COLUMNS)}: {', '.join(COLUMNS)}")
    for column, field in zip(COLUMNS, fields, strict=True):
        if not field:
            raise UserError(f"column {column} is empty")
    cell_type, lineage, tissue_text, marker_text, source = fields
    tissues, markers = _split("tissues", tissue_text), _split("markers", marker_text)
    return MarkerEntry(cell_type, lineage, tissues, markers, source)


def _split(column: str, text: str) -> tuple[str, ...]:
    """The comma-separated names of one field, each once."""
    names = tuple(name.strip() for name in text.split(","))
    for position, name in enumerate(names):
        if not name:
            raise UserError(f"column {column} has an empty name: remove the extra comma")
        if name in names[:position]:
            raise UserError(f"column {column} lists {name} twice; remove one")
    return names
