"""Whether gene names are symbols, Ensembl ids or numbers, and which column of var has the best ones."""

import re
from collections import Counter

import numpy as np

from data.build.h5ad import column_names, open_node, read_column
from data.build.matrix import Matrix, gene_names
from data.errors import UserError
from data.formats.stores import StoreGroup, is_dataset, is_group
from data.inspection.facts import GeneFacts, GeneNames

SYMBOL_COLUMNS = (
    "feature_name",
    "gene_symbols",
    "gene_symbol",
    "symbol",
    "symbols",
    "hgnc_symbol",
    "gene_name",
    "gene_names",
    "gene_short_name",
    "genesymbol",
    "genename",
    "genenames",
    "name",
    "names",
    "features",
    "feature",
    "gene",
    "genes",
)
"""Names of var columns that hold gene symbols, in lower case, best first."""
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?$|FBgn\d+$|WBGene\d+$")
NUMBER = re.compile(r"\d+(\.\d+)?$")
SPIKE_IN = re.compile(r"ERCC-\d+$")
MOST = 0.5
"""A kind of name is that of more than this share of the genes."""
KIND_SAMPLE = 2000
"""About this many names, evenly spaced, are looked at."""
EXAMPLES = 3
ORGANISM_OF_PREFIX = {"ENSG": "Homo sapiens", "ENSMUSG": "Mus musculus", "FBgn": "Drosophila melanogaster"}


def gene_facts(matrix: Matrix, wanted: str) -> GeneFacts:
    """What the genes of a layer are called. wanted: the --gene-key that a build would use."""
    table = "raw/var" if matrix.layer == "raw" else "var"
    file = matrix.node.file
    columns = list(dict.fromkeys(name for part in (table, "var") for name in _text_columns(file, part, matrix.path)))
    names_of: dict[str, list[str]] = {}
    for key in dict.fromkeys([wanted, *sorted(columns, key=_preference), "index"]):
        if key in (wanted, "index") or key.lower() in SYMBOL_COLUMNS or "symbol" in key.lower() or "id" in key.lower():
            try:
                names_of[key] = gene_names(matrix, key).tolist()
            except UserError:
                continue
    sources = [
        GeneNames(key, kind_of_names(names), names[:EXAMPLES])
        for key, names in names_of.items()
        if key in (wanted, "index") or len(set(names)) > MOST * len(names)  # not a class of genes, such as a biotype
    ]
    used = _best(sources, wanted)
    types = _counts(file, table, "feature_types", matrix.path)
    biotypes = _counts(file, table, "feature_biotype", matrix.path)
    named = sum(bool(SPIKE_IN.match(name)) for name in names_of.get(used or "index", []))
    spike_ins = max(biotypes.get("spike-in", 0), named)
    return GeneFacts(sources, used, types, spike_ins)


def kind_of_names(names: list[str]) -> str:
    """symbols, Ensembl ids, numbers or other names, by what most names are."""
    if not names:
        return "other names"
    names = names[:: max(1, len(names) // KIND_SAMPLE)]
    of_kind = {"Ensembl ids": ENSEMBL, "numbers": NUMBER}
    for kind, pattern in of_kind.items():
        if np.mean([bool(pattern.match(name)) for name in names]) > MOST:
            return kind
    return "symbols" if np.mean([len(name) <= 25 for name in names]) > MOST else "other names"


def organism_of_names(facts: GeneFacts, names: list[str]) -> str | None:
    """The organism that gene names look like: by the prefix of Ensembl ids, else by the case of symbols."""
    for source in facts.sources:
        if source.kind == "Ensembl ids":
            prefix = re.match(r"ENS[A-Z]*G|FBgn", source.examples[0])
            if prefix and prefix[0] in ORGANISM_OF_PREFIX:
                return ORGANISM_OF_PREFIX[prefix[0]]
    symbols = [name for name in names if re.match(r"[A-Za-z]{2,}\d*$", name)]
    if facts.kind != "symbols" or len(symbols) < 20:
        return None
    if np.mean([name.isupper() for name in symbols]) > 0.8:
        return "Homo sapiens"
    return "Mus musculus" if np.mean([name[0].isupper() and name[1:].islower() for name in symbols]) > 0.8 else None


def _best(sources: list[GeneNames], wanted: str) -> str | None:
    """The source to use: the wanted one if it has symbols, else another with symbols, else any that are no numbers."""
    kinds = {source.key: source.kind for source in sources}
    if kinds.get(wanted) == "symbols":
        return wanted
    symbols = [source.key for source in sources if source.kind == "symbols"]
    known = [key for key in symbols if key.lower() in SYMBOL_COLUMNS or "symbol" in key.lower()]
    others = [source.key for source in sources if source.kind != "numbers"]
    if "index" in symbols and not known:
        return "index"
    return next(iter([*known, *symbols, *([wanted] if wanted in others else []), *others]), None)


def _preference(name: str) -> int:
    lower = name.lower()
    return SYMBOL_COLUMNS.index(lower) if lower in SYMBOL_COLUMNS else len(SYMBOL_COLUMNS)


def _text_columns(file: StoreGroup, table: str, path) -> list[str]:
    """The columns of a table that are texts or categories."""
    group = open_node(file, table, path)
    names = column_names(group) if is_group(group) else []
    nodes = {name: open_node(group, name, path) for name in names}
    return [name for name, node in nodes.items() if is_group(node) or is_dataset(node) and node.dtype.kind in "SO"]


def _counts(file: StoreGroup, table: str, key: str, path) -> dict[str, int]:
    """{value: genes} of a var column; empty when there is none."""
    for part in dict.fromkeys((table, "var")):
        if key in column_names(file[part]):
            try:
                texts = read_column(file, part, key, path).texts()
            except UserError:
                return {}
            return dict(Counter(text for text in texts if text is not None).most_common())
    return {}
