"""The bytes do not depend on workers, order of files, hash seed or a kill. What the drawing of cells guarantees."""

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.build.build import BuildProgress, build_puzzles
from data.build.cells import groups_of, read_cells
from data.build.draw import draw_puzzle_cells
from data.build.matrix import open_matrix
from data.build.rank import RankSettings, Reader, genes_of, highly_variable, top_genes
from data.build.staging import Staging
from data.folder import write_build
from data.puzzles import read_puzzles
from tests.data.test_build import SMALL, TYPES, build, write_atlas
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.slow(1)
SIZES = ["--min-cells", 3, "--max-cells", 5, "--puzzles-per-n", 5, "--test-puzzles-per-n", 3]


@pytest.fixture(scope="module")
def atlases(tmp_path_factory):
    """Four files. The donors of different files are different people."""
    folder = tmp_path_factory.mktemp("atlases")
    for i, name in enumerate(("one", "two", "three", "four")):
        path = write_atlas(folder / f"{name}.h5ad", donors=4 + i, diseases=("normal", "influenza"))
        adata = anndata.read_h5ad(path)
        adata.obs["donor_id"] = [f"{name}-{donor}" for donor in adata.obs["donor_id"]]
        adata.write_h5ad(path)
    return sorted(folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def words(files):
    return [word for path in files for word in ("--h5ad", path)]


@pytest.fixture(scope="module")
def expected(atlases, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    done = build(*words(atlases), "--out", out, *SIZES, "--format", "both", "--workers", 1, hash_seed="1")
    assert done.returncode == 0, done.stderr
    return contents(out)


def test_workers_file_order_and_hash_seed_do_not_matter(atlases, expected, tmp_path):
    out = tmp_path / "out"
    done = build(*words(atlases[::-1]), "--out", out, *SIZES, "--format", "both", "--workers", 3, hash_seed="2")
    assert done.returncode == 0, done.stderr
    assert contents(out) == expected and len(expected) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.status.json"]
    assert read_puzzles(out / "train.parquet") == read_puzzles(out / "train.jsonl")


STOPS_AFTER_A_FILE = """
import time
from data.build.staging import Staging
from launch.build import main

save = Staging.save

def save_and_stop(*given):
    save(*given)
    print("saved a file", flush=True)
    time.sleep(1000)

Staging.save = save_and_stop
main()
"""


def test_a_killed_build_goes_on_where_it_was(atlases, expected, tmp_path):
    """kill -9 after the first file. Only the others are read again; the bytes are those of an uninterrupted build."""
    out, staging = tmp_path / "out", tmp_path / ".out.building"
    command = [
        sys.executable,
        "-c",
        STOPS_AFTER_A_FILE,
        *words(atlases),
        "--out",
        out,
        *SIZES,
        "--format",
        "both",
        "--workers",
        1,
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert any(line == "saved a file\n" for line in process.stdout)
        process.kill()
    finished = list(staging.glob("*.jsonl"))
    assert not out.exists() and len(finished) == 1
    done = build(*words(atlases), "--out", out, *SIZES, "--format", "both", "--workers", 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished earlier") == len(finished)
    assert contents(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.status.json"]


def test_finished_files_are_kept_when_a_later_one_is_refused(atlases, tmp_path):
    bad = tmp_path / "zzz.h5ad"
    adata = anndata.read_h5ad(atlases[0])
    adata.obs["donor_id"] = [f"bad-{donor}" for donor in adata.obs["donor_id"]]
    matrix = adata.X.toarray()
    matrix[np.arange(len(matrix)) % 35 >= 16, 0] = np.nan  # not in the rows of the sample
    adata.X = matrix
    adata.write_h5ad(bad)
    out = tmp_path / "out"
    done = build(*words([*atlases, bad]), "--out", out, *SIZES)
    assert done.returncode == 2 and "zzz.h5ad: layer 'X' holds NaN" in done.stderr, done.stderr
    assert "4 finished files are kept; --resume uses them" in done.stderr and not out.exists()
    matrix[np.isnan(matrix)] = 0
    adata.X = matrix
    adata.write_h5ad(bad)
    done = build(*words([*atlases, bad]), "--out", out, *SIZES, "--resume")
    assert done.returncode == 0 and done.stdout.count("finished earlier") == 4, done.stderr
    fresh = build(*words([*atlases, bad]), "--out", tmp_path / "fresh", *SIZES)
    assert fresh.returncode == 0 and contents(out) == contents(tmp_path / "fresh")


def test_resume_takes_nothing_that_was_made_with_other_settings(atlases, tmp_path):
    staging = Staging(tmp_path / "staging")
    said = []
    build_puzzles(atlases, SMALL, staging=staging)
    changed = dataclasses.replace(SMALL, top_genes=3)
    splits, _ = build_puzzles(atlases, changed, staging=staging, watch=BuildProgress(say=said.append))
    assert not any("finished earlier" in line for line in said) and len(said) == 4
    assert splits == build_puzzles(atlases, changed)[0]


def test_leaks_are_accepted_without_building_again(atlases, tmp_path):
    """The remedy in the message works."""
    command = [*words(atlases[:2]), "--out", tmp_path / "out", *SIZES, "--split", "instance"]
    done = build(*command)
    assert (
        done.returncode == 2 and "accept it with --allow-leaks" in done.stderr and "--resume uses them" in done.stderr
    )
    done = build(*command, "--allow-leaks", "--resume")
    assert done.returncode == 0 and done.stdout.count("finished earlier") == 2, done.stderr


@pytest.mark.parametrize("damage", ["cut in the first line", "cut in a row", "one letter", "empty"])
def test_a_finished_part_that_is_damaged_is_built_again(atlases, tmp_path, damage):
    staging, said = Staging(tmp_path / "staging"), []
    splits, _ = build_puzzles(atlases[:2], SMALL, staging=staging)
    part = sorted(staging.folder.glob("*.jsonl"))[0]
    text = part.read_text()
    kept = {"cut in the first line": text[:200], "cut in a row": text[:-500], "empty": ""}
    part.write_text(kept.get(damage, text.replace("B cell", "C cell", 1)))
    assert build_puzzles(atlases[:2], SMALL, staging=staging, watch=BuildProgress(say=said.append))[0] == splits
    assert ["finished earlier" in line for line in said] == [True, False]


BUILDER = """
import sys, time
from data.build.staging import run_all

def work(pipe, advance):
    with open(pipe, "w") as file:
        print("at work", file=file, flush=True)
        time.sleep(60)
        print("still there", file=file)

if __name__ == "__main__":
    run_all(work, [(sys.argv[1],), (sys.argv[1],)], 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_build(tmp_path, how):
    """The pipe ends when the last process that writes to it does."""
    script, pipe = tmp_path / "builder.py", tmp_path / "pipe"
    script.write_text(BUILDER)
    os.mkfifo(pipe)
    process = subprocess.Popen([sys.executable, script, pipe], env=os.environ | {"PYTHONPATH": str(ROOT)})
    with open(pipe) as file:
        assert [file.readline(), file.readline()] == ["at work\n", "at work\n"]
        process.send_signal(how)
        assert process.wait() == -how
        assert file.read() == ""


def test_two_builds_do_not_write_into_one_folder(atlases, tmp_path):
    import fcntl

    (tmp_path / ".out.building").mkdir()
    with open(tmp_path / ".out.building/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = build(*words(atlases[:1]), "--out", tmp_path / "out", *SIZES)
    assert done.returncode == 2 and "another build is writing there" in done.stderr


def test_progress_counts_every_cell_that_is_read(atlases):
    told = []
    splits, _ = build_puzzles(atlases, SMALL, workers=1, watch=BuildProgress(progress=lambda *args: told.append(args)))
    cells = {(p.meta["source"], cell) for ps in splits.values() for p in ps for cell in p.meta["cell_ids"]}
    assert told[-1] == ("reading cells", len(cells), len(cells))
    done = [done for phase, done, _ in told if phase == "reading cells"]
    assert done == sorted(done)


def test_the_bytes_of_a_seed_stay(tmp_path):
    """The hash is that of the first builder (commit 71da542). The demo's published numbers depend on these bytes."""
    path = write_atlas(tmp_path / "atlas.h5ad", diseases=("normal", "influenza"))
    splits, _ = build_puzzles([path], dataclasses.replace(SMALL, seed=5, unseen_disease=("influenza",)))
    rows = json.dumps([[puzzle.to_row() for puzzle in puzzles] for puzzles in splits.values()])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "e1b3dbb8ead834ab"


# --- what the drawing of cells guarantees for any groups

TABLES = st.dictionaries(
    st.tuples(st.sampled_from(["d0", "d1", "d2", "d3"]), st.sampled_from(["", "b"])),
    st.dictionaries(st.sampled_from(list("ABCDEFG")), st.integers(1, 4), min_size=1),
    min_size=1,
)


@settings(max_examples=150, deadline=None)
@given(TABLES, st.integers(2, 4), st.integers(0, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_batches_keep_the_rules(table, smallest, more, quota, seed):
    numbers = iter(range(10**6))
    groups = {
        g: {t: np.array([next(numbers) for _ in range(n)]) for t, n in types.items()} for g, types in table.items()
    }
    where = {int(row): (g, t) for g, types in groups.items() for t, rows in types.items() for row in rows}
    sizes = range(smallest, smallest + more + 1)
    drawn, drawing = draw_puzzle_cells(groups, sizes, quota, random.Random(seed))
    for group, rows in drawn:
        assert {where[row][0] for row in rows} == {group}, "one donor and batch"
        assert len({where[row][1] for row in rows}) == len(rows) and len(rows) in sizes, "each cell of another type"
    assert len({frozenset(rows) for _, rows in drawn}) == len(drawn), "no batch twice"
    taken = Counter(len(rows) for _, rows in drawn)
    assert {n: quota - taken[n] for n in sizes if quota > taken[n]} == {
        int(n): q for n, q in drawing["quota_left"].items()
    }
    assert draw_puzzle_cells(groups, sizes, quota, random.Random(seed)) == (drawn, drawing), "the seed decides"
    for n, left in drawing["quota_left"].items():  # what is left could not be drawn
        able = [g for g, types in groups.items() if len(types) >= int(n)]
        closed = {(gap["donor"], gap["batch"]) for gap in drawing["exhausted"] if gap["n_cells"] == int(n)}
        assert left > 0 and set(able) == closed


def test_candidates_and_cells_are_in_no_order(tmp_path):
    """Over many puzzles, the right label is equally often at each place of the list, and each type in each cell."""
    path = write_atlas(tmp_path / "atlas.h5ad", donors=6, cells_per_type=12)
    config = dataclasses.replace(SMALL, min_cells=5, max_cells=5, puzzles_per_n=2500)
    puzzles = build_puzzles([path], config)[0]["train"]
    assert len(puzzles) == 2500
    places = Counter(p.candidates.index(label) for p in puzzles for label in p.answer[:1])
    first = Counter(p.answer[0] for p in puzzles)
    orders = Counter(tuple(map(p.answer.index, p.candidates)) for p in puzzles)
    # five equal chances: standard deviation of a count is sqrt(2500 * 0.2 * 0.8) = 20; chi-square over 120 orders below
    assert all(abs(count - 500) < 100 for count in places.values()) and len(places) == 5
    assert all(abs(first[t] - 500) < 100 for t in TYPES)
    expected = 2500 / 120
    chi_square = sum((orders[o] - expected) ** 2 for o in orders) / expected + (120 - len(orders)) * expected
    assert 50 < chi_square < 200  # 119 degrees of freedom: mean 119, standard deviation 15


# --- extensions: which genes, and whose


def test_deg_and_cluster_by_hand(tmp_path):
    import pandas as pd
    from scipy import sparse

    counts = np.array([[50, 30, 20, 0], [70, 10, 20, 0], [50, 0, 10, 40], [30, 0, 30, 40]], dtype=np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": ["A", "A", "B", "B"],
            "donor_id": "d",
            "batch": "b",
            "tissue": "eye",
            "disease": "normal",
            "suspension_type": "cell",
            "is_primary_data": True,
        },
        index=list("wxyz"),
    )
    var = pd.DataFrame({"feature_name": ["HOUSE", "MARKA", "MID", "MARKB"]}, index=list("1234"))
    anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var).write_h5ad(tmp_path / "a.h5ad")
    config = dataclasses.replace(SMALL, min_cells=2, max_cells=2, puzzles_per_n=1, test_fraction=0.0, profile="cluster")
    puzzle = build_puzzles([tmp_path / "a.h5ad"], config)[0]["train"][0]
    shown = dict(zip(puzzle.answer, puzzle.cells, strict=True))
    # means of A: 60, 20, 20, 0; of B: 40, 0, 20, 40
    assert shown == {"A": ["HOUSE", "MARKA", "MID"], "B": ["HOUSE", "MARKB", "MID"]}
    assert sorted(puzzle.meta["cell_ids"]) == ["mean of 2 cells from w", "mean of 2 cells from y"]
    puzzle = build_puzzles([tmp_path / "a.h5ad"], dataclasses.replace(config, rank="deg"))[0]["train"][0]
    assert dict(zip(puzzle.answer, puzzle.cells, strict=True)) == {"A": ["MARKA", "HOUSE"], "B": ["MARKB"]}
    cells = dataclasses.replace(config, profile="cell", rank="deg", puzzles_per_n=4)
    lists = {
        (cell, tuple(genes))
        for p in build_puzzles([tmp_path / "a.h5ad"], cells)[0]["train"]
        for cell, genes in zip(p.meta["cell_ids"], p.cells, strict=True)
    }
    assert ("w", ("MARKA", "HOUSE", "MID")) in lists or ("w", ("MARKA", "MID", "HOUSE")) in lists
    assert all(genes[0] == ("MARKA" if cell in "wx" else "MARKB") for cell, genes in lists)


def test_highly_variable_genes_are_those_of_scanpy(tmp_path):
    scanpy = pytest.importorskip("scanpy")
    adata = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    adata.write_h5ad(tmp_path / "pbmc.h5ad")
    with open_matrix(tmp_path / "pbmc.h5ad", "X") as matrix:
        genes = genes_of(matrix, RankSettings(top_genes=50, gene_key="index"))
        reader = Reader(matrix, False, lambda n: None)
        ours = highly_variable(reader, genes, np.arange(adata.n_obs), "log counts", 200)
    adata.uns["log1p"] = {"base": None}
    scanpy.pp.highly_variable_genes(adata, n_top_genes=200, flavor="seurat")
    theirs = set(adata.var_names[adata.var["highly_variable"]])
    assert len(theirs & set(genes.names[ours])) >= 190


def test_top_genes_of_any_encoding_are_the_same_on_real_cells(tmp_path):
    scanpy = pytest.importorskip("scanpy")
    from scipy import sparse

    adata = scanpy.datasets.pbmc68k_reduced().raw.to_adata()
    lists = []
    for encode in (sparse.csr_matrix, sparse.csc_matrix, lambda matrix: matrix.toarray()):
        anndata.AnnData(encode(sparse.csr_matrix(adata.X)), obs=adata.obs, var=adata.var).write_h5ad(
            tmp_path / "p.h5ad"
        )
        lists.append(top_genes(tmp_path / "p.h5ad", range(0, 700, 3), 50, gene_key="index", drop_genes=["ribosomal"]))
    assert lists[0] == lists[1] == lists[2]
    assert not any(re.fullmatch(r"RP[LS]\d+", gene) for genes in lists[0] for gene in genes)


def test_groups_are_sorted_and_whole(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad", donors=3)
    from data.build.settings import BuildConfig

    cells = read_cells(path, BuildConfig().column_keys, {})
    groups = groups_of(cells)
    obs = anndata.read_h5ad(path).obs
    assert list(groups) == sorted(groups) and all(list(types) == sorted(types) for types in groups.values())
    for (donor, batch), types in groups.items():
        for cell_type, rows in types.items():
            wanted = (obs["donor_id"] == donor) & (obs["batch"] == batch) & (obs["cell_type"] == cell_type)
            assert rows.tolist() == np.flatnonzero(wanted).tolist()


def test_report_says_how_to_build_it_again(atlases, tmp_path):
    done = build(
        *words(atlases[:2]),
        "--out",
        tmp_path / "out",
        *SIZES,
        "--seed",
        3,
        "--rank",
        "hvg",
        "--hvg-genes",
        9,
        "--drop-genes",
        "ribosomal,mitochondrial",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["command"] == (
        "python launch/build.py --h5ad four.h5ad --h5ad one.h5ad --seed 3 --min-cells 3 --max-cells 5 --puzzles-per-n 5 "
        "--test-puzzles-per-n 3 --rank hvg --hvg-genes 9 --drop-genes ribosomal,mitochondrial --out DIR"
    )
    assert report["files"][0]["values"] == "counts" and len(report["files"][0]["sha256"]) == 64
    again = report["command"].replace("four.h5ad", str(atlases[0])).replace("one.h5ad", str(atlases[1])).split()[2:]
    done = build(*again[:-1], tmp_path / "again")
    assert done.returncode == 0 and contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_build_takes_the_place_of_one_in_another_format(atlases, tmp_path):
    out = tmp_path / "out"
    for form, ends in (
        ("parquet", {".parquet"}),
        ("jsonl", {".jsonl"}),
        ("both", {".parquet", ".jsonl"}),
        ("parquet", {".parquet"}),
    ):
        out.mkdir(exist_ok=True)
        (out / "notes.jsonl").write_text("mine")
        done = build(*words(atlases[:1]), "--out", out, *SIZES, "--format", form)
        assert done.returncode == 0, done.stderr
        expected = {f"{split}{end}" for split in ("train", "test", "unseen") for end in ends}
        assert set(os.listdir(out)) == expected | {"notes.jsonl", "report.json", "labels.json"}


def test_an_empty_split_has_the_columns_and_types_of_a_filled_one(tmp_path, atlases):
    import pyarrow.parquet as parquet

    splits, report = build_puzzles(atlases[:1], SMALL)
    write_build(tmp_path / "out", splits, report)
    schemas = {split: parquet.read_schema(tmp_path / f"out/{split}.parquet") for split in splits}
    assert not splits["unseen"] and schemas["unseen"] == schemas["train"] == schemas["test"]
    assert {"cell_ids", "donor", "id"} <= set(schemas["unseen"].names)
    assert parquet.read_table(tmp_path / "out/unseen.parquet").num_rows == 0


def test_what_is_renamed_into_place_is_on_disk(tmp_path, atlases, monkeypatch):
    flushed, fsync = set(), os.fsync

    def watched(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    splits, report = build_puzzles(atlases[:1], SMALL)
    monkeypatch.setattr(os, "fsync", watched)
    write_build(tmp_path / "out", splits, report, ("parquet", "jsonl"))
    assert {path.stat().st_ino for path in (tmp_path / "out").iterdir()} <= flushed


def test_the_report_of_a_build_comes_last(tmp_path, monkeypatch):
    """Whoever finds it finds every split (launch/demo.py looks for it alone)."""
    order, replace = [], os.replace

    def noted(source, target):
        order.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    write_build(tmp_path / "out", {"unseen": [], "train": [], "test": []}, {"options": {}})
    assert (
        sorted(order) == ["report.json", "test.parquet", "train.parquet", "unseen.parquet"]
        and order[-1] == "report.json"
    )
