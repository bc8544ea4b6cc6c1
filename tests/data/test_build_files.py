"""Files from anywhere: every kind of damage or surprise gives one sentence, exit code 2 and no output."""

import gzip
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from itertools import takewhile

import anndata
import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from scipy import sparse

from data.build.build import build_puzzles
from data.build.settings import BuildConfig
from data.errors import UserError
from data.folder import staged
from data.puzzles import read_puzzles
from launch.build import main
from tests.data.test_build import TYPES, write_atlas
from tests.helpers.commands import ROOT, run_command

SIZES = [
    "--min-cells",
    "3",
    "--max-cells",
    "5",
    "--top-genes",
    "4",
    "--puzzles-per-n",
    "4",
    "--test-puzzles-per-n",
    "2",
]


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return write_atlas(tmp_path_factory.mktemp("atlas") / "atlas.h5ad", donors=4)


def run(tmp_path, *files, options=()):
    """Run the command in this process. Returns (exit code, output)."""
    words = [word for file in files for word in ("--h5ad", str(file))]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out"), "--workers", "1", *SIZES, *options])
    return done.exit_code, done.output


def edited(change):
    """A case that changes a copy of the atlas through h5py."""

    def make(path, atlas):
        shutil.copy(atlas, path)
        with h5py.File(path, "r+") as file:
            change(file)

    return make


def saved(change):
    """A case that changes the atlas through anndata."""

    def make(path, atlas):
        adata = anndata.read_h5ad(atlas)
        change(adata)
        adata.write_h5ad(path)

    return make


def cut(fraction):
    return lambda path, atlas: path.write_bytes(atlas.read_bytes()[: int(fraction * atlas.stat().st_size)])


def replace(file, name, values, **attrs):
    old = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update({**old, **attrs})


def zipped(path, atlas):
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(atlas)


def no_index(file):
    file["obs"].attrs["_index"] = "barcodes"


def old_obs(file):
    del file["obs"]
    file["obs"] = np.array([(b"c1", 3)], dtype=[("index", "S5"), ("n", "i4")])


def bad_chunk(file):
    """A compressed matrix whose bytes on disk were overwritten."""
    values = file["X/data"][:]
    del file["X/data"]
    dataset = file["X"].create_dataset("data", data=values, chunks=(500,), compression="gzip")
    dataset.id.write_direct_chunk((0,), b"\x00garbage" * 20)


def set_column(name, values):
    def change(adata):
        adata.obs[name] = values if isinstance(values, list) else [values] * adata.n_obs

    return change


def rename_label(label):
    def change(adata):
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"mast cell": label})

    return change


def no_cells(adata):
    adata._inplace_subset_obs([])


def no_genes(adata):
    adata._inplace_subset_var([])


def set_value(value, at):
    def change(file):
        file["X/data"][at] = value

    return change


def csc_with_a_bad_cell(path, atlas):
    adata = anndata.read_h5ad(atlas)
    adata.X = sparse.csc_matrix(adata.X)
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][3] = 9999


def old_categories(reference):
    """A column whose categories are in another dataset, as anndata 0.7 wrote it."""

    def change(file):
        del file["obs/sex"]
        file["obs/sex"] = np.zeros(160, np.int8)
        file["obs/sex"].attrs["categories"] = reference

    return change


def nullable(values, mask):
    def change(file):
        del file["obs/sex"]
        file.create_group("obs/sex").attrs["encoding-type"] = "nullable-integer"
        file["obs/sex/values"], file["obs/sex/mask"] = values, mask

    return change


CASES = {
    "missing": (lambda path, atlas: None, "no such file"),
    "dangling link": (lambda path, atlas: path.symlink_to("nowhere"), "no such file"),
    "0 bytes": (lambda path, atlas: path.touch(), "the file is empty (0 bytes)"),
    "text": (lambda path, atlas: path.write_text("gene,count\n"), "not an .h5ad file (no HDF5 signature)"),
    "gzip": (lambda path, atlas: path.write_bytes(gzip.compress(atlas.read_bytes())), "is gzip-compressed; unpack it"),
    "zip": (zipped, "is a zip archive; unpack it"),
    "directory": (lambda path, atlas: path.mkdir(), "is a directory, not an .h5ad file"),
    "pipe": (lambda path, atlas: os.mkfifo(path), "is not a regular file"),
    "cut at a tenth": (cut(0.1), "cannot be opened, was the download cut short?"),
    "cut near the end": (cut(0.98), "cannot be opened, was the download cut short?"),
    "other hdf5": (lambda path, atlas: h5py.File(path, "w").create_dataset("x", data=[1]), "holds no 'obs' table"),
    "anndata 0.6 obs": (
        edited(old_obs),
        "was written by anndata 0.6 or earlier; write it again in Python: anndata.read_h5ad(",
    ),
    "no var": (edited(lambda f: f.pop("var")), "holds no 'var' table"),
    "no index": (edited(no_index), "the obs table has no index ('barcodes')"),
    "no matrix": (edited(lambda f: f.pop("X")), "has no layer 'X'; the file has no matrix, so add its counts"),
    "no indptr": (edited(lambda f: f.pop("X/indptr")), "is stored in a way that is not known here"),
    "coo": (edited(lambda f: f["X"].attrs.update({"encoding-type": "coo_matrix"})), "(encoding 'coo_matrix')"),
    "matrix of text": (
        edited(lambda f: replace(f, "X/data", np.full(len(f["X/data"]), b"1"))),
        "does not hold numbers",
    ),
    "other shape": (
        edited(lambda f: f["X"].attrs.update({"shape": [160, 11]})),
        "but there are 160 cells and 12 genes",
    ),
    "lost values": (edited(lambda f: replace(f, "X/data", f["X/data"][:-9])), "indptr, indices and data do not fit"),
    "indptr falls": (edited(lambda f: f["X/indptr"].__setitem__(7, 10**6)), "indptr decreases"),
    "gene out of range": (
        edited(lambda f: f["X/indices"].__setitem__(slice(None), 500)),
        "gene number outside 0 to 11",
    ),
    "csc, cell out of range": (csc_with_a_bad_cell, "cell number outside 0 to 159"),
    "broken chunk": (edited(bad_chunk), "cannot be read to its end, was the download cut short?"),
    "NaN": (edited(set_value(np.nan, slice(None))), "holds NaN or infinite values; this file has no other matrix"),
    "infinite": (edited(set_value(np.inf, slice(0, 400))), "holds NaN or infinite values"),
    "scaled": (edited(set_value(-1.5, slice(0, 400))), "holds negative values, so it looks scaled"),
    "no cells": (saved(no_cells), "holds no cells"),
    "no genes": (saved(no_genes), "is empty (160 cells x 0 genes)"),
    "no donor column": (saved(lambda a: a.obs.pop("donor_id")), "no obs column 'donor_id'"),
    "cell types all NaN": (saved(set_column("cell_type", np.nan)), "160 because no cell type"),
    "donors all unknown": (saved(set_column("donor_id", "unknown")), "160 because no donor"),
    "nuclei only": (saved(set_column("suspension_type", "nucleus")), "all 160 cells were dropped"),
    "code out of range": (
        edited(lambda f: f["obs/cell_type/codes"].__setitem__(0, 9)),
        "holds the code 9, but has 5 cat",
    ),
    "column of an odd encoding": (
        edited(lambda f: (f.pop("obs/tissue"), f.create_group("obs/tissue"))),
        "not known here",
    ),
    "short column": (
        edited(lambda f: replace(f, "obs/tissue/codes", np.zeros(9, np.int8))),
        "has 9 values for 160 rows",
    ),
    "not UTF-8": (
        edited(lambda f: replace(f, "obs/tissue/categories", [b"lung\xff", b"blood"])),
        "text that is not UTF-8",
    ),
    "label with a bar": (saved(rename_label("mast|cell")), "'mast|cell' holds '|'"),
    "label like a tag": (saved(rename_label("mast </answer>")), "looks like a tag"),
    "labels by case": (saved(rename_label("b cell")), "'B cell' and 'b cell' differ only in case"),
    "shape of one number": (edited(lambda f: f["X"].attrs.update({"shape": 160})), "has no shape of two numbers"),
    "shape of text": (edited(lambda f: f["X"].attrs.update({"shape": "ab"})), "has no shape of two numbers"),
    "codes in two columns": (
        edited(lambda f: replace(f, "obs/sex/codes", np.zeros((160, 2), np.int8))),
        "obs column 'sex': its codes are not one row of whole numbers",
    ),
    "categories nowhere": (edited(old_categories(h5py.Reference())), "a categorical without readable codes"),
    "categories by name": (edited(old_categories("nowhere")), "a categorical without readable codes"),
    "mask too short": (edited(nullable(np.zeros(160, int), np.zeros(5, bool))), "has 160 values and a mask of 5"),
    "dangling raw": (edited(lambda f: f.update({"raw": h5py.SoftLink("/nowhere")})), "'raw' cannot be opened"),
    "matrix elsewhere": (
        edited(lambda f: (f.pop("X"), f.update({"X": h5py.ExternalLink("nowhere.h5", "/X")}))),
        "'X' cannot be opened, is the file damaged?",
    ),
    "dangling data": (
        edited(lambda f: (f.pop("X/data"), f["X"].update({"data": h5py.SoftLink("/nowhere")}))),
        "'data' cannot be opened, is the file damaged?",
    ),
    "two organisms": (saved(set_column("organism", ["Homo sapiens", "Mus musculus"] * 80)), "keep one with --organism"),
}


@pytest.mark.slow(2)
@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_no_output(tmp_path, atlas, name):
    make, sentence = CASES[name]
    path = tmp_path / "a.h5ad"
    made = make(path, atlas)
    if isinstance(made, h5py.Dataset):
        made.file.close()
    code, output = run(tmp_path, path)
    assert code == 2, output
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and sentence in lines[0] and "Traceback" not in output, output
    assert str(path) in lines[0], "the sentence names the file"
    assert not [p for p in tmp_path.iterdir() if p.name not in ("a.h5ad",)]


@pytest.mark.slow(2)
def test_bytes_damaged_at_random(tmp_path, atlas):
    """Each file builds or gives one sentence; these seeds gave tracebacks."""
    config = BuildConfig(min_cells=3, max_cells=4, top_genes=4, puzzles_per_n=2, test_puzzles_per_n=1, allow_leaks=True)
    whole, refused = atlas.read_bytes(), 0
    for seed in range(150):
        rng, damaged = random.Random(seed), bytearray(whole)
        for _ in range(rng.choice((1, 8, 30, 200))):
            damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
        (tmp_path / "a.h5ad").write_bytes(damaged)
        try:
            build_puzzles([tmp_path / "a.h5ad"], config)
        except UserError as error:
            assert "\n" not in str(error), (seed, error)
            refused += 1
    assert refused > 50


def test_a_file_without_layers(tmp_path, atlas):
    edited(lambda f: (f.pop("layers", None), f.create_dataset("layers", data=3.0))[:0])(tmp_path / "a.h5ad", atlas)
    assert run(tmp_path, tmp_path / "a.h5ad")[0] == 0


def test_two_files_of_two_organisms_and_one_name(tmp_path, atlas):
    for name, organism in (("human.h5ad", "Homo sapiens"), ("mouse.h5ad", "Mus musculus")):
        saved(set_column("organism", organism))(tmp_path / name, atlas)
    code, output = run(tmp_path, tmp_path / "human.h5ad", tmp_path / "mouse.h5ad")
    assert code == 2 and "holds Homo sapiens and" in output and "build them separately" in output
    (tmp_path / "sub").mkdir()
    shutil.copy(atlas, tmp_path / "sub/human.h5ad")
    code, output = run(tmp_path, tmp_path / "human.h5ad", tmp_path / "sub/human.h5ad")
    assert code == 2 and "would both be dataset 'human'" in output


def test_an_organism_is_kept_by_name(tmp_path, atlas):
    def mixed(adata):
        adata.obs["organism"] = np.where(np.arange(adata.n_obs) % 4 == 0, "Mus musculus", "Homo sapiens")

    saved(mixed)(tmp_path / "a.h5ad", atlas)
    code, output = run(tmp_path, tmp_path / "a.h5ad", options=["--organism", "homo sapiens"])
    assert code == 0, output
    assert "40 dropped: organism is not 'homo sapiens'" in output
    code, output = run(tmp_path, tmp_path / "a.h5ad", options=["--organism", "cat"])
    assert code == 2 and "160 because organism is not 'cat' (the file has Homo sapiens, Mus musculus)" in output


@pytest.mark.slow(2)
@pytest.mark.parametrize("table", ["obs", "uns"])
def test_files_of_another_organism_are_skipped(tmp_path, atlas, table):
    for donors, organism in (("h", "Homo sapiens"), ("m", "Mus musculus"), ("t", "NCBITaxon:9606")):

        def change(adata, donors=donors, organism=organism):
            adata.obs["donor_id"] = [donors + donor for donor in adata.obs["donor_id"]]
            name = "organism_ontology_term_id" if ":" in organism else "organism"
            (adata.obs if table == "obs" else adata.uns)[name] = organism
            if donors == "m":
                adata.var = adata.var.rename(columns={"feature_name": "symbol"})  # not used

        saved(change)(tmp_path / f"{donors}.h5ad", atlas)
    files = [tmp_path / f"{donors}.h5ad" for donors in "hmt"]
    for asked in ("Homo sapiens", "ncbitaxon:9606"):
        code, output = run(tmp_path, *files, options=["--organism", asked])
        assert code == 0, output
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert [file["cells_kept"] for file in report["files"]] == [160, 0, 160]
        assert [file["organism"] for file in report["files"]] == ["Homo sapiens", None, "Homo sapiens"]
        assert f"organism is not {asked!r} (the file has Mus musculus)" in report["files"][1]["notes"][-1]
        shutil.rmtree(tmp_path / "out")
    code, output = run(tmp_path, files[0], files[2])
    assert code == 0, "two names of one organism"
    shutil.rmtree(tmp_path / "out")
    code, output = run(tmp_path, files[1], options=["--organism", "Homo sapiens"])
    assert code == 2 and "all 160 cells were dropped" in output and "Traceback" not in output


def test_an_organism_that_the_file_does_not_state(tmp_path, atlas):
    code, output = run(tmp_path, atlas, options=["--organism", "Homo sapiens"])
    assert code == 0, output
    notes = json.loads((tmp_path / "out/report.json").read_text())["files"][0]["notes"]
    assert "the file states no organism: all its cells count as Homo sapiens" in notes


def test_surprises_that_are_no_mistake(tmp_path, atlas):
    """Names in other scripts, genes of one name, cells of one name, plain text columns, nullable ones."""

    def change(adata):
        adata.obs_names = ["same"] * adata.n_obs
        adata.var["feature_name"] = ["\u03b2-actin", "\u03b2-actin", *adata.var["feature_name"][2:].astype(str)]
        adata.obs["tissue"] = "\u8840\u6db2"
        adata.obs["donor_id"] = np.array(adata.obs["donor_id"].astype(str), dtype=object)
        adata.obs["is_primary_data"] = adata.obs["is_primary_data"].astype("boolean")
        adata.obs["sex"] = adata.obs["sex"].astype("string").astype("category")

    saved(change)(tmp_path / "a.h5ad", atlas)
    code, output = run(tmp_path, tmp_path / "a.h5ad", options=["--format", "jsonl"])
    assert code == 0, output
    rows = (tmp_path / "out/train.jsonl").read_text(encoding="utf-8")
    assert "originating from the \u8840\u6db2" in rows and "\u03b2-actin" in rows and "same#" in rows
    assert all(len(set(genes)) == len(genes) for p in read_puzzles(tmp_path / "out/train.jsonl") for genes in p.cells)


def command(tmp_path, atlas, out):
    return [sys.executable, str(ROOT / "launch/build.py"), "--h5ad", str(atlas), "--out", str(out), *SIZES]


def test_a_disk_that_is_full(tmp_path, atlas):
    """A limit on the file size replaces a full disk: writing fails in the same place, with another reason."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command(tmp_path, atlas, tmp_path / "out"), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "cannot be written (File too large)" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow(1)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root")
def test_a_small_disk(tmp_path, atlas):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = subprocess.run(command(tmp_path, atlas, disk / "out"), capture_output=True, text=True)
        assert done.returncode == 2 and "cannot be written (No space left on device)" in done.stderr, done.stderr
        assert not list(disk.glob("out")) and "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow(2)
def test_folders_and_files_without_permission(tmp_path, atlas):
    os.chmod(tmp_path, 0o777)
    for parent in takewhile(lambda folder: folder.name.startswith(("pytest-", "popen-")), tmp_path.parents):
        os.chmod(parent, 0o755)  # pytest's own folders only: those above are everybody's
    words = []
    if os.geteuid() == 0:
        words = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
        trials = [[sys.executable, str(ROOT / "launch/build.py"), "--help"], ["ls", str(tmp_path)]]
        if not shutil.which("setpriv") or any(
            subprocess.run([*words, *trial], capture_output=True, check=False).returncode for trial in trials
        ):
            pytest.skip("root may read everything, and nobody else may run this Python, or enter this folder")
    secret, locked = tmp_path / "secret.h5ad", tmp_path / "locked"
    shutil.copy(atlas, secret)
    secret.chmod(0)
    locked.mkdir(mode=0o555)
    done = subprocess.run([*words, *command(tmp_path, secret, tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2 and "secret.h5ad: you have no permission to read it" in done.stderr, done.stderr
    secret.chmod(0o644)
    closed = tmp_path / "closed"
    closed.mkdir()
    shutil.copy(atlas, closed / "atlas.h5ad")
    closed.chmod(0o700 if os.geteuid() == 0 else 0)
    done = subprocess.run(
        [*words, *command(tmp_path, closed / "atlas.h5ad", tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no permission to enter a folder on the way to it" in done.stderr, done.stderr
    words_of_annotate = [
        sys.executable,
        str(ROOT / "launch/annotate.py"),
        str(closed / "atlas.h5ad"),
        "--cluster-key",
        "c",
    ]
    asked = ["--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "labelled.h5ad")]
    done = subprocess.run([*words, *words_of_annotate, *asked], capture_output=True, text=True)
    assert done.returncode == 2 and "no permission to enter a folder on the way to it" in done.stderr, done.stderr
    closed.chmod(0o700)
    done = subprocess.run([*words, *command(tmp_path, secret, locked / "out")], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written (Permission denied)" in done.stderr, done.stderr
    assert not list(locked.iterdir()) and not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(tmp_path, atlas):
    (tmp_path / "out").write_text("mine")
    code, output = run(tmp_path, atlas)
    assert code == 2 and "is a file, not a folder" in output and (tmp_path / "out").read_text() == "mine"
    assert TYPES and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_puzzle_files_that_no_build_made_are_not_removed(tmp_path, atlas):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "train.jsonl").write_text("mine")
    done = run_command("build", atlas, "--out", out)
    assert done.returncode == 2 and "train.jsonl is there without the report.json of a build" in done.stderr
    assert (out / "train.jsonl").read_text() == "mine" and [path.name for path in out.iterdir()] == ["train.jsonl"]


def test_a_build_that_was_killed_while_it_moved_its_files_does_not_lock_itself_out(tmp_path):
    """Its files of puzzles are there, and no report; the next call is refused for an option, and the one after it builds."""
    out = tmp_path / "puzzles"
    with pytest.raises(KeyError), staged(out, resume=False):
        out.mkdir()
        (out / "train.parquet").touch()
        raise KeyError("killed")
    for _ in range(2):
        with pytest.raises(KeyError), staged(out, resume=False):
            raise KeyError("refused")
    with staged(out, resume=False):
        (out / "report.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["puzzles"]
