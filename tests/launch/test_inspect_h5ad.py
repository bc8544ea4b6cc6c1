"""launch/inspect_h5ad.py: what a file holds, and a command that builds puzzles from it."""

import json
import shlex

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import sparse

from data.build.settings import BuildConfig
from data.inspection.inspection import first_lines, inspect_file
from data.inspection.text import facts_text
from launch.build import main as build
from launch.inspect_h5ad import main
from tests.data.test_build import TYPES, write_atlas

SYMBOLS = ["CD3D", "LYZ", "MS4A1", "NKG7", "GNLY", "CD79A", "IL7R", "CD14", "PPBP", "FCER1A", "CST3", "MALAT1"]
SYMBOLS += ["B2M", "ACTB", "CD8A", "CCR7", "S100A4", "FCGR3A", "MS4A7", "CD74", "TRAC", "KLRB1", "GZMB", "IGHM"]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return write_atlas(tmp_path_factory.mktemp("atlas") / "atlas.h5ad", donors=4)


def cells(path, change=lambda adata: None, donors=4, genes=24):
    """Cells of 5 types with symbols as gene names, changed and saved."""
    rows = [(f"p{d}", name) for d in range(donors) for name in TYPES for _ in range(6)]
    obs = pd.DataFrame(rows, columns=["donor_id", "cell_type"]).assign(
        tissue="lung", disease="normal", suspension_type="cell", is_primary_data=True
    )
    obs.index = [f"c{i}" for i in range(len(obs))]
    counts = np.random.default_rng(3).poisson(2.0, (len(obs), genes)).astype(np.float32)
    counts[:, 0] += 1
    var = pd.DataFrame({"feature_name": SYMBOLS[:genes]}, index=[f"ENSG{i:011d}" for i in range(genes)])
    adata = anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)
    change(adata)
    adata.write_h5ad(path)
    return path


def run(*arguments):
    done = CliRunner().invoke(main, [str(word) for word in arguments])
    return done.exit_code, done.output


def builds(tmp_path, command):
    """Run a proposed command, with few puzzles. Returns its exit code and output."""
    words = shlex.split(command)
    assert words[:2] == ["python", "launch/build.py"]
    words[words.index("--out") + 1] = str(tmp_path / "out")
    done = CliRunner().invoke(
        build, [*words[2:], "--puzzles-per-n", "2", "--test-puzzles-per-n", "2", "--workers", "1"]
    )
    return done.exit_code, done.output


def test_a_file_of_cellxgene(tmp_path, atlas):
    code, text = run(atlas)
    assert code == 0
    assert text.startswith("atlas.h5ad: an .h5ad file of anndata, 160 cells x 12 genes\n")
    for line in (
        "matrices    X  counts                    12 genes, csr   <- used",
        "gene names  feature_name  symbols       G00, G01, G02, ...   <- used",
        "            index         Ensembl ids   ENSG00000000000, ENSG00000000001, ENSG00000000002, ...",
        "organism    Homo sapiens (not stated; guessed from the gene names)",
        "cell types  cell_type: 5 values   <- used",
        "donors      donor_id, 4 values: d0 40; d1 40; d2 40; d3 40",
        "batches     batch, 8 values: d0-a 20; d0-b 20; d1-a 20; d1-b 20; d2-a 20; d2-b 20; d3-a 20; d3-b 20",
        "tissues     tissue, 2 values: blood 80; lung 80",
        "not found   development_stage, self_reported_ethnicity (optional)",
        "dropped     no cell",
        "kept        160 cells: 5 cell types and 4 donors; 8 pairs of donor and batch, the best with 5 cell types",
        f"  python launch/build.py {atlas} --min-cells 3 --max-cells 5 --out puzzles",
    ):
        assert line in text.splitlines(), line
    code, output = builds(tmp_path, inspect_file(atlas).command)
    assert code == 0, output


def test_json_has_the_same_facts(atlas):
    code, text = run(atlas, "--json")
    found = json.loads(text)
    assert code == 0 and found["n_cells"] == 160 and found["layer"] == "X"
    assert found["layers"] == [
        {"name": "X", "values": "counts", "usable": True, "encoding": "csr", "n_genes": 12, "problem": "",
         "empty_cells": 0}
    ]  # fmt: skip
    assert found["usable"]["labels"] == dict.fromkeys(sorted(TYPES), 32)
    assert found["command"] == inspect_file(atlas).command


def test_other_kinds_give_their_remedy_and_exit_code_2(tmp_path):
    (tmp_path / "x.h5ad").write_bytes(b"%PDF-1.7")
    code, text = run(tmp_path / "x.h5ad")
    assert code == 2 and text.startswith(f"Error: {tmp_path}/x.h5ad: is a PDF document") and text.count("\n") == 1
    code, text = run(tmp_path / "x.h5ad", "--json")
    assert code == 2 and json.loads(text[: text.index("}") + 1])["kind"] == "a PDF document"
    with h5py.File(tmp_path / "m.h5mu", "w", userblock_size=512) as file:
        file.create_group("mod/rna"), file.create_group("mod/prot")
    code, text = run(tmp_path / "m.h5mu")
    assert code == 2 and "modalities 'prot', 'rna'" in text and '["rna"].write_h5ad("m.h5ad")' in text
    assert run(tmp_path / "none.h5ad") == (2, f"Error: {tmp_path}/none.h5ad: no such file\n")


def scaled(adata):
    dense = adata.X.toarray()
    adata.layers["counts"] = adata.X.copy()
    adata.layers["ambient"] = adata.X * 1.37 + adata.X.power(2) * 3.21
    depth = dense.sum(axis=1, keepdims=True)
    adata.layers["lognorm"] = np.log1p(dense / depth * 1e4)
    adata.layers["cpm"] = sparse.csr_matrix(dense / depth * 1e6)
    adata.X = ((dense - dense.mean(axis=0)) / dense.std(axis=0)).astype(np.float32)
    adata.layers["broken"] = dense * np.nan


def test_the_values_of_each_layer(tmp_path):
    path = cells(tmp_path / "x.h5ad", scaled)
    facts = inspect_file(path)
    assert {layer.name: layer.values for layer in facts.layers} == {
        "X": "scaled (negative values)",
        "ambient": "counts with fractions",
        "broken": "NaN or infinite values",
        "counts": "counts",
        "cpm": "normalised",
        "lognorm": "log-normalised",
    }
    assert facts.layer == "counts" and "--layer counts" in facts.command
    assert [layer.name for layer in facts.layers if not layer.usable] == ["X", "broken"]
    assert builds(tmp_path, facts.command)[0] == 0


def shallow(adata):
    """Counts from which a little ambient RNA was taken: most are still whole, none is large."""
    values = adata.X.toarray()
    values[::3] = np.maximum(values[::3] - 0.3, 0)
    adata.X = sparse.csr_matrix(values)


def test_shallow_counts_with_fractions_are_no_logarithms(tmp_path):
    assert inspect_file(cells(tmp_path / "x.h5ad", shallow)).layers[0].values == "counts with fractions"


@pytest.mark.parametrize("encoding", [sparse.csc_matrix, lambda matrix: matrix.toarray()])
def test_other_encodings(tmp_path, encoding):
    def change(adata):
        adata.X = encoding(adata.X)

    layer = inspect_file(cells(tmp_path / "x.h5ad", change)).layers[0]
    assert layer.values == "counts" and layer.encoding in ("csc", "dense")


def test_the_sample_of_an_expensive_matrix(tmp_path, monkeypatch):
    """A CSC or a dense matrix of millions of cells is judged from stored values, without whole rows."""
    monkeypatch.setattr("data.inspection.layers.BUDGET_BYTES", 0)
    monkeypatch.setattr("data.meaning.values.row_blocks", None)
    for encoding in (sparse.csc_matrix, lambda matrix: matrix.toarray()):

        def change(adata, encoding=encoding):
            adata.X = encoding(adata.X)
            adata.layers["log"] = encoding(sparse.csr_matrix(adata.X).log1p())

        layers = inspect_file(cells(tmp_path / "x.h5ad", change)).layers
        assert [layer.values for layer in layers] == ["counts", "log-normalised"]


def test_raw_with_fewer_genes_than_x(tmp_path):
    def change(adata):
        adata.raw = adata[:, :10]

    facts = inspect_file(cells(tmp_path / "x.h5ad", change))
    assert (facts.layer, facts.n_genes) == ("X", 24) and "--layer X" in facts.command
    assert "raw has 10 genes only; X has 24 and is taken" in facts.notes


def columns_of_another_lab(adata):
    adata.obs["CellType"] = adata.obs.pop("cell_type")
    adata.obs["leiden"] = pd.Categorical([str(i % 7) for i in range(adata.n_obs)])
    adata.obs["patient"] = adata.obs.pop("donor_id")
    adata.obs["organ"] = adata.obs.pop("tissue")
    adata.obs["n_counts"] = np.arange(adata.n_obs) * 1.5
    adata.obs["age"] = 40
    del adata.obs["disease"], adata.obs["suspension_type"], adata.obs["is_primary_data"]
    adata.var.index = adata.var.pop("feature_name").astype(str)


def test_columns_of_other_names_are_found(tmp_path):
    path = cells(tmp_path / "x.h5ad", columns_of_another_lab)
    facts = inspect_file(path)
    assert facts.used["cell_type"] == "CellType" and facts.used["donor_id"] == "patient"
    assert facts.used["tissue"] == "organ" and facts.used["disease"] == "= DISEASE"
    words = shlex.split(facts.command)
    for flag, value in (("--cell-type-key", "CellType"), ("--donor-key", "patient"), ("--gene-key", "index")):
        assert words[words.index(flag) + 1] == value
    assert "disease=DISEASE" in words and "suspension_type=cell" in words
    text = facts_text(facts)
    assert "clusters    leiden: 7 values, numbers without names" in text
    assert "Replace the words in capitals" in text
    code, output = builds(tmp_path, facts.command)
    assert code == 0, output


def test_settings_of_the_user_are_kept(tmp_path):
    path = cells(tmp_path / "x.h5ad", columns_of_another_lab)
    config = BuildConfig(donor_key="organ", constant=("disease=COVID-19",), layer="X", gene_key="index")
    facts = inspect_file(path, config)
    assert facts.used["donor_id"] == "organ" and facts.used["disease"] == "= COVID-19"
    assert "DISEASE" not in facts.command


def test_labels_that_are_numbers(tmp_path):
    def numbers(adata):
        adata.obs["cell_type"] = pd.Categorical(adata.obs["cell_type"].cat.codes.astype(str))

    def both(adata):
        adata.obs["author_annotation"] = adata.obs["cell_type"].copy()
        numbers(adata)

    def categories(adata):
        adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")

    def with_categories(change):
        return lambda adata: (categories(adata), change(adata))

    facts = inspect_file(cells(tmp_path / "x.h5ad", with_categories(numbers)))
    assert facts.problems[0].startswith("the obs column 'cell_type' holds only numbers (0, 1, 2, ...)")
    assert "When that is solved" in facts_text(facts)
    facts = inspect_file(cells(tmp_path / "y.h5ad", with_categories(both)))
    assert facts.used["cell_type"] == "author_annotation" and not facts.problems


def test_a_file_without_labels(tmp_path):
    facts = inspect_file(cells(tmp_path / "x.h5ad", lambda adata: adata.obs.pop("cell_type")))
    assert facts.usable is None
    assert facts.problems == ["no obs column holds cell types: a build needs them; annotate the cells first"]
    assert run(tmp_path / "x.h5ad")[0] == 0


def test_cells_that_are_not_primary(tmp_path):
    def change(adata):
        adata.obs["is_primary_data"] = [i < 12 for i in range(adata.n_obs)]

    facts = inspect_file(cells(tmp_path / "x.h5ad", change))
    assert "--include-non-primary" in facts.command and facts.usable.cells == 120
    assert "without --include-non-primary 108 of 120 cells are dropped" in facts_text(facts).replace(
        "\n" + " " * 14, " "
    )
    assert builds(tmp_path, facts.command)[0] == 0


def test_one_donor_is_split_by_cells(tmp_path):
    facts = inspect_file(cells(tmp_path / "x.h5ad", donors=1))
    assert "--split cell" in facts.command
    assert builds(tmp_path, facts.command)[0] == 0


def test_gene_names(tmp_path):
    def ids_first(adata):
        adata.var["gene_symbols"] = adata.var.pop("feature_name")

    def ids_only(adata):
        del adata.var["feature_name"]

    def numbers(adata):
        del adata.var["feature_name"]
        adata.var.index = [str(i) for i in range(adata.n_vars)]

    def tags(adata):
        adata.var["feature_types"] = ["Gene Expression"] * 20 + ["Antibody Capture"] * 4

    def spikes(adata):
        adata.var["feature_name"] = [*adata.var["feature_name"][:22].astype(str), "ERCC-00002", "ERCC-00113"]

    def peaks(adata):
        adata.var["feature_types"] = "Peaks"

    facts = inspect_file(cells(tmp_path / "a.h5ad", ids_first))
    assert (facts.genes.key, facts.genes.kind) == ("gene_symbols", "symbols") and "gene_symbols" in facts.command
    facts = inspect_file(cells(tmp_path / "b.h5ad", ids_only))
    assert (facts.genes.key, facts.genes.kind) == ("index", "Ensembl ids") and "Ensembl ids" in facts.notes[0]
    facts = inspect_file(cells(tmp_path / "c.h5ad", numbers))
    assert facts.genes.key is None and facts.problems == [
        "the gene names in the index of var are numbers (0, 1, 2), so the names were lost when the file was written; "
        "no column of var has symbols: export the file again with the gene names"
    ]
    facts = inspect_file(cells(tmp_path / "d.h5ad", tags))
    assert facts.genes.feature_types == {"Gene Expression": 20, "Antibody Capture": 4}
    assert "4 of 24 rows of var are no genes and are left out: 4 'Antibody Capture'" in facts.notes
    facts = inspect_file(cells(tmp_path / "e.h5ad", spikes))
    assert facts.genes.spike_ins == 2
    assert "2 of 24 rows of var are no genes and are left out: 2 'spike-in'" in facts.notes
    facts = inspect_file(cells(tmp_path / "f.h5ad", peaks))
    assert "layer 'X' holds no genes (its var rows are 24 'Peaks')" in facts.problems[0]


def test_cells_without_a_gene_are_counted(tmp_path):
    def change(adata):
        dense = adata.X.toarray()
        dense[:7] = 0
        adata.X = sparse.csr_matrix(dense)

    facts = inspect_file(cells(tmp_path / "x.h5ad", change))
    assert "7 cells have no expressed gene: a puzzle that draws one of them is left out" in facts.notes


def test_long_columns_without_categories_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("data.inspection.columns.WHOLE", 100)
    monkeypatch.setattr("data.inspection.columns.SPOT_CELLS", 10)
    path = cells(tmp_path / "x.h5ad")
    with h5py.File(path, "r+") as file:
        file["obs/note"] = [f"n{i % 3} cell".encode() for i in range(120)]
        file["obs/number"] = np.arange(120)
    columns = {column.name: column for column in inspect_file(path).columns}
    assert columns["note"].kind == "labels" and columns["note"].n_values == 3 and not columns["note"].exact
    assert columns["number"].kind == "numbers" and columns["cell_type"].exact


def test_labels_of_a_sampled_column_are_counted_in_all_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("data.inspection.columns.WHOLE", 100)
    monkeypatch.setattr("data.inspection.columns.SPOT_CELLS", 10)
    path = cells(tmp_path / "x.h5ad")
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"]
        file["obs/cell_type"] = [b"B cell", b"T cell", b"mast cell", b"T cell"] * 30
    text = run(path)[1]
    assert "cell types  cell_type: about 3 values   <- used" in text
    assert "T cell 60; B cell 30; mast cell 30" in text


def test_a_zarr_store(tmp_path):
    store = tmp_path / "x.zarr"
    with anndata.settings.override(zarr_write_format=3):
        anndata.read_h5ad(cells(tmp_path / "x.h5ad")).write_zarr(store)
    facts = inspect_file(store)
    assert facts.kind == "a zarr store of anndata" and facts.layers[0].values == "counts"
    assert facts.usable.labels == inspect_file(tmp_path / "x.h5ad").usable.labels


def test_first_lines(tmp_path, atlas):
    assert first_lines(atlas) == [
        "atlas.h5ad: 160 cells x 12 genes; X holds counts; gene names from feature_name are symbols (G00, G01)"
    ]
    path = cells(tmp_path / "x.h5ad", scaled)
    assert first_lines(path, BuildConfig(layer="counts", gene_key="index")) == [
        "x.h5ad: 120 cells x 24 genes; counts holds counts; gene names from index are Ensembl ids "
        "(ENSG00000000000, ENSG00000000001)",
        "  other matrices (--layer): X, ambient, broken, cpm, lognorm",
        "  --gene-key feature_name would give symbols",
    ]
