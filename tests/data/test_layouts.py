"""One table of facts, written in every layout that tools use, gives one and the same set of puzzles.

The facts are a matrix of counts, names of genes, and labels and donors of cells. Their layouts are those of anndata 0.7
to 0.13, SeuratDisk and h5Seurat: encodings of columns and of the index, csr, csc and dense matrices of several types, in
X, raw or a layer, with the compressions of h5py, as .h5ad, zarr folder or zip.
"""

import dataclasses
import functools
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from data.build.build import build_puzzles
from tests.data.test_real_files import IDS, SMALL, SYMBOLS, TYPES

N_CELLS, N_GENES = 64, len(SYMBOLS)
COLUMNS = ("cell_type", "donor_id", "tissue", "disease", "suspension_type", "sex", "is_primary_data")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a file says, in whichever layout."""

    counts: np.ndarray
    """[C, G]"""
    columns: dict[str, list[str]]
    """{obs column: [C] values}"""
    cells: list[str]
    genes: list[str]
    ids: list[str]


@functools.cache
def facts(seed: int) -> Facts:
    rng = np.random.default_rng(seed)
    rows = [(f"d{donor}", cell_type) for donor in range(4) for cell_type in TYPES for _ in range(4)]
    donors, labels = map(list, zip(*rows, strict=True))
    same = {"tissue": "blood", "disease": "normal", "suspension_type": "cell", "is_primary_data": "True"}
    columns = {"cell_type": labels, "donor_id": donors} | {name: [text] * N_CELLS for name, text in same.items()}
    columns["sex"] = [["male", "female"][int(donor[1]) % 2] for donor in donors]
    counts = rng.poisson(4.0, size=(N_CELLS, N_GENES)) + np.eye(1, N_GENES)[0]
    return Facts(counts, columns, [f"c{i:02d}" for i in range(N_CELLS)], SYMBOLS, IDS)


# --- layouts of a column


def as_pandas(values, how):
    """A column as anndata writes it in this encoding, when anndata knows it."""
    if how == "categorical":
        return pd.Categorical(values)
    if how == "categories of nullable strings":
        return pd.Categorical(pd.array(values, dtype="string"))
    if how == "nullable":
        return pd.array(values, dtype="string")
    return np.array(values, dtype=object)


def write_column(table, name, values, how):
    """Replace a column of an .h5ad file by an encoding that anndata no longer writes."""
    texts = sorted(set(values))
    codes = np.array([texts.index(value) for value in values])
    del table[name]
    if how == "fixed length":
        table[name] = np.array(values, dtype="S")
    elif how == "codes with names beside them":  # SeuratDisk
        table[name], table[f"__categories/{name}"] = codes.astype(np.int32), texts
    elif how == "codes with a reference":  # anndata 0.7
        table[name], table[f"__categories/{name}"] = codes.astype(np.int8), texts
        table[name].attrs["categories"] = table[f"__categories/{name}"].ref
    else:  # h5Seurat: codes begin with 1
        table[f"{name}/levels"], table[f"{name}/values"] = texts, codes + 1


NEW = ("categorical", "categories of nullable strings", "nullable", "strings")
OLD = ("fixed length", "codes with names beside them", "codes with a reference", "levels")
INDEXES = ("strings", "nullable", "fixed length", "no attributes")


# --- layouts of a matrix


def as_matrix(counts, form, kind):
    counts = counts.astype(kind)
    if form == "dense":
        return counts
    if form == "csc":
        return sparse.csc_matrix(counts)
    return sparse.csr_matrix(counts)


def change_matrix(group, form):
    """Write a csr matrix in another way that the format allows."""
    indptr, columns, values = (group[name][:] for name in ("indptr", "indices", "data"))
    if form == "int64":
        new = {"indices": columns.astype(np.int64), "indptr": indptr.astype(np.int64)}
    else:  # columns of a row in decreasing order
        order = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(indptr[:-1], indptr[1:], strict=True)])
        new = {"indices": columns[order], "data": values[order]}
    for name, array in new.items():
        del group[name]
        group[name] = array


FORMS = ("csr", "csc", "dense", "int64", "unsorted")
TYPES_OF_VALUES = ("<f4", "<f8", "<i4", "<i8", "<u2", ">f4", ">i4")
PLACES = ("X", "raw", "layer", "layer beside null")
FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip", "compression_opts": 9},
    "lzf": {"compression": "lzf"},
    "shuffle": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "checksum": {"fletcher32": True, "chunks": True},
    "scaleoffset": {"scaleoffset": 0},
    "szip": {"compression": "szip"},
}
"""Options of h5py."""


def compress(file, options):
    """Write all one-dimensional numbers of a file again with a filter."""
    names = []
    file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    for name in names:
        node = file[name]
        if node.ndim != 1 or node.dtype.kind not in "iuf" or "categories" in node.attrs or not node.shape[0]:
            continue
        values, attributes = node[:], dict(node.attrs)
        if "scaleoffset" in options and values.dtype.kind == "f":
            continue
        del file[name]
        file.create_dataset(name, data=values, **options).attrs.update(attributes)


# --- layouts of a file


@st.composite
def layouts(draw, stores):
    store = draw(st.sampled_from(stores))
    own = NEW if store != "h5ad" else NEW + OLD
    form = draw(st.sampled_from(FORMS if store == "h5ad" else FORMS[:3]))
    return {
        "store": store,
        "columns": {name: draw(st.sampled_from(own)) for name in COLUMNS},
        "genes": draw(
            st.sampled_from(["feature_name", "ids and symbols", "ids only", "symbols", "suffixes", "with tags"])
        ),
        "gene column": draw(st.sampled_from(own)),
        "index": draw(st.sampled_from(INDEXES if store == "h5ad" else INDEXES[:2])),
        "form": form,
        "values": draw(st.sampled_from(TYPES_OF_VALUES if form == "dense" else TYPES_OF_VALUES[:5])),
        "place": draw(st.sampled_from(PLACES)),
        "filter": draw(st.sampled_from(list(FILTERS) if store == "h5ad" else ["none"])),
    }


def var_of(table: Facts, layout) -> tuple[pd.DataFrame, np.ndarray, dict]:
    """(var, counts, the options that read the names)."""
    names, ids, genes, counts = list(table.genes), list(table.ids), layout["genes"], table.counts
    if genes == "with tags":
        names, ids, counts = [*names, "CD3"], [*ids, "CD3"], np.hstack([counts, np.full((N_CELLS, 1), 77)])
    if genes == "suffixes":
        names = [f"{name}_{gene}" for name, gene in zip(names, ids, strict=True)]
    column = {"symbols": [], "ids only": [], "ids and symbols": ["gene_symbols"]}.get(genes, ["feature_name"])
    index = names if genes == "symbols" else ids
    if layout["index"] == "nullable":
        index = pd.Index(pd.array(index, dtype="string"))
    var = pd.DataFrame({key: as_pandas(names, layout["gene column"]) for key in column}, index=index)
    if genes == "with tags":
        var["feature_types"] = ["Gene Expression"] * N_GENES + ["Antibody Capture"]
    return var, counts, {"gene_key": "index"} if column != ["feature_name"] else {}


def anndata_of(table: Facts, layout) -> tuple[anndata.AnnData, dict]:
    var, counts, options = var_of(table, layout)
    obs = pd.DataFrame({name: as_pandas(v, layout["columns"][name]) for name, v in table.columns.items()})
    obs.index = pd.Index(pd.array(table.cells, dtype="string")) if layout["index"] == "nullable" else table.cells
    matrix = as_matrix(counts, layout["form"], layout["values"])
    scaled = (counts - counts.mean(axis=0)).astype(np.float32)
    adata = anndata.AnnData(matrix, obs=obs, var=var)
    if layout["place"] == "raw":
        adata.raw, adata.X = adata.copy(), scaled
    elif layout["place"].startswith("layer"):
        adata.layers["counts"], adata.X = matrix, None if layout["place"].endswith("null") else scaled
        options["layer"] = "counts"
    return adata, options


def write(folder: Path, table: Facts, layout) -> tuple[Path, dict]:
    """Write the facts in a layout. Returns (file, the options that read it)."""
    adata, options = anndata_of(table, layout)
    version = 3 if layout["store"] == "zarr 3" else 2
    path = folder / ("a.h5ad" if layout["store"] == "h5ad" else "a.zarr")
    with anndata.settings.override(allow_write_nullable_strings=True, zarr_write_format=version):
        if layout["store"] != "h5ad":
            adata.write_zarr(path)
        else:
            adata.write_h5ad(path)
    if layout["store"] == "zip":
        return Path(shutil.make_archive(folder / "a", "zip", path)), options
    if layout["store"] != "h5ad":
        return path, options
    with h5py.File(path, "r+") as file:
        rewrite(file, table, layout)
    return path, options


def rewrite(file, table: Facts, layout):
    """Replace what anndata wrote by older layouts."""
    for name, how in layout["columns"].items():
        if how in OLD:
            write_column(file["obs"], name, table.columns[name], how)
    var, _, _ = var_of(table, layout)
    tables = ["var", "raw/var"] if layout["place"] == "raw" else ["var"]
    for key in set(var.columns) - {"feature_types"}:
        if layout["gene column"] in OLD:
            for where in tables:
                write_column(file[where], key, [str(name) for name in var[key]], layout["gene column"])
    for where in ("obs", *tables):
        key = file[where].attrs["_index"]
        if layout["index"] == "fixed length":
            values = file[where][key].asstr()[:].tolist()
            del file[where][key]
            file[where][key] = np.array(values, dtype="S")
        elif layout["index"] == "no attributes":
            if key != "_index":
                file[where].move(key, "_index")
            for name in list(file[where].attrs):
                del file[where].attrs[name]
    matrix = {"X": "X", "raw": "raw/X"}.get(layout["place"], "layers/counts")
    if layout["form"] in ("int64", "unsorted"):
        change_matrix(file[matrix], layout["form"])
    if layout["filter"] != "none":
        compress(file, FILTERS[layout["filter"]])


PLAIN = {
    "store": "h5ad",
    "columns": dict.fromkeys(COLUMNS, "categorical"),
    "genes": "feature_name",
    "gene column": "strings",
    "index": "strings",
    "form": "csr",
    "values": "<f4",
    "place": "X",
    "filter": "none",
}
"""What anndata 0.12 writes."""


def puzzles_of(path, **options):
    """{split: its puzzles as rows}, without the name of the file."""
    splits, _ = build_puzzles([path], dataclasses.replace(SMALL, **options))
    rows = [(split, puzzle.to_row()) for split, puzzles in splits.items() for puzzle in puzzles]
    return [(split, {key: value for key, value in row.items() if key != "source"}) for split, row in rows]


@functools.cache
def plain_rows(seed):
    """The puzzles of a plain file with these facts, checked against the facts themselves."""
    with tempfile.TemporaryDirectory() as folder:
        path, options = write(Path(folder), facts(seed), PLAIN)
        splits, _ = build_puzzles([path], SMALL)
        for puzzle in (puzzle for puzzles in splits.values() for puzzle in puzzles):
            check_against_facts(puzzle, facts(seed))
        return puzzles_of(path, **options)


def check_against_facts(puzzle, table: Facts):
    for cell_id, genes, label in zip(puzzle.meta["cell_ids"], puzzle.cells, puzzle.answer, strict=True):
        row = table.cells.index(cell_id)
        assert label == table.columns["cell_type"][row] and puzzle.meta["donor"] == table.columns["donor_id"][row]
        values = dict(zip(table.genes, table.counts[row].tolist(), strict=True))
        expressed = [gene for gene in sorted(values, key=lambda gene: (-values[gene], gene)) if values[gene]]
        assert genes == expressed[: SMALL.top_genes]
        assert f"from a {table.columns['sex'][row]}" in puzzle.context


def check(folder, seed, layout):
    if layout["filter"] == "szip" and not h5py.h5z.filter_avail(h5py.h5z.FILTER_SZIP):
        layout["filter"] = "gzip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr, on what other readers know
        path, options = write(folder, facts(seed), layout)
    assert puzzles_of(path, **options) == plain_rows(seed)


@pytest.mark.slow(7)
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2), layouts(["h5ad"]))
def test_the_layout_of_the_facts_in_h5ad_does_not_matter(tmp_path_factory, seed, layout):
    check(tmp_path_factory.mktemp("layout"), seed, layout)


@pytest.mark.slow(9)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), layouts(["zarr 2", "zarr 3", "zip"]))
def test_the_layout_of_the_facts_in_zarr_does_not_matter(tmp_path_factory, seed, layout):
    check(tmp_path_factory.mktemp("layout"), seed, layout)


# --- compressions that h5py lacks


WRITE = """
import sys, h5py, hdf5plugin
name, source, target = sys.argv[1:]
with h5py.File(source) as old, h5py.File(target, "w") as new:
    for member in old:
        old.copy(member, new)
    for key in ("data", "indices"):
        values = new["X"][key][:]
        del new["X"][key]
        new["X"].create_dataset(key, data=values, chunks=(len(values),), **dict(getattr(hdf5plugin, name)()))
"""
READ = """
import sys
from pathlib import Path
import data.formats.filters
from data.errors import UserError
from tests.data.test_layouts import plain_rows, puzzles_of
try:
    assert puzzles_of(Path(sys.argv[1])) == plain_rows(0)
    print("the same puzzles")
except UserError as error:
    print(error)
"""


@pytest.mark.slow(30)
@pytest.mark.skipif(importlib.util.find_spec("hdf5plugin") is None, reason="needs pip install hdf5plugin (190 MB)")
@pytest.mark.parametrize(
    "name, named",
    [
        ("Blosc", "32001 (blosc)"),
        ("Blosc2", "32026 (blosc2)"),
        ("Bitshuffle", "32008 (bitshuffle)"),
        ("LZ4", "32004 (lz4)"),
        ("Zstd", "32015 (zstd)"),
        ("BZip2", "307 (bzip2)"),
    ],
)
def test_real_files_of_other_filters(tmp_path, name, named):
    """Each step is a process of its own: h5py knows the filters of all plugins once one was loaded."""
    source, _ = write(tmp_path, facts(0), PLAIN)
    source = source.rename(tmp_path / "plain.h5ad")
    target = tmp_path / "a.h5ad"

    def run(program, *arguments):
        words = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    run(WRITE, name, source, target)
    without = READ.replace("try:", "data.formats.filters.load_plugins = lambda: False\ntry:")
    assert f"is compressed with the HDF5 filter {named}, which is not installed; pip install" in run(without, target)
    assert run(READ, target) == "the same puzzles\n"
