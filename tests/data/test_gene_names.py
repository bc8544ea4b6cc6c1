"""data/meaning/names.py and genes.py: rows of var that are no genes, and names that are no symbols."""

import gzip

import numpy as np
import pytest

from data.inspection.inspection import inspect_file
from data.meaning.ensembl import TABLE
from data.meaning.names import kind_of_names, nameless, no_genes, notes_on_names, without_id
from tests.data.test_real_files import SYMBOLS, atlas, built, refusal, saved
from tests.data.test_tracker_files import named, names_of

KINDS = {
    "spike-in": ["gSpikein", "gSpikein_ERCC-00003", "ERCC00002", "ERCC_00004", "SIRV1", "phiX174", "spike-ERCC-00002"],
    "antibody-tag": ["ADT_CD3", "adt-CD3", "CD19_ADT", "CD4-ADT", "prot_CD8", "CD45_protein", "Ab-CD14", "IgG1-isotype"]
    + ["TotalSeq-C-CD3", "IgG2a_control"],
    "hashtag": ["HTO_1", "HTO-2", "Hashtag3", "hashtag_4", "CMO301"],
    "CRISPR-guide": ["sgTP53_1", "sgTP53", "NTC", "NTC_2"],
    "aligner-counter": ["__no_feature", "__ambiguous", "N_unmapped", "N_multimapping", "no_feature"],
    "peak": ["GL000194.1:100-700", "KI270728.1-1000-2000", "chrX:5-9", "chr1:100-200"],
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in KINDS.items() for name in names])
def test_names_of_what_is_no_gene(kind, name):
    assert no_genes([name]) == [kind]


def test_rows_that_are_no_genes_are_left_out_and_counted(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    more = [name for names in KINDS.values() for name in names]
    counts = np.hstack([atlas().X.toarray(), np.full((64, len(more)), 90)])
    path = saved(tmp_path / "a.h5ad", atlas(SYMBOLS + more, SYMBOLS + more, counts))
    rows, report = built(path)
    assert rows == built(saved(other / "a.h5ad", atlas(SYMBOLS, SYMBOLS)))[0]
    listed = ", ".join(f"{len(KINDS[kind])} {kind!r}" for kind in sorted(KINDS))
    assert f"{len(more)} of {len(more) + 10} rows of var are no genes and are left out: {listed}" in report["notes"]


def test_genes_of_human_mouse_and_other_animals_are_genes():
    with gzip.open(TABLE, "rt") as lines:
        symbols = [line.rstrip("\n").split("\t")[1] for line in lines if not line.startswith("#")]
    assert len(symbols) > 97_000 and "UNK" in symbols
    assert not any(no_genes(symbols)) and not any(nameless(symbols)) and not notes_on_names(symbols)
    assert [without_id(name) for name in symbols] == symbols
    others = ["adt-1", "ntc-1", "sgo-1", "prot_0001", "BRAKER_g12", "AT1G01010", "MSTRG.12", "EGFP", "tdTomato", "Cre"]
    assert not any(no_genes(others))


def test_dates_of_a_spreadsheet_are_told(tmp_path):
    dates = ["1-Mar", "Sep-07", "2023-09-02", "MAR-01", "3/1/2023"]
    note = names_of(named(tmp_path / "a.h5ad", dates + SYMBOLS[:5])).notes[0]
    assert note.startswith(
        "5 gene names look like dates (1-Mar, Sep-07, 2023-09-02), which a spreadsheet makes of genes"
    )


@pytest.mark.parametrize("form, kind", [("NM_{}.2", "RefSeq ids"), ("gene_{}", "numbers of genes")])
def test_other_names_are_told(tmp_path, form, kind):
    names = [form.format(100000 + i) for i in range(10)]
    path = named(tmp_path / "a.h5ad", names)
    assert kind_of_names(names) == "other names"
    note = f"the gene names are {kind} ({names[0]}) and no symbols: they are listed as they are"
    assert names_of(path).notes == [note]
    assert inspect_file(path).genes.kind == "other names"


def test_rows_with_one_name_are_told(tmp_path):
    names = ["CD3D", "CD3D", "CD3D", "LYZ", "LYZ", *SYMBOLS[2:7]]
    path = saved(tmp_path / "a.h5ad", atlas(names))
    _, report = built(path)
    note = "5 rows of var share 2 gene names, such as 'CD3D' (3 rows): a cell has the largest value of the rows with one name"
    assert note in report["notes"]


def test_a_name_with_a_comma_is_left_out(tmp_path):
    names = ["HLA-A, B", *SYMBOLS[1:]]
    rows, report = built(saved(tmp_path / "a.h5ad", atlas(names)))
    assert rows and not any("HLA-A" in str(row) for _, row in rows)
    note = "1 row of var left out for a name that is empty or has a comma, which ends a name in a list: 'HLA-A, B'"
    assert note in report["notes"]
    message = refusal(saved(tmp_path / "b.h5ad", atlas([f"protein {i}, of a cell" for i in range(10)])))
    assert (
        "the gene name 'protein 0, of a cell' is empty or holds the separator of the gene list; see --gene-key"
        in message
    )
