"""Files as other tools write them: each is read right, or refused with its one remedy.

The kinds are those of issue 15. The puzzles of a changed file are compared with those of the plain file, which the
tests of test_build.py check.
"""

import dataclasses
import gzip

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import sparse

from data.build.build import build_puzzles
from data.build.cells import read_cells
from data.build.columns import clean_text
from data.build.contexts import context_sentence, has_disease
from data.build.rank import top_genes
from data.build.settings import BuildConfig
from data.errors import UserError
from data.inspection.inspection import inspect_file
from data.meaning.ensembl import TABLE, symbols_of
from data.meaning.labels import columns_like_cell_types, names_no_cell_type
from launch.build import main

SMALL = BuildConfig(min_cells=3, max_cells=4, top_genes=6, puzzles_per_n=4, test_puzzles_per_n=2)
TYPES = ["B cell", "classical monocyte", "mast cell", "natural killer cell"]
SYMBOLS = ["CD3D", "LYZ", "MS4A1", "NKG7", "MT-CO1", "RPL3", "GNLY", "CST3", "CD79A", "TPSB2"]
IDS = [
    "ENSG00000167286",
    "ENSG00000090382",
    "ENSG00000156738",
    "ENSG00000105374",
    "ENSG00000198804",
    "ENSG00000100316",
    "ENSG00000115523",
    "ENSG00000101439",
    "ENSG00000105369",
    "ENSG00000197253",
]
N_CELLS = 64


def atlas(names=SYMBOLS, index=IDS, counts=None) -> anndata.AnnData:
    """4 donors x 4 types x 4 cells and 10 genes; counts that differ between all cells."""
    rows = [(f"d{donor}", cell_type) for donor in range(4) for cell_type in TYPES for _ in range(4)]
    obs = pd.DataFrame(rows, columns=["donor_id", "cell_type"], index=[f"c{i:02d}" for i in range(N_CELLS)])
    obs = obs.assign(tissue="blood", disease="normal", suspension_type="cell", is_primary_data=True, sex="female")
    if counts is None:
        counts = np.random.default_rng(3).poisson(4.0, size=(N_CELLS, len(names))) + np.eye(1, len(names))[0]
    var = pd.DataFrame({"feature_name": list(names)}, index=list(index))
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def saved(path, adata):
    adata.write_h5ad(path)
    return path


def with_obs(path, **columns):
    adata = atlas()
    adata.obs = adata.obs.assign(**columns)
    return saved(path, adata)


def built(path, **options):
    """(rows of all puzzles, report of the file)."""
    splits, report = build_puzzles([path], dataclasses.replace(SMALL, **options))
    rows = [(split, puzzle.to_row()) for split, puzzles in splits.items() for puzzle in puzzles]
    return rows, report["files"][0]


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as error:
        built(path, **options)
    return str(error.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(file, rows of its puzzles)"""
    path = saved(tmp_path_factory.mktemp("plain") / "a.h5ad", atlas())
    return path, built(path)[0]


# --- columns of obs


def as_integers(path, columns, missing=-1):
    """Replace obs columns by 0-based numbers with the names in obs/__categories, as SeuratDisk does."""
    adata = anndata.read_h5ad(path)
    with h5py.File(path, "r+") as file:
        beside = file["obs"].create_group("__categories")
        for name in columns:
            values = adata.obs[name].astype("category").cat
            del file["obs"][name]
            codes = values.codes.astype(np.int32)
            file["obs"][name] = np.where(codes < 0, missing, codes)
            beside[name] = [str(value) for value in values.categories]


FACTORS = ["cell_type", "donor_id", "sex", "tissue", "disease", "suspension_type", "is_primary_data"]


def test_integer_factors_of_seuratdisk_are_categoricals(tmp_path, plain):
    path = saved(tmp_path / "a.h5ad", atlas())
    as_integers(path, FACTORS)
    assert built(path)[0] == plain[1]


def test_integer_factors_with_missing_values(tmp_path):
    path = with_obs(tmp_path / "a.h5ad", sex=["male"] * 60 + [None] * 4)
    as_integers(path, ["sex"], missing=-(2**31))  # NA of R
    assert read_cells(path, SMALL.column_keys, {}).columns["sex"].texts() == ["male"] * 60 + [None] * 4
    with h5py.File(path, "r+") as file:
        file["obs/sex"][3] = 7
    assert "obs column 'sex' holds the code 7, but has 1 categories" in refusal(path)


def test_factors_of_h5seurat_begin_with_1(tmp_path, plain):
    path = saved(tmp_path / "a.h5ad", atlas())
    with h5py.File(path, "r+") as file:
        codes = file["obs/cell_type/codes"][:]
        del file["obs/cell_type"]
        file["obs/cell_type/levels"], file["obs/cell_type/values"] = TYPES, codes.astype(np.int32) + 1
    assert built(path)[0] == plain[1]


def test_integer_factors_of_var(tmp_path, plain):
    adata = atlas(index=[f"g{i}" for i in range(10)])
    path = saved(tmp_path / "a.h5ad", adata)
    with h5py.File(path, "r+") as file:
        del file["var/feature_name"]
        file["var/feature_name"] = np.arange(10, dtype=np.int32)
        file["var/__categories/feature_name"] = SYMBOLS
    assert built(path)[0] == plain[1]


@pytest.mark.parametrize("number", [str, int, float, "{}.0".format])
def test_labels_that_are_numbers_are_refused(tmp_path, number):
    clusters = [number(i // 4 % 4) for i in range(N_CELLS)]
    path = with_obs(tmp_path / "a.h5ad", author_cell_type=atlas().obs["cell_type"], cell_type=clusters)
    message = refusal(path)
    assert "'cell_type' holds only numbers (0, 1, 2, ...)" in message.replace("0.0, 1.0, 2.0", "0, 1, 2")
    assert "--cell-type-key" in message and "look like cell types: 'author_cell_type'" in message
    rows, _ = built(path, allow_numeric_labels=True)
    assert rows
    assert built(path, cell_type_key="author_cell_type")[0]


@pytest.mark.parametrize("name", ["sex", "tissue", "disease"])
def test_other_columns_that_are_numbers_are_refused(tmp_path, name):
    path = with_obs(tmp_path / "a.h5ad", **{name: 1})
    message = refusal(path)
    assert f"{name!r} holds only numbers (1)" in message and f"--constant {name}=VALUE" in message
    assert built(path, allow_numeric_labels=True)[0]
    assert built(path, constant=(f"{name}=eye",))[0]


def test_ids_of_an_ontology_are_no_labels(tmp_path):
    """CELLxGENE writes cell_type_ontology_term_id beside cell_type; a tool may keep the first only."""
    ids = {"B cell": "CL:0000236", "classical monocyte": "CL:0000860", "mast cell": "CL:0000097"}
    labels = [ids.get(label, "CL:0000623") for label in atlas().obs["cell_type"]]
    path = with_obs(tmp_path / "a.h5ad", cell_type=labels, author_cell_type=atlas().obs["cell_type"])
    message = refusal(path)
    assert "'cell_type' holds only ids (CL:0000097, CL:0000236, CL:0000623, ...), which are no cell types" in message
    assert "look like cell types: 'author_cell_type'" in message
    assert built(path, allow_numeric_labels=True)[0]
    assert inspect_file(path).used["cell_type"] == "author_cell_type"
    path = with_obs(tmp_path / "b.h5ad", tissue="UBERON:0000178")
    assert "'tissue' holds only ids (UBERON:0000178), so its words were lost" in refusal(path)
    assert built(
        with_obs(tmp_path / "c.h5ad", cell_type="CD4:1", author=atlas().obs["cell_type"]), cell_type_key="author"
    )[0]


def test_what_is_missing_in_all_cells_has_a_remedy(tmp_path):
    path = with_obs(tmp_path / "a.h5ad", cell_type="unknown")
    remedy = "all 64 cells were dropped (64 because no cell type); keep them with --cell-type-key COLUMN (or annotate them first)"
    assert refusal(path) == f"{path}: {remedy}"
    for donor in ("unknown", "pooled"):
        message = refusal(with_obs(tmp_path / "b.h5ad", donor_id=donor))
        assert message.endswith("; keep them with --donor-key COLUMN or --constant donor_id=NAME")


def test_numbers_of_donors_and_batches_are_names(tmp_path):
    path = with_obs(tmp_path / "a.h5ad", donor_id=[i // 16 for i in range(N_CELLS)], batch=1)
    assert built(path)[1]["donors"] == 4


def test_a_numeric_context_column_without_a_flag_is_left_out(tmp_path):
    rows, report = built(with_obs(tmp_path / "a.h5ad", lung_condition=2))
    assert rows and "the obs column 'lung_condition' holds only numbers: no context states it" in report["notes"]
    assert not any("lung condition" in str(row) for _, row in rows)


PLACEHOLDERS = [
    "n/a",
    "N/A",
    "na",
    "NaN",
    "not available",
    "Unknown",
    "unspecified",
    "?",
    "none",
    "NULL",
    "-",
    "--",
    ".",
]


@pytest.mark.parametrize("text", [*PLACEHOLDERS, "  n/a ", "<NA>", "(unknown)", "Not  Available"])
def test_placeholders_are_missing_values(text):
    assert clean_text(text) is None


@pytest.mark.parametrize("text", ["nave", "CD4-", "T-", "naive T cell", "unknown disease", "A.", "none of these"])
def test_what_is_no_placeholder(text):
    assert clean_text(text) == text


def test_placeholders_of_donors_labels_and_contexts(tmp_path):
    donors = [*(["N/A"] * 8), *(["not available"] * 8), *(["Pooled"] * 8), *(["pooled donors"] * 8)]
    donors += [f"d{i // 16}" for i in range(32)]
    labels = [None if i in (40, 41) else label for i, label in enumerate(atlas().obs["cell_type"].astype(object))]
    labels[42] = "n/a"
    path = with_obs(tmp_path / "a.h5ad", donor_id=donors, cell_type=labels, sex="pooled", tissue="--", batch="?")
    rows, report = built(path)
    splits, _ = build_puzzles([path], SMALL)
    assert {puzzle.meta["donor"] for puzzles in splits.values() for puzzle in puzzles} == {"d0", "d1"}
    assert report["cells_dropped"]["no cell type"] == 3 and report["cells_dropped"]["no donor"] == 16
    assert report["cells_dropped"]["donor is 'pooled' or 'pooled donors', which means several"] == 16
    assert report["donors"] == 2
    assert "29 cells have no known batch: they are grouped by donor only" in report["notes"]
    assert not any("a pooled" in str(row) or "from the --" in str(row) for _, row in rows)


JUNK = ["unassigned", "Unclassified", "unidentified", "Ambiguous", "Doublet", "doublets", "Multiplets", "low quality"]
JUNK += ["Low-quality cells", "low_quality", "debris", "Filtered", "contaminated", "Contamination", "to be removed"]
JUNK += ["T/B doublets", "Unassigned_2", "Doublets (B/T)", "not assigned", "Unknown cells", "Undetermined", "lowQ"]


@pytest.mark.parametrize("label", JUNK)
def test_labels_that_name_no_cell_type(label):
    assert names_no_cell_type(label)


@pytest.mark.parametrize(
    "label", [*TYPES, "double negative thymocyte", "double-positive T cell", "enterocyte", "low-affinity B cell"]
)
def test_labels_that_name_a_cell_type(label):
    assert not names_no_cell_type(label)


def test_set_aside_labels_are_left_out_unless_kept(tmp_path):
    labels = atlas().obs["cell_type"].astype(object).tolist()
    labels[0] = labels[1] = "Doublets"
    labels[20] = "Unassigned"
    path = with_obs(tmp_path / "a.h5ad", cell_type=labels)
    _, report = built(path)
    assert report["cells_dropped"]["the label names no cell type"] == 3 and report["cells_kept"] == 61
    note = "3 cells with a label that names no cell type are left out: 'Doublets' (2), 'Unassigned' (1); "
    assert note + "--keep-label NAME keeps one" in report["notes"]
    _, report = built(path, keep_label=("doublets", "Plasma"))
    assert report["cell_types"]["Doublets"] == 2 and report["cells_kept"] == 63
    assert "--keep-label Plasma: no cell has this label" in report["notes"]
    assert "--keep-label n/a: this means that the cell type is not known" in refusal(path, keep_label=("n/a",))


def test_non_primary_cells_and_their_remedy(tmp_path):
    path = with_obs(tmp_path / "a.h5ad", is_primary_data=[i in (0, 1, 5) for i in range(N_CELLS)])
    assert refusal(path).endswith(
        "has 2 cell types, fewer than --min-cells 3 (61 of 64 cells were dropped: 61 because is_primary_data is not "
        "True; keep them with --include-non-primary)"
    )
    assert built(path, include_non_primary=True)[1]["cells_kept"] == N_CELLS


def test_nuclei_and_their_remedy(tmp_path):
    types = ["nucleus"] * 32 + ["na"] * 31 + ["cell"]
    path = with_obs(tmp_path / "a.h5ad", suspension_type=types)
    assert "63 because suspension_type is not 'cell'; keep them with --suspension cell,nucleus,na" in refusal(path)
    assert built(path, suspension=("cell,nucleus",))[1]["cells_kept"] == 33
    assert built(path, suspension=("cell", "nucleus", "na"))[1]["cells_kept"] == N_CELLS
    assert "--suspension nuclear: not one of cell, nucleus, na" in refusal(path, suspension=("nuclear",))
    rows, report = built(path, constant=("suspension_type=cell",))
    assert rows and report["cells_kept"] == N_CELLS
    assert "--constant suspension_type=cell is used instead of the obs column 'suspension_type'" in report["notes"]


def test_several_diseases(tmp_path):
    both = "diabetes mellitus || COVID-19"
    assert has_disease(both, ("covid-19 || Diabetes mellitus",)) and has_disease(both, ("COVID-19",))
    assert not has_disease("COVID-19", (both,)) and not has_disease(both, ("",))
    assert context_sentence({"disease": both}) == "The patient has been diagnosed with diabetes mellitus and COVID-19."
    assert "a, b and c background" in context_sentence({"self_reported_ethnicity": "a||b || c"})
    path = with_obs(tmp_path / "a.h5ad", disease=["normal"] * 32 + ["COVID-19"] * 16 + [both] * 16)
    for name, donors in {both: {"d3"}, "diabetes mellitus": {"d3"}, "COVID-19": {"d2", "d3"}}.items():
        splits, _ = build_puzzles([path], dataclasses.replace(SMALL, unseen_disease=(name,)))
        assert {puzzle.meta["donor"] for puzzle in splits["unseen"]} == donors
        assert not any("||" in puzzle.context for puzzles in splits.values() for puzzle in puzzles)
    assert "'diabetes mellitus'" in refusal(path, unseen_disease=("diabetes",))


def test_cellxgene_schema_7(tmp_path):
    """Organism in uns, tissue_type, and a file before its analysis, which has no cell types."""
    adata = atlas()
    adata.uns = {"organism": "Homo sapiens", "organism_ontology_term_id": "NCBITaxon:9606", "schema_version": "7.1.0"}
    adata.obs["tissue_type"] = ["tissue"] * 48 + ["organoid"] * 16
    _, report = built(saved(tmp_path / "a.h5ad", adata))
    assert report["organism"] == "Homo sapiens"
    assert any(note.startswith("tissue_type of the cells kept: 16 'organoid', 48 'tissue'") for note in report["notes"])
    del adata.obs["cell_type"]
    message = refusal(saved(tmp_path / "b.h5ad", adata))
    assert "this file has no cell types; a build needs them" in message
    adata.obs["majorCluster"] = atlas().obs["cell_type"]
    path = saved(tmp_path / "c.h5ad", adata)
    assert columns_like_cell_types(path) == ["majorCluster"]
    assert "columns that look like cell types: 'majorCluster'" in refusal(path)


# --- genes


@pytest.mark.slow(2)
def test_only_rows_of_gene_expression_are_genes(tmp_path, plain):
    tags = np.full((N_CELLS, 3), 900.0)
    counts = np.hstack([atlas().X.toarray(), tags])
    adata = atlas(SYMBOLS + ["CD3", "CD19", "guide1"], IDS + ["CD3", "CD19", "guide1"], counts)
    for column, values in {
        "feature_types": ["Gene Expression"] * 10 + ["Antibody Capture"] * 2 + ["CRISPR Guide Capture"],
        "feature_type": ["GEX"] * 10 + ["ADT", "ADT", "guide"],
        "modality": ["rna"] * 10 + ["prot", "prot", "sgRNA"],
    }.items():
        adata.var = adata.var[["feature_name"]].assign(**{column: values})
        path = saved(tmp_path / "a.h5ad", adata)
        rows, report = built(path)
        assert rows == plain[1]
        kinds = sorted({value: values.count(value) for value in values[10:]}.items())
        listed = ", ".join(f"{n} {kind!r}" for kind, n in kinds)
        assert report["notes"][-1] == f"3 of 13 rows of var are no genes and are left out: {listed}"
        for option in ({"profile": "cluster"}, {"rank": "deg"}, {"rank": "hvg", "hvg_genes": 5}):
            assert built(path, **option)[0] == built(plain[0], **option)[0]  # the depth of a cell is of its genes
    adata.var["modality"] = "prot"
    assert "holds no genes (its var rows are 13 'prot')" in refusal(saved(tmp_path / "a.h5ad", adata))


def test_scaled_tags_beside_counts_of_genes(tmp_path, plain):
    counts = np.hstack([atlas().X.toarray(), np.random.default_rng(0).normal(size=(N_CELLS, 2))])
    adata = atlas(SYMBOLS + ["CD3", "CD19"], IDS + ["CD3", "CD19"], counts)
    adata.var["feature_types"] = ["Gene Expression"] * 10 + ["Antibody Capture"] * 2
    rows, report = built(saved(tmp_path / "a.h5ad", adata))
    assert rows == plain[1] and report["values"] == "counts"


def test_genes_without_a_type_are_genes(tmp_path, plain):
    """anndata.concat(join="outer") leaves no type for the genes of a file without the column."""
    adata = atlas()
    adata.var["feature_types"] = ["Gene Expression"] * 7 + [None] * 3
    rows, report = built(saved(tmp_path / "a.h5ad", adata))
    assert rows == plain[1] and not any("no genes" in note for note in report["notes"])


def test_biotypes_are_no_reason_to_leave_a_gene_out(tmp_path, plain):
    adata = atlas()
    adata.var["feature_type"] = ["protein_coding"] * 9 + ["lncRNA"]
    rows, report = built(saved(tmp_path / "a.h5ad", adata))
    assert rows == plain[1] and not any("no genes" in note for note in report["notes"])


@pytest.mark.parametrize("biotype", [True, False])
def test_spike_ins_are_no_genes(tmp_path, plain, biotype):
    counts = np.hstack([atlas().X.toarray(), np.full((N_CELLS, 2), 500.0)])
    names = ["ERCC-00002 (spike-in control)", "spike 3"] if biotype else ["ERCC-00002", "ercc-00003"]
    adata = atlas(SYMBOLS + names, IDS + ["S1", "S2"], counts)
    if biotype:
        adata.var["feature_biotype"] = ["gene"] * 10 + ["spike-in"] * 2
    rows, report = built(saved(tmp_path / "a.h5ad", adata))
    assert rows == plain[1]
    assert report["notes"][-1] == "2 of 12 rows of var are no genes and are left out: 2 'spike-in'"
    assert "ERCC1" in genes_in_names(tmp_path, ["ERCC1", *SYMBOLS[1:]])


def genes_in_names(tmp_path, names):
    path = saved(tmp_path / "names.h5ad", atlas(names))
    return {gene for cell in top_genes(path, list(range(N_CELLS)), 10) for gene in cell}


def test_numbers_are_no_gene_names(tmp_path, plain):
    adata = atlas(index=[str(i) for i in range(10)])
    path = saved(tmp_path / "a.h5ad", adata)
    message = refusal(path, gene_key="index")
    assert "the gene names in the index of var are numbers (0, 1, 2)" in message
    assert "--gene-key 'feature_name'" in message
    assert built(path)[0] == plain[1]
    adata.var = adata.var.drop(columns="feature_name")
    assert "no column of var has symbols" in refusal(saved(path, adata), gene_key="index")


@pytest.mark.parametrize("version", ["", ".7"])
@pytest.mark.parametrize("column", ["gene_symbols", "Symbol", "gene_short_name", "gene_name", None])
def test_ensembl_ids_are_listed_by_their_symbols(tmp_path, plain, column, version):
    adata = atlas(index=[name + version for name in IDS])
    adata.var = adata.var.rename(columns={"feature_name": column}) if column else adata.var[[]]
    rows, report = built(saved(tmp_path / "a.h5ad", adata), gene_key="index")
    assert rows == plain[1]
    source = f"var column {column!r}" if column else "table GENCODE 48 (human) or M37 (mouse)"
    found = f"the gene names are Ensembl ids ({IDS[0]}{version}): 10 are listed by the symbols of the {source}"
    assert found in report["notes"]


def test_ensembl_ids_without_symbols(tmp_path):
    adata = atlas(index=[f"ENSSSCG{i:011d}.3" for i in range(10)])
    adata.var = adata.var[[]]
    path = saved(tmp_path / "a.h5ad", adata)
    _, report = built(path, gene_key="index", drop_genes=("mitochondrial",))
    assert report["notes"][-2:] == [
        "the gene names are Ensembl ids (ENSSSCG00000000000.3) and no symbols are known for them, so the ids are listed",
        "--drop-genes mitochondrial: no gene has such a name, so nothing is dropped",
    ]
    assert top_genes(path, [0], 1, gene_key="index")[0][0].startswith("ENSSSCG0000000000")
    assert "." not in top_genes(path, [0], 1, gene_key="index")[0][0]


def test_drop_genes_works_on_ids_too(tmp_path, plain):
    path = saved(tmp_path / "a.h5ad", atlas())
    rows, report = built(path, gene_key="index", drop_genes=("mitochondrial", "ribosomal"))
    assert not any("MT-CO1" in str(row) or "RPL3" in str(row) for _, row in rows)
    assert not any("--drop-genes" in note for note in report["notes"])


def test_the_shipped_table_of_symbols():
    assert symbols_of({"ENSG00000167286", "ENSMUSG00000032094", "ENSG99999999999"}) == {
        "ENSG00000167286": "CD3D",
        "ENSMUSG00000032094": "Cd3d",
    }
    assert symbols_of({"ENSSSCG00000000001"}) == {}
    assert TABLE.stat().st_size < 1_000_000
    with gzip.open(TABLE, "rt") as lines:
        head = [next(lines) for _ in range(3)]
    assert all(line.startswith("#") for line in head) and "GENCODE 48" in head[0]


@pytest.mark.parametrize(
    "form", ["{}_ENSMUSG00000032094", "{}_ENSSSCG00000000001.2", "{}-ENSG00000167286", "ENSG00000167286.5_{}"]
)
def test_ids_that_make_names_unique_go(tmp_path, plain, form):
    assert genes_in_names(tmp_path, [form.format(name) for name in SYMBOLS]) == set(SYMBOLS)


def test_a_file_without_feature_name_is_told_where_symbols_are(tmp_path):
    adata = atlas()
    adata.var = adata.var.rename(columns={"feature_name": "hgnc"}).assign(
        number=range(10), entrez=[str(i) for i in range(10)]
    )
    assert "or --gene-key index for the index (gene symbols are in 'hgnc')" in refusal(
        saved(tmp_path / "a.h5ad", adata)
    )
    adata = atlas(index=SYMBOLS)
    adata.var = adata.var[[]]
    assert "(gene symbols are in 'index')" in refusal(saved(tmp_path / "b.h5ad", adata))


# --- values


def test_fractional_counts_are_scaled_to_one_depth_before_a_mean(tmp_path):
    """Donor d0's B cells: a deep cell with much LYZ must not outweigh three shallow ones with CD3D."""
    adata = atlas()
    counts = adata.X.toarray() * 0.9 + 30 * np.eye(1, 10, 4)[0]
    counts[:4] = 0.5
    counts[0, 1], counts[1:4, 0] = 500.5, 9.3
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    path = saved(tmp_path / "a.h5ad", adata)
    splits, report = build_puzzles([path], dataclasses.replace(SMALL, profile="cluster", top_genes=2))
    assert report["files"][0]["values"] == "fractional counts"
    lists = {
        tuple(cell)
        for puzzles in splits.values()
        for puzzle in puzzles
        for cell, label in zip(puzzle.cells, puzzle.answer, strict=True)
        if puzzle.meta["donor"] == "d0" and label == "B cell"
    }
    assert lists == {("CD3D", "LYZ")}


def test_raw_with_fewer_genes_is_told(tmp_path):
    adata = atlas()
    adata.raw = adata[:, :6].copy()
    path = saved(tmp_path / "a.h5ad", adata)
    note = "the layer raw is read and has 6 genes, fewer than the 10 of X; --layer X reads those"
    assert note in built(path)[1]["notes"]
    assert note not in built(path, layer="X")[1]["notes"] and note not in built(path, layer="raw")[1]["notes"]


def test_lost_puzzles_are_told_on_the_console(tmp_path):
    counts = atlas().X.toarray()
    counts[[0, 1, 2, 17, 18, 33]] = 0
    path = saved(tmp_path / "a.h5ad", atlas(counts=counts))
    words = "--min-cells 3 --max-cells 4 --top-genes 6 --puzzles-per-n 9 --test-puzzles-per-n 2 --workers 1".split()
    done = CliRunner().invoke(main, [str(path), "--out", str(tmp_path / "out"), *words])
    assert done.exit_code == 0, done.output
    report = built(path, puzzles_per_n=9)[1]
    lost = sum(split["puzzles_with_a_cell_without_genes"] for split in report["splits"].values() if split)
    assert lost and f"note: {lost} of " in done.output and "cells drawn have no expressed gene" in done.output
