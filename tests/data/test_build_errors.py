"""Every mistake with .h5ad files and options gives one sentence that names it, exit code 2 and no output."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from data.build.build import build_puzzles
from data.build.settings import BuildConfig
from launch.build import main, without_effect
from launch.progress import plain_progress
from tests.data.test_build import SMALL, write_atlas
from tests.helpers.commands import ROOT


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return write_atlas(tmp_path_factory.mktemp("atlas") / "atlas.h5ad", diseases=("normal", "influenza"))


def changed(atlas, path, change):
    """A copy of the atlas after change(adata)."""
    adata = anndata.read_h5ad(atlas)
    change(adata)
    adata.write_h5ad(path)
    return path


def refusal(files, config=SMALL, **options) -> str:
    with pytest.raises(ValueError) as error:
        build_puzzles(files, dataclasses.replace(config, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_no_h5ad(tmp_path, atlas):
    assert refusal([tmp_path / "none.h5ad"]) == f"{tmp_path}/none.h5ad: no such file"
    (tmp_path / "empty.h5ad").touch()
    assert refusal([tmp_path / "empty.h5ad"]) == f"{tmp_path}/empty.h5ad: the file is empty (0 bytes)"
    (tmp_path / "text.h5ad").write_text("gene,count\nCD3D,4\n")
    assert "text.h5ad: not an .h5ad file" in refusal([tmp_path / "text.h5ad"])
    (tmp_path / "cut.h5ad").write_bytes(atlas.read_bytes()[:20000])
    assert "cut.h5ad: cannot be opened, was the download cut short?" in refusal([tmp_path / "cut.h5ad"])
    h5py.File(tmp_path / "other.h5ad", "w").create_dataset("x", data=[1])
    assert "other.h5ad: holds no 'obs' table" in refusal([tmp_path / "other.h5ad"])
    assert refusal([]) == "no .h5ad file was given; name one with --h5ad"
    assert "would both be dataset 'atlas'" in refusal([atlas, atlas])


def test_absent_columns(tmp_path, atlas):
    path = changed(
        atlas, tmp_path / "a.h5ad", lambda adata: adata.obs.rename(columns={"donor_id": "donor"}, inplace=True)
    )
    message = refusal([path])
    assert "no obs column 'donor_id' (nearest: 'donor'," in message
    assert "--donor-key COLUMN" in message and "--constant donor_id=VALUE" in message
    assert build_puzzles([path], dataclasses.replace(SMALL, donor_key="donor"))[0]["train"]
    assert "no obs column 'stage'" in refusal([atlas], development_stage_key="stage")  # optional, but the user named it
    assert (
        "var has no column 'symbol' (nearest: 'feature_name'); name the column of gene names with --gene-key"
        in refusal([atlas], gene_key="symbol")
    )
    assert "--layer can be one of X" in refusal([atlas], layer="raw")


def test_too_few_cell_types(tmp_path, atlas):
    assert "has 5 cell types, fewer than --min-cells 8" in refusal([atlas], BuildConfig())

    def one_type_per_batch(adata):
        adata.obs["batch"] = [f"{t}{i % 2}" for i, t in enumerate(adata.obs["cell_type"])]
        adata.obs.loc[adata.obs_names[0], "batch"] = "macrophage0"

    path = changed(atlas, tmp_path / "a.h5ad", one_type_per_batch)
    assert "the best, donor 'd0' batch 'macrophage0', has 2; lower --min-cells" in refusal([path])
    wide = dataclasses.replace(SMALL, max_cells=90)  # fewer sizes, no error
    assert {len(p.cells) for p in build_puzzles([atlas], wide)[0]["train"]} == {3, 4, 5}


def test_options_that_contradict(atlas):
    assert refusal([atlas], min_cells=9, max_cells=8) == "--min-cells 9 is larger than --max-cells 8"
    assert "at least 2 cells" in refusal([atlas], min_cells=1)
    assert "--puzzles-per-n 0: must be at least 1" in refusal([atlas], puzzles_per_n=0)
    assert "--test-fraction 1.0" in refusal([atlas], test_fraction=1.0)
    assert "--compat authors means --split instance" in refusal([atlas], compat="authors", split="cell")
    assert "must be NAME=VALUE" in refusal([atlas], constant=("tissue",))
    assert "no column 'tisue' is used (nearest: 'tissue'" in refusal([atlas], constant=("tisue=eye",))


def test_diseases_and_donors(tmp_path, atlas):
    message = refusal([atlas], unseen_disease=("influenzza",))
    assert message == "--unseen-disease influenzza: no cell has it (nearest: 'influenza', 'normal')"
    assert "nothing is left to train on" in refusal([atlas], unseen_disease=("influenza", "normal"))
    one = write_atlas(tmp_path / "one.h5ad", donors=1)
    assert "only donor 'd0' can give puzzles" in refusal([one])
    assert "--split cell" in refusal([one])


def test_values_and_labels(tmp_path, atlas):
    def scale(adata):
        adata.X = adata.X.toarray() - 1.0

    message = refusal([changed(atlas, tmp_path / "a.h5ad", scale)])
    assert "layer 'X' holds negative values" in message and "add its counts as a layer" in message
    assert "--allow-scaled" in message

    def spoil(adata):
        adata.X = np.full(adata.shape, np.nan, dtype=np.float32)

    assert "holds NaN" in refusal([changed(atlas, tmp_path / "a.h5ad", spoil)])

    def zero(adata):
        adata.X = adata.X * 0

    assert "every batch drawn holds a cell without an expressed gene" in refusal(
        [changed(atlas, tmp_path / "a.h5ad", zero)]
    )

    def relabel(label):
        def change(adata):
            adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"mast cell": label})

        return change

    assert "'mast|cell' holds '|'" in refusal([changed(atlas, tmp_path / "a.h5ad", relabel("mast|cell"))])
    assert "'B cell' and 'b cell' differ only in case" in refusal(
        [changed(atlas, tmp_path / "a.h5ad", relabel("b cell"))]
    )


def test_all_cells_dropped(tmp_path, atlas):
    def nuclei(adata):
        adata.obs["suspension_type"] = "nucleus"

    path = changed(atlas, tmp_path / "nuclei.h5ad", nuclei)
    assert "all 320 cells were dropped (320 because suspension_type is not 'cell')" in refusal([path])
    splits, report = build_puzzles([atlas, path], SMALL)  # another file gives puzzles: a note, no error
    assert {p.meta["dataset"] for p in splits["train"]} == {"atlas"}
    assert report["files"][1]["notes"] == [
        "gives no puzzle: all 320 cells were dropped (320 because suspension_type is not 'cell'); "
        "keep them with --suspension cell,nucleus"
    ]


def test_puzzles_with_an_empty_cell_are_left_out_and_counted(tmp_path, atlas):
    def blank(adata):
        adata.X = adata.X.multiply((np.arange(adata.n_obs) % 40 != 3)[:, None]).tocsr()

    path = changed(atlas, tmp_path / "a.h5ad", blank)
    splits, report = build_puzzles([path], SMALL)
    left_out = report["files"][0]["splits"]["train"]["puzzles_with_a_cell_without_genes"]
    assert left_out > 0 and len(splits["train"]) == 18 - left_out
    assert all(all(p.cells) for p in splits["train"])


@pytest.mark.slow(2)
def test_command_exits_with_2_and_leaves_nothing(tmp_path, atlas):
    (tmp_path / "text.h5ad").write_text("hello")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "launch/build.py", "--out", str(tmp_path / "out"), "--seed", "0"]
    for arguments, sentence in [
        (["--h5ad", tmp_path / "text.h5ad"], "not an .h5ad file"),
        (["--h5ad", atlas, "--gene-key", "symbol", "--min-cells", "3"], "has no column 'symbol'"),
    ]:
        done = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.h5ad"]


SIZES = ["--min-cells", "3", "--max-cells", "5", "--puzzles-per-n", "2", "--test-puzzles-per-n", "1"]


def command(*arguments, cwd=ROOT):
    words = [sys.executable, str(ROOT / "launch/build.py"), *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.mark.slow(2)
def test_the_folder_one_stands_in_and_none(tmp_path, atlas):
    here = tmp_path / "here"
    here.mkdir()
    done = command("--h5ad", atlas, "--out", ".", *SIZES, cwd=here)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(here)) == ["labels.json", "report.json", "test.parquet", "train.parquet", "unseen.parquet"]
    assert sorted(os.listdir(tmp_path)) == ["here", "here.status.json"]
    for out in ("", "/"):
        done = command("--h5ad", atlas, "--out", out, *SIZES, cwd=here)
        assert (
            done.returncode == 2
            and done.stderr == f"Error: --out {out!r}: is no folder that can be written; name one\n"
        )


def test_a_file_name_that_is_not_utf8(tmp_path, atlas):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/atl\xe4s.h5ad"))
    shutil.copy(atlas, path)
    done = command("--h5ad", path, "--out", tmp_path / "out", *SIZES)
    assert done.returncode == 2 and "s.h5ad: the file's name is not UTF-8; rename it" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_files_may_be_named_without_a_flag(tmp_path, atlas):
    """Files without a flag, as a shell expands *.h5ad. They, and --h5ad, replace the files of a recipe."""
    for name in ("a", "b"):
        adata = anndata.read_h5ad(atlas)
        adata.obs["donor_id"] = [f"{name}-{donor}" for donor in adata.obs["donor_id"]]
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    a, b = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    (tmp_path / "recipe.yaml").write_text("h5ad: [missing.h5ad]\n")

    def said(*words):
        done = CliRunner().invoke(main, [*map(str, words), "--out", str(tmp_path / "out"), *SIZES, "--workers", "1"])
        return done.output

    for words in ([a, b], ["--h5ad", a, b], [a, "--h5ad", b, "--recipe", tmp_path / "recipe.yaml"]):
        output = said(*words)
        assert "a.h5ad: " in output and "b.h5ad: " in output and "written to" in output, output
    assert "missing.h5ad: no such file" in said("--recipe", tmp_path / "recipe.yaml")
    assert "no .h5ad file was given; name one with --h5ad" in said()


def test_an_input_that_may_not_be_looked_at_is_named(tmp_path, atlas):
    long = tmp_path / f"{'x' * 300}.h5ad"
    done = command("--h5ad", atlas, "--h5ad", long, "--out", tmp_path / "out", "--workers", 2, *SIZES)
    assert done.returncode == 2 and f"{long}: cannot be read (File name too long)" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []
    done = command("--h5ad", atlas, "--out", tmp_path / ("x" * 300), *SIZES)
    assert done.returncode == 2 and "--out " in done.stderr and "cannot be written (File name too long)" in done.stderr


def test_a_pipe_that_is_closed_ends_the_build_quietly(tmp_path, atlas):
    words = [
        sys.executable,
        str(ROOT / "launch/build.py"),
        "--h5ad",
        str(atlas),
        "--out",
        str(tmp_path / "out"),
        *SIZES,
    ]
    end, start = os.pipe()
    os.close(end)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=env, stdout=start, stderr=subprocess.PIPE, text=True)
    os.close(start)
    assert done.returncode == 1 and done.stderr == ""  # its first line says what the file is, and nobody reads it
    assert os.listdir(tmp_path) == []


@pytest.mark.slow(1)
def test_options_that_do_nothing_are_told(tmp_path, atlas):
    def told(**options):
        return [note.split()[0] for note in without_effect(BuildConfig(**options))]

    assert told() == told(test_puzzles_per_n=3) == told(hvg_genes=9, rank="hvg") == []
    assert told(test_puzzles_per_n=3, split="instance", unseen_disease=("flu",)) == []  # the unseen split has this many
    assert told(test_puzzles_per_n=3, split="instance") == told(test_puzzles_per_n=3, test_fraction=0.0)
    assert told(test_puzzles_per_n=3, compat="authors", hvg_genes=9) == ["--test-puzzles-per-n", "--hvg-genes"]
    done = command("--h5ad", atlas, "--out", tmp_path / "out", *SIZES, "--hvg-genes", 9)
    assert done.stdout.startswith("note: --hvg-genes has no effect without --rank hvg\n"), done.stderr


def test_progress_off_a_terminal_is_a_line_now_and_then():
    said, times = [], iter([100.0, 110.0, 130.0, 150.0, 160.0, 170.0, 201.0])
    progress = plain_progress(said.append, lambda: next(times))
    for done in (0, 500, 1500, 2000, 3000):
        progress("reading cells", done, 6000)
    progress("looking at files", 0, 5)
    progress("looking at files", 3, 5)
    assert said == [
        "reading cells: 1,500 of 6,000 cells, 50.0 per second, 01:30 left",
        "reading cells: 3,000 of 6,000 cells, 50.0 per second, 01:00 left",
        "looking at files: 3 of 5 files, 0.1 per second, 00:20 left",
    ]


def test_a_leak_of_one_file_does_not_ask_to_leave_files_out(tmp_path):
    """Cells whose 30 genes have the same order in every donor."""
    path = tmp_path / "a.h5ad"
    atlas = anndata.read_h5ad(write_atlas(path))
    values = np.tile(np.arange(30.0, 0.0, -1.0, dtype=np.float32), (atlas.n_obs, 1))
    var = pd.DataFrame({"feature_name": [f"G{i:02d}" for i in range(30)]}, index=[f"g{i}" for i in range(30)])
    anndata.AnnData(values, obs=atlas.obs, var=var).write_h5ad(path)
    message = refusal([path], top_genes=30)
    assert message.startswith("the splits leak: ") and message.endswith("; accept it with --allow-leaks")
    assert refusal([path], top_genes=30, split="cell").endswith("; use --split donor, or accept it with --allow-leaks")
