"""Atlases of any size: what a streamed file holds in each encoding, its format, its bytes, and what is refused."""

import os
import shutil
import subprocess
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

import data.atlas.h5ad_writer
import data.atlas.stream
from data.atlas.markers import read_markers
from data.atlas.simulate import simulate_atlas, synthetic_ensembl_id
from data.atlas.stream import filler_symbols, stream_atlas
from tests.data.test_simulate import OBS_COLUMNS
from tests.helpers.commands import run_command

SIZE = {"cells": 700, "genes": 2000}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> dict[str, Path]:
    """{encoding: file} of one atlas, in blocks of 40 cells and, for CSC, ranges of columns of 9000 values."""
    folder = tmp_path_factory.mktemp("streamed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.atlas.stream, "BLOCK_CELLS", 40)
        patch.setattr(data.atlas.h5ad_writer, "VALUES_IN_MEMORY", 9000)
        for encoding in ("csr", "csc", "dense"):
            stream_atlas(folder / f"{encoding}.h5ad", 12, 1, **SIZE, encoding=encoding)
    assert sorted(path.name for path in folder.iterdir()) == ["csc.h5ad", "csr.h5ad", "dense.h5ad"]
    return {path.stem: path for path in folder.iterdir()}


def test_a_streamed_atlas_opens_in_anndata_with_the_sizes_asked_for(streamed):
    atlas = anndata.read_h5ad(streamed["csr"])
    assert atlas.shape == (700, 2000) and atlas.X.format == "csr" and atlas.X.dtype == np.float32
    assert atlas.X.has_canonical_format and (atlas.X.data == np.rint(atlas.X.data)).all() and atlas.X.data.min() == 1
    assert OBS_COLUMNS == set(atlas.obs.columns) and atlas.obs_names.is_unique and not atlas.obs.isna().any().any()
    assert set(atlas.obs.dtypes.astype(str)) == {"category", "bool"} and atlas.var["feature_name"].dtype == "category"
    assert atlas.var.index.is_unique and atlas.var.index.is_monotonic_increasing
    names = atlas.var["feature_name"].astype(str)
    assert names.is_unique and atlas.var.index.tolist() == [synthetic_ensembl_id(name) for name in names]
    assert atlas.obs["donor_id"].nunique() == 12 and atlas.obs.groupby("batch", observed=True).size().min() > 20
    assert atlas.uns["simulation"]["cells"] == 700 and atlas.uns["simulation"]["genes"] == 2000


def test_all_encodings_hold_the_same_numbers(streamed):
    atlases = {encoding: anndata.read_h5ad(path) for encoding, path in streamed.items()}
    rows, columns = atlases["csr"].X, atlases["csc"].X
    assert columns.format == "csc" and columns.has_canonical_format and isinstance(atlases["dense"].X, np.ndarray)
    assert (rows.toarray() == atlases["dense"].X).all() and (columns.toarray() == atlases["dense"].X).all()
    for other in ("csc", "dense"):
        assert atlases["csr"].obs.equals(atlases[other].obs) and atlases["csr"].var.equals(atlases[other].var)


@pytest.mark.parametrize("encoding", ["csr", "csc", "dense"])
def test_a_streamed_file_has_the_elements_and_attributes_that_anndata_writes(streamed, encoding, tmp_path):
    anndata.read_h5ad(streamed[encoding]).write_h5ad(tmp_path / "again.h5ad", compression="gzip")

    def layout(path: Path) -> dict[str, tuple]:
        found = {}
        with h5py.File(path) as file:
            file.visititems(lambda name, item: found.update({name: _description(item)}))
            return {"/": _description(file), **found}

    assert layout(streamed[encoding]) == layout(tmp_path / "again.h5ad")


def _description(item: h5py.Group | h5py.Dataset) -> tuple:
    attributes = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
    if isinstance(item, h5py.Group) or not item.shape:
        return (attributes,)
    kind = item.dtype.kind if item.name == "/X/indptr" else item.dtype  # 64 bits for any number of values
    return attributes, item.shape, kind, item.compression, item.compression_opts


def test_filler_genes_have_invented_names_and_stay_out_of_the_top(streamed):
    atlas = anndata.read_h5ad(streamed["csr"])
    names = atlas.var["feature_name"].astype(str)
    is_filler = names.str.fullmatch(r"(LINC|AC|AL)9\d{5}(\.\d)?").to_numpy()
    markers = {gene for entry in read_markers().values() for gene in entry.markers}
    assert is_filler.sum() == 2000 - 782 and not markers & set(filler_symbols(30_000, []))
    filler = atlas.X[:, is_filler]
    assert 0.02 < filler.nnz / np.prod(filler.shape) < 0.05 and (filler.data == 1).mean() > 0.8
    by_gene = np.sort(np.asarray(filler.sum(axis=0)).ravel())
    assert by_gene[-120:].sum() > 0.3 * by_gene.sum(), "a tenth of the genes has much of the counts"
    top = np.argsort(-atlas.X.toarray(), axis=1, kind="stable")[:, :50]
    assert is_filler[top].mean() < 0.01


@pytest.mark.slow(2)
def test_without_sizes_the_streamed_numbers_are_those_of_the_atlas_in_memory(tmp_path):
    stream_atlas(tmp_path / "a.h5ad", 6, 5, cells_per_type=2, encoding="csc", compression="lzf")
    stream_atlas(tmp_path / "b.h5ad", 6, 5, cells_per_type=2, genes=1500)
    atlas, wide = anndata.read_h5ad(tmp_path / "a.h5ad"), anndata.read_h5ad(tmp_path / "b.h5ad")
    expected = simulate_atlas(6, 5, cells_per_type=2)
    core = wide[:, expected.var_names]
    assert (atlas.X.tocsr() != expected.X).nnz == 0 and (core.X != expected.X).nnz == 0 and wide.n_vars == 1500
    for found in (atlas, core):
        assert found.obs.astype(str).equals(expected.obs.astype(str))
        assert found.var["feature_name"].tolist() == expected.var["feature_name"].tolist()


@pytest.mark.slow(3)
@pytest.mark.parametrize("encoding", ["csr", "csc", "dense"])
def test_a_streamed_file_is_the_same_bytes_again(tmp_path, encoding):
    for name in ("a", "b"):
        stream_atlas(tmp_path / f"{name}.h5ad", 6, 2, cells=220, genes=900, encoding=encoding, compression="none")
    stream_atlas(tmp_path / "c.h5ad", 6, 3, cells=220, genes=900, encoding=encoding, compression="none")
    first, again, other = ((tmp_path / f"{name}.h5ad").read_bytes() for name in "abc")
    assert first == again != other


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "a.h5ad"
    stream_atlas(out, 6, cells=300)
    before = out.read_bytes()
    monkeypatch.setattr(data.atlas.stream, "draw_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream_atlas(out, 6, cells=300, encoding="csc")
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cells": 50}, r"--cells 50 is too few for 6 donors: give at least \d+, one for each type .* fewer --donors"),
        ({"genes": 700}, "--genes 700 is out of range: give 782, the genes that the chosen types need, to 100000"),
        ({"genes": 100_001}, "--genes 100001 is out of range"),
        ({"encoding": "coo"}, "--encoding coo: must be one of csr, csc, dense"),
        ({"compression": "zip"}, "--compression zip: must be one of gzip, lzf, none"),
        ({"cells": 10**6, "genes": 20_000, "encoding": "dense"}, r"are 80 GB .* more than 20 GB; give --encoding csr"),
        ({"n_donors": 3}, "--donors 3 is too few"),
    ],
)
def test_sizes_and_layouts_out_of_range(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stream_atlas(tmp_path / "a.h5ad", **{"n_donors": 6, **settings})
    assert list(tmp_path.iterdir()) == []


def test_command_streams_and_refuses_in_one_sentence(tmp_path):
    out = tmp_path / "a.h5ad"
    arguments = ("--out", out, "--donors", 6, "--cells", 300)
    done = run_command("simulate", *arguments, "--genes", 1000, "--encoding", "csc", "--compression", "lzf")
    assert done.returncode == 0 and done.stdout.startswith(f"{out}: 300 cells x 1000 genes, 6 donors, 6 tissues, ")
    refused = run_command("simulate", *arguments, "--cells-per-type", 3)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr == "Error: --cells-per-type 3.0 and --cells 300 both set how many cells there are; give one\n"


@pytest.mark.slow(2)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root")
def test_a_full_disk_is_told_in_one_sentence_and_nothing_is_left(tmp_path):
    """HDF5 crashes the process when it cannot write its buffered chunks, so the disk is never filled completely."""
    cases = [("300k", ()), ("300k", ("--cells", 5000, "--genes", 3000))]
    cases += [
        ("80m", ("--cells", 3000, "--genes", 3000, "--compression", "none", "--encoding", "dense")),
        ("67m", ("--cells", 3000, "--genes", 3000, "--compression", "none", "--encoding", "csc")),
    ]
    for size, words in cases:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], check=False)
        if mounted.returncode:
            pytest.skip("mounting is not allowed here")
        try:
            done = run_command("simulate", "--out", tmp_path / "a.h5ad", "--donors", 6, *words)
            sentence = f"Error: {tmp_path}/a.h5ad: cannot be written (No space left on device); make room or name another place"
            assert (done.returncode, done.stderr.splitlines()) == (2, [sentence])
            assert list(tmp_path.iterdir()) == []
        finally:
            subprocess.run(["umount", tmp_path], check=True)
