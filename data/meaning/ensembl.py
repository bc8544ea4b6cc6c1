"""Symbols of human and mouse genes by Ensembl id, from the file ensembl.tsv.gz beside this one.

data/meaning/make_ensembl.py makes the file; its first lines name the release and the terms of use.
"""

import gzip
from pathlib import Path

TABLE = Path(__file__).with_name("ensembl.tsv.gz")
SOURCE = "GENCODE 48 (human) or M37 (mouse)"
PREFIXES = {"ENSG": "human", "ENSMUSG": "mouse"}
"""Beginning of an id -> species in the table."""


def known_symbols(names: set[str]) -> set[str]:
    """Those of some names that are symbols of the table."""
    with gzip.open(TABLE, "rt", encoding="ascii") as lines:
        return {symbol for line in lines if (symbol := line.rstrip("\n").partition("\t")[2]) in names}


def symbols_of(ids: set[str]) -> dict[str, str]:
    """{Ensembl id without version: symbol} of those ids that the table has."""
    if not any(name.startswith(tuple(PREFIXES)) for name in ids):
        return {}  # another species: the table need not be read
    found = {}
    with gzip.open(TABLE, "rt", encoding="ascii") as lines:
        for line in lines:
            if not line.startswith("#"):
                gene, _, symbol = line.rstrip("\n").partition("\t")
                if gene in ids:
                    found[gene] = symbol
    return found
