"""Shapes of files from public trackers, three rounds of ten; each test names the report. LOG.md has the summary.

Chosen from the reports, not from the code. A shape that was read right from the start has a test where no other test
holds it.
"""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data.build.columns import clean_text
from data.build.matrix import open_matrix
from data.build.rank import top_genes
from data.inspection.inspection import inspect_file
from data.meaning.genes import gene_table
from data.meaning.labels import names_no_cell_type, transposed
from data.meaning.names import copies_of, no_genes
from tests.data.test_real_files import IDS, N_CELLS, SYMBOLS, as_integers, atlas, built, plain, refusal, saved, with_obs
from tests.data.test_values import counts_of, to_one_depth

__all__ = ["plain"]  # a fixture
FACTORS = ["cell_type", "donor_id", "sex", "tissue", "disease", "suspension_type"]


def named(path, names, **var):
    """A file whose index of var has these names."""
    adata = atlas(names, names)
    adata.var = adata.var[[]].assign(**var)
    return saved(path, adata)


def names_of(path, gene_key="index"):
    with open_matrix(path) as matrix:
        return gene_table(matrix, gene_key)


# --- first round


def test_tables_without_any_attribute(tmp_path, plain):
    """https://github.com/scverse/anndata/issues/731: written by hand, with `_index` and `__categories` only."""
    path = saved(tmp_path / "a.h5ad", atlas())
    as_integers(path, FACTORS)
    with h5py.File(path, "r+") as file:
        for table in ("obs", "var"):
            for node in (file[table], *file[table].values()):
                for name in list(node.attrs):
                    del node.attrs[name]
        for name in list(file.attrs):
            del file.attrs[name]
    assert built(path)[0] == plain[1]


def test_files_of_anndata_0_6(tmp_path):
    """https://github.com/scverse/anndata/issues/353: obs and var are compound datasets. anndata itself reads them."""
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        file["obs"] = np.zeros(3, dtype=[("index", "S2"), ("cell_type", "i1")])
        file["var"] = np.zeros(2, dtype=[("index", "S2")])
        file["X"] = np.ones((3, 2), dtype=np.float32)
    assert refusal(path) == (
        f"{path}: was written by anndata 0.6 or earlier; write it again in Python: "
        "anndata.read_h5ad('a.h5ad').write_h5ad('a-again.h5ad')"
    )
    anndata.read_h5ad(path).write_h5ad(tmp_path / "a-again.h5ad")
    with h5py.File(tmp_path / "a-again.h5ad") as file:
        assert isinstance(file["obs"], h5py.Group)


def test_named_types_of_jhdf5(tmp_path, plain):
    """https://github.com/scverse/anndata/issues/1051: a Java program leaves named types in every group."""
    path = saved(tmp_path / "a.h5ad", atlas())
    with h5py.File(path, "r+") as file:
        for where in ("", "obs/", "var/"):
            file[f"{where}__DATA_TYPES__/Enum_Boolean"] = h5py.enum_dtype({"FALSE": 0, "TRUE": 1}, "i1")
            file[f"{where}named"] = np.dtype("S10")
    assert built(path)[0] == plain[1]
    assert not inspect_file(path).problems


def test_raw_with_numbers_as_index(tmp_path, plain):
    """https://github.com/mojaveazure/seurat-disk/issues/196: the symbols are in a column of raw/var."""
    adata = atlas(SYMBOLS, SYMBOLS)
    raw = atlas(index=[str(i) for i in range(10)])
    raw.var = raw.var.rename(columns={"feature_name": "features"})
    adata.raw, adata.X = raw, np.log1p(adata.X.toarray())
    adata.var = adata.var[[]]
    path = saved(tmp_path / "a.h5ad", adata)
    assert refusal(path, gene_key="index").endswith("name the column with the symbols: --gene-key 'features'")
    assert built(path, gene_key="features")[0] == plain[1]
    facts = inspect_file(path)
    assert (facts.layer, facts.genes.key) == ("raw", "features") and not facts.problems


@pytest.mark.parametrize("column", ["real_gene_name", "Gene Symbol", "hgnc_symbol_2023"])
def test_symbols_in_columns_of_unusual_names(tmp_path, column):
    """https://github.com/STOmics/Stereopy/issues/446: ids of an animal that is in no table, symbols beside them."""
    ids = [f"ENSSSCG{i:011d}" for i in range(10)]
    path = named(tmp_path / "a.h5ad", ids, **{column: SYMBOLS})
    assert names_of(path).names.tolist() == SYMBOLS
    assert f"10 are listed by the symbols of the var column {column!r}" in names_of(path).notes[0]
    assert inspect_file(path).genes.key == column


def scaled_file(path, **more):
    """Clipped, scaled values in X, as after scanpy's tutorial."""
    counts = counts_of(300)
    logged = np.log1p(to_one_depth(counts))
    adata = atlas([f"g{i}" for i in range(300)], [f"i{i}" for i in range(300)], counts)
    if "raw" in more:
        adata.raw = adata.copy()
        adata.raw.X[:] = logged
    adata.X = np.minimum((logged - logged.mean(axis=0)) / np.maximum(logged.std(axis=0), 1e-6), 10)
    if "obsm" in more:
        adata.obsm["counts"], adata.obsm["X_pca"] = sparse.csr_matrix(counts), np.zeros((N_CELLS, 5))
    return saved(path, adata), logged


def test_clipped_scaled_values_beside_logarithms(tmp_path):
    """https://github.com/czbiohub-sf/tabula-muris-senis/issues/13"""
    path, logged = scaled_file(tmp_path / "a.h5ad", raw=True)
    assert built(path)[1]["values"] == "log counts"
    assert top_genes(path, [5], 1) == [[f"g{logged[5].argmax()}"]]


def test_counts_in_obsm(tmp_path):
    """https://github.com/klarman-cell-observatory/HTAPP-Pipelines/issues/4"""
    path, _ = scaled_file(tmp_path / "a.h5ad", obsm=True)
    remedy = "obsm['counts'] has a column for each gene: copy it (adata.layers['counts'] = adata.obsm['counts'])"
    assert remedy in refusal(path) and "--layer raw" not in refusal(path)
    facts = inspect_file(path)
    assert remedy in facts.problems[0] and facts.genes.kind == "symbols"


def test_names_that_mean_nothing(tmp_path):
    """https://github.com/scverse/scanpy/issues/1259: nan is a gene of the fly; elsewhere it is a lost name."""
    lost = ["nan", "NA", "none", *SYMBOLS[3:]]
    table = names_of(named(tmp_path / "a.h5ad", lost))
    assert table.is_gene.tolist() == [False] * 3 + [True] * 7
    assert table.notes == ["3 of 10 rows of var are no genes and are left out: 3 'without a name'"]
    fly = ["nan", "na", "CG1234", "CG40042", *SYMBOLS[4:]]
    table = names_of(named(tmp_path / "b.h5ad", fly))
    assert table.is_gene.all() and table.names.tolist() == fly


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_infinite_values(tmp_path, value):
    """https://github.com/scverse/anndata/issues/544"""
    adata = atlas()
    adata.X = adata.X.toarray()
    adata.X[40, 3] = value
    message = refusal(saved(tmp_path / "a.h5ad", adata))
    assert message.endswith("layer 'X' holds NaN or infinite values; this file has no other matrix, so add its counts as a "
                            "layer and name it with --layer")  # fmt: skip
    adata.layers["counts"] = atlas().X
    assert refusal(saved(tmp_path / "b.h5ad", adata)).endswith("choose values that can be ranked with --layer counts")
    assert inspect_file(tmp_path / "b.h5ad").layer == "counts"


def test_copies_of_a_gene_are_one_gene(tmp_path):
    """https://github.com/scverse/scanpy/issues/1719: var_names_make_unique and R's make.unique."""
    names = ["CD3D", "CD3D-1", "CD3D-2", "LYZ", "LYZ.1", "NKX2-1", "SNORD115", "SNORD115-1", "HLA-A", "AC1.2"]
    path = named(tmp_path / "a.h5ad", names)
    read = ["CD3D", "CD3D", "CD3D", "LYZ", "LYZ", "NKX2-1", "SNORD115", "SNORD115-1", "HLA-A", "AC1.2"]
    table = names_of(path)
    assert table.names.tolist() == read  # SNORD115-1 is a gene's own symbol
    assert table.notes[0].startswith("3 gene names were made unique with a number, such as 'CD3D-1'")
    lists = top_genes(path, list(range(N_CELLS)), 10, gene_key="index")
    assert all(len(genes) == len(set(genes)) for genes in lists)
    counts = atlas().X.toarray()
    assert lists[7][0] == read[counts[7].argmax()]


def test_numbered_genes_of_the_pig_are_no_copies():
    """SLA-1, SLA-2, ... are MHC class I; SLA is another gene, the Src-like adaptor."""
    assert copies_of(["SLA", "SLA-1", "SLA-11", "CD3D", "CD3D-1"]) == {"CD3D-1": "CD3D"}


# --- second round


def with_shape(path, matrix, shape):
    adata = atlas()
    adata.raw = adata.copy() if matrix.startswith("raw") else None
    saved(path, adata)
    with h5py.File(path, "r+") as file:
        file[matrix].attrs["shape"] = shape
    return path


def test_a_matrix_that_does_not_fit_its_tables(tmp_path):
    """https://github.com/lmw123/DISCOtoolkit/issues/5 and single-cell-curation 418: raw has more genes than raw.var."""
    path = with_shape(tmp_path / "a.h5ad", "X", [N_CELLS, 1])
    assert refusal(path).endswith("but there are 64 cells and 10 genes; write the file again, or download it again")
    path = with_shape(tmp_path / "b.h5ad", "raw/X", [N_CELLS, 14])
    assert refusal(path).endswith("but there are 64 cells and 10 genes; choose another matrix with --layer X")
    assert inspect_file(path).layer == "X"


def test_unsorted_entries_and_stored_zeros(tmp_path, plain):
    """https://github.com/scverse/anndata/issues/1388: the format allows any order, repeats and zeros."""
    path, rng = saved(tmp_path / "a.h5ad", atlas()), np.random.default_rng(0)
    counts = atlas().X.toarray()
    data, indices, indptr = [], [], [0]
    for row in counts:
        whole, part = np.floor(row / 2), np.ceil(row / 2)  # each value in two entries
        columns = rng.permutation(np.r_[np.arange(10), np.arange(10) + 10])
        data += np.r_[whole, part][columns].tolist()
        indices += (columns % 10).tolist()
        indptr.append(len(data))
    with h5py.File(path, "r+") as file:
        for name, values in {"data": np.array(data, "f4"), "indices": indices, "indptr": indptr}.items():
            del file["X"][name]
            file["X"][name] = values
    assert built(path)[0] == plain[1]


def test_truth_and_missing_values_as_text(tmp_path):
    """https://github.com/scverse/scirpy/issues/190"""
    labels = ["nan"] * 3 + atlas().obs["cell_type"].astype(str).tolist()[3:]
    path = with_obs(tmp_path / "a.h5ad", is_primary_data=["False"] * 8 + ["True"] * 56, cell_type=labels, sex="nan")
    _, report = built(path)
    assert report["cells_dropped"]["is_primary_data is not True"] == 8 and report["cells_kept"] == 56


def test_a_column_that_is_listed_but_absent(tmp_path, plain):
    """https://github.com/scverse/anndata/issues/621: `column-order` names a column that was not written."""
    adata = atlas()
    adata.obs["stage"] = 1.0
    path = saved(tmp_path / "a.h5ad", adata)
    with h5py.File(path, "r+") as file:
        del file["obs/stage"]
    assert built(path)[0] == plain[1]
    with h5py.File(path, "r+") as file:
        del file["obs/cell_type"]
    message = refusal(path)
    assert "this file has no cell types; a build needs them, so annotate the cells first" in message
    assert message.count(". ") == 0 and not message.endswith(".")  # one sentence


def test_bytes_that_became_text(tmp_path, plain):
    """https://github.com/scverse/anndata/issues/2271: "b'CD3D'" in the names and the labels."""
    assert clean_text("b'T cell'") == "T cell" and clean_text('b"5\' cap"') == "5' cap"
    assert clean_text("b'nan'") is None and clean_text("b cell") == "b cell" and clean_text("b''") is None
    adata = atlas([f"b'{name}'" for name in SYMBOLS], [f"b'{name}'" for name in IDS])
    for column in FACTORS:
        adata.obs[column] = [f"b'{value}'" for value in adata.obs[column]]
    path = saved(tmp_path / "a.h5ad", adata)
    assert built(path)[0] == plain[1]
    assert names_of(path).names.tolist() == SYMBOLS


def test_labels_that_differ_in_blanks_only(tmp_path, plain):
    """https://github.com/linnarsson-lab/adult-human-brain/issues/4"""
    blanks = ["{} ", "{}", "{}\u00a0", "\t{}"]
    labels = [blanks[i % 4].format(label) for i, label in enumerate(atlas().obs["cell_type"])]
    assert built(with_obs(tmp_path / "a.h5ad", cell_type=labels, tissue="blood "))[0] == plain[1]


def test_transposed_files(tmp_path):
    """https://github.com/scverse/scvi-tools/issues/84: a table was read as it is in R, with genes as rows."""
    turned = saved(tmp_path / "a.h5ad", atlas(SYMBOLS, SYMBOLS).T)
    assert refusal(turned, gene_key="index") == (
        f"{turned}: has no cell types and looks transposed, with genes as rows (the table of genes (var) has the columns "
        "'cell_type', 'donor_id', 'suspension_type'); turn it in Python: "
        "anndata.read_h5ad('a.h5ad').T.write_h5ad('a-turned.h5ad')"
    )
    for rows in (SYMBOLS, IDS):
        bare = anndata.AnnData(np.ones((10, 5)), obs=pd.DataFrame(index=rows))
        assert transposed(saved(tmp_path / "b.h5ad", bare)) == f"the cells (obs) are named {', '.join(rows[:3])}, ..."
        assert "looks transposed" in inspect_file(tmp_path / "b.h5ad").problems[0]
    assert transposed(saved(tmp_path / "c.h5ad", atlas())) is None


def test_files_of_kb_python(tmp_path, plain):
    """https://github.com/pachterlab/kb_python/issues/160: ids with versions, and a matrix for each kind of transcript."""
    adata = atlas(index=[f"{name}.14" for name in IDS])
    adata.var = adata.var.rename(columns={"feature_name": "gene_name"})
    adata.layers.update({"mature": adata.X, "nascent": adata.X * 2, "ambiguous": adata.X * 3})
    rows, _ = built(saved(tmp_path / "a.h5ad", adata), gene_key="index")
    assert rows == plain[1]


def test_logarithms_to_the_base_2_of_counts(tmp_path):
    """https://github.com/ventolab/Human-Uterus-Cell-Altas_UHCA/issues/3"""
    counts = counts_of(300)
    adata = atlas([f"g{i}" for i in range(300)], [f"i{i}" for i in range(300)], np.log2(1 + counts))
    path = saved(tmp_path / "a.h5ad", adata)
    assert built(path)[1]["values"] == "log counts"
    assert top_genes(path, [9], 1) == [[f"g{counts[9].argmax()}"]]


# --- third round


def test_genomes_in_front_of_gene_names(tmp_path, plain):
    """https://github.com/10XGenomics/cellranger/issues/24: a reference of several genomes."""
    for form in ("GRCh38_{}", "hg19-{}", "GRCh38______{}"):
        table = names_of(named(tmp_path / "a.h5ad", [form.format(name) for name in SYMBOLS]))
        assert table.names.tolist() == SYMBOLS
        assert table.notes == [
            f"the gene names begin with the name of a genome ({form.format('CD3D')}), which is left out"
        ]
    path = saved(tmp_path / "a.h5ad", atlas(index=[f"GRCh38_{name}" for name in IDS]))
    assert built(path, gene_key="index")[0] == plain[1]  # ids are found behind it, too
    mixed = [f"hg19_{name}" for name in SYMBOLS[:5]] + [f"mm10___{name.capitalize()}" for name in SYMBOLS[5:]]
    table = names_of(named(tmp_path / "b.h5ad", mixed))
    assert table.names.tolist() == SYMBOLS[:5] + [name.capitalize() for name in SYMBOLS[5:]]
    assert table.notes[0].endswith("they are of 2 genomes (hg19, mm10), so a cell may list genes of each")
    one = ["mm10_Cd3d", *SYMBOLS[1:]]  # a transgene
    assert names_of(named(tmp_path / "c.h5ad", one)).names.tolist() == one


PROBES = ["NegControlProbe_00042", "NegControlCodeword_0500", "BLANK_0006", "Blank-12", "UnassignedCodeword_0001"]
PROBES += [
    "DeprecatedCodeword_0018",
    "Intergenic_Region_1021",
    "antisense_LYZ",
    "NegPrb3",
    "Negative7",
    "SystemControl12",
]


@pytest.mark.parametrize("probe", PROBES)
def test_control_probes_are_no_genes(probe):
    """https://github.com/AlexsLemonade/training-modules/pull/1041: Xenium, CosMx and MERSCOPE."""
    assert no_genes([probe, "BLNK", "NEGR1", "SYS1", "CD3D"]) == ["control-probe", None, None, None, None]


def test_guides_without_a_column_of_types(tmp_path):
    """https://github.com/broadinstitute/CellBender/issues/62: TREM2-1 targets TREM2 and is no copy of it."""
    names = ["TREM2", "TREM2-1", "TREM2-2", "NEG_CTRL-1", "non-targeting_3", *SYMBOLS[:5]]
    table = names_of(named(tmp_path / "a.h5ad", names))
    assert table.is_gene.tolist() == [True, False, False, False, False, *[True] * 5]
    assert table.notes == ["4 of 10 rows of var are no genes and are left out: 4 'CRISPR-guide'"]


def test_negative_counts(tmp_path):
    """https://github.com/broadinstitute/CellBender/issues/306: whole numbers are not scaled."""
    counts = atlas().X.toarray()
    counts[40, 3] = -1
    path = saved(tmp_path / "a.h5ad", atlas(counts=counts))
    assert refusal(path) == (
        f"{path}: layer 'X' holds negative counts, as CellBender 0.3.1 wrote them; run a later version of it"
    )
    assert inspect_file(path).layers[0].values == "negative counts" and not inspect_file(path).layers[0].usable


def test_a_file_without_genes(tmp_path):
    """https://github.com/theislab/zellkonverter/issues/65: an atlas of labels and embeddings only."""
    assert "layer 'X' is empty (64 cells x 0 genes); choose another file" in refusal(
        saved(tmp_path / "a.h5ad", atlas()[:, :0].copy())
    )


def test_truth_values_that_are_missing(tmp_path):
    """https://github.com/scverse/anndata/issues/1258"""
    primary = pd.array([True] * 56 + [False] * 4 + [None] * 4, dtype="boolean")
    _, report = built(with_obs(tmp_path / "a.h5ad", is_primary_data=primary))
    assert report["cells_dropped"]["is_primary_data is not True"] == 8


def test_numbers_as_names_of_cells(tmp_path, plain):
    """https://github.com/scverse/anndata/issues/84: the index is a dataset of numbers, with repeats."""
    path = saved(tmp_path / "a.h5ad", atlas())
    with h5py.File(path, "r+") as file:
        key = file["obs"].attrs["_index"]
        del file["obs"][key]
        file["obs"][key] = np.arange(N_CELLS) % 60
    rows, _ = built(path)
    assert [row["assistant_msg"] for _, row in rows] == [row["assistant_msg"] for _, row in plain[1]]
    ids = {name for _, row in rows for name in row["cell_ids"]}
    assert ids <= {str(i) for i in range(4, 60)} | {f"{i % 60}#{i}" for i in (0, 1, 2, 3, 60, 61, 62, 63)}


def test_quotes_and_labels_of_any_cell(tmp_path, plain):
    """https://github.com/chanzuckerberg/cellxgene-census/issues/1434"""
    labels = [f'"{label}"' if i % 3 else label for i, label in enumerate(atlas().obs["cell_type"])]
    assert built(with_obs(tmp_path / "a.h5ad", cell_type=labels))[0] == plain[1]
    assert clean_text("'5' end'") == "'5' end'" and clean_text("3'") == "3'" and clean_text('""') is None
    for label in ("cell", "native cell", "Cells", "eukaryotic cell", "other", "Other cells"):
        assert names_no_cell_type(label)
    for label in ("B cell", "stem cell", "other T cell", "mother cell"):
        assert not names_no_cell_type(label)


def test_numbers_among_labels(tmp_path):
    """https://github.com/scverse/anndata/issues/761: one of two concatenated studies had cluster numbers."""
    labels = atlas().obs["cell_type"].astype(str).tolist()[:48] + ["1", "2"] * 8
    path = with_obs(tmp_path / "a.h5ad", cell_type=labels)
    _, report = built(path)
    assert report["cells_kept"] == 48 and report["cells_dropped"]["the label names no cell type"] == 16
    assert any("are left out: '1' (8), '2' (8); --keep-label NAME keeps one" in note for note in report["notes"])
    assert built(path, keep_label=("1",))[1]["cells_kept"] == 56
    assert built(path, allow_numeric_labels=True)[1]["cells_kept"] == 64
