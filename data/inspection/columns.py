"""What each obs column holds, and which ones are the cell types, donors and other facts that a build needs."""

import os
import re
from typing import Any

import numpy as np

from data.build.columns import clean_text, is_number
from data.build.h5ad import as_text, column_names, has_categories_beside, open_h5ad, open_node, read_column, table_index
from data.errors import UserError
from data.formats.stores import is_dataset, is_group
from data.inspection.facts import ColumnFacts
from data.meaning.labels import is_cluster, is_term_id, likeness
from data.meaning.words import suspension_kind

WHOLE = 200_000
"""A column without categories is read whole up to this many cells, else sampled."""
SPOTS, SPOT_CELLS = 8, 2_500
FEW = 300
"""More distinct values than this are no cell types and no clusters."""
SHOWN = 200
"""Values whose counts are kept."""
CLUSTER_NAME = re.compile(r"leiden|louvain|cluster|phenograph|snnres|kmeans")
ROLE_NAMES = {
    "cell_type": (
        r"celltypes?",
        r"cellontologyclass|cellontology",
        r".*celltype.*",
        r"(bulk|cell)?labels?|annotations?|annot",
        r".*(annotation|annot|celllabel|majorityvoting|predictedlabel|cellident|identity|subclass|clustername).*",
        r".*(annlevel|level|class|cluster|ident|type).*",
    ),
    "donor_id": (
        r"donor(id|name)?",
        r".*donor.*",
        r"(patient|subject|individual|participant|person|mouse|animal)(id|name|no|number)?",
        r".*(patient|subject|individual|participant|mouseid|animalid).*",
        r"(sample|specimen|biosample)(id|name)?",
        r"origident|library(id)?|batch(id)?",
    ),
    "batch": (r"batch(id)?", r"library(id)?", r"(sample|specimen)(id|name)?", r"origident|channel|lane|run|pool"),
    "tissue": (
        r"tissue(name)?",
        r"organ(name)?",
        r"tissue(general|origin|source)",
        r"(anatomical)?site|bodysite|region",
    ),
    "disease": (r"disease(s|name)?", r"diagnosis", r"(disease|health)(status|state|group)", r"condition|status|health"),
    "suspension_type": (r"suspensiontype", r"cellornucle(us|i)", r"suspension|celltypeofassay"),
    "sex": (r"sex", r"gender", r"(donor)?sex.*"),
    "development_stage": (r"developmentstage", r"developmentalstage|devstage", r"age|donorage|agegroup|stage"),
    "self_reported_ethnicity": (r"selfreportedethnicity", r"ethnicity", r"race|ancestry|population"),
}
"""CELLxGENE obs column -> patterns of the names that others give it (letters and digits, lower case), best first."""


def obs_facts(path: str | os.PathLike) -> tuple[int, list[ColumnFacts]]:
    """(number of cells, what each obs column holds)."""
    with open_h5ad(path) as file:
        n_cells = table_index(file, "obs", path).shape[0]
        return n_cells, [_column_facts(file, name, n_cells, path) for name in column_names(file["obs"])]


def _column_facts(file: Any, name: str, n_cells: int, path: str | os.PathLike) -> ColumnFacts:
    try:
        node = open_node(file["obs"], name, path)
        if is_dataset(node) and node.ndim != 1:
            return ColumnFacts(name, "unreadable", 0, 0, False, [])
        if is_group(node) or n_cells <= WHOLE or "categories" in node.attrs or f"__categories/{name}" in file["obs"]:
            if _is_float(node) and not has_categories_beside(file["obs"], name):
                return ColumnFacts(name, "numbers", 0, 0, False, [])
            column = read_column(file, "obs", name, path)
            known = column.codes[column.codes >= 0]
            counts = np.bincount(known, minlength=len(column.names)).tolist()
            pairs = [(text, count) for text, count in zip(column.names, counts, strict=True) if count]
            return _judged(name, pairs, n_cells - len(known), n_cells, exact=True, of_numbers=_is_number(node))
        if _is_float(node):
            return ColumnFacts(name, "numbers", 0, 0, False, [])
        starts = np.linspace(0, n_cells - SPOT_CELLS, SPOTS).astype(np.int64).tolist()
        raw = [value for start in starts for value in node[start : start + SPOT_CELLS].tolist()]
        values, numbers = np.unique(np.array([_text(value) for value in raw], dtype=str), return_counts=True)
        known = [(clean_text(v), n) for v, n in zip(values.tolist(), numbers.tolist(), strict=True)]
        pairs = [(text, count) for text, count in known if text is not None]
        missing = sum(count for text, count in known if text is None)
        return _judged(name, pairs, missing, len(raw), exact=False, of_numbers=_is_number(node))
    except UserError:
        return ColumnFacts(name, "unreadable", 0, 0, False, [])


def _judged(
    name: str, pairs: list[tuple[str, int]], n_missing: int, n_read: int, *, exact: bool, of_numbers: bool
) -> ColumnFacts:
    """The facts about a column from its distinct values and how many cells have each."""
    texts = [text for text, _ in pairs]
    pairs = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:SHOWN]
    numeric = all(map(is_number, texts))
    kind, likely = "labels", False
    if not texts:
        kind, pairs = "empty", []
    elif set(texts) <= {"True", "False"}:
        kind = "true/false"
    elif numeric and (len(texts) > FEW or of_numbers) and not CLUSTER_NAME.search(plain(name)):
        kind = "numbers"
    elif numeric or all(map(is_cluster, texts)):
        kind = "clusters"
    elif len(texts) > FEW and len(texts) > 0.2 * n_read:
        kind, pairs = "identifiers", []
    else:
        likely = likeness(name, texts) > 0
    return ColumnFacts(name, kind, len(texts), n_missing, exact, pairs, likely)


def guessed_column(role: str, columns: list[ColumnFacts], taken: set[str]) -> str | None:
    """The column that most likely holds a fact, by its name and, for cell types, by its values. None: there is none.

    role: a name of ROLE_NAMES. taken: columns that have another role.
    """
    # a build refuses numbers where the context needs words (data/meaning/labels.py)
    texts_only = role not in ("donor_id", "batch")
    kinds = ("labels",) if texts_only else ("labels", "clusters", "identifiers", "numbers")
    able = [c for c in columns if c.name not in taken and c.kind in kinds]
    able = [c for c in able if not (c.most_common and all(is_term_id(text) for text, _ in c.most_common))]
    if role in ("cell_type", "donor_id", "batch"):
        able = [c for c in able if c.n_values >= 2]
    if role == "suspension_type":
        able = [c for c in able if all(_is_suspension(text) for text, _ in c.most_common)]
    for rank, pattern in enumerate(ROLE_NAMES[role]):
        named = [c for c in able if re.fullmatch(pattern, plain(c.name))]
        if role == "cell_type" and rank >= 3:  # names such as "type" say little: the values must, too
            named = [c for c in named if c.looks_like_cell_types]
        if named:
            return min(named, key=lambda c: (not c.looks_like_cell_types, len(c.name), c.name)).name
    if role == "cell_type":
        likely = [c for c in able if c.looks_like_cell_types]
        return max(likely, key=lambda c: c.n_values).name if likely else None
    return None


def _is_suspension(text: str) -> bool:
    return text.lower() == "na" or suspension_kind(text) != "na"


def plain(name: str) -> str:
    """A column's name in lower case, letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_float(node: Any) -> bool:
    values = node["values"] if is_group(node) and "values" in node else node
    return is_dataset(values) and values.dtype.kind == "f"


def _is_number(node: Any) -> bool:
    values = node["values"] if is_group(node) and "values" in node else node
    return is_dataset(values) and values.dtype.kind in "iuf"


def _text(value: Any) -> str:
    return as_text(value, "obs") if isinstance(value, bytes) else str(value)
