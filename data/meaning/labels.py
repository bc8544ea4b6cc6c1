"""Which values of obs columns are no cell types: numbers of clusters, and names for cells that were set aside."""

import os
import re
from collections.abc import Callable, Iterable, Sequence

import h5py

from data.build.columns import Column, is_number
from data.build.h5ad import (
    as_text,
    column_names,
    has_categories_beside,
    nearest_names,
    open_h5ad,
    open_node,
    read_column,
    table_index,
)
from data.errors import UserError
from data.formats.stores import is_dataset
from data.meaning.names import are_genes

_SET_ASIDE = re.compile(
    r"\b(un|not|non) ?(assigned|classified|identified|annotated|labell?ed|determined|defined|known|mapped|called)\b"
    r"|\bambig(uous)?\b|\b(doublets?|multiplets?|triplets?)\b|\blow ?q(uality|ual|c)?\b|\b(poor|bad) (quality|qc)\b"
    r"|\blowq\b|\blow (umis?|counts?|genes?|rna|features?|reads?|complexity)\b|\bfew (umis?|counts?|genes?|reads?)\b"
    r"|\bdebris\b|\bfiltered\b|\bcontaminat(ed|ion|ing|ions|ants?)\b|\bambient\b"
    r"|\bto (be )?(remove|exclude|discard|delete|drop|reject|filter)(p?ed|d)?\b|\bartifacts?\b|\bartefacts?\b"
    r"|\bempty (droplets?|drops?)\b|\bfail(s|ed|ing)? qc\b|\bqc (fail(s|ed)?|poor|bad|low)\b"
    r"|\bno ?(match|label|annotation|calls?|type|cell type)\b",
)
"""Words within labels, in lower case and with blanks for - and _, of cells that an annotator set aside: no cell type."""
_NO_TYPE = re.compile(
    r"(dead|dying|damaged|bad|rejected|reject|dropp?ed|drop|deleted?|discard(ed)?|removed?|excluded?|trash|junk|garbage"
    r"|noise|noisy|outliers?|background|singlets?|negatives?|uncertain|unsure|undecided|indeterminate|inconclusive"
    r"|(un|not ?)resolved|mixed|mixture|misc|miscellaneous|(native|animal|eukaryotic|somatic|human|mouse|single|other)"
    r"|not a|non|others?|((mt|mito(chondrial)?) ?(high|hi)|(high|hi) (mt|mito(chondrial)?))( rna| genes)?)?"
    r"( ?(cells?|rna|noise|qc|clusters?))?( ?#?\d+)?",
)
"""Whole labels, written in the same way, that name no cell type, with or without "cells" or a number."""
_REMOVED_AT_END = re.compile(r"\b(removed?|excluded?|discard(ed)?|rejected|deleted?|dropped)\W*$")
_STATE = re.compile(
    r"(cycling|proliferating|proliferation|mitotic|dividing|stress(ed)?|dissociation|interferon|hypoxi[ac])( cells?)?"
)
"""Whole labels that name what cells do."""
_CLUSTER = re.compile(
    r"(c|cl|clu|clus|clust|((sub|meta|super|cell|seurat|leiden|louvain|rna|wnn)[\s_.-]?)?clusters?|leiden|louvain|seurat"
    r"|phenograph|k-?means|communit(y|ies)|partition|group|population|cell[\s_.-]?type|(rna|wnn|sct|integrated)?_?snn_res)"
    r"[\s_.#:-]*\d+([\s_.,:-]\d+)*",
    re.IGNORECASE,
)
"""Names of clusters: the word of a program, or nothing but a letter, with a number."""
_CELL_WORDS = re.compile(
    r"\b(cells?|t|b|nk|dc|cd4|cd8|treg|pdc|mono|macs?|neurons?|neural|glia|stem|progenitors?|mast|plasma|stroma\w*"
    r"|hsc|mait|ilc\d?|cdc\d?|tuft|ductal|acinar|alpha|beta|delta|platelets?|neutrophils?|eosinophils?|basophils?|erythroid|endotheli\w*|epitheli\w*|pericytes?|excitatory"
    r"|inhibitory|myeloid|lymphoid|basal|ciliated|goblet|club|alveolar)\b|cytes?\b|blasts?\b|phages?\b|glia\b"
)
"""Words of cell types, in lower case."""
_CELL_TYPE_NAME = re.compile(r"cell.?(types?|class|subtypes?|labels?|states?|anno\w*)|^(cluster_)?annot\w*|^labels?$")
"""Names of obs columns, in lower case, that usually hold cell types."""
_OTHER_NAME = re.compile(r"ontology_term_id$|^(suspension_?type|tissue_?type|assay)$")
"""Names of obs columns, in lower case, whose values hold words of cell types but are none."""
_TERM_ID = re.compile(r"[A-Za-z]+[:_]\d{4,}$")
MOST_TYPES = 2000
"""More distinct values than this are no cell types."""
SAMPLED = 200
"""Values of a column that are looked at."""
CELL_COLUMNS = ("cell_type", "donor_id", "suspension_type", "barcode", "n_genes", "n_genes_by_counts", "nCount_RNA")
"""Columns of cells that are never columns of genes."""


def names_no_cell_type(label: str) -> bool:
    """Whether a label stands for cells without a cell type, such as "Doublets" or "low-quality cells"."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)  # lowQualityCells
    return any(_is_set_aside(" ".join(re.split(r"[\s_-]+", text.lower())).strip()) for text in {label, apart})


def _is_set_aside(words: str) -> bool:
    if _SET_ASIDE.search(words) or _REMOVED_AT_END.search(words):
        return True
    return not is_number(words) and _NO_TYPE.fullmatch(words) is not None


def same_name(label: str) -> str:
    """A label without what differs between spellings of one name: case, blanks, hyphens within words, the plural.

    CD4- T cell stays apart from CD4 T cell, and 1-1 from 11.

    >>> same_name("CD8 T-cells") == same_name("cd8 t cell"), same_name("CD4- T cell") == same_name("CD4 T cell")
    (True, False)
    """
    text = re.sub(r"(?<=[a-z]{3})(?<![sui])s\b", "", label.lower())
    text = re.sub(r"(?<=\w)([\s_]+|-)(?=\w)", " ", text)
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def names_state(label: str) -> bool:
    """Whether a label says only what cells do, such as "cycling": perhaps no cell type, but used."""
    return _STATE.fullmatch(label.lower()) is not None


def is_cluster(label: str) -> bool:
    """Whether a label is the number of a cluster, or its name without a meaning: 3, C12, leiden_4, Cluster#2."""
    return is_number(label) or _CLUSTER.fullmatch(label) is not None and not is_term_id(label)


def kept_label(kept: Iterable[str]) -> Callable[[str], bool]:
    """The function that tells whether --keep-label names a label. Case is ignored."""
    names = {name.strip().lower() for name in kept}
    return lambda label: label.lower() in names


def clusters_among_words(column: Column) -> set[str]:
    """The values of a column that are numbers or names of clusters while others are words: an annotator left them.

    https://github.com/scverse/anndata/issues/761
    """
    clusters = {name for name in column.counts() if is_cluster(name)}
    return clusters if len(clusters) < len(column.counts()) else set()


def only_codes(column: Column) -> tuple[str, list[str]]:
    """("numbers" or "ids", some distinct values) when all known values of a column are such, else ("", [])."""
    return _all_codes(column, {"numbers": is_number, "ids": is_term_id})


def only_clusters(column: Column) -> tuple[str, list[str]]:
    """As only_codes, for the column of cell types: names of clusters are codes, too, and one label beside is too few."""
    found = _all_codes(column, {"numbers": is_number, "ids": is_term_id, "names of clusters": is_cluster})
    if found[0]:
        return found
    clusters = [name for name in column.counts() if is_cluster(name)]
    types = [name for name in column.counts() if not is_cluster(name) and not names_no_cell_type(name)]
    if not clusters or len(types) > 1:
        return "", []
    kind = "numbers" if all(map(is_number, clusters)) else "names of clusters"
    return f"hardly anything but {kind}", clusters[:3]


def _all_codes(column: Column, kinds: dict[str, Callable[[str], bool]]) -> tuple[str, list[str]]:
    for what, is_code in kinds.items():
        if any(map(is_code, column.names)) and all(map(is_code, used := list(column.counts()))) and used:
            return what, used[:3]
    return "", []


def columns_like_cell_types(path: str | os.PathLike) -> list[str]:
    """The obs columns whose values look like cell types, the best first."""
    scores: dict[str, float] = {}
    with open_h5ad(path) as file:
        for name in column_names(file["obs"]):
            score = _score(file, name, path)
            if score > 0:
                scores[name] = score
    return sorted(scores, key=lambda name: (-scores[name], name))


def hint_of_cell_types(path: str | os.PathLike) -> str:
    """The columns that look like cell types, for a message."""
    names = columns_like_cell_types(path)
    if names:
        return f"columns that look like cell types: {', '.join(map(repr, names[:5]))}"
    with open_h5ad(path) as file:
        return f"no column looks like cell types; the file has {nearest_names('cell_type', column_names(file['obs']))}"


def transposed(path: str | os.PathLike) -> str | None:
    """Why a file seems to hold genes in the rows and cells in the columns; None when nothing speaks for it.

    Readers of text tables often leave a matrix as it is in R. https://github.com/scverse/scvi-tools/issues/84
    """
    with open_h5ad(path) as file:
        held = [name for name in column_names(file["var"]) if name in CELL_COLUMNS]
        if held:
            return f"the table of genes (var) has the columns {', '.join(map(repr, held))}"
        index = table_index(file, "obs", path)
        rows = [as_text(name, f"{path}: the index of obs") for name in index[: 10 * SAMPLED].tolist()]
    return f"the cells (obs) are named {', '.join(rows[:3])}, ..." if are_genes(rows) else None


def _score(file: h5py.File, name: str, path: str | os.PathLike) -> float:
    """How much a column looks like cell types: 0 for not at all, at most 2."""
    node = open_node(file["obs"], name, path)
    is_words = not is_dataset(node) or node.dtype.kind not in "iufb" or "categories" in node.attrs
    try:
        if not is_words and not has_categories_beside(file["obs"], name):
            return 0.0  # measurements and flags
        return likeness(name, read_column(file, "obs", name, path).names)
    except UserError:  # a column that cannot be read is no remedy
        return 0.0


def is_term_id(label: str) -> bool:
    """Whether a label is an id of an ontology, such as CL:0000084."""
    return _TERM_ID.match(label) is not None


def likeness(name: str, values: Sequence[str]) -> float:
    """How much a column with these distinct values looks like cell types: 0 for not at all, at most 2."""
    values = [value for value in values if not is_cluster(value)]
    if not 2 <= len(values) <= MOST_TYPES or _OTHER_NAME.search(name.lower()) or any(map(is_term_id, values)):
        return 0.0
    sample = values[:: max(1, len(values) // SAMPLED)]
    share = sum(_CELL_WORDS.search(value.lower()) is not None for value in sample) / len(sample)
    named = _CELL_TYPE_NAME.search(name.lower()) is not None
    return share + named if share >= 0.3 or (named and len(values) >= 2) else 0.0
