"""The marker table and the simulated atlas: schema, reproducibility, biology of the top genes."""

import hashlib
import re
import subprocess
import sys

import anndata
import numpy as np
import pytest

from data.atlas.markers import COLUMNS, read_markers
from data.atlas.simulate import (
    DISEASE_PROGRAMS,
    DISPERSION,
    HOUSEKEEPING,
    MITOCHONDRIAL,
    PROGRAMS,
    RIBOSOMAL,
    TISSUES,
    background_genes,
    draw_counts,
    simulate_atlas,
    synthetic_ensembl_id,
    write_atlas,
)
from data.atlas.stream import stream_atlas
from data.errors import UserError
from data.formats.checksum import LENGTH
from tests.helpers.commands import ROOT

OBS_COLUMNS = {
    "donor_id",
    "batch",
    "tissue",
    "disease",
    "sex",
    "development_stage",
    "self_reported_ethnicity",
    "cell_type",
    "suspension_type",
    "assay",
    "is_primary_data",
    "smoking_status",
    "cell_type_ontology_term_id",
}


@pytest.fixture(scope="module")
def adata():
    return simulate_atlas(48, seed=7)


@pytest.fixture(scope="module")
def top_genes(adata):
    """[C][50] symbols of each cell, most expressed first."""
    order = np.argsort(-adata.X.toarray(), axis=1, kind="stable")[:, :50]
    return adata.var["feature_name"].to_numpy().astype(str)[order]


# --- marker table ---


def test_every_tissue_has_at_least_twelve_types():
    entries = read_markers()
    assert len(entries) >= 44
    for tissue in TISSUES:
        assert sum(tissue in entry.tissues for entry in entries.values()) >= 12, tissue
    assert {tissue for entry in entries.values() for tissue in entry.tissues} == set(TISSUES)


def test_entries_have_8_to_16_markers_and_a_doi():
    for entry in read_markers().values():
        assert 8 <= len(entry.markers) <= 16, entry.cell_type
        assert all(word.startswith("doi:10.") for word in entry.source.split()), entry.cell_type


def test_related_types_share_markers():
    entries = read_markers()
    carriers = {gene: {n for n, e in entries.items() if gene in e.markers} for gene in ("CD3D", "LYZ", "PECAM1")}
    assert {"regulatory T cell", "CD8-positive, alpha-beta T cell", "gamma-delta T cell"} <= carriers["CD3D"]
    assert {"classical monocyte", "non-classical monocyte", "alveolar macrophage"} <= carriers["LYZ"]
    assert {entries[name].lineage for name in carriers["PECAM1"]} == {"endothelium"}
    marker_sets = [frozenset(entry.markers) for entry in entries.values()]
    assert len(set(marker_sets)) == len(marker_sets)


def test_no_gene_has_two_roles():
    markers = {gene for entry in read_markers().values() for gene in entry.markers}
    states = {gene for members in PROGRAMS.values() for gene in members}
    assert (len(RIBOSOMAL), len(MITOCHONDRIAL), len(HOUSEKEEPING)) == (80, 13, 50)
    assert not markers & background_genes()
    assert not states & background_genes()
    assert not states & markers


HEADER = "\t".join(COLUMNS) + "\n"
GOOD = "B cell\tB cells\tlung, blood\tMS4A1, CD79A\tdoi:10.1/x\n"


def test_read_markers_parses_a_line(tmp_path):
    path = tmp_path / "m.tsv"
    path.write_text("# a comment\n\n" + HEADER + GOOD)
    entry = read_markers(path)["B cell"]
    assert (entry.lineage, entry.tissues, entry.markers) == ("B cells", ("lung", "blood"), ("MS4A1", "CD79A"))


def test_a_marker_table_may_have_the_ids_of_the_cell_ontology(tmp_path):
    path = tmp_path / "m.tsv"
    path.write_text(HEADER.strip() + "\tontology_term_id\n" + GOOD.strip() + "\tCL:0000236\n")
    assert read_markers(path)["B cell"].ontology_term_id == "CL:0000236"
    path.write_text(HEADER + GOOD)
    assert read_markers(path)["B cell"].ontology_term_id is None
    path.write_text(HEADER.strip() + "\tontology_term_id\n" + GOOD)
    with pytest.raises(ValueError, match="line 2: has 5 tab-separated columns, needs 6"):
        read_markers(path)


def test_the_shipped_ids_are_distinct_and_stand_beside_their_type(adata):
    terms = {name: entry.ontology_term_id for name, entry in read_markers().items()}
    assert len(set(terms.values())) == len(terms) and all(re.fullmatch(r"CL:\d{7}", term) for term in terms.values())
    # from the Cell Ontology's own pages
    assert (terms["B cell"], terms["natural killer cell"], terms["platelet"]) == (
        "CL:0000236",
        "CL:0000623",
        "CL:0000233",
    )
    pairs = set(zip(adata.obs["cell_type"], adata.obs["cell_type_ontology_term_id"], strict=True))
    assert pairs <= {*terms.items(), ("unknown", "unknown")} and len(pairs) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cell_type\tmarkers\n" + GOOD, "line 1: the header must be"),
        ("# c\n" + HEADER + "B cell\tB cells\tlung\tMS4A1\n", "line 3: has 4 tab-separated columns, needs 5"),
        (HEADER + "B cell\tB cells\tlung\t \tdoi:10.1/x\n", "line 2: column markers is empty"),
        (HEADER + GOOD + GOOD, "line 3: 'B cell' is listed twice"),
        (HEADER + GOOD.replace("CD79A", "MS4A1"), "line 2: column markers lists MS4A1 twice"),
        (HEADER + GOOD.replace("lung,", "lung,,"), "line 2: column tissues has an empty name"),
        (HEADER, "holds no cell type"),
    ],
)
def test_read_markers_names_the_bad_line(tmp_path, text, message):
    path = tmp_path / "m.tsv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_markers(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_read_markers_of_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such marker table"):
        read_markers(tmp_path / "absent.tsv")


# --- schema and composition ---


def test_schema(adata):
    assert OBS_COLUMNS == set(adata.obs.columns)
    assert adata.var.index.is_unique and adata.var["feature_name"].is_unique and adata.obs_names.is_unique
    assert adata.var.index.str.fullmatch(r"ENSG\d{11}").all()
    assert adata.var.index[adata.var["feature_name"] == "CD3D"].tolist() == [synthetic_ensembl_id("CD3D")]
    assert adata.obs["development_stage"].str.fullmatch(r"\d\d-year-old stage").all()
    assert not adata.obs.isna().any().any()


def test_counts_are_non_negative_integers(adata):
    assert adata.X.format == "csr" and adata.X.dtype == np.float32
    assert (adata.X.data > 0).all() and (adata.X.data == np.rint(adata.X.data)).all()
    assert 3000 < np.median(np.asarray(adata.X.sum(axis=1))) < 5000


def test_donors_tissues_diseases(adata):
    per_donor = adata.obs.groupby("donor_id", observed=True)
    for column in ("tissue", "disease", "sex", "development_stage", "smoking_status"):
        assert (per_donor[column].nunique() == 1).all(), column
    donors = per_donor[["tissue", "disease", "smoking_status"]].first()
    assert len(donors) == 48
    assert donors["tissue"].value_counts().to_dict() == dict.fromkeys(TISSUES, 8)
    assert set(donors["disease"]) == {"normal", *DISEASE_PROGRAMS} and len(DISEASE_PROGRAMS) == 8
    assert donors.groupby("disease", observed=True).size()["systemic lupus erythematosus"] == 3
    assert donors.groupby("disease", observed=True).size()["Crohn disease"] == 4
    assert (donors.groupby("tissue", observed=True)["disease"].nunique() >= 2).all()
    in_lung = donors["tissue"] == "lung"
    assert set(donors.loc[~in_lung, "smoking_status"]) == {"unknown"}
    assert set(donors.loc[in_lung, "smoking_status"]) <= {"active", "former", "never"}


def test_batches_and_labels(adata):
    obs, entries = adata.obs, read_markers()
    assert obs.groupby("donor_id", observed=True)["batch"].nunique().value_counts().to_dict() == {1: 32, 2: 16}
    assert (obs.groupby("batch", observed=True)["suspension_type"].nunique() == 1).all()
    assert obs.groupby("batch", observed=True)["suspension_type"].first().value_counts().to_dict() == {
        "cell": 60,
        "nucleus": 4,
    }
    assert 0.01 < (obs["cell_type"] == "unknown").mean() < 0.06
    assert 0.01 < (~obs["is_primary_data"]).mean() < 0.08
    labelled = obs[obs["cell_type"] != "unknown"]
    assert set(labelled["cell_type"]) == set(entries)
    for (name, tissue), count in labelled.groupby(["cell_type", "tissue"], observed=True).size().items():
        assert count == 0 or tissue in entries[name].tissues, name
    assert labelled.groupby("batch", observed=True)["cell_type"].nunique().min() >= 12
    assert set(obs.loc[obs["cell_type"] == "malignant cell", "disease"]) == {"lung adenocarcinoma"}


def test_same_seed_same_arrays_other_seed_other_arrays():
    first, again, other = (simulate_atlas(6, seed, cells_per_type=2) for seed in (3, 3, 4))
    assert first.X.data.tobytes() == again.X.data.tobytes() and first.X.indices.tobytes() == again.X.indices.tobytes()
    assert first.obs.equals(again.obs) and first.var.equals(again.var)
    assert first.var.equals(other.var)
    assert first.shape != other.shape or (first.X != other.X).nnz > 0


# --- expression ---


def test_background_share_of_the_top_50_is_as_in_real_cells(adata, top_genes):
    share = np.isin(top_genes, list(background_genes())).mean(axis=1)
    assert 0.60 <= np.median(share[(adata.obs["suspension_type"] == "cell").to_numpy()]) <= 0.75


@pytest.mark.slow(2)
def test_types_show_their_own_markers_more_often_than_unrelated_types(adata, top_genes):
    entries, labels = read_markers(), adata.obs["cell_type"].to_numpy().astype(str)
    for name, entry in entries.items():
        found = np.isin(top_genes, entry.markers).sum(axis=1)  # [C]
        neighbours = {
            n for n, e in entries.items() if e.lineage != entry.lineage and set(e.tissues) & set(entry.tissues)
        }
        own, unrelated = found[labels == name].mean(), found[np.isin(labels, list(neighbours))].mean()
        assert own > 2 * unrelated + 1, f"{name}: {own:.1f} of its own markers, {unrelated:.1f} in unrelated types"


def test_related_types_show_shared_markers_and_unrelated_ones_do_not(adata, top_genes):
    labels = adata.obs["cell_type"].to_numpy().astype(str)
    has_cd3d = (top_genes == "CD3D").any(axis=1)
    t_cells = ("regulatory T cell", "CD8-positive, alpha-beta T cell", "CD4-positive, alpha-beta T cell")
    for name in t_cells:
        assert has_cd3d[labels == name].mean() > 0.2, name
    for name in ("pulmonary alveolar type 2 cell", "podocyte", "pancreatic acinar cell"):
        assert has_cd3d[labels == name].mean() < 0.1, name


def test_one_cell_shows_only_part_of_its_markers(adata, top_genes):
    entry = read_markers()["mast cell"]
    found = np.isin(top_genes[(adata.obs["cell_type"] == "mast cell").to_numpy()], entry.markers).sum(axis=1)
    assert found.mean() < 0.75 * len(entry.markers)
    assert found.std() > 1


def test_counts_are_negative_binomial():
    counts = draw_counts(np.random.default_rng(0), np.full((40_000, 20), 1.0)).toarray()
    share = counts[:, 0] / counts.sum(axis=1)  # without the effect of library size
    mean, variance = counts[:, 0].mean(), counts[:, 0].var()
    assert variance > 10 * mean  # Poisson would give 1
    # a gamma-Poisson gene among 20 equal ones: relative variance ~ DISPERSION + 1 / mean, a little less for the closure
    assert share.var() / share.mean() ** 2 == pytest.approx(DISPERSION, rel=0.15)


def test_a_strong_gene_is_overdispersed_within_one_type_of_one_batch(adata):
    batch = adata.obs["batch"].astype(str) + adata.obs["cell_type"].astype(str)
    rows = (batch == batch.value_counts().index[0]).to_numpy()
    gene = int(np.argmax(adata.X[rows].mean(axis=0)))
    counts = adata.X[rows][:, gene].toarray().ravel()
    assert rows.sum() >= 15 and counts.var() > 2 * counts.mean()


def test_lupus_raises_interferon_genes(adata):
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    ifi = np.asarray(adata[:, adata.var["feature_name"].isin(PROGRAMS["interferon"])].X.sum(axis=1)).ravel()
    blood = (adata.obs["tissue"] == "blood").to_numpy()
    disease = adata.obs["disease"].to_numpy().astype(str)
    lupus, normal = ((ifi / total)[blood & (disease == d)].mean() for d in ("systemic lupus erythematosus", "normal"))
    assert lupus > 2 * normal


def test_nuclei_hold_less_mitochondrial_rna(adata):
    mito = adata[:, adata.var["feature_name"].isin(MITOCHONDRIAL)].X.sum(axis=1) / adata.X.sum(axis=1)
    nucleus = (adata.obs["suspension_type"] == "nucleus").to_numpy()
    assert mito[nucleus].mean() < 0.3 * mito[~nucleus].mean()


def test_noise_hides_markers():
    entries, found = read_markers(), {}
    for noise in (0.0, 1.0, 2.0):
        adata = simulate_atlas(6, seed=1, cells_per_type=4, noise=noise)
        top = adata.var["feature_name"].to_numpy().astype(str)[np.argsort(-adata.X.toarray(), axis=1)[:, :24]]
        labels = adata.obs["cell_type"].astype(str)
        found[noise] = np.mean(
            [np.isin(g, entries[n].markers).sum() for g, n in zip(top, labels, strict=True) if n in entries]
        )
    assert found[0.0] > 1.5 * found[1.0] > 1.5 * found[2.0]


# --- settings, file, command ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_donors": 5}, "--donors 5 is too few: give at least 6"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"cells_per_type": 0}, "--cells-per-type 0 is out of range"),
        ({"noise": -0.1}, "--noise -0.1 is out of range"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        simulate_atlas(**settings)


def test_write_atlas_writes_the_same_bytes_and_reads_back(tmp_path):
    written = write_atlas(tmp_path / "new" / "a.h5ad", 6, 5, cells_per_type=2)
    write_atlas(tmp_path / "b.h5ad", 6, 5, cells_per_type=2)
    assert (tmp_path / "new" / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()
    read = anndata.read_h5ad(tmp_path / "b.h5ad")
    assert read.obs.equals(written.obs) and (read.X != written.X).nnz == 0
    assert read.uns["simulation"]["seed"] == 5
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["b.h5ad"]


def _run(*arguments: str) -> subprocess.CompletedProcess:
    root = ROOT
    return subprocess.run([sys.executable, "launch/simulate.py", *arguments], cwd=root, capture_output=True, text=True)


@pytest.mark.slow(2)
def test_command_writes_and_summarises(tmp_path):
    out = tmp_path / "atlas.h5ad"
    result = _run("--out", str(out), "--donors", "12", "--seed", "2", "--cells-per-type", "2", "--noise", "0.5")
    assert result.returncode == 0 and result.stderr == ""
    adata = anndata.read_h5ad(out)
    assert result.stdout == (
        f"{out}: {adata.n_obs} cells x {adata.n_vars} genes, 12 donors, 6 tissues, 74 cell types, "
        "6 diseases besides normal\n"
    )


@pytest.mark.slow(2)
def test_command_refuses_a_wrong_file_name(tmp_path):
    result = _run("--out", str(tmp_path / "atlas.h5"))
    assert result.returncode == 2 and "the file name must end in .h5ad" in result.stderr
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


# --- the demo's atlas stays what it is ---


@pytest.mark.slow(2)
def test_an_atlas_without_new_options_is_the_one_the_published_demo_numbers_come_from(tmp_path):
    """The digest was taken before data.atlas.stream existed: counts, obs and var of a small atlas.

    obs has had the ids of the Cell Ontology since; they add no random draw.
    """
    adata = write_atlas(tmp_path / "a.h5ad", 6, 3, cells_per_type=2)
    digest = hashlib.sha256()
    for part in (adata.X.indptr, adata.X.indices, adata.X.data):
        digest.update(part.astype("<i8").tobytes())
    obs = adata.obs.drop(columns="cell_type_ontology_term_id")
    digest.update((obs.to_csv() + adata.var.to_csv()).encode())
    assert digest.hexdigest() == "c881b3eeccaf9956a867344339b8feef41f7af386c241d5602812514fe6253d0"
    adata.write_h5ad(tmp_path / "b.h5ad", compression="gzip")
    done = _run("--out", str(tmp_path / "c.h5ad"), "--donors", "6", "--seed", "3", "--cells-per-type", "2.0")
    assert done.returncode == 0, done.stderr
    # the file is anndata's, and a last line with its checksum
    assert (tmp_path / "a.h5ad").read_bytes()[:-LENGTH] == (tmp_path / "b.h5ad").read_bytes()
    assert (anndata.read_h5ad(tmp_path / "c.h5ad").X != adata.X).nnz == 0


def test_a_file_that_is_no_simulated_atlas_is_not_replaced(tmp_path):
    (tmp_path / "atlas.h5ad").write_text("20 GB of real cells")
    for write in (write_atlas, stream_atlas):
        with pytest.raises(UserError, match="is no simulated atlas, and would be replaced"):
            write(tmp_path / "atlas.h5ad", 6, 0)
    assert (tmp_path / "atlas.h5ad").read_text() == "20 GB of real cells"
    # ---- an older simulated atlas is, unless its clusters were labelled: that may have cost money
    write_atlas(tmp_path / "old.h5ad", 6, 0, n_types=12)
    write_atlas(tmp_path / "old.h5ad", 6, 1, n_types=12)
    edited = anndata.read_h5ad(tmp_path / "old.h5ad")
    edited.obs["note"] = "mine"
    edited.write_h5ad(tmp_path / "edited.h5ad")
    with pytest.raises(UserError, match="edited.h5ad: was changed since it was written, and would be replaced"):
        write_atlas(tmp_path / "edited.h5ad", 6, 1, n_types=12)
    labelled = anndata.read_h5ad(tmp_path / "old.h5ad")
    labelled.uns["cell_type_llm"] = {"model": "m"}
    labelled.write_h5ad(tmp_path / "old.h5ad")
    with pytest.raises(UserError, match="is no simulated atlas"):
        write_atlas(tmp_path / "old.h5ad", 6, 0, n_types=12)
