"""Files of other programs, other layouts of .h5ad, and zarr stores: read right, or refused with their one remedy."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data.build.build import build_puzzles
from data.build.cells import read_cells
from data.build.h5ad import OtherKind, obs_columns, read_cell_ids, read_obs, uns_text
from data.build.matrix import open_matrix
from data.build.onefile import summarise_file
from data.build.rank import top_genes
from data.errors import UserError
from data.formats.foreign import h5ad_name
from data.formats.stores import content_sha256, content_stamp
from tests.data.test_build import SMALL, write_atlas

RDS = b"X\n\x00\x00\x00\x03\x00\x04\x02\x01\x00\x03\x05\x00"
MTX = b"%%MatrixMarket matrix coordinate integer general\n3 2 1\n1 1 5\n"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return write_atlas(tmp_path_factory.mktemp("atlas") / "atlas.h5ad", donors=4)


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        obs_columns(path)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def tar_gz(name):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def zip_of(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return out.getvalue()


AS_H5AD = 'zellkonverter::writeH5AD(as.SingleCellExperiment(readRDS("x.h5ad")), "x-converted.h5ad")'
CONTENTS = {
    "rds": (
        RDS,
        f"is an R object (.rds), not an .h5ad file; in R, if it is a Seurat object: library(Seurat); {AS_H5AD}",
    ),
    "rds, gzip": (gzip.compress(RDS), "is an R object (.rds)"),
    "rds, xz": (lzma.compress(RDS), "is an R object (.rds)"),
    "rds, bzip2": (bz2.compress(RDS), "is an R object (.rds)"),
    "rds of SingleCellExperiment": (
        gzip.compress(RDS + b"SingleCellExperiment"),
        'in R: zellkonverter::writeH5AD(readRDS("x.h5ad"), "x-converted.h5ad")',
    ),
    "large rds, bzip2": (bz2.compress(RDS + np.random.default_rng(0).bytes(2_000_000)), "is an R object (.rds)"),
    "rda": (gzip.compress(b"RDX3\nX\n\x00\x00\x00\x03"), 'in R, load("x.h5ad")'),
    "qs": (b"\x0b\x0e\x0a\x0c\x00\x00", 'as.SingleCellExperiment(qs::qread("x.h5ad"))'),
    "mtx": (MTX, "is a Matrix Market matrix (.mtx), not an .h5ad file; read its folder with scanpy.read_10x_mtx"),
    "mtx, gzip": (gzip.compress(MTX), "scanpy.read_10x_mtx"),
    "csv": (b"gene,c1,c2\nCD3D,4,0\n", 'a table of text (CSV); read it with anndata.io.read_csv("x.h5ad") (and .T'),
    "csv, gzip": (gzip.compress(b"gene,c1\nCD3D,4\n"), "a table of text (CSV)"),
    "csv of Excel": ("gene;c1\nCD3D;4\n".encode("utf-16"), 'anndata.io.read_csv("x.h5ad", ";")'),
    "tsv": (b"\tc1\tc2\nCD3D\t4\t0\n", 'a table of text (TSV); read it with anndata.io.read_csv("x.h5ad", delimiter='),
    "text": (b"hello\n", "not an .h5ad file (no HDF5 signature) but a text file"),
    "web page": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "is a web page (HTML), not an .h5ad file; download"),
    "error of a bucket": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a server's error message"),
    "json": (b'{"message": "not found"}', "is a JSON text, such as a server's answer"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull -I x.h5ad"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document, not an .h5ad file; download the data file itself"),
    "parquet": (b"PAR1\x15\x04\x15\x00", "is a Parquet table, not an .h5ad file; read it with pandas.read_parquet"),
    "npy": (b"\x93NUMPY\x01\x00", "a NumPy array (.npy)"),
    "npz": (zip_of(data__npy="x", indices__npy="y"), "scipy.sparse.load_npz"),
    "xlsx": (zip_of(**{"[Content_Types]__xml": "<Types/>"}), "is a document of Microsoft Office"),
    "zip": (zip_of(atlas__h5ad="x"), "is a zip archive; unpack it first (unzip x.h5ad): it holds atlas.h5ad"),
    "zip cut short": (zip_of(atlas__h5ad="x" * 999)[:200], "is a zip archive that is cut short"),
    "gzip": (
        gzip.compress(b"\x89HDF\r\n\x1a\n"),
        "is gzip-compressed; unpack it first (gunzip -c x.h5ad > x-converted.h5ad",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", "is zstd-compressed; unpack it first (zstd -dc"),
    "tar.gz": (tar_gz("atlas.h5ad"), "is a tar archive; unpack it first (tar -xf x.h5ad)"),
    "pickle": (b"\x80\x04\x95\x00", "is a Python pickle"),
    "zeros": (bytes(9000), "it was not downloaded to its end, so download it again"),
    "unknown": (bytes(range(256)), "not an .h5ad file (no HDF5 signature); give the .h5ad file itself"),
}


@pytest.mark.parametrize(
    "name, made",
    [
        ("GSE1.lung.rds", "GSE1.lung.h5ad"),
        ("matrix.mtx.gz", "matrix.h5ad"),
        ("a.h5ad.gz", "a.h5ad"),
        ("a.h5ad", "a-converted.h5ad"),
        ("a", "a.h5ad"),
    ],
)
def test_what_is_made_has_another_name(name, made):
    assert h5ad_name(Path(name)) == made


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_are_recognised_whatever_the_name(tmp_path, name):
    content, words = CONTENTS[name]
    path = tmp_path / "x.h5ad"
    path.write_bytes(content)
    assert words in refusal(path)
    with pytest.raises(OtherKind):
        obs_columns(path)


def loom(file):
    file["matrix"] = np.ones((3, 2))
    file["row_attrs/Gene"], file["col_attrs/CellID"] = [b"a", b"b", b"c"], [b"c1", b"c2"]


def tenx(group, genes):
    group.update({"barcodes": [b"AAAC-1"], "data": [1], "indices": [0], "indptr": [0, 1], "shape": [1, 1]})
    group[genes + "/id" if genes == "features" else genes] = [b"ENSG00000000003"]


def mudata(file):
    file.attrs["encoding-type"] = "MuData"
    for name in ("mod/atac/obs", "mod/rna/obs", "obs", "var"):
        file.create_group(name)


def h5seurat(file):
    file.attrs["active.assay"], file.attrs["project"] = "RNA", "x"
    file.create_group("assays/RNA")
    file["cell.names"] = [b"c1"]


LAYOUTS = {
    "loom": (
        loom,
        'is a loom file, not an .h5ad file; convert it in Python (pip install loompy): anndata.io.read_loom("',
    ),
    "10x of Cell Ranger 3": (
        lambda f: tenx(f.create_group("matrix"), "features"),
        'is a 10x Genomics matrix (.h5), not an .h5ad file; read it with scanpy.read_10x_h5("x.h5ad"), add the cell',
    ),
    "10x of Cell Ranger 2": (lambda f: tenx(f.create_group("GRCh38"), "genes"), "scanpy.read_10x_h5"),
    "molecules": (lambda f: f.update({"barcode_idx": [0], "umi": [1]}), "use filtered_feature_bc_matrix.h5"),
    "MuData": (
        mudata,
        "is a MuData file with the modalities 'atac', 'rna', not an .h5ad file; write one of them as .h5ad in Python: "
        'mudata.read_h5mu("x.h5ad")["rna"].write_h5ad("x-converted.h5ad")',
    ),
    "h5Seurat": (h5seurat, 'is an h5Seurat file, not an .h5ad file; convert it in R: SeuratDisk::Convert("x.h5ad", '),
    "MATLAB": (lambda f: f.create_group("#refs#"), "is a MATLAB file"),
    "a broken link": (lambda f: f.update({"x": h5py.SoftLink("/nowhere")}), "holds no 'obs' table"),
    "unknown": (lambda f: f.update({"x": [1]}), "holds no 'obs' table, so it is not an .h5ad of anndata 0.7"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_hdf5_are_recognised(tmp_path, name):
    make, words = LAYOUTS[name]
    with h5py.File(tmp_path / "x.h5ad", "w", userblock_size=512 if name == "MuData" else 0) as file:
        make(file)
    assert words in refusal(tmp_path / "x.h5ad")


def test_folders_are_recognised(tmp_path):
    (tmp_path / "filtered").mkdir()
    (tmp_path / "filtered/matrix.mtx.gz").write_bytes(gzip.compress(MTX))
    assert 'scanpy.read_10x_mtx("filtered"), add the cell types' in refusal(tmp_path / "filtered")
    (tmp_path / "se").mkdir()
    (tmp_path / "se/se.rds").write_bytes(RDS)
    assert 'HDF5Array::loadHDF5SummarizedExperiment("se")' in refusal(tmp_path / "se")
    (tmp_path / "soma").mkdir()
    (tmp_path / "soma/__tiledb_group.tdb").touch()
    assert "tiledbsoma.io.to_h5ad" in refusal(tmp_path / "soma")
    (tmp_path / "some").mkdir()
    (tmp_path / "some/a.h5ad").touch()
    assert refusal(tmp_path / "some").startswith(
        "is a directory, not an .h5ad file; name the file itself, for example "
    )
    assert "some/a.h5ad" in refusal(tmp_path / "some")


def test_a_file_cut_short_says_how_much_is_there(tmp_path, atlas):
    content = atlas.read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(content[:20000])
    expected = f"Download it again (it has 20,000 of {len(content):,} bytes)"
    assert refusal(tmp_path / "cut.h5ad") == f"cannot be opened, was the download cut short? {expected}"


def with_filters(path, atlas, *numbers):
    """A copy of the atlas whose column of donors needs filters that are not installed."""
    shutil.copy(atlas, path)
    with h5py.File(path, "r+") as file:
        codes = file["obs/donor_id/codes"][:]
        del file["obs/donor_id/codes"]
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((len(codes),))
        for number in numbers:  # optional, since HDF5 refuses to make what it cannot write
            made.set_filter(number, h5py.h5z.FLAG_OPTIONAL, ())
        space, kind = h5py.h5s.create_simple((len(codes),)), h5py.h5t.py_create(codes.dtype)
        dataset = h5py.h5d.create(file["obs/donor_id"].id, b"codes", kind, space, made)
        dataset.write_direct_chunk((0,), b"compressed by a filter", 0)
    return path


@pytest.mark.parametrize(
    "numbers, named",
    [
        ((32015,), "the HDF5 filter 32015 (zstd), which is not installed; pip install hdf5plugin (it is"),
        ((32004,), "the HDF5 filter 32004 (lz4), which is not"),
        ((32001, 32008), "the HDF5 filters 32001 (blosc), 32008 (bitshuffle), which are not installed"),
        ((31999,), "the HDF5 filter 31999, which is not"),
    ],
)
def test_an_absent_filter_is_named(tmp_path, atlas, monkeypatch, numbers, named):
    monkeypatch.setattr("data.formats.filters.load_plugins", lambda: False)
    path = with_filters(tmp_path / "x.h5ad", atlas, *numbers)
    with pytest.raises(UserError) as error:
        read_obs(path, ["donor_id"])
    assert named in str(error.value) and 're-save the file with compression="gzip"' in str(error.value)
    assert read_obs(path, ["tissue"])["tissue"].names  # a filter of a column that is not read does not matter


def test_a_plugin_that_does_not_help_is_no_remedy(tmp_path, atlas, monkeypatch):
    monkeypatch.setattr("data.formats.filters.load_plugins", lambda: True)
    with pytest.raises(UserError) as error:
        read_obs(with_filters(tmp_path / "x.h5ad", atlas, 31999), ["donor_id"])
    assert str(error.value).endswith('not installed; re-save the file with compression="gzip"')


def test_hdf5plugin_is_loaded_when_a_filter_is_absent(tmp_path, atlas, monkeypatch):
    called = []
    monkeypatch.setattr("data.formats.filters.load_plugins", lambda: called.append(1))
    read_obs(atlas, ["donor_id"])
    assert not called
    with pytest.raises(UserError):
        read_obs(with_filters(tmp_path / "x.h5ad", atlas, 32015), ["donor_id"])
    assert called


# -- layouts of .h5ad --


def as_seurat_disk(path, atlas, missing=-(2**31), dtype=np.int32):
    """A copy in which obs columns are factors of SeuratDisk: codes, and texts in __categories without a reference."""
    shutil.copy(atlas, path)
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        for name in [name for name in obs if isinstance(obs[name], h5py.Group)]:
            codes, texts = obs[name]["codes"][:].astype(dtype), obs[name]["categories"][:]
            del obs[name]
            obs[name], obs[f"__categories/{name}"] = codes, texts
        obs["cell_type"][3] = missing
        obs["n_genes"] = np.arange(len(codes))
    return path


@pytest.mark.parametrize("missing, dtype", [(-(2**31), np.int32), (-1, np.int64), (np.nan, np.float64)])
def test_factors_of_seurat_disk(tmp_path, atlas, missing, dtype):
    path = as_seurat_disk(tmp_path / "x.h5ad", atlas, missing, dtype)
    names = ["cell_type", "donor_id", "tissue", "disease", "suspension_type", "sex", "batch"]
    right, read = read_obs(atlas, names), read_obs(path, [*names, "n_genes"])
    assert read["n_genes"].texts()[:3] == ["0", "1", "2"]  # a number without categories stays a number
    assert "__categories" not in obs_columns(path)
    for name in names:
        expected = right[name].texts()
        assert read[name].texts() == [None if name == "cell_type" and i == 3 else t for i, t in enumerate(expected)]


def test_a_code_of_seurat_disk_without_a_category(tmp_path, atlas):
    with pytest.raises(UserError, match="holds the code 99, but has 5 categories"):
        read_obs(as_seurat_disk(tmp_path / "x.h5ad", atlas, missing=99), ["cell_type"])


def slashed(adata):
    adata.obs = adata.obs.rename(columns={"cell_type": "cell/type"})
    adata.obs["a/b/c"] = np.arange(adata.n_obs)
    adata.obs["a/b/d"] = pd.array([None, *range(adata.n_obs - 1)], dtype="Int64")
    adata.var["gene/name"] = [f"S{i:02d}" for i in range(adata.n_vars)]
    adata.layers["my/counts"] = adata.X * 2
    adata.layers["my/dense"] = adata.X.toarray() * 3


def test_names_with_a_slash(tmp_path, atlas):
    adata = anndata.read_h5ad(atlas)
    slashed(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata plans to forbid such names
        adata.write_h5ad(tmp_path / "x.h5ad")
    path = tmp_path / "x.h5ad"
    assert {"cell/type", "a/b/c", "a/b/d"} <= set(obs_columns(path))
    assert not {"cell", "a"} & set(obs_columns(path))
    columns = read_obs(path, ["cell/type", "a/b/c", "a/b/d"])
    assert columns["cell/type"].texts() == read_obs(atlas, ["cell_type"])["cell_type"].texts()
    assert columns["a/b/c"].texts()[:2] == ["0", "1"] and columns["a/b/d"].texts()[:2] == [None, "0"]
    with open_matrix(path) as matrix:
        assert matrix.layers == ["X", "my/counts", "my/dense"]
    for layer in ("my/counts", "my/dense"):
        renamed = top_genes(path, [0, 9], 4, layer=layer, gene_key="gene/name")
        assert renamed == [[f"S{gene[1:]}" for gene in genes] for genes in top_genes(atlas, [0, 9], 4)]
    with pytest.raises(UserError, match=r"nearest: 'cell/type'"):
        read_cells(path, SMALL.column_keys, {})


def test_a_link_that_leads_nowhere_does_not_matter_elsewhere(tmp_path, atlas):
    shutil.copy(atlas, tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        for name in ("layers/x", "obs/x", "var/x"):
            file[name] = h5py.SoftLink("/nowhere")
    assert top_genes(tmp_path / "x.h5ad", [0], 3) == top_genes(atlas, [0], 3)
    assert "x" in obs_columns(tmp_path / "x.h5ad")


def null(file, name):
    if name in file:
        del file[name]
    file[name] = h5py.Empty("f4")
    file[name].attrs.update({"encoding-type": "null", "encoding-version": "0.1.0"})


@pytest.mark.parametrize(
    "layers, words",
    [
        (("counts",), "take the counts with --layer counts (--layer can be one of counts)"),
        (("counts", "log1p", "scaled_counts"), "take the counts with --layer counts (--layer can be one of counts, "),
        (("my counts", "z"), "take the counts with --layer 'my counts'"),
        (("a", "b"), "; --layer can be one of a, b"),
        ((), "; the file has no matrix, so add its counts"),
    ],
)
def test_a_null_matrix_names_the_layer_to_take(tmp_path, atlas, layers, words):
    path = tmp_path / "x.h5ad"
    adata = anndata.read_h5ad(atlas)
    adata.layers.update({name: adata.X for name in layers})
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        null(file, "X"), null(file, "raw"), null(file, "layers/nothing"), null(file, "uns/organism")
    with pytest.raises(UserError) as error, open_matrix(path):
        pass
    assert str(error.value).startswith(f"{path}: has no layer 'X' (X is stored as null, which means no matrix)")
    assert str(error.value).endswith(words) or words in str(error.value)
    assert "nothing" not in str(error.value)
    assert uns_text(path, ["organism"]) is None
    if layers:
        assert top_genes(path, [0], 3, layer=layers[0]) == top_genes(atlas, [0], 3)


def test_a_null_matrix_beside_raw_is_read_from_raw(tmp_path, atlas):
    adata = anndata.read_h5ad(atlas)
    adata.raw = adata
    adata.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        null(file, "X")
    assert top_genes(tmp_path / "x.h5ad", [0, 5], 4) == top_genes(atlas, [0, 5], 4)


def test_nullable_strings_and_elements_that_are_not_needed(tmp_path, atlas):
    adata = anndata.read_h5ad(atlas)
    labels = adata.obs["cell_type"].astype(str).tolist()
    adata.obs["cell_type"] = pd.array([None, *labels[1:]], dtype="string")
    adata.obs["donor_id"] = pd.array(adata.obs["donor_id"].astype(str), dtype="string")
    adata.obs.index = pd.Index(pd.array(adata.obs.index.astype(str), dtype="string"))
    adata.obs["flag"] = pd.array([None, *[True] * (adata.n_obs - 1)], dtype="boolean")
    adata.var["feature_name"] = pd.array(adata.var["feature_name"].astype(str), dtype="string")
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "x.h5ad", convert_strings_to_categoricals=False)
    path = tmp_path / "x.h5ad"
    with h5py.File(path, "r+") as file:
        assert file["obs/cell_type"].attrs["encoding-type"] == "nullable-string-array"
        for name in ("obsm/odd", "uns/odd", "obs/odd"):
            file.create_group(name).attrs["encoding-type"] = "awkward-array-of-tomorrow"
        file["obsm/rec"] = np.zeros(3, dtype=[("a", "i4"), ("b", "S3")])
    read = read_obs(path, ["cell_type", "donor_id", "flag"])
    assert read["cell_type"].texts() == [None, *labels[1:]]
    assert read["donor_id"].texts() == read_obs(atlas, ["donor_id"])["donor_id"].texts()
    assert read["flag"].texts()[:2] == [None, "True"]
    assert read_cell_ids(path, [0, 7]) == ["cell00000", "cell00007"]
    assert top_genes(path, [0, 5], 4) == top_genes(atlas, [0, 5], 4)
    summary = summarise_file(path, SMALL)
    assert summary.report["cells_kept"] == adata.n_obs - 1 and summary.report["cells_dropped"]["no cell type"] == 1


# -- zarr stores --


def as_zarr(source, path, version, change=lambda adata: None):
    """Write an .h5ad file as a zarr store with anndata."""
    adata = anndata.read_h5ad(source)
    change(adata)
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")
        adata.write_zarr(path)
    return path


def zipped(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def rich(adata):
    adata.obs["count"] = pd.array([None, *range(adata.n_obs - 1)], dtype="Int64")
    adata.obs["score"] = np.linspace(0, 1, adata.n_obs, dtype=np.float32)
    adata.obs["note"] = [f"n{i}" for i in range(adata.n_obs)]
    adata.obs["all_missing"] = pd.Categorical([None] * adata.n_obs)
    adata.layers["dense"] = adata.X.toarray() * 2
    adata.layers["csc"] = sparse.csc_matrix(adata.X * 3)
    adata.raw = adata
    adata.uns["organism"] = "Homo sapiens"


@pytest.fixture(scope="module", params=["v2", "v3", "zip v2", "zip v3", "zip of the folder"])
def stores(request, atlas, tmp_path_factory):
    """(the same cells as .h5ad, a zarr store of them)."""
    folder = tmp_path_factory.mktemp("stores")
    adata = anndata.read_h5ad(atlas)
    rich(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(folder / "same.h5ad")
        store = as_zarr(atlas, folder / "same.zarr", 3 if "3" in request.param else 2, rich)
    if "zip" in request.param:
        inside = "same.zarr/" if "folder" in request.param else ""
        store = zipped(store, folder / "same.zip", inside)
    return folder / "same.h5ad", store


@pytest.mark.slow(1)
def test_a_zarr_store_reads_like_the_h5ad(stores):
    file, store = stores
    assert obs_columns(store) == obs_columns(file)
    right, read = (read_obs(path, obs_columns(file)) for path in (file, store))
    assert {name: column.texts() for name, column in read.items()} == {n: c.texts() for n, c in right.items()}
    rows = [0, 3, 77, 150]
    assert read_cell_ids(store, rows) == read_cell_ids(file, rows)
    for layer in ("auto", "X", "raw", "dense", "csc"):
        assert top_genes(store, rows, 5, layer=layer) == top_genes(file, rows, 5, layer=layer)
    assert uns_text(store, ["title", "organism"]) == "Homo sapiens"
    with open_matrix(store) as matrix:
        assert matrix.layers == ["X", "raw", "csc", "dense"]
    assert summarise_file(store, SMALL).donors == summarise_file(file, SMALL).donors


@pytest.mark.slow(1)
def test_puzzles_of_a_zarr_store_are_those_of_the_h5ad(stores, tmp_path, monkeypatch):
    file, store = stores
    monkeypatch.setattr("data.build.onefile.sha256", content_sha256, raising=False)
    splits, _ = build_puzzles([file], SMALL)
    of_store, report = build_puzzles([store], SMALL)
    assert splits["train"] and report["files"][0]["file"] == store.name
    assert report["files"][0]["sha256"] == content_sha256(store)
    for split, puzzles in splits.items():
        assert [(p.context, p.cells, p.answer) for p in of_store[split]] == [
            (p.context, p.cells, p.answer) for p in puzzles
        ]


def test_the_hash_of_a_folder_is_of_its_files(tmp_path, atlas):
    store = as_zarr(atlas, tmp_path / "a.zarr", 3)
    first = content_sha256(store)
    assert content_sha256(shutil.copytree(store, tmp_path / "b.zarr")) == first
    (tmp_path / "b.zarr/extra").write_text("x")
    assert content_sha256(tmp_path / "b.zarr") != first


def test_a_zarr_store_that_was_copied_in_part(tmp_path, atlas):
    """Zarr reads a chunk that is not there as zeros, so it must be looked for."""
    for version, name in ((2, "0"), (3, "c/0")):
        store = as_zarr(atlas, tmp_path / f"v{version}.zarr", version)
        (store / "X/indices" / name).unlink()
        with pytest.raises(UserError, match="lacks 1 of 1 chunks of 'indices', was it copied to its end"):
            top_genes(store, [0, 1], 3)


def test_a_sharded_zarr_store_is_complete(tmp_path, atlas):
    """As anndata 0.13 writes by default: shards of several chunks, the last one not full."""
    import zarr

    store = as_zarr(atlas, tmp_path / "x.zarr", 3)
    root = zarr.open_group(store, mode="a", use_consolidated=False)
    for name in ("data", "indices"):
        values = root[f"X/{name}"][:]
        del root[f"X/{name}"]
        made = root["X"].create_array(name, shape=values.shape, dtype=values.dtype, chunks=(100,), shards=(500,))
        made[:] = values
    zarr.consolidate_metadata(store)
    assert len(values) > 1000 and len(values) % 500
    assert top_genes(store, [0, 9, 150], 4) == top_genes(atlas, [0, 9, 150], 4)
    (store / "X/data/c/1").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 chunks of 'data'"):
        top_genes(store, [0, 1], 3)


def test_the_stamp_of_a_folder(tmp_path, atlas):
    assert content_stamp(atlas) == [atlas.stat().st_size, atlas.stat().st_mtime_ns]
    store = as_zarr(atlas, tmp_path / "a.zarr", 3)
    before = content_stamp(store)
    later = before[1] + 1_000_000_000  # two writes within one tick of the disk's clock have one time
    os.utime(store / "X/zarr.json", ns=(later, later))
    assert content_stamp(store)[0] == before[0] and content_stamp(store)[1] > before[1]


def test_damaged_zarr_stores_give_one_sentence(tmp_path, atlas):
    store = as_zarr(atlas, tmp_path / "a.zarr", 3)
    chunk = next(file for file in (store / "X/data").rglob("*") if file.is_file() and file.name != "zarr.json")
    chunk.write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot be read to its end"):
        top_genes(store, [0, 1], 3)
    (store / "zarr.json").write_text("{")
    assert refusal(store).startswith("cannot be opened")


def test_other_zarr_stores_are_named(tmp_path, atlas):
    import zarr

    root = zarr.open_group(tmp_path / "m.zarr", mode="w")
    root.create_group("mod/rna")
    assert "MuData file with the modalities 'rna'" in refusal(tmp_path / "m.zarr")
    assert 'mudata.read_zarr("m.zarr")["rna"]' in refusal(tmp_path / "m.zarr")
    root = zarr.open_group(tmp_path / "s.zarr", mode="w", zarr_format=3)
    root.create_group("images")
    as_zarr(atlas, tmp_path / "s.zarr/tables/cells", 3)
    zarr.open_group(tmp_path / "s.zarr", mode="a").create_group("tables")
    assert refusal(tmp_path / "s.zarr").endswith("is a SpatialData store, not an .h5ad file; give a table of it: "
                                                 "s.zarr/tables/cells")  # fmt: skip
    assert "cell_type" in obs_columns(tmp_path / "s.zarr/tables/cells")
