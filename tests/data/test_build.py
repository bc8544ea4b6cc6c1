"""Puzzles from small .h5ad files with known contents, and from real PBMC through the command."""

import dataclasses
import json
import os
import random
import re
from collections import Counter

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data.audit import leak_lines
from data.build.build import build_puzzles
from data.build.contexts import context_sentence
from data.build.draw import draw_puzzle_cells
from data.build.h5ad import obs_columns, read_cell_ids, read_obs
from data.build.rank import top_genes
from data.build.settings import BuildConfig
from data.build.splits import choose_test_donors, split_items
from data.errors import UserError
from data.folder import write_build
from data.puzzles import read_puzzles
from tests.helpers.commands import run_command

SMALL = BuildConfig(min_cells=3, max_cells=5, top_genes=4, puzzles_per_n=6, test_puzzles_per_n=3)
TYPES = ["B cell", "CD4-positive, alpha-beta T cell", "macrophage", "mast cell", "plasma cell"]


def write_atlas(path, donors=8, cells_per_type=4, diseases=("normal",), tissues=("lung", "blood"), **obs):
    """Donors d0.. in two batches each, every type in every batch; disease and tissue go round the donors."""
    rows = [
        (f"d{donor}", f"d{donor}-{batch}", cell_type, tissues[donor % len(tissues)], diseases[donor % len(diseases)])
        for donor in range(donors)
        for batch in "ab"
        for cell_type in TYPES
        for _ in range(cells_per_type)
    ]
    frame = pd.DataFrame(rows, columns=["donor_id", "batch", "cell_type", "tissue", "disease"])
    frame = frame.assign(suspension_type="cell", is_primary_data=True, sex="female", **obs)
    frame.index = [f"cell{i:05d}" for i in range(len(frame))]
    counts = np.random.default_rng(7).poisson(1.0, size=(len(frame), 12)).astype(np.float32) + np.eye(1, 12, 0)[0]
    var = pd.DataFrame({"feature_name": [f"G{i:02d}" for i in range(12)]}, index=[f"ENSG{i:011d}" for i in range(12)])
    anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=frame, var=var).write_h5ad(path)
    return path


def write_matrix(path, matrix, names, raw=None, **layers):
    obs = pd.DataFrame(index=[f"c{i}" for i in range(matrix.shape[0])])
    var = pd.DataFrame({"feature_name": names}, index=[f"ENSG{i:011d}" for i in range(len(names))])
    adata = anndata.AnnData(matrix, obs=obs, var=var, layers=layers)
    if raw is not None:
        adata.raw = anndata.AnnData(raw, obs=obs, var=var)
    adata.write_h5ad(path)
    return path


def build(*arguments, hash_seed=None):
    env = {"PYTHONHASHSEED": hash_seed} if hash_seed else {}
    return run_command("build", *arguments, env=env, fresh=hash_seed is not None)


# --- genes

NAMES = ["ZEB2", "CD8A", "ACTB", "CD4_ENSG00000010610", "ACTB", "MALAT1", "ENSG00000279483.2"]
COUNTS = np.array(
    [
        [3, 3, 1, 9, 5, 0, 0],  # ACTB counts as 5; ZEB2 and CD8A tie
        [0, 0, 2, 0, 2, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 7],
    ],
    dtype=np.float32,
)
EXPECTED = [
    ["CD4", "ACTB", "CD8A", "ZEB2"],
    ["ACTB", "ENSG00000279483.2"],
    [],
    ["ENSG00000279483.2", "MALAT1", "ACTB", "CD4"],
]


@pytest.mark.parametrize("encode", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_top_genes_by_hand(tmp_path, encode, dtype):
    path = write_matrix(tmp_path / "a.h5ad", encode(COUNTS.astype(dtype)), NAMES)
    assert top_genes(path, [0, 1, 2, 3], n_top=4) == EXPECTED
    assert top_genes(path, [3, 0, 3], n_top=2) == [EXPECTED[3][:2], EXPECTED[0][:2], EXPECTED[3][:2]]
    assert top_genes(path, [], n_top=2) == []


@pytest.mark.parametrize("encode", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_top_genes_in_blocks_equals_a_plain_sort(tmp_path, monkeypatch, encode):
    monkeypatch.setattr("data.build.matrix.DENSE_VALUES_PER_BLOCK", 7 * 40)
    monkeypatch.setattr("data.build.matrix.NONZEROS_PER_BLOCK", 50)
    counts = np.random.default_rng(0).poisson(0.7, size=(60, 40))
    names = [f"g{i:02d}" for i in range(40)]
    path = write_matrix(tmp_path / "a.h5ad", encode(counts.astype(np.float32)), names)
    rows = [41, 3, 59, 0, 17, 18, 19, 20, 21, 22]
    for row, genes in zip(rows, top_genes(path, rows, n_top=9), strict=True):
        expressed = np.flatnonzero(counts[row])
        assert genes == [names[i] for i in sorted(expressed, key=lambda i: (-counts[row, i], i))[:9]]


@pytest.mark.parametrize("encoding", ["csr", "csc"])
def test_entries_of_one_gene_are_added_up(tmp_path, encoding):
    """Sparse matrices may hold an entry in parts; unsorted, too."""
    entries = [(0, 2, 3.0), (0, 0, 2.0), (0, 1, 4.0), (0, 0, 3.0), (1, 1, 1.0), (1, 0, 7.0)]
    if encoding == "csc":
        entries.sort(key=lambda entry: entry[1])
    major, minor = ([entry[axis] for entry in entries] for axis in ((0, 1) if encoding == "csr" else (1, 0)))
    path = write_matrix(
        tmp_path / "a.h5ad", getattr(sparse, f"{encoding}_matrix")((2, 3), dtype=np.float32), list("ABC")
    )
    with h5py.File(path, "r+") as file:
        for name, values in (
            ("data", np.array([value for *_, value in entries], np.float32)),
            ("indices", np.array(minor, np.uint32)),
            ("indptr", np.searchsorted(major, range(3 if encoding == "csr" else 4))),
        ):
            del file["X"][name]
            file["X"][name] = values
    assert top_genes(path, [0, 1], n_top=3) == [["A", "B", "C"], ["A", "B"]]


def test_a_layer_called_raw_is_not_raw(tmp_path):
    def write(name, raw):
        path = write_matrix(tmp_path / name, COUNTS, NAMES, raw=raw, flipped=COUNTS[::-1].copy())
        with h5py.File(path, "r+") as file:
            file.move("layers/flipped", "layers/raw")
        return path

    path = write("a.h5ad", None)
    assert top_genes(path, [0], n_top=4) == top_genes(path, [0], n_top=4, layer="X") == [EXPECTED[0]]
    assert top_genes(path, [0], n_top=4, layer="raw") == [EXPECTED[3]], "there is no other raw"
    path = write("b.h5ad", COUNTS[[1, 2, 0, 3]])
    lists = {layer: top_genes(path, [0], n_top=4, layer=layer)[0] for layer in ("auto", "raw", "layers/raw", "X")}
    assert lists == {"auto": EXPECTED[1], "raw": EXPECTED[1], "layers/raw": EXPECTED[3], "X": EXPECTED[0]}
    with pytest.raises(ValueError, match=r"--layer can be one of X, raw, layers/raw$"):
        top_genes(path, [0], n_top=4, layer="counts")


def test_layers_and_scaled_values(tmp_path):
    scaled = (COUNTS - COUNTS.mean(axis=0)).astype(np.float32)
    path = write_matrix(tmp_path / "a.h5ad", scaled, NAMES, raw=sparse.csr_matrix(COUNTS), flipped=COUNTS[::-1].copy())
    assert top_genes(path, [0, 3], n_top=4) == [EXPECTED[0], EXPECTED[3]]  # auto is raw where there is one
    assert top_genes(path, [0, 3], n_top=4, layer="flipped") == [EXPECTED[3], EXPECTED[0]]
    with pytest.raises(ValueError, match=r"layer 'X' holds negative values.*--layer raw.*--allow-scaled"):
        top_genes(path, [0], n_top=4, layer="X")
    assert top_genes(path, [2], n_top=4, layer="X", allow_scaled=True) == [[]]
    with pytest.raises(ValueError, match=r"has no layer 'counts'; --layer can be one of X, raw, flipped"):
        top_genes(path, [0], n_top=4, layer="counts")


def test_raw_genes_are_named_through_var_when_raw_var_has_no_names(tmp_path):
    adata = anndata.AnnData(COUNTS[:, :3], var=pd.DataFrame({"feature_name": ["A", "B", "C"]}, index=["x", "y", "z"]))
    adata.raw = anndata.AnnData(sparse.csr_matrix(COUNTS[:, 2::-1]), var=pd.DataFrame(index=["z", "y", "x"]))
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert top_genes(tmp_path / "a.h5ad", [3], n_top=3) == [["C", "B", "A"]]
    assert top_genes(tmp_path / "a.h5ad", [3], n_top=3, gene_key="index") == [["z", "y", "x"]]


# --- obs


def test_read_obs_cleans_values_and_names_shared_cells(tmp_path):
    obs = pd.DataFrame(
        {"BMI": [27.0, np.nan, 31.5], "sex": pd.Categorical(["male", "unknown", " nan "])}, index=["x", "y", "x"]
    )
    with pytest.warns(UserWarning, match="not unique"):
        anndata.AnnData(np.ones((3, 1), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "a.h5ad")
    table = read_obs(tmp_path / "a.h5ad", ["BMI", "sex"])
    assert table["BMI"].texts() == ["27", None, "31.5"] and table["sex"].texts() == ["male", None, None]
    assert read_cell_ids(tmp_path / "a.h5ad", [2, 1, 0]) == ["x#2", "y", "x#0"]


def test_a_name_of_several_cells_is_numbered_whichever_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("data.build.h5ad.VALUES_PER_BLOCK", 2)
    with pytest.warns(UserWarning, match="not unique"):
        adata = anndata.AnnData(np.ones((5, 1), dtype=np.float32), obs=pd.DataFrame(index=list("xyxzx")))
        adata.write_h5ad(tmp_path / "a.h5ad")
    assert read_cell_ids(tmp_path / "a.h5ad", [0, 1]) == ["x#0", "y"]
    assert read_cell_ids(tmp_path / "a.h5ad", [4, 3, 4]) == ["x#4", "z", "x#4"]


def test_numbers_read_as_they_were_written(tmp_path):
    values = np.array([27.3, 31.7, 27.3], dtype=np.float32)
    columns = {
        "BMI": values,
        "donor_BMI": pd.Categorical(values),
        "wide": values.astype(np.float64),
        "half": np.float16(27.3),
    }
    obs = pd.DataFrame(columns, index=list("xyz"))
    anndata.AnnData(np.ones((3, 1), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "a.h5ad")
    table = {name: column.texts() for name, column in read_obs(tmp_path / "a.h5ad", list(obs)).items()}
    assert table["BMI"] == table["donor_BMI"] == ["27.3", "31.7", "27.3"] and table["half"] == ["27.3"] * 3
    assert table["wide"][0] == "27.299999237060547"


def test_an_index_of_nullable_strings(tmp_path):
    """As anndata 0.12 writes it when it may."""
    path = write_atlas(tmp_path / "a.h5ad", donors=3)
    plain = build_puzzles([path], SMALL)[0]
    with h5py.File(path, "r+") as file:
        for table in ("obs", "var"):
            names, group = file[table]["_index"][:], file[table]
            del group["_index"]
            index = group.create_group("_index")
            index.attrs.update({"encoding-type": "nullable-string-array", "encoding-version": "0.1.0"})
            index["values"], index["mask"] = names, np.zeros(len(names), dtype=bool)
    assert build_puzzles([path], SMALL)[0] == plain
    assert build_puzzles([path], dataclasses.replace(SMALL, gene_key="index"))[0]["train"]


def test_categories_as_anndata_0_7_wrote_them(tmp_path):
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        for table, index in (("obs", ["c0", "c1", "c2"]), ("var", ["g0"])):
            group = file.create_group(table)
            group.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.1.0"})
            group.attrs["column-order"] = ["tissue"] if table == "obs" else []
            group["_index"] = index
        file["obs/__categories/tissue"] = ["blood", "lung"]
        file["obs/__categories/tissue"].attrs["ordered"] = False
        file["obs/tissue"] = np.array([1, 0, 1], dtype=np.int8)
        file["obs/tissue"].attrs["categories"] = file["obs/__categories/tissue"].ref
    assert obs_columns(tmp_path / "old.h5ad") == ["tissue"]
    assert read_obs(tmp_path / "old.h5ad", ["tissue"])["tissue"].texts() == ["lung", "blood", "lung"]


def test_context_sentences():
    known = {"sex": "female", "development_stage": "73-year-old stage", "self_reported_ethnicity": "European"}
    assert context_sentence({**known, "tissue": "lung", "disease": "normal"}) == (
        "The cell is from a female at the 73-year-old stage with European background, originating from the lung. "
        "The patient is healthy with no diagnosed disease."
    )
    assert (
        context_sentence({"sex": "nan", "tissue": "lung", "disease": "unknown"})
        == "The cell is from, originating from the lung."
    )
    extras = {
        "smoking_status": "former",
        "BMI": 27.0,
        "hypertension": "Yes",
        "eGFR": "nan",
        "harm_condition": "Colon_T",
        "tumor_stage": "advanced",
        "activation": "who knows",
    }
    assert context_sentence({"disease": "influenza", **extras}) == (
        "The patient has been diagnosed with influenza. The patient has an advanced-stage tumor. The patient is a "
        "former smoker. The patient's BMI is 27. The sample is from tumor tissue in the Colon. The patient has a "
        "history of hypertension."
    )
    assert context_sentence({}) == ""


# --- puzzles


def test_puzzles_follow_the_rules(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad")
    splits, report = build_puzzles([path], SMALL)
    adata = anndata.read_h5ad(path)
    assert Counter(p.meta["n_cells"] for p in splits["train"]) == {3: 6, 4: 6, 5: 6}
    assert Counter(p.meta["n_cells"] for p in splits["test"]) == {3: 3, 4: 3, 5: 3}
    assert splits["unseen"] == []
    for split in ("train", "test"):
        assert [p.id for p in splits[split]] == [f"{split}-{i:06d}" for i in range(len(splits[split]))]
        for puzzle in splits[split]:
            cells = adata.obs.loc[puzzle.meta["cell_ids"]]
            assert set(cells["donor_id"]) == {puzzle.meta["donor"]} and set(cells["batch"]) == {puzzle.meta["batch"]}
            assert cells["cell_type"].tolist() == puzzle.answer
            assert len(set(puzzle.answer)) == len(puzzle.answer) and sorted(puzzle.candidates) == sorted(puzzle.answer)
            tissue = cells["tissue"].iloc[0]
            assert puzzle.context == (
                f"The cell is from a female, originating from the {tissue}. "
                "The patient is healthy with no diagnosed disease."
            )
            first = adata[puzzle.meta["cell_ids"][0]].X.toarray()[0]
            order = sorted(np.flatnonzero(first), key=lambda gene: (-first[gene], gene))
            assert puzzle.cells[0] == [f"G{gene:02d}" for gene in order[:4]]
    donors = {split: {p.meta["donor"] for p in splits[split]} for split in splits}
    assert len(donors["test"]) == 1 and not donors["test"] & donors["train"]  # 0.15 of 8 donors
    assert any(p.candidates != sorted(p.candidates) for p in splits["train"])
    assert report["files"][0]["cells_read"] == report["files"][0]["cells_kept"] == 320
    assert report["splits"]["train"]["donors"] == dict(
        sorted(Counter(p.meta["donor"] for p in splits["train"]).items())
    )


def test_matrix_encoding_does_not_matter(tmp_path):
    adata = anndata.read_h5ad(write_atlas(tmp_path / "atlas.h5ad", donors=3))
    built = []
    for encode in (sparse.csr_matrix, sparse.csc_matrix, lambda matrix: matrix.toarray()):
        adata.X = encode(adata.X)
        adata.write_h5ad(tmp_path / "atlas.h5ad")
        built.append(build_puzzles([tmp_path / "atlas.h5ad"], SMALL)[0])
        adata.X = sparse.csr_matrix(adata.X)
    assert built[0] == built[1] == built[2]


def test_cells_are_dropped_by_reason(tmp_path):
    suspension = ["nucleus"] * 5 + ["cell"] * 115
    primary = [True] * 10 + [False] * 7 + [True] * 103
    path = write_atlas(tmp_path / "atlas.h5ad", donors=3)
    adata = anndata.read_h5ad(path)
    adata.obs = adata.obs.assign(suspension_type=suspension, is_primary_data=primary).astype(
        {"cell_type": object, "donor_id": object}
    )
    adata.obs.iloc[0, adata.obs.columns.get_loc("cell_type")] = "unknown"  # a nucleus too: counted once
    adata.obs.iloc[20:23, adata.obs.columns.get_loc("cell_type")] = ["Unknown", "nan", "NA"]
    adata.obs.iloc[30, adata.obs.columns.get_loc("donor_id")] = ""
    adata.write_h5ad(path)
    splits, report = build_puzzles([path], SMALL)
    assert report["files"][0]["cells_dropped"] == {
        "suspension_type is not 'cell'": 5,
        "is_primary_data is not True": 7,
        "no cell type": 3,
        "no donor": 1,
    }
    used = {cell for puzzles in splits.values() for p in puzzles for cell in p.meta["cell_ids"]}
    assert not used & {adata.obs_names[i] for i in (*range(5), *range(10, 17), 20, 21, 22, 30)}


@pytest.mark.parametrize("true", [True, "true", "TRUE", 1, 1.0, "1"])
def test_primary_data_in_any_spelling(tmp_path, true):
    path = write_atlas(tmp_path / "atlas.h5ad", donors=3)
    adata = anndata.read_h5ad(path)
    adata.obs["is_primary_data"] = [true] * 115 + [type(true)(0) if not isinstance(true, str) else "false"] * 5
    adata.write_h5ad(path)
    assert build_puzzles([path], SMALL)[1]["files"][0]["cells_dropped"]["is_primary_data is not True"] == 5


def test_pooled_donors_and_unknown_batches(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", donors=4)
    adata = anndata.read_h5ad(path)
    donor, batch = (adata.obs[name].astype(object) for name in ("donor_id", "batch"))
    adata.obs["donor_id"] = donor.replace("d1", "Pooled")
    adata.obs["batch"] = batch.mask(batch.isin(["d1-a", "d2-b"]), "unknown")
    adata.write_h5ad(path)
    splits, report = build_puzzles([path], SMALL)
    assert {p.meta["donor"] for puzzles in splits.values() for p in puzzles} == {"d0", "d2", "d3"}
    assert report["files"][0]["cells_dropped"]["donor is 'pooled', which means several"] == 40
    assert "20 cells have no known batch: they are grouped by donor only" in report["files"][0]["notes"]
    assert report["files"][0]["donors"] == 3 and report["files"][0]["groups"] == 6


@pytest.mark.parametrize("profile", ["cell", "cluster"])
def test_of_columns_with_one_name_the_larger_counts(tmp_path, profile):
    path = write_atlas(tmp_path / "atlas.h5ad", donors=4, cells_per_type=2)
    adata = anndata.read_h5ad(path)
    counts = np.ones(adata.shape, dtype=np.float32)
    counts[:, 0], counts[:, 1], counts[:, 2] = 6, 5, 10  # 11 together
    adata.X = counts
    adata.var["feature_name"] = ["TWICE_ENSG00000000001", "TWICE", *adata.var["feature_name"][2:].astype(str)]
    adata.write_h5ad(path)
    config = dataclasses.replace(SMALL, allow_leaks=True, profile=profile)
    train = build_puzzles([path], config)[0]["train"]
    assert {tuple(genes) for p in train for genes in p.cells} == {("G02", "TWICE", "G03", "G04")}


@pytest.mark.parametrize("profile", ["cell", "cluster"])
def test_deg_does_not_depend_on_what_else_is_drawn(tmp_path, monkeypatch, profile):
    """And a gene that is the same in every cell lies above no mean, in float32 either."""
    path = write_atlas(tmp_path / "atlas.h5ad", donors=4)
    adata = anndata.read_h5ad(path)
    values = np.log1p(adata.X.toarray())
    values[:, 0], values[:, 1] = 1.7, 2.3
    adata.X = sparse.csr_matrix(values.astype(np.float32))
    adata.write_h5ad(path)
    lists = []
    for quota in (1, 40):
        config = dataclasses.replace(
            SMALL, rank="deg", profile=profile, puzzles_per_n=quota, test_fraction=0, allow_leaks=True, top_genes=12
        )
        train = build_puzzles([path], config)[0]["train"]
        cells = {(cell, tuple(g)) for p in train for cell, g in zip(p.meta["cell_ids"], p.cells, strict=True)}
        assert not any({"G00", "G01"} & set(genes) for _, genes in cells)
        lists.append(dict(cells))
    monkeypatch.setattr("data.build.rank.MEANS_PER_BLOCK", 3 * 12)  # three groups, or types, at a time
    assert build_puzzles([path], config)[0]["train"] == train
    shared = lists[0].keys() & lists[1].keys()
    assert shared and all(lists[0][cell] == lists[1][cell] for cell in shared)
    if profile == "cell":
        of_batch = {
            name: values[(adata.obs["batch"] == name).to_numpy()].mean(axis=0) for name in set(adata.obs["batch"])
        }
        for cell, genes in lists[1].items():
            above = values[adata.obs_names.get_loc(cell)] - of_batch[adata.obs["batch"][cell]]
            order = sorted(
                np.flatnonzero((above > 1e-6) & (values[adata.obs_names.get_loc(cell)] > 0)),
                key=lambda gene: -above[gene],
            )
            assert set(genes) == {f"G{gene:02d}" for gene in order} and genes[0] == f"G{order[0]:02d}"


def test_unseen_disease_takes_whole_donors(tmp_path):
    path = write_atlas(
        tmp_path / "atlas.h5ad", diseases=("normal", "influenza", "normal", "pulmonary fibrosis || influenza")
    )
    splits, report = build_puzzles([path], dataclasses.replace(SMALL, unseen_disease=("Influenza",)))
    assert {p.meta["donor"] for p in splits["unseen"]} == {"d1", "d3", "d5", "d7"}
    assert all("influenza" in p.meta["disease"] for p in splits["unseen"])
    assert {p.meta["donor"] for p in splits["train"] + splits["test"]} <= {"d0", "d2", "d4", "d6"}
    assert report["splits"]["unseen"]["diseases"].keys() == {"influenza", "pulmonary fibrosis || influenza"}


def test_healthy_cells_of_an_unseen_donor_are_in_no_split(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", donors=4)
    adata = anndata.read_h5ad(path)
    adata.obs["disease"] = np.where(adata.obs["batch"] == "d1-b", "influenza", "normal")
    adata.write_h5ad(path)
    splits, report = build_puzzles([path], dataclasses.replace(SMALL, unseen_disease=("influenza",)))
    assert {p.meta["batch"] for p in splits["unseen"]} == {"d1-b"}
    assert "d1" not in {p.meta["donor"] for p in splits["train"] + splits["test"]}
    assert report["files"][0]["cells_set_aside"] == {"donor has an unseen disease, the cell does not": 20}


def test_cell_split_of_one_donor_shares_no_cell(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", donors=1)
    splits, _ = build_puzzles([path], dataclasses.replace(SMALL, split="cell"))
    train, test = ({c for p in splits[split] for c in p.meta["cell_ids"]} for split in ("train", "test"))
    assert train and test and not train & test
    assert len(test) <= 10  # one cell of each type and batch


def test_compat_authors_sorts_candidates_and_splits_puzzles(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad")
    splits, report = build_puzzles([path], dataclasses.replace(SMALL, compat="authors"))
    assert report["options"]["split"] == "instance"
    assert all(p.candidates == sorted(p.answer) for p in splits["train"] + splits["test"])
    assert Counter(p.meta["n_cells"] for p in splits["test"]) == {3: 1, 4: 1, 5: 1}  # 0.15 of 6
    assert Counter(p.meta["n_cells"] for p in splits["train"]) == {3: 5, 4: 5, 5: 5}


def test_gene_dropout_gives_train_cells_many_views_and_leaves_test_cells_alone(tmp_path):
    path = write_atlas(tmp_path / "a.h5ad", cells_per_type=2)
    plain, _ = build_puzzles([path], SMALL)
    dropped, report = build_puzzles([path], dataclasses.replace(SMALL, gene_dropout=0.4))
    assert [p.cells for p in dropped["test"]] == [p.cells for p in plain["test"]]
    assert [(p.meta["cell_ids"], p.answer) for p in dropped["train"]] == [
        (p.meta["cell_ids"], p.answer) for p in plain["train"]
    ]
    full = {cell: genes for p in plain["train"] for cell, genes in zip(p.meta["cell_ids"], p.cells, strict=True)}
    views = [(cell, genes) for p in dropped["train"] for cell, genes in zip(p.meta["cell_ids"], p.cells, strict=True)]
    assert all(len(genes) <= 4 for _, genes in views) and any(genes != full[cell] for cell, genes in views)
    seen = {cell: {tuple(genes) for c, genes in views if c == cell} for cell, _ in views}
    assert any(len(lists) > 1 for lists in seen.values()), "a cell in two puzzles is drawn anew"
    assert report["options"]["gene_dropout"] == 0.4
    for options, says in (
        ({"gene_dropout": 0.9}, "from 0 to 0.5"),
        ({"gene_dropout": 0.2, "split": "instance"}, "not instance"),
    ):
        with pytest.raises(ValueError, match=says):
            build_puzzles([path], dataclasses.replace(SMALL, **options))


def test_batches_run_out(tmp_path):
    groups = {("d", ""): {"a": [0], "b": [1], "c": [2, 3]}}
    drawn, drawing = draw_puzzle_cells(groups, [2, 3], 10, random.Random("0"))
    assert Counter(len(rows) for _, rows in drawn) == {2: 5, 3: 2}  # ab, and ac, bc with either c; abc with either c
    assert len({frozenset(rows) for _, rows in drawn}) == 7
    assert drawing["quota_left"] == {"2": 5, "3": 8}
    assert {(gap["donor"], gap["n_cells"]) for gap in drawing["exhausted"]} == {("d", 2), ("d", 3)}


def test_test_donors_are_spread_over_tissues():
    tissue_of = {f"lung{i}": "lung" for i in range(20)} | {f"gut{i}": "gut" for i in range(10)} | {"eye0": "eye"}
    test = choose_test_donors(tissue_of, 0.2, random.Random("0"))
    assert Counter(tissue_of[donor] for donor in test) == {"lung": 4, "gut": 2}
    assert len(choose_test_donors({"a": "lung", "b": "eye"}, 0.9, random.Random("0"))) == 1


def test_divide():
    assert split_items([5], 0.15, random.Random("0")) == ([5], [])
    assert [len(part) for part in split_items(list(range(20)), 0.15, random.Random("0"))] == [17, 3]
    assert [len(part) for part in split_items([1, 2], 0.99, random.Random("0"))] == [1, 1]
    assert split_items([1, 2], 0.0, random.Random("0")) == ([1, 2], [])


def test_splits_that_leak_are_refused_unless_asked_for(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad")
    by_puzzle = dataclasses.replace(SMALL, split="instance", puzzles_per_n=40)
    with pytest.raises(ValueError, match=r"the splits leak: .*; use --split donor, or accept it with --allow-leaks"):
        build_puzzles([path], by_puzzle)
    splits, report = build_puzzles([path], dataclasses.replace(by_puzzle, allow_leaks=True))
    train, test = ({cell for p in splits[s] for cell in p.meta["cell_ids"]} for s in ("train", "test"))
    pair = next(p for p in report["audit"]["pairs"] if (p["first"], p["second"]) == ("train", "test"))
    assert pair["shared_cells"] == len(train & test) > 0
    assert pair["shared_donors"] and report["audit"]["leaks"]
    assert build_puzzles([path], SMALL)[1]["audit"]["leaks"] == ()


def test_constants_and_other_column_names(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", smoking_status="never")
    adata = anndata.read_h5ad(path)
    adata.obs = adata.obs.drop(columns=["disease", "is_primary_data", "batch"]).rename(columns={"donor_id": "patient"})
    adata.write_h5ad(path)
    config = dataclasses.replace(SMALL, donor_key="patient", constant=("disease=normal", "BMI=31", "tissue=eye"))
    splits, report = build_puzzles([path], config)
    puzzle = splits["train"][0]
    assert puzzle.meta["donor"].startswith("d") and puzzle.meta["batch"] == "" and puzzle.meta["tissue"] == "eye"
    assert puzzle.context.endswith(
        "The patient is healthy with no diagnosed disease. The patient has never smoked. The patient's BMI is 31."
    )
    assert report["files"][0]["notes"] == [
        "--constant tissue=eye is used instead of the obs column 'tissue'",
        "no obs column for the experimental batch: cells are grouped by donor only",
        "no obs column 'is_primary_data': all cells count as primary data",
    ]


def test_a_fact_on_which_cells_disagree_is_not_stated(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", donors=2)
    adata = anndata.read_h5ad(path)
    adata.obs["sex"] = ["male", "female"] * (len(adata) // 2)  # differs within each type
    adata.obs["tissue"] = [f"site of {t}" for t in adata.obs["cell_type"]]
    adata.write_h5ad(path)
    splits, _ = build_puzzles([path], SMALL)
    for puzzle in splits["train"]:
        assert "originating" not in puzzle.context
        assert puzzle.meta["tissue"] == " || ".join(sorted(f"site of {t}" for t in puzzle.answer))


# --- the command


def test_an_existing_folder_gets_the_new_files_and_keeps_others(tmp_path):
    splits, report = build_puzzles([write_atlas(tmp_path / "atlas.h5ad")], SMALL)
    out = tmp_path / "deep" / "out"
    write_build(out, splits, report)
    (out / "notes.txt").write_text("mine")
    write_build(out, {**splits, "train": splits["train"][:2]}, report)
    names = ["labels.json", "notes.txt", "report.json", "test.parquet", "train.parquet", "unseen.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert read_puzzles(out / "train.parquet") == splits["train"][:2]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_build_that_is_killed_leaves_no_report_of_an_older_one(tmp_path, monkeypatch):
    """Else train of the new seed would stand beside test of the old one, under the old report."""
    splits, report = build_puzzles([write_atlas(tmp_path / "atlas.h5ad")], SMALL)
    write_build(tmp_path / "out", splits, report)
    moved = []

    def killed(source, target):
        moved.append(target)
        if len(moved) == 3:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr("data.folder.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_build(tmp_path / "out", splits, report)
    assert (tmp_path / "out/test.parquet").is_file() and not (tmp_path / "out/report.json").exists()


@pytest.mark.slow(4)
def test_command_gives_the_same_bytes_whatever_the_hash_seed_and_file_order(tmp_path):
    one, two = write_atlas(tmp_path / "one.h5ad"), write_atlas(tmp_path / "two.h5ad", donors=5)
    options = ["--seed", 3, "--min-cells", 3, "--max-cells", 5, "--puzzles-per-n", 5]
    runs = [(("--h5ad", one, "--h5ad", two), "1"), (("--h5ad", two, "--h5ad", one), "2")]
    for number, (files, hash_seed) in enumerate(runs):
        done = build(*files, "--out", tmp_path / f"out{number}", *options, hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
    names = ["labels.json", "report.json", "test.parquet", "train.parquet", "unseen.parquet"]
    assert sorted(p.name for p in (tmp_path / "out0").iterdir()) == names
    for name in names:
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes()
    report = json.loads((tmp_path / "out0/report.json").read_text())
    assert report["notes"] == ["taken for one donor although in several files: d0, d1, d2, d3, d4"]
    assert {p.meta["source"] for p in read_puzzles(tmp_path / "out0/train.parquet")} == {"one.h5ad", "two.h5ad"}
    assert build_puzzles([one, two], dataclasses.replace(SMALL, seed=4))[0] != build_puzzles([one, two], SMALL)[0]


def test_real_pbmc_through_the_command(tmp_path):
    scanpy = pytest.importorskip("scanpy")
    (adata := scanpy.datasets.pbmc68k_reduced()).write_h5ad(tmp_path / "pbmc.h5ad")
    constants = ["donor_id=donor_A", "suspension_type=cell", "tissue=blood", "disease=normal"]
    options = [part for constant in constants for part in ("--constant", constant)]
    options += ["--cell-type-key", "bulk_labels", "--gene-key", "index", "--split", "cell"]
    sizes = ["--min-cells", 4, "--max-cells", 8, "--top-genes", 24]
    done = build("--h5ad", tmp_path / "pbmc.h5ad", "--out", tmp_path / "out", "--seed", 0, *options, *sizes)
    assert done.returncode == 0, done.stderr
    assert "pbmc.h5ad: 700 cells, 700 kept" in done.stdout
    train, test = read_puzzles(tmp_path / "out/train.parquet"), read_puzzles(tmp_path / "out/test.parquet")
    assert Counter(len(p.cells) for p in train) == {4: 40, 5: 40, 6: 40, 7: 40, 8: 40}
    assert Counter(len(p.cells) for p in test) == {4: 10, 5: 10, 6: 10, 7: 10, 8: 10}
    train_cells, test_cells = ({c for p in puzzles for c in p.meta["cell_ids"]} for puzzles in (train, test))
    assert not train_cells & test_cells
    puzzle = train[0]
    assert puzzle.context == (
        "The cell is from, originating from the blood. The patient is healthy with no diagnosed disease."
    )
    assert puzzle.answer == adata.obs.loc[puzzle.meta["cell_ids"], "bulk_labels"].tolist()
    values = pd.Series(adata.raw[puzzle.meta["cell_ids"][0]].X.toarray()[0], index=adata.raw.var_names)
    assert puzzle.cells[0] == sorted(values.index[values > 0], key=lambda gene: (-values[gene], gene))[:24]
    assert json.loads((tmp_path / "out/report.json").read_text())["files"][0]["layer"] == "raw"


def test_where_donors_are_more_than_puzzles_names_do_not_decide():
    rows = iter(range(10**6))
    types = [f"t{i}" for i in range(8)]
    groups = {(f"{cohort}{i:03}", "b"): {t: [next(rows)] for t in types} for cohort in "AB" for i in range(200)}
    drawn, _ = draw_puzzle_cells(groups, [8], 40, random.Random("0"))
    donors = [donor for (donor, _), _ in drawn]
    assert len(set(donors)) == 40 and 8 < sum(donor.startswith("A") for donor in donors) < 32
    # a donor of many batches does not take the turns of the others
    groups |= {("A000", f"b{i}"): {t: [next(rows)] for t in types} for i in range(100)}
    donors = [donor for (donor, _), _ in draw_puzzle_cells(groups, [8], 40, random.Random("0"))[0]]
    assert len(set(donors)) == 40
    # sizes that no donor can fill, as by default, have a quota that helps nobody
    few_types = {group: types for group, types in groups.items() if group[1] == "b"}
    drawn, left_over = draw_puzzle_cells(few_types, range(8, 16), 60, random.Random("0"))
    donors = [donor for (donor, _), _ in drawn]
    assert len(set(donors)) == 60 and 15 < sum(donor.startswith("A") for donor in donors) < 45
    assert left_over["quota_left"] == {str(n): 60 for n in range(9, 16)}
    drawn, _ = draw_puzzle_cells(dict(list(groups.items())[:30]), [8], 40, random.Random("0"))
    assert [donor for (donor, _), _ in drawn][:3] == ["A000", "A001", "A002"], (
        "every group has its turn: in their order"
    )


def test_donors_without_a_puzzle_are_counted(tmp_path):
    path = write_atlas(tmp_path / "a.h5ad", donors=12)
    _, report = build_puzzles([path], dataclasses.replace(SMALL, puzzles_per_n=1))
    (note,) = [note for note in report["files"][0]["notes"] if note.startswith("train: its")]
    assert re.match(r"train: its \d+ puzzles are of \d+ of \d+ donors, drawn at random; a larger --puzzles-per-n", note)


def test_one_label_in_two_spellings_in_two_files_is_refused(tmp_path):
    one, two = write_atlas(tmp_path / "a.h5ad"), write_atlas(tmp_path / "b.h5ad")
    adata = anndata.read_h5ad(two)
    first = sorted(set(adata.obs["cell_type"]))[0]
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace(first, first.upper())
    adata.obs["donor_id"] = "x" + adata.obs["donor_id"].astype(str)
    adata.write_h5ad(two)
    with pytest.raises(
        UserError, match="b.h5ad: the cell type .* is written .* in .*a.h5ad, and an answer could not tell"
    ):
        build_puzzles([one, two], SMALL)


def test_an_audit_that_compared_no_lists_does_not_say_that_none_is_shared():
    found = {"leaks": [], "warnings": ["w"], "splits": [{"short_lists": 3}, {"short_lists": 0}]}
    assert leak_lines(found) == [
        "warning: w",
        "leak audit: no shared cell, donor or batch (short gene lists are not compared)",
    ]
    found["splits"][0]["short_lists"] = 0
    assert leak_lines(found)[-1] == "leak audit: no shared cell, donor, batch or near-duplicate list"
    assert leak_lines(found | {"leaks": ["l"], "warnings": []}) == ["leak: l"]
