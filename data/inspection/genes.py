"""What the genes of a layer are called, where else they have names, and which organism they look like."""

import re
from collections import Counter

import numpy as np

from data.build.h5ad import column_names, read_column
from data.build.matrix import Matrix
from data.errors import UserError
from data.inspection.facts import GeneFacts, GeneNames
from data.meaning.genes import best_source, gene_table, name_sources

EXAMPLES = 3
ORGANISM_OF_PREFIX = {
    "ENSG": "Homo sapiens",
    "ENSMUSG": "Mus musculus",
    "ENSRNOG": "Rattus norvegicus",
    "ENSDARG": "Danio rerio",
    "ENSSSCG": "Sus scrofa",
    "ENSMMUG": "Macaca mulatta",
    "ENSMFAG": "Macaca fascicularis",
    "ENSGALG": "Gallus gallus",
    "ENSBTAG": "Bos taurus",
    "ENSPTRG": "Pan troglodytes",
    "FBgn": "Drosophila melanogaster",
    "WBGene": "Caenorhabditis elegans",
}


def gene_facts(matrix: Matrix, wanted: str) -> tuple[GeneFacts, list[str]]:
    """(what the genes of a layer are called, their names as a build takes them).

    wanted: the --gene-key that a build would use.
    """
    sources = name_sources(matrix, wanted)
    key, notes, left_out, names, problem = best_source(sources, wanted), [], {}, [], ""
    try:
        table = gene_table(matrix, key or sources[0].key)
        notes, left_out, names = table.notes, table.left_out, table.names[table.is_gene].tolist()
    except UserError as error:
        problem = str(error).removeprefix(f"{matrix.path}: ")
    facts = GeneFacts(
        sources=[GeneNames(source.key, source.kind, source.names[:EXAMPLES]) for source in sources],
        key=key,
        feature_types=_feature_types(matrix),
        spike_ins=left_out.get("spike-in", 0),
        left_out=left_out,
        notes=notes,
        problem=problem,
    )
    return facts, names


def organism_of_names(facts: GeneFacts, names: list[str]) -> str | None:
    """The organism that gene names look like: by the prefix of Ensembl ids, else by the case of symbols.

    Symbols that are written as another organism's than the ids beside them were renamed to orthologs, and decide.
    """
    by_case = _organism_by_case(facts, names)
    for source in facts.sources:
        if source.kind == "Ensembl ids":
            prefix = re.match(r"ENS[A-Z]*G|FBgn|WBGene", source.examples[0])
            if prefix and prefix[0] in ORGANISM_OF_PREFIX:
                of_ids = ORGANISM_OF_PREFIX[prefix[0]]
                renamed = by_case and TITLE_CASE.get(of_ids) not in (None, TITLE_CASE[by_case])
                return by_case if renamed else of_ids
    return by_case


TITLE_CASE = {"Homo sapiens": False, "Mus musculus": True, "Rattus norvegicus": True}
"""Is only the first letter of a symbol a capital? Of these organisms both are known."""


def _organism_by_case(facts: GeneFacts, names: list[str]) -> str | None:
    """The organism as which symbols are written: Homo sapiens, Mus musculus, or None where neither is clear."""
    symbols = [name for name in names if re.match(r"[A-Za-z]{2,}\d*$", name)]
    if facts.kind != "symbols" or len(symbols) < 20:
        return None
    if np.mean([name.isupper() for name in symbols]) > 0.8:
        return "Homo sapiens"
    return "Mus musculus" if np.mean([name[0].isupper() and name[1:].islower() for name in symbols]) > 0.8 else None


def _feature_types(matrix: Matrix) -> dict[str, int]:
    """{value of var's feature_types: rows with it}; empty when there is no such column."""
    file = matrix.node.file
    for table in ("raw/var", "var") if matrix.layer == "raw" else ("var",):
        if "feature_types" in column_names(file[table]):
            try:
                texts = read_column(file, table, "feature_types", matrix.path).texts()
            except UserError:
                return {}
            return dict(Counter(text for text in texts if text is not None).most_common())
    return {}
