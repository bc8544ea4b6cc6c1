"""Labels written onto a copy: what is added, what stays, which encodings are used, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data.clusters.annotated import storable, write_annotated
from data.errors import UserError
from tests.helpers.commands import ROOT

N = 40
LABELS = np.array(["T cell", "B cell", None, "T cell"] * (N // 4), dtype=object)
COLUMNS = {"cell_type_llm": LABELS, "cell_type_llm_confidence": np.linspace(0, 1, N).astype(np.float32)}
UNS = {"cell_type_llm": {"model": "m", "candidates": ["T cell", "B cell"], "samples": 8, "votes": {"0": {"T cell": 7}}}}
KNOWN_TO_0_10 = {
    *(("categorical", "0.2.0"), ("array", "0.2.0"), ("string-array", "0.2.0"), ("dict", "0.1.0")),
    *(("string", "0.2.0"), ("numeric-scalar", "0.2.0")),
}


@pytest.fixture
def source(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"leiden": pd.Categorical(["0", "1"] * (N // 2)), "note": "x"}, index=[f"c{i}" for i in range(N)]
    )
    adata = anndata.AnnData(
        sparse.csr_matrix(rng.poisson(1, (N, 30)).astype(np.float32)), obs=obs, uns={"title": "mine"}
    )
    adata.obsm["X_umap"] = rng.normal(size=(N, 2))
    adata.write_h5ad(tmp_path / "in.h5ad", compression="gzip")
    return tmp_path / "in.h5ad"


def test_columns_and_uns_are_added_to_a_copy(source, tmp_path):
    before = source.read_bytes()
    assert write_annotated(source, tmp_path / "deep/out.h5ad", COLUMNS, UNS) == []
    assert source.read_bytes() == before and os.listdir(tmp_path / "deep") == ["out.h5ad"]
    old, new = anndata.read_h5ad(source), anndata.read_h5ad(tmp_path / "deep/out.h5ad")
    assert new.obs.columns.tolist() == ["leiden", "note", "cell_type_llm", "cell_type_llm_confidence"]
    assert new.obs["cell_type_llm"].cat.categories.tolist() == ["B cell", "T cell"]
    assert (
        new.obs["cell_type_llm"].astype(object).where(new.obs["cell_type_llm"].notna(), None).tolist()
        == LABELS.tolist()
    )
    assert new.obs["cell_type_llm_confidence"].dtype == np.float32
    assert new.obs["cell_type_llm_confidence"].tolist() == COLUMNS["cell_type_llm_confidence"].tolist()
    assert new.uns["title"] == "mine" and new.uns["cell_type_llm"]["candidates"].tolist() == ["T cell", "B cell"]
    assert new.uns["cell_type_llm"]["votes"] == {"0": {"T cell": 7}} and new.uns["cell_type_llm"]["samples"] == 8
    assert old.obs.equals(new.obs[["leiden", "note"]]) and (old.X != new.X).nnz == 0
    with h5py.File(source) as one, h5py.File(tmp_path / "deep/out.h5ad") as other:
        for name in ("X/data", "X/indices", "obsm/X_umap"):
            assert other[name].compression == one[name].compression == "gzip" and other[name].chunks == one[name].chunks
            assert (other[name][:] == one[name][:]).all()


def test_only_encodings_that_anndata_0_10_knows_are_written(source, tmp_path):
    more = {"n": np.arange(N), "sure": np.arange(N) > 3, "codes": pd.Categorical(["x"] * N, categories=["x", "unused"])}
    more["texts"] = pd.array(["a", None] * (N // 2), dtype="string")
    uns = {"u": {"a": 1, "b": True, "c": 0.5, "d": None, "e": [1, 2.5], "f": [{"x": 1}], "g": {"h": [True]}, "i": []}}
    write_annotated(source, tmp_path / "out.h5ad", COLUMNS | more, uns)
    found = set()

    def see(name: str, node: h5py.Group | h5py.Dataset) -> None:
        found.add((node.attrs["encoding-type"], node.attrs["encoding-version"]))

    with h5py.File(tmp_path / "out.h5ad") as file:
        for name in (*COLUMNS, *more):
            see(name, file["obs"][name])
            if isinstance(file["obs"][name], h5py.Group):
                file["obs"][name].visititems(see)
        file["uns/u"].visititems(see)
        assert file["obs/codes/categories"][:].tolist() == [b"x"], "CELLxGENE's validator refuses unused categories"
    assert found == KNOWN_TO_0_10
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs["texts"].astype(object)[:2].tolist()[0] == "a"


def test_what_is_replaced_is_replaced_in_the_copy_only_and_said(source, tmp_path):
    first = tmp_path / "first.h5ad"
    write_annotated(source, first, COLUMNS, UNS)
    notes = write_annotated(first, tmp_path / "second.h5ad", {"cell_type_llm": np.array(["NK"] * N)}, {"title": "new"})
    assert notes == [
        "the obs columns 'cell_type_llm' of the input are replaced in the copy; the input keeps them",
        "the members of uns 'title' of the input are replaced in the copy; the input keeps them",
    ]
    second = anndata.read_h5ad(tmp_path / "second.h5ad")
    assert set(second.obs["cell_type_llm"]) == {"NK"} and second.uns["title"] == "new"
    assert second.obs.columns.tolist().count("cell_type_llm") == 1
    assert set(anndata.read_h5ad(first).obs["cell_type_llm"].dropna()) == {"T cell", "B cell"}


def test_equal_input_gives_equal_bytes_and_an_old_output_is_replaced(source, tmp_path):
    for name in ("a.h5ad", "b.h5ad"):
        (tmp_path / name).write_text("old")
        write_annotated(source, tmp_path / name, COLUMNS, UNS)
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.h5ad", "b.h5ad", "in.h5ad"]


def test_obs_as_anndata_0_7_wrote_it(source, tmp_path):
    """Codes with a reference to a dataset of categories, and another version of the table."""
    with h5py.File(source, "r+") as file:
        del file["obs/leiden"]
        file["obs/__categories/leiden"] = ["zero", "one"]
        file["obs/__categories/leiden"].attrs["ordered"] = False
        file["obs/leiden"] = np.array([0, 1] * (N // 2), dtype=np.int8)
        file["obs/leiden"].attrs["categories"] = file["obs/__categories/leiden"].ref
        file["obs"].attrs["encoding-version"] = "0.1.0"
    write_annotated(source, tmp_path / "out.h5ad", COLUMNS, UNS)
    new = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert new.obs["leiden"].tolist()[:2] == ["zero", "one"] and new.obs["cell_type_llm"].tolist()[:2] == [
        "T cell",
        "B cell",
    ]


def test_a_file_without_uns(source, tmp_path):
    with h5py.File(source, "r+") as file:
        del file["uns"]
    write_annotated(source, tmp_path / "out.h5ad", COLUMNS, UNS)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").uns["cell_type_llm"]["model"] == "m"


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("in.h5ad", "is the input, which is never changed; name another file"),
        ("link.h5ad", "is the input, which is never changed"),
        ("out.txt", "the file name must end in .h5ad"),
        ("folder.h5ad", "is a folder; name a file"),
        ("in.h5ad/out.h5ad", "cannot be written .*make room or name another place"),
    ],
)
def test_places_that_cannot_be_written(source, tmp_path, out, says):
    (tmp_path / "link.h5ad").symlink_to(source)
    (tmp_path / "folder.h5ad").mkdir()
    before, names = source.read_bytes(), sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=says) as error:
        write_annotated(source, tmp_path / out, COLUMNS, UNS)
    assert out.split("/")[0] in str(error.value) and "\n" not in str(error.value)
    assert source.read_bytes() == before and sorted(os.listdir(tmp_path)) == names


def test_sources_that_cannot_be_copied(source, tmp_path):
    pytest.importorskip("zarr")
    anndata.read_h5ad(source).write_zarr(tmp_path / "in.zarr")
    with pytest.raises(
        UserError, match=r"in.zarr: is a zarr store.*anndata.read_zarr\('in.zarr'\).write_h5ad\('in.h5ad'\)"
    ):
        write_annotated(tmp_path / "in.zarr", tmp_path / "out.h5ad", COLUMNS, UNS)
    with pytest.raises(UserError, match="absent.h5ad: no such file"):
        write_annotated(tmp_path / "absent.h5ad", tmp_path / "out.h5ad", COLUMNS, UNS)
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.slow(2)
def test_a_disk_that_is_full_leaves_nothing(source, tmp_path):
    """A limit on the file size replaces a full disk: writing fails in the same place, with another reason."""
    words = (
        "import resource, sys; from pathlib import Path; from data.clusters.annotated import write_annotated\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "write_annotated(Path(sys.argv[1]), Path(sys.argv[2]), {}, {})"
    )
    done = subprocess.run(
        [sys.executable, "-c", words, source, tmp_path / "out.h5ad"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UserError" in done.stderr and "out.h5ad: cannot be written (File too large)" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["in.h5ad"]


def test_a_disk_without_room_is_refused_before_the_copy(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"total": 10**9, "free": 60_000_000})())
    with pytest.raises(UserError, match="out.h5ad: cannot be written .No space left on device.; make room"):
        write_annotated(source, tmp_path / "out.h5ad", COLUMNS, UNS)
    assert os.listdir(tmp_path) == ["in.h5ad"]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (None, "null"),
        ([], "[]"),
        ({}, "{}"),
        ([[1, 2], [3]], "[[1, 2], [3]]"),
        ([1, "a"], '[1, "a"]'),
        ({"T/NK": 3}, '{"T/NK": 3}'),
        ({"a": {"T/NK": 3}}, {"a": '{"T/NK": 3}'}),
        ([2**70], f"[{2**70}]"),
        ({0: "x"}, {"0": "x"}),
        ("text", "text"),
    ],
)
def test_what_hdf5_has_no_form_for_is_stored_as_its_json_text(value, stored):
    assert storable(value) == stored
