"""Clusters as mean profiles: hand-computed means and lists, the same numbers from every layout, and what is refused."""

import dataclasses
import math
from contextlib import nullcontext

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import data.build.matrix
import data.clusters.profiles
from data.build.rank import top_genes
from data.clusters.profiles import Asked, Profiles, profiles_of, read_profiles
from data.clusters.settings import ProfileSettings
from data.errors import UserError
from data.puzzles import Puzzle

GENES = ["LYZ", "CD3D", "ACTB", "MS4A1"]
COUNTS = np.array(
    [
        [0, 1, 1, 0],  # s1, cluster 10
        [0, 1, 0, 0],  # s1, 10
        [3, 0, 1, 0],  # s1, 2
        [1, 0, 1, 0],  # s1, 2
        [0, 0, 2, 2],  # s2, 2
        [0, 0, 0, 5],  # s2, 2
        [9, 0, 0, 0],  # s2, 10: too few cells
        [7, 7, 7, 7],  # no cluster
    ],
    dtype=np.float32,
)
CLUSTERS = ["10", "10", "2", "2", "2", "2", "10", None]
DONORS = ["s1", "s1", "s1", "s1", "s2", "s2", "s2", "s2"]
TWO = ProfileSettings(min_cells=2)


def small(matrix=COUNTS, names=GENES, **obs) -> anndata.AnnData:
    columns = {"leiden": pd.Categorical(CLUSTERS), "donor_id": DONORS, "tissue": "blood", "sex": "F", **obs}
    frame = pd.DataFrame(columns, index=[f"c{i}" for i in range(len(matrix))])
    return anndata.AnnData(matrix.copy(), obs=frame, var=pd.DataFrame(index=list(names)))


def same(one: Profiles, other: Profiles) -> bool:
    """Whether two results have equal numbers and texts, but for notes."""
    equal = one.genes == other.genes and one.values == other.values
    for name in ("profile_of_cell", "cluster_of_cell", "sample_of_cell"):
        equal &= bool((getattr(one, name) == getattr(other, name)).all())
    for a, b in zip(one.profiles, other.profiles, strict=True):
        left, right = vars(a) | {"mean": a.mean.tobytes()}, vars(b) | {"mean": b.mean.tobytes()}
        equal &= left == right
    return equal


def log(counts_per_10k: float) -> float:
    return math.log1p(counts_per_10k)


def test_means_and_lists_computed_by_hand():
    found = profiles_of(small(), "leiden", TWO)
    assert found.genes == ["ACTB", "CD3D", "LYZ", "MS4A1"] and found.values == "counts"
    assert [(p.sample, p.cluster, p.n_cells) for p in found.profiles] == [
        ("s1", "2", 2),
        ("s1", "10", 2),
        ("s2", "2", 2),
    ]
    two, ten, other = found.profiles
    # cluster 2 of s1: LYZ is 3/4 and 1/2 of a cell, ACTB 1/4 and 1/2
    means = [(log(2500) + log(5000)) / 2, 0, (log(7500) + log(5000)) / 2, 0]
    assert two.mean.dtype == np.float32 and two.mean == pytest.approx(means, rel=1e-6)
    assert ten.mean == pytest.approx([log(5000) / 2, (log(5000) + log(10000)) / 2, 0, 0], rel=1e-6)
    assert two.by_expression == ["LYZ", "ACTB"] and ten.by_expression == ["CD3D", "ACTB"]
    # by difference from the sample's other profile: LYZ + 8.7, ACTB 8.2 - 4.3 = + 3.9; for cluster 10 only CD3D is above
    assert two.by_difference == ["LYZ", "ACTB"] and ten.by_difference == ["CD3D"]
    assert other.by_expression == ["MS4A1", "ACTB"] and other.by_difference == [], "the only profile of its sample"
    assert found.profile_of_cell.tolist() == [1, 1, 0, 0, 2, 2, -1, -1] and found.profile_of_cell.dtype == np.int32
    assert found.cluster_of_cell.tolist() == ["10", "10", "2", "2", "2", "2", "10", ""]
    assert found.sample_of_cell.tolist() == DONORS
    assert "1 cells have no known cluster: they get no profile" in found.notes
    assert "1 cells are in a cluster with fewer than 2 cells in their sample" in found.notes
    assert any(note.startswith("the layer X holds counts") for note in found.notes)


def test_the_difference_is_from_the_mean_of_the_other_profiles_and_not_of_all():
    """Three clusters of one cell: 0.5 log units above the mean of the others is 1/3 above the mean of all."""
    matrix = np.log1p(np.array([[900.0, 9100, 0], [600, 0, 9400], [150, 0, 9850]], dtype=np.float32))
    obs = pd.DataFrame({"cluster": ["a", "b", "c"] * 2}, index=list("uvwxyz"))
    adata = anndata.AnnData(np.vstack([matrix] * 2), obs=obs, var=pd.DataFrame(index=["G1", "G2", "G3"]))
    a, b, c = profiles_of(adata, "cluster", TWO).profiles
    assert a.by_difference == ["G2", "G1"], "G1: log 901 is above (log 601 + log 151) / 2"
    assert b.by_difference == ["G3", "G1"], "log 601 is above (log 901 + log 151) / 2 = log 369"
    assert c.by_difference == ["G3"]


def test_counts_and_log_normalised_values_give_the_same_lists():
    adata, rng = small(), np.random.default_rng(1)
    adata = anndata.AnnData(
        rng.poisson(3, (8, 40)).astype(np.float32),
        obs=adata.obs,
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(40)]),
    )
    from_counts = profiles_of(adata, "leiden", TWO)
    adata.X = np.log1p(adata.X / adata.X.sum(axis=1, keepdims=True) * 10_000)
    from_logs = profiles_of(adata, "leiden", TWO)
    assert (from_counts.values, from_logs.values) == ("counts", "log counts")
    assert any("holds log-normalised values: they are averaged as they are" in note for note in from_logs.notes)
    for one, other in zip(from_counts.profiles, from_logs.profiles, strict=True):
        assert one.mean == pytest.approx(other.mean, abs=1e-5)
        assert one.by_expression == other.by_expression and one.by_difference == other.by_difference


def test_counts_per_million_are_brought_to_the_unit_of_counts():
    from_counts = profiles_of(small(), "leiden", TWO)
    per_million = profiles_of(small(COUNTS / COUNTS.sum(axis=1, keepdims=True) * 1e6), "leiden", TWO)
    for one, other in zip(from_counts.profiles, per_million.profiles, strict=True):
        assert one.mean == pytest.approx(other.mean, rel=1e-5)


def test_a_cluster_of_one_cell_lists_what_a_puzzle_shows_of_the_cell(tmp_path):
    rng, genes = np.random.default_rng(4), [f"GENE{i % 55}" for i in range(60)]  # 5 names occur twice
    obs = pd.DataFrame({"own": [*"abcdef", *["the rest"] * 14]}, index=[f"c{i}" for i in range(20)])
    var = pd.DataFrame({"feature_name": genes}, index=[f"ENSG{i:011d}" for i in range(60)])
    adata = anndata.AnnData(rng.poisson(1, (20, 60)).astype(np.float32), obs=obs, var=var)
    adata.write_h5ad(tmp_path / "a.h5ad")
    shown = top_genes(tmp_path / "a.h5ad", range(6), 50)
    found = read_profiles(tmp_path / "a.h5ad", "own", ProfileSettings(min_cells=1))
    assert [p.by_expression for p in found.profiles[:6]] == shown and found.genes == sorted(set(genes))


def layouts(adata: anndata.AnnData) -> dict[str, anndata.AnnData]:
    """The same cells, stored in other ways."""
    made = {name: adata.copy() for name in ("dense", "csr", "csc", "raw", "layer", "texts", "nullable", "float64")}
    made["csr"].X, made["csc"].X = sparse.csr_matrix(adata.X), sparse.csc_matrix(adata.X)
    scaled = adata.copy()
    scaled.X = (adata.X - adata.X.mean(axis=0)) / (adata.X.std(axis=0) + 1)
    made["raw"] = scaled.copy()
    made["raw"].raw = adata
    made["layer"] = scaled.copy()
    made["layer"].layers["counts"] = sparse.csc_matrix(adata.X)
    made["texts"].obs["leiden"] = adata.obs["leiden"].astype(object)
    made["nullable"].obs["leiden"] = adata.obs["leiden"].astype(float).astype("Int64")
    made["float64"].X = adata.X.astype(np.float64)
    return made


@pytest.mark.parametrize("name", ["dense", "csr", "csc", "raw", "layer", "texts", "nullable", "float64"])
def test_every_layout_in_memory_and_on_disk_gives_the_same_numbers(tmp_path, name):
    adata = layouts(small())[name]
    settings = ProfileSettings(min_cells=2, layer="counts" if name == "layer" else "auto")
    expected = profiles_of(small(), "leiden", TWO)
    before = adata.copy()
    in_memory = profiles_of(adata, "leiden", settings)
    assert adata.obs.equals(before.obs) and (adata.X != before.X).sum() == 0, "the AnnData is not changed"
    adata.write_h5ad(tmp_path / "a.h5ad")
    on_disk = read_profiles(tmp_path / "a.h5ad", "leiden", settings)
    assert same(in_memory, on_disk) and same(in_memory, expected) and in_memory.notes == on_disk.notes


def test_a_view_and_a_zarr_store(tmp_path):
    pytest.importorskip("zarr")
    adata = small()
    adata.write_zarr(tmp_path / "a.zarr")
    assert same(read_profiles(tmp_path / "a.zarr", "leiden", TWO), profiles_of(adata, "leiden", TWO))
    s1 = adata[adata.obs["donor_id"] == "s1"]
    assert s1.is_view and same(profiles_of(s1, "leiden", TWO), profiles_of(s1.copy(), "leiden", TWO))


@pytest.mark.parametrize("encoding", ["csr", "csc", "dense"])
def test_blocks_and_passes_do_not_matter(tmp_path, monkeypatch, encoding):
    """A file of several samples, read in blocks of a few values and with the sums of one sample at a time."""
    rng = np.random.default_rng(3)
    matrix = rng.poisson(0.7, (400, 30)).astype(np.float32)
    obs = pd.DataFrame({"k": rng.integers(0, 5, 400).astype(str), "donor_id": rng.choice(["a", "b", "c"], 400)})
    obs.index = obs.index.astype(str)
    stored = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[encoding](matrix)
    adata = anndata.AnnData(stored, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(30)]))
    adata.write_h5ad(tmp_path / "a.h5ad")
    whole, read = read_profiles(tmp_path / "a.h5ad", "k"), []
    monkeypatch.setattr(data.clusters.profiles, "SUMS_AT_ONCE", 30 * 5)
    monkeypatch.setattr(data.build.matrix, "NONZEROS_PER_BLOCK", 100)
    monkeypatch.setattr(data.build.matrix, "DENSE_VALUES_PER_BLOCK", 300)
    in_parts = read_profiles(tmp_path / "a.h5ad", "k", advance=lambda n, total: read.append((n, total)))
    assert same(whole, in_parts) and len(whole.profiles) == 15
    assert sum(n for n, _ in read) == 400 and {total for _, total in read} == {400}
    by_hand = np.log1p(matrix / matrix.sum(axis=1, keepdims=True) * 1e4)
    order = [whole.genes.index(name) for name in adata.var_names]
    for profile in whole.profiles:
        cells = ((obs["k"] == profile.cluster) & (obs["donor_id"] == profile.sample)).to_numpy()
        assert profile.mean[order] == pytest.approx(by_hand[cells].mean(axis=0), rel=1e-5, abs=1e-7)


def test_a_matrix_stored_by_genes_gives_the_same_bytes(tmp_path):
    """Names that occur twice, tags, entries in any order, and several entries of one gene in a cell: they add up."""
    rng = np.random.default_rng(5)
    matrix = rng.poisson(0.8, (60, 12)).astype(np.float32)
    names = ["A", "B", "C", "A", "D", "ERCC-00002", "B", "E", "F", "G", "H", "A"]
    obs = pd.DataFrame({"k": rng.integers(0, 3, 60).astype(str)}, index=[f"c{i}" for i in range(60)])
    by_cells = anndata.AnnData(sparse.csr_matrix(matrix), obs=obs, var=pd.DataFrame({"feature_name": names}))
    parts = sparse.coo_matrix(matrix)
    order = rng.permutation(2 * parts.nnz)
    order = order[np.argsort(np.tile(parts.col, 2)[order], kind="stable")]  # by gene; its cells in any order
    halves, cells = np.tile(parts.data / 2, 2)[order], np.tile(parts.row, 2)[order]
    indptr = np.searchsorted(np.tile(parts.col, 2)[order], np.arange(13))
    by_genes = anndata.AnnData(np.zeros((60, 12), np.float32), obs=obs, var=by_cells.var)
    by_genes.X = sparse.csc_matrix((halves, cells, indptr), shape=(60, 12))
    assert not by_genes.X.has_canonical_format
    expected = profiles_of(by_cells, "k")
    assert same(profiles_of(by_genes, "k"), expected) and len(expected.profiles) == 3
    by_genes.X.data[7] = np.nan
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        profiles_of(by_genes, "k")


def test_only_the_samples_that_are_asked_about_are_read():
    """Of 200 donors, 120 clusters and 36,000 genes the means are 3.5 GB."""
    rng = np.random.default_rng(6)
    donors = np.repeat([f"d{i}" for i in range(9)], rng.integers(20, 60, 9))
    obs = pd.DataFrame({"donor_id": donors, "k": rng.integers(0, 3, len(donors)).astype(str)})
    matrix = sparse.csr_matrix(rng.poisson(0.5, (len(donors), 30)).astype(np.float32))
    adata = anndata.AnnData(matrix, obs=obs.set_index(obs.index.astype(str)))
    adata.var["feature_name"] = [f"G{i}" for i in range(30)]
    read = []
    every = profiles_of(adata, "k")
    some = profiles_of(adata, "k", advance=lambda n, total: read.append((n, total)), asked=Asked(2, 3))
    assert len(every.profiles) > 20 and len(some.profiles) == 6
    donors = {profile.sample for profile in some.profiles}
    cells = pd.Series(obs["donor_id"]).value_counts()
    assert len(donors) == 2 and donors == set(cells.index[:2]), "of those with all clusters the two of most cells"
    assert {total for _, total in read} == {int(cells.iloc[:2].sum())} == {sum(n for n, _ in read)}
    whole = {(one.sample, one.cluster): one for one in every.profiles}
    for one in some.profiles:
        other = whole[one.sample, one.cluster]
        assert one.by_difference == other.by_difference and np.array_equal(one.mean, other.mean)


@pytest.mark.parametrize("samples", [1, 2])
def test_clusters_are_asked_about_in_company(samples):
    """Each cluster has most of its cells in donors of its own, and some in every other."""
    donors = [(f"d{i:02}", f"k{j:02}", 50 if i % 12 == j else 6) for i in range(24) for j in range(12)]
    obs = pd.DataFrame([row[:2] for row in donors for _ in range(row[2])], columns=["donor_id", "k"])
    matrix = sparse.csr_matrix(np.ones((len(obs), 3), np.float32) + np.eye(len(obs), 3, dtype=np.float32))
    adata = anndata.AnnData(matrix, obs=obs.set_index(obs.index.astype(str)))
    adata.var["feature_name"] = ["A", "B", "C"]
    asked = profiles_of(adata, "k", asked=Asked(samples, 4)).profiles
    assert len(asked) == 12 * samples and len({one.sample for one in asked}) == samples
    # a cluster of one donor brings that donor, where others keep it company
    obs.loc[obs["donor_id"] == "d05", "k"] = obs.loc[obs["donor_id"] == "d05", "k"].replace("k03", "rare")
    adata = anndata.AnnData(matrix, obs=obs.set_index(obs.index.astype(str)), var=adata.var)
    asked = profiles_of(adata, "k", asked=Asked(1, 4)).profiles
    for sample in {one.sample for one in asked}:
        assert len([one for one in asked if one.sample == sample]) >= 4
    assert {one.cluster for one in asked} == {*(f"k{j:02}" for j in range(12)), "rare"}


# --- contexts


def test_a_context_states_what_all_cells_of_a_sample_share():
    adata = small(
        tissue=["blood", "blood", "lung", "lung", "lung", "lung", "lung", "blood"],
        disease="healthy",
        development_stage=[40, 40, 40, 40, 51, 51, 51, 51],
        self_reported_ethnicity=[1, 1, 1, 1, 2, 2, 2, 2],
    )
    found = profiles_of(adata, "leiden", TWO)
    two, ten, other = found.profiles
    health = "The patient is healthy with no diagnosed disease."
    assert two.context == ten.context == f"The cell is from a female at the 40-year-old stage. {health}"
    assert other.context == f"The cell is from a female at the 51-year-old stage, originating from the lung. {health}"
    assert [p.tissue for p in found.profiles] == ["lung", "blood", "lung"]
    assert "the tissue differs in 1 of 2 samples: no context states it there" in found.notes
    assert any("'self_reported_ethnicity' holds only numbers: no context states it" in note for note in found.notes)


def test_a_fact_that_is_known_for_a_part_of_the_cells_is_stated_for_none():
    """As after anndata.concat(join="outer") of two files of which one states the disease."""
    disease = [None, "COVID-19", None, None, "COVID-19", "COVID-19", "COVID-19", None]
    found = profiles_of(small(disease=disease), "leiden", TWO)
    two, ten, other = found.profiles
    assert "COVID" not in two.context + ten.context and "diagnosed with COVID-19" in other.context
    assert (
        "the disease is known for a part of the cells only in 1 of 2 samples: no context states it there" in found.notes
    )


def test_two_columns_of_one_name_in_memory():
    adata = small()
    adata.obs = pd.concat([adata.obs, adata.obs[["tissue"]]], axis=1)
    with pytest.raises(UserError, match="adata: its table has two columns named 'tissue'; rename one"):
        profiles_of(adata, "leiden", TWO)


def test_without_columns_a_constant_supplies_a_fact_and_all_cells_are_one_sample():
    adata = small()
    adata.obs = adata.obs[["leiden"]].assign(patient=DONORS)
    found = profiles_of(adata, "leiden", ProfileSettings(min_cells=2, constant=("tissue=kidney",)))
    assert [(p.sample, p.cluster, p.n_cells) for p in found.profiles] == [("", "2", 4), ("", "10", 3)]
    assert {p.context for p in found.profiles} == {"The cell is from, originating from the kidney."}
    assert {p.tissue for p in found.profiles} == {"kidney"}
    assert any("no obs column 'donor_id'" in note and "(perhaps 'patient')" in note for note in found.notes)
    named = profiles_of(adata, "leiden", ProfileSettings(min_cells=2, sample_key="patient"))
    assert [p.sample for p in named.profiles] == ["s1", "s1", "s2"] and {p.tissue for p in named.profiles} == {""}


def test_names_of_clusters_reach_no_text_that_a_model_reads():
    adata = small()
    adata.obs["old"] = adata.obs["leiden"].map({"2": "SECRET monocyte", "10": "SECRET T cell"})
    for p in profiles_of(adata, "old", TWO).profiles:
        shown = Puzzle(id="x", context=p.context, cells=[p.by_expression], candidates=["a"], answer=["a"])
        assert "SECRET" in p.cluster and "SECRET" not in shown.user_message


# --- genes


def test_genes_by_ensembl_ids_tags_and_names_that_occur_twice(tmp_path):
    names = ["ENSG00000167286", "ENSG00000090382", "ENSG00000156738", "ERCC-00002", "ENSG00000075624", "CD4_TotalSeqB"]
    matrix = np.hstack([COUNTS[:, [1, 0, 3]], np.full((8, 1), 900), COUNTS[:, [2]], np.full((8, 1), 900)])
    adata = small(matrix.astype(np.float32), names)
    found = profiles_of(adata, "leiden", TWO)
    assert found.genes == ["ACTB", "CD3D", "LYZ", "MS4A1"]
    assert same(found, profiles_of(small(), "leiden", TWO)), "what is no gene does not count in a cell's sum"
    assert any("2 of 6 rows of var are no genes" in note for note in found.notes)
    assert any("listed by the symbols of the table" in note for note in found.notes)
    twice = small(np.hstack([COUNTS, COUNTS[:, [0]] * 2]), [*GENES, "LYZ"])
    assert profiles_of(twice, "leiden", TWO).profiles[0].mean[2] == pytest.approx(
        (log(10_000 * 6 / 10) + log(10_000 * 2 / 4)) / 2, rel=1e-6
    ), "a cell has the larger value of the two rows; both count in its sum"


def test_symbols_are_found_by_themselves_and_classes_are_left_out():
    adata = small(np.hstack([COUNTS, COUNTS[:, :2]]), [*[f"gene_{i}" for i in range(4)], "gene_4", "gene_5"])
    adata.var["gene_symbols"] = [*GENES, "MT-CO1", "RPL3"]
    found = profiles_of(adata, "leiden", ProfileSettings(min_cells=2, drop_genes=("mitochondrial,ribosomal",)))
    assert found.profiles[0].by_expression == ["LYZ", "ACTB"] and "MT-CO1" in found.genes
    assert "gene names are taken from the var column 'gene_symbols'" in found.notes


def test_other_organisms():
    mouse = small(np.tile(COUNTS, (1, 12)), [f"{n.capitalize()}{i}" for i in range(12) for n in GENES])
    with pytest.raises(
        UserError, match="gene names look like those of Mus musculus .* orthologs .* --organism 'Mus mus"
    ):
        profiles_of(mouse, "leiden", TWO)
    found = profiles_of(mouse, "leiden", ProfileSettings(min_cells=2, organism="Mus musculus"))
    assert found.organism == "Mus musculus" and "Lyz0" in found.genes
    aged = profiles_of(
        small(np.tile(COUNTS, (1, 12)), mouse.var_names, development_stage=8),
        "leiden",
        ProfileSettings(min_cells=2, organism="Mus musculus"),
    )
    assert not any("8" in profile.context for profile in aged.profiles), "weeks, perhaps"
    assert profiles_of(small(organism="human"), "leiden", TWO).organism == "Homo sapiens"
    stated = small(organism="Mus musculus")
    with pytest.raises(
        UserError, match="adata: holds cells of Mus musculus; the model knows the genes of Homo sapiens"
    ):
        profiles_of(stated, "leiden", TWO)
    both = small(organism=["Homo sapiens"] * 6 + ["Mus musculus"] * 2)
    found = profiles_of(both, "leiden", TWO)
    assert found.profile_of_cell.tolist() == [1, 1, 0, 0, 2, 2, -1, -1] and found.organism == "Homo sapiens"
    assert "1 cells of Mus musculus get no profile" in found.notes, "the other mouse cell has no cluster"
    assert found.cluster_of_cell.tolist() == ["10", "10", "2", "2", "2", "2", "", ""]


# --- what is refused, in one sentence


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        (
            "leidn",
            {},
            r"no obs column 'leidn' \(nearest: 'leiden'.*--cluster-key \(columns that look like clusters: 'leiden'",
        ),
        ("", {}, r"name its column of clusters with --cluster-key \(columns that look like clusters: 'leiden'"),
        (
            "barcode",
            {"barcode": [f"b{i}" for i in range(8)]},
            "8 values for 8 cells, so it names cells and no clusters",
        ),
        ("tissue", {}, r"'tissue' has one value only \('blood'\), so it divides no cells; cluster the cells"),
        ("empty", {"empty": [None] * 7 + ["unknown"]}, "'empty' has no known value; name another column"),
        (
            "leiden",
            {"donor_id": list("abcdefgh")},
            "no cluster has 2 cells in one sample .*--sample-key, or lower --min-c",
        ),
    ],
)
def test_columns_that_hold_no_clusters(key, change, says):
    with pytest.raises(UserError, match=says) as error:
        profiles_of(small(**change), key, TWO)
    assert "\n" not in str(error.value)


def test_a_measurement_is_no_clustering():
    obs = pd.DataFrame({"n_genes": np.repeat(np.arange(400), 3)}, index=[f"c{i}" for i in range(1200)])
    adata = anndata.AnnData(np.ones((1200, 2), np.float32), obs=obs, var=pd.DataFrame(index=["A", "B"]))
    with pytest.raises(UserError, match="'n_genes' holds 400 different numbers, so it is a measurement"):
        profiles_of(adata, "n_genes")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sample_key": "dono"}, r"no obs column 'dono' \(nearest: 'donor_id'"),
        ({"sample_key": "leiden"}, "--sample-key leiden: is the column of clusters"),
        ({"min_cells": 0}, "--min-cells 0: must be at least 1"),
        ({"top_genes": 0}, "--top-genes 0: must be at least 1"),
        ({"drop_genes": ("x",)}, "--drop-genes x: not one of"),
        ({"constant": ("tissue",)}, "--constant tissue: must be NAME=VALUE"),
        ({"tissue_key": "organ"}, "no obs column 'organ'.*--tissue-key"),
        ({"layer": "counts"}, "has no layer 'counts'; --layer can be one of X"),
        ({"gene_key": "symbol"}, "var has no column 'symbol'"),
    ],
)
def test_options_that_cannot_be_used(settings, says):
    with pytest.raises(UserError, match=says):
        profiles_of(small(), "leiden", ProfileSettings(**{"min_cells": 2} | settings))


def test_scaled_values_are_refused_without_naming_an_option_that_is_not_there():
    adata = small()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X - adata.X.mean(axis=0)
    with pytest.raises(UserError, match="holds negative values, so it looks scaled .* --layer counts") as error:
        profiles_of(adata, "leiden", TWO)
    assert "--allow-scaled" not in str(error.value)
    adata.X = np.full_like(adata.X, np.nan)
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        profiles_of(adata, "leiden", TWO)


def test_an_anndata_whose_matrix_is_on_disk_is_refused(tmp_path):
    small().write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(
        UserError, match=r"its matrix is on disk in .*a.h5ad; give that file, or load it with adata.to_memory"
    ):
        profiles_of(backed, "leiden", TWO)
    backed.file.close()


def test_columns_of_another_species_genes_are_not_the_files_own():
    """Files of cross-species work have a column of orthologs; it is used where --gene-key names it."""
    human = [f"{stem}{i}" for stem in ("CCL", "KRT", "HBA") for i in range(8)]
    mouse = [name.capitalize() for name in human]
    matrix = np.tile(COUNTS, (1, len(human) // COUNTS.shape[1] + 1))[:, : len(human)]
    for own, other, column, organism in (
        (human, mouse, "mouse_symbol", "Homo sapiens"),
        (human, [f"ENSMUSG{i:011d}" for i in range(len(human))], "mouse_ortholog_id", "Homo sapiens"),
        (mouse, human, "human_symbol", "Mus musculus"),
        (mouse, [f"ENSG{i:011d}" for i in range(len(human))], "human_ortholog_id", "Mus musculus"),
    ):
        adata = small(matrix, own)
        adata.var[column] = other
        found = profiles_of(adata, "leiden", dataclasses.replace(TWO, organism=organism))
        assert found.organism == organism and set(found.genes) <= set(own), column
        if organism == "Mus musculus":
            with pytest.raises(UserError, match="look like those of Mus musculus"):
                profiles_of(adata, "leiden", TWO)


def test_a_column_named_for_a_species_is_used_where_nothing_else_has_names():
    human = [f"{stem}{i}" for stem in ("CCL", "KRT", "HBA") for i in range(8)]
    matrix = np.tile(COUNTS, (1, len(human) // COUNTS.shape[1] + 1))[:, : len(human)]
    adata = small(matrix, map(str, range(len(human))))
    adata.var["human_gene_symbol"] = human
    assert set(profiles_of(adata, "leiden", TWO).genes) <= set(human)


def test_many_clusters_are_clusters_where_their_column_says_so():
    names = pd.Categorical(np.repeat(np.arange(400), 3).astype(str))
    for column in ("leiden", "n_genes"):
        obs = pd.DataFrame({column: names, "donor_id": "d"}, index=[f"c{i}" for i in range(1200)])
        adata = anndata.AnnData(
            np.tile([[3.0, 1], [2, 5], [1, 1]], (400, 1)), obs=obs, var=pd.DataFrame(index=["CD3D", "LYZ"])
        )
        with (
            pytest.raises(UserError, match="is a measurement.*holds 'cluster'") if column != "leiden" else nullcontext()
        ):
            assert len(profiles_of(adata, column, TWO).profiles) == 400


def test_gene_names_that_are_numbers_are_told_at_once():
    with pytest.raises(UserError, match="gene names in the index of var are numbers"):
        profiles_of(small(names=map(str, range(COUNTS.shape[1]))), "leiden", TWO)


def symbols(kind: str) -> list[str]:
    """30 names of genes as human or mouse symbols."""
    names = [f"{a}{b}Z{i}" for i, (a, b) in enumerate((a, b) for a in "ABCDE" for b in "FGHIJK")]
    return (
        [name.replace("Z", "") for name in names]
        if kind == "human"
        else [name.replace("Z", "").capitalize() for name in names]
    )


def of_genes(names: list[str], **var) -> anndata.AnnData:
    obs = pd.DataFrame({"k": ["0"] * 3 + ["1"] * 3}, index=[f"c{i}" for i in range(6)])
    matrix = sparse.csr_matrix(np.random.default_rng(0).poisson(2, (6, len(names))).astype(np.float32))
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(var, index=names))


def test_genes_that_were_renamed_to_orthologs_are_taken():
    """10x keeps the ids of mouse genes beside symbols that the user has renamed, as a refusal advises."""
    ids = [f"ENSMUSG{i:011d}" for i in range(30)]
    assert profiles_of(of_genes(symbols("human"), gene_ids=ids), "k", TWO).organism == "Homo sapiens"
    with pytest.raises(
        UserError, match="look like those of Mus musculus .* rename the genes to their orthologs there \\(and the"
    ):
        profiles_of(of_genes(symbols("mouse"), gene_ids=ids), "k", TWO)
    with pytest.raises(UserError, match="look like those of Rattus norvegicus"):
        profiles_of(of_genes(symbols("mouse"), gene_ids=[one.replace("MUS", "RNO") for one in ids]), "k", TWO)


def test_one_name_of_a_donor_in_several_data_sets_is_said():
    datasets = ["a", "a", "b", "b", "b", "b", "b", "b"]
    (note,) = [one for one in profiles_of(small(dataset_id=datasets), "leiden", TWO).notes if "dataset_id" in one]
    assert note.startswith("1 of the donors are in several data sets (dataset_id)") and "--sample-key" in note
    keyed = dataclasses.replace(TWO, sample_key="donor_id")
    assert not [one for one in profiles_of(small(dataset_id=datasets), "leiden", keyed).notes if "dataset_id" in one]
    apart = ["a"] * 4 + ["b"] * 4
    assert not [one for one in profiles_of(small(dataset_id=apart), "leiden", TWO).notes if "dataset_id" in one]


def test_a_sentence_for_one_tissue_is_not_said_where_no_tissue_is_known():
    adata = small(Condition="Healthy", medical_conditions="tumor")
    del adata.obs["tissue"]
    assert not [
        word for one in profiles_of(adata, "leiden", TWO).profiles for word in ("skin", "brain") if word in one.context
    ]
    skin = small(Condition="Healthy", tissue="skin of body")
    assert "skin condition" in profiles_of(skin, "leiden", TWO).profiles[0].context
