"""Real cells (PBMC 68k, Zheng et al. 2017, as scanpy ships 700 of them) through every option of the builder."""

import json
import re

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from data.build.contexts import RULES, context_sentence
from data.puzzles import read_puzzles
from launch.build import main

BASE = {
    "cell-type-key": "bulk_labels",
    "gene-key": "index",
    "split": "cell",
    "min-cells": 4,
    "max-cells": 8,
    "top-genes": 24,
    "puzzles-per-n": 8,
    "test-puzzles-per-n": 3,
    "workers": 1,
}
CONSTANTS = ("donor_id=donor_A", "suspension_type=cell", "tissue=blood", "disease=normal")


@pytest.fixture(scope="module")
def pbmc(tmp_path_factory):
    """The cells as they are; and, for options that need donors, divided over six invented donors of two diseases."""
    scanpy = pytest.importorskip("scanpy")
    folder = tmp_path_factory.mktemp("pbmc")
    adata = scanpy.datasets.pbmc68k_reduced()
    adata.write_h5ad(folder / "pbmc.h5ad")
    adata.obs["donor_id"] = pd.Categorical([f"donor_{i % 6}" for i in range(adata.n_obs)])
    adata.obs["disease"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 6 == 5, "influenza", "normal"))
    adata.obs["lane"] = pd.Categorical([f"lane_{i // 350}" for i in range(adata.n_obs)])
    adata.obs["is_primary_data"] = np.arange(adata.n_obs) % 10 > 0
    adata.obs["author_label"] = adata.obs["bulk_labels"]
    raw = adata.raw.to_adata()
    adata.layers["logged"] = raw[:, adata.var_names].X.copy()
    adata.write_h5ad(folder / "donors.h5ad")
    return folder


def build(folder, out, changes=(), file="pbmc.h5ad", constants=CONSTANTS):
    options = {**BASE, **dict(changes)}
    words = ["--h5ad", str(folder / file), "--out", str(out)]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", str(value)]
    for constant in constants:
        words += ["--constant", constant]
    done = CliRunner().invoke(main, words)
    return done.exit_code, done.output


def puzzles(out, split="train"):
    return read_puzzles(out / f"{split}.parquet")


def report(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


DONORS = {"file": "donors.h5ad", "constants": CONSTANTS[1:3]}


def test_ribosomal_and_mitochondrial_genes_can_be_left_out(pbmc, tmp_path):
    assert build(pbmc, tmp_path / "all")[0] == 0
    code, output = build(pbmc, tmp_path / "some", {"drop-genes": "ribosomal,mitochondrial"})
    assert code == 0, output
    listed = [{gene for p in puzzles(tmp_path / o) for genes in p.cells for gene in genes} for o in ("all", "some")]
    dropped = [
        {gene for gene in genes if re.match(r"RP[LS]\d+[AXYL]?\d*$|MT-|RPLP\d$|RPSA$", gene)} for genes in listed
    ]
    assert dropped[0] and not dropped[1]
    assert [p.meta["cell_ids"] for p in puzzles(tmp_path / "all")] == [
        p.meta["cell_ids"] for p in puzzles(tmp_path / "some")
    ]
    assert "--drop-genes mytochondrial" in build(pbmc, tmp_path / "no", {"drop-genes": "mytochondrial"})[1]


@pytest.mark.slow(2)
@pytest.mark.parametrize("rank", ["expression", "hvg", "deg"])
@pytest.mark.parametrize("profile", ["cell", "cluster"])
def test_ranks_and_profiles(pbmc, tmp_path, rank, profile):
    """Each list is recomputed here from the whole matrix."""
    code, output = build(
        pbmc, tmp_path / "out", {"rank": rank, "profile": profile, "hvg-genes": 300, "allow-leaks": True}
    )
    assert code == 0, output
    adata = anndata.read_h5ad(pbmc / "pbmc.h5ad").raw.to_adata()
    values = pd.DataFrame(adata.X.toarray().astype(np.float64), index=adata.obs_names, columns=adata.var_names)
    made = puzzles(tmp_path / "out")
    allowed = {gene for p in made for genes in p.cells for gene in genes} if rank == "hvg" else set(values.columns)
    assert len(allowed) <= 300 or rank != "hvg"
    if rank == "deg" or profile == "cluster":
        members = {c: [c] if profile == "cell" else None for p in made for c in p.meta["cell_ids"]}
        if profile == "cluster":
            assert all(re.fullmatch(r"mean of \d+ cells? from .+", cell) for cell in members)
        return
    for p in made[:6]:
        for cell, genes in zip(p.meta["cell_ids"], p.cells, strict=True):
            row = values.loc[cell, sorted(allowed)]
            expected = sorted(row.index[row > 0], key=lambda gene: (-row[gene], gene))[:24]
            assert genes == expected


@pytest.mark.slow(2)
def test_cluster_lists_are_means_of_the_cells_of_the_split(pbmc, tmp_path):
    code, output = build(pbmc, tmp_path / "out", {"profile": "cluster", "test-fraction": 0, "split": "donor"})
    assert code == 0, output
    adata = anndata.read_h5ad(pbmc / "pbmc.h5ad")
    values = pd.DataFrame(adata.raw.X.toarray().astype(np.float64), columns=adata.raw.var_names)
    means = values.groupby(adata.obs["bulk_labels"].to_numpy()).mean()
    for p in puzzles(tmp_path / "out"):
        for label, genes, cell in zip(p.answer, p.cells, p.meta["cell_ids"], strict=True):
            assert cell.startswith(f"mean of {(adata.obs['bulk_labels'] == label).sum()} cells from ")
            row = means.loc[label].round(9)
            assert genes == sorted(row.index[row > 0], key=lambda gene: (-means.loc[label, gene], gene))[:24]


def test_a_cluster_of_one_cell(pbmc, tmp_path):
    """The mean of one cell gives the same list as the cell."""
    adata = anndata.read_h5ad(pbmc / "pbmc.h5ad")
    first = adata.obs["bulk_labels"].drop_duplicates().index
    anndata.AnnData(adata.raw.X, obs=adata.obs, var=adata.raw.var)[first].write_h5ad(tmp_path / "pbmc.h5ad")
    code, output = build(tmp_path, tmp_path / "deg", {"profile": "cluster", "rank": "deg", "test-fraction": 0})
    assert code == 0, output
    shown = []
    for profile in ("cell", "cluster"):
        code, output = build(tmp_path, tmp_path / profile, {"profile": profile, "test-fraction": 0})
        assert code == 0, output
        made = puzzles(tmp_path / profile)
        shown.append(
            {
                (cell.removeprefix("mean of 1 cell from "), *genes)
                for p in made
                for cell, genes in zip(p.meta["cell_ids"], p.cells, strict=True)
            }
        )
        assert all(
            cell.startswith("mean of 1 cell from ") == (profile == "cluster")
            for p in made
            for cell in p.meta["cell_ids"]
        )
    assert shown[0] == shown[1]


def test_splits(pbmc, tmp_path):
    code, output = build(pbmc, tmp_path / "donor", {"split": "donor", "unseen-disease": "influenza"}, **DONORS)
    assert code == 0, output
    donors = {s: {p.meta["donor"] for p in puzzles(tmp_path / "donor", s)} for s in ("train", "test", "unseen")}
    assert donors["unseen"] == {"donor_5"} and len(donors["test"]) == 1 and len(donors["train"]) == 4
    assert not donors["train"] & donors["test"] and report(tmp_path / "donor")["audit"]["leaks"] == []
    code, output = build(pbmc, tmp_path / "instance", {"split": "instance"}, **DONORS)
    assert code == 2 and "the splits leak" in output and not (tmp_path / "instance").exists()
    code, output = build(pbmc, tmp_path / "instance", {"split": "instance", "allow-leaks": True}, **DONORS)
    assert code == 0 and "leak: " in output
    code, output = build(pbmc, tmp_path / "authors", {"split": None, "compat": "authors"}, **DONORS)
    assert code == 0 and all(p.candidates == sorted(p.answer) for p in puzzles(tmp_path / "authors"))


@pytest.mark.slow(1)
def test_columns_layers_and_primary_data(pbmc, tmp_path):
    batches = {"split": "donor", "batch-key": "lane", "cell-type-key": "author_label"}
    assert build(pbmc, tmp_path / "lanes", batches, **DONORS)[0] == 0
    assert {p.meta["batch"] for p in puzzles(tmp_path / "lanes")} == {"lane_0", "lane_1"}
    assert report(tmp_path / "lanes")["files"][0]["cells_dropped"]["is_primary_data is not True"] == 70
    everything = {"split": "donor", "include-non-primary": True}
    assert build(pbmc, tmp_path / "every", everything, **DONORS)[0] == 0
    assert report(tmp_path / "every")["files"][0]["cells_kept"] == 700
    assert build(pbmc, tmp_path / "layer", {"split": "donor", "layer": "logged"}, **DONORS)[0] == 0
    assert report(tmp_path / "layer")["files"][0]["values"] == "log counts"
    code, output = build(pbmc, tmp_path / "scaled", {"split": "donor", "layer": "X"}, **DONORS)
    assert code == 2 and "looks scaled" in output and "--allow-scaled" in output
    code, output = build(pbmc, tmp_path / "scaled", {"split": "donor", "layer": "X", "allow-scaled": True}, **DONORS)
    assert code == 0, output
    assert "no layer 'counts'" in build(pbmc, tmp_path / "no", {"layer": "counts"})[1]


@pytest.mark.slow(2)
def test_scaled_values_that_are_not_negative(pbmc, tmp_path):
    """scanpy.pp.scale(zero_center=False) of real log counts is refused; the log counts, and log TPM, are not."""
    import scanpy

    adata = scanpy.datasets.pbmc68k_reduced()
    logged = adata.raw.to_adata()
    logged.obs = logged.obs[["bulk_labels"]]
    lengths = np.random.default_rng(0).lognormal(0, 1, logged.n_vars)
    tpm = np.expm1(logged.X.toarray()) / lengths
    logged.layers["log_tpm"] = np.log1p(1e6 * tpm / tpm.sum(axis=1, keepdims=True)).astype(np.float32)
    logged.layers["scaled"] = scanpy.pp.scale(logged, zero_center=False, copy=True).X
    logged.write_h5ad(tmp_path / "pbmc.h5ad")
    for layer in ("X", "log_tpm"):
        assert build(tmp_path, tmp_path / layer, {"layer": layer})[0] == 0
        assert report(tmp_path / layer)["files"][0]["values"] == "log counts"
    code, output = build(tmp_path, tmp_path / "no", {"layer": "scaled"})
    assert code == 2 and "looks scaled" in output and "--allow-scaled" in output and not (tmp_path / "no").exists()
    assert build(tmp_path, tmp_path / "yes", {"layer": "scaled", "allow-scaled": True})[0] == 0


def test_formats_hold_the_same_rows(pbmc, tmp_path):
    for name in ("parquet", "jsonl", "both"):
        assert build(pbmc, tmp_path / name, {"format": name})[0] == 0
    endings = {name: sorted(p.suffix for p in (tmp_path / name).iterdir()) for name in ("parquet", "jsonl", "both")}
    report = [".json", ".json"]  # report.json and labels.json
    assert endings["parquet"] == [*report, *[".parquet"] * 3] and endings["jsonl"] == [*report, *[".jsonl"] * 3]
    assert endings["both"] == [*report, *[".jsonl"] * 3, *[".parquet"] * 3]
    assert read_puzzles(tmp_path / "parquet/test.parquet") == read_puzzles(tmp_path / "jsonl/test.jsonl")


TABLE_9 = {  # a value of each row, and words of its sentence
    ("ever_smoker", "Yes"): "is a smoker",
    ("ever_smoker", "no"): "is a non-smoker",
    ("tumor_stage", "non-cancer"): "no cancer present",
    ("tumor_stage", "early"): "an early-stage tumor",
    ("tumor_stage", "advanced"): "an advanced-stage tumor",
    ("sampletype", "M3"): "at month 3 post-treatment",
    ("sampletype", "M6"): "at month 6 post-treatment",
    ("sampletype", "UV"): "ultraviolet (UV) treatment",
    ("sampletype", "CONTROL"): "from the control group",
    ("donor_BMI", "31.4"): "has a BMI of 31.4",
    ("lung_condition", "healthy"): "lung condition is described as healthy",
    ("smoking_status", "active"): "an active smoker",
    ("smoking_status", "former"): "a former smoker",
    ("smoking_status", "hist of marijuana use"): "a history of marijuana use",
    ("smoking_status", "never"): "has never smoked",
    ("BMI", "27"): "BMI is 27",
    ("medical_conditions", "Epilepsy"): "a history of epilepsy",
    ("medical_conditions", "Tumor"): "a diagnosed brain tumor",
    ("medical_conditions", "Hydrocephalus"): "has hydrocephalus",
    ("medical_conditions", "Both"): "both epilepsy and a brain",
    ("medical_conditions", "Other"): "other neurological conditions",
    ("hemisphere", "Left"): "from the left hemisphere",
    ("hemisphere", "right"): "from the right hemisphere",
    ("harm_tumor.type", "PBMC"): "peripheral blood mononuclear",
    ("harm_tumor.type", "BRCA"): "diagnosed with brca cancer",
    ("harm_tumor.site", "primary"): "at the primary site",
    ("harm_tumor.site", "metastasis"): "has metastasized",
    ("harm_tumor.site", "normal"): "non-tumorous tissue",
    ("harm_sample.type", "tumor"): "derived from tumor tissue",
    ("harm_sample.type", "normal"): "derived from normal tissue",
    ("harm_sample.type", "blood"): "a blood-derived specimen",
    ("harm_sample.type", "lymphnode"): "lymph node tissue",
    ("harm_condition", "Colon_T"): "tumor tissue in the Colon",
    ("harm_condition", "Colon_N"): "from normal Colon tissue",
    ("harm_condition", "Colon_M"): "metastatic Colon tumor",
    ("harm_condition", "IBD"): "overall condition is described as IBD",
    ("harm_cd45pos", "yes"): "CD45-positive",
    ("harm_cd45pos", "no"): "CD45-negative",
    ("harm_cd45pos", "mixed"): "mixture of CD45-positive and",
    ("diabetes_history", "Yes"): "a history of diabetes",
    ("diabetes_history", "No"): "does not have diabetes",
    ("hypertension", "Yes"): "a history of hypertension",
    ("hypertension", "No"): "does not have hypertension",
    ("eGFR", "30-60"): "(eGFR) is in the range 30-60",
    ("Condition", "Healthy"): "healthy with no reported skin condition",
    ("Condition", "DM \u2013 non ulcer"): "without skin ulc",
    ("Condition", "Keloid"): "had a keloid",
    ("Condition", "Localized scleroderma"): "localized scleroderma",
    ("Condition", "Scar"): "a typical scar",
    ("author_tumor_subsite", "Left Ovary"): "collected from the left ovary",
    ("activation", "activated"): "activated immune cells",
    ("activation", "resting"): "resting (non-activated)",
    ("Genotype", "FLT3-ITD,NPM1-MUT"): "FLT3-ITD and NPM1 mutations",
    ("Genotype", "FLT3-WT,NPM1-MUT"): "a wild-type FLT3",
    ("Genotype", "APL"): "acute promyelocytic leukemia",
}


def test_every_row_of_table_9_has_its_sentence():
    assert {column for column, _ in TABLE_9} == set(RULES)
    for (column, value), words in TABLE_9.items():
        assert words in context_sentence({column: value}), (column, value)
    per_column = {column: sum(c == column for c, _ in TABLE_9) for column in RULES}
    assert all(per_column[column] >= len(rules) for column, rules in RULES.items())


def test_a_fact_of_table_9_is_stated_only_where_all_cells_of_the_batch_agree(pbmc, tmp_path):
    adata = anndata.read_h5ad(pbmc / "donors.h5ad")
    adata.obs["smoking_status"] = np.where(adata.obs["donor_id"] == "donor_1", "never", "former")
    adata.obs["hypertension"] = np.where(np.arange(adata.n_obs) % 2 == 0, "Yes", "No")
    adata.obs.loc[adata.obs["donor_id"] == "donor_0", "hypertension"] = "unknown"
    adata.obs["eGFR"] = [f"range {label}" for label in adata.obs["bulk_labels"]]
    adata.write_h5ad(tmp_path / "d.h5ad")
    assert build(tmp_path, tmp_path / "out", {"split": "donor"}, file="d.h5ad", constants=CONSTANTS[1:3])[0] == 0
    for p in puzzles(tmp_path / "out"):
        assert ("has never smoked" in p.context) == (p.meta["donor"] == "donor_1")
        assert "eGFR" not in p.context, "differs between the types of a batch"
        odd = int(p.meta["donor"][-1]) % 2
        assert ("hypertension" in p.context) == (p.meta["donor"] != "donor_0")
        assert ("does not have hypertension" in p.context) == bool(odd)
