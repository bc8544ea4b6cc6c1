"""The demo as a command: a tiny run of every stage on two files, stopped in the middle and continued."""

import json

import pytest
import yaml

from data.puzzles import read_puzzles, read_rows
from launch.demo import DemoConfig, flags, training_files
from launch.stages import run_stage
from tests.helpers.commands import run_command, succeed

BUILD = ["min-cells=3", "max-cells=3", "top-genes=8", "puzzles-per-n=24", "test-puzzles-per-n=6"]


def test_options_become_words_of_a_command():
    assert flags(("teacher-voice=plain", "constant=tissue=blood", "autocast")) == [
        *("--teacher-voice", "plain"),
        *("--constant", "tissue=blood"),
        "--autocast",
    ]


def test_a_run_of_one_file_trains_on_it_alone():
    assert [path.name for path in training_files(DemoConfig(out="o"))] == ["train.parquet", "traces.jsonl"]
    both = training_files(DemoConfig(out="o", cells_h5ad="b.h5ad"))
    assert [path.name for path in both] == ["train_both.parquet", "traces_both.jsonl"]


def test_a_model_that_is_not_there_is_refused(tmp_path):
    done = run_command("demo", "--out", tmp_path / "run", "--model", tmp_path / "none")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert f"--model {tmp_path / 'none'}: no checkpoint there; `make smollm2` brings SmolLM2's" in done.stderr


@pytest.mark.vllm
@pytest.mark.slow(60)
@pytest.mark.timeout(3600)  # twenty processes, one after the other
def test_a_run_on_two_files_evaluates_held_out_cells_too(tmp_path):
    """A policy from scratch stands for the pretrained one: the path is the same, and it answers badly in seconds."""
    atlas, cells = tmp_path / "atlas.h5ad", tmp_path / "cells.h5ad"
    for seed, file in enumerate((atlas, cells)):
        succeed("simulate", "--out", file, "--donors", 8, "--types", 12, "--seed", seed)
    grpo = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_prompt_tokens": 192, "max_response_tokens": 12}
    grpo |= {"lora_rank": 4, "lora_alpha": 8, "lr": 1e-3, "insist": True}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    settings = {"out": str(tmp_path / "run"), "h5ad": str(atlas), "cells_h5ad": str(cells), "build": BUILD}
    settings |= {
        "cells_build": [*BUILD, "split=cell", "test-fraction=0.3"],
        "hidden": 128,
        "layers": 1,
        "eval_puzzles": 4,
    }
    settings |= {"distill": ["teacher-voice=plain", "teacher-glance=0.5"], "grpo_recipe": str(tmp_path / "grpo.yaml")}
    settings |= {"sft": ["lora-rank=0", "batch-size=16"], "sft_epochs": 1}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(settings))
    printed = succeed("demo", "--recipe", tmp_path / "demo.yaml", timeout=3000)
    run = tmp_path / "run"
    train, traces = run / "train_both.parquet", run / "traces_both.jsonl"
    halves = [read_puzzles(run / folder / "train.parquet") for folder in ("puzzles", "cells")]
    both = read_puzzles(train)
    assert [puzzle.cells for puzzle in both] == [puzzle.cells for half in halves for puzzle in half]
    assert [puzzle.id for puzzle in both[23:26]] == ["train-000023", "cells-train-000000", "cells-train-000001"]
    assert {row["assistant_msg"].split("\n")[0] for row in read_rows(traces)} == {
        "<think>At first sight:",
        "<think>By their marker genes:",
    }
    assert read_puzzles(run / "puzzles/cells.parquet") == read_puzzles(run / "cells/test.parquet")
    summary = json.loads((run / "summary.json").read_text())
    assert {stage: set(summary[stage]) for stage in ("base", "sft", "grpo")} == dict.fromkeys(
        ("base", "sft", "grpo"), {"test", "cells"}
    )
    assert set(summary["baselines"]) == {"random", "markers", "nearest", "nearest-assigned"}
    assert all(set(of_split) == {"test", "cells"} for of_split in summary["baselines"].values())
    assert "markers           cells" in printed
    compared = json.loads((run / "eval/grpo/cells/metrics.json").read_text())
    assert {"difference", "interval"} <= set(compared["compare"]["metrics"]["batch_accuracy"])
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["unit"], status["step"], status["steps"]) == ("finished", "part", 6, 6)
    page = (run / "report.html").read_text()
    assert "This run: held-out real cells" in page and "marker table, one to one" in page
    # the same command finds all stages done
    assert "already holds a finished demo" in succeed("demo", "--recipe", tmp_path / "demo.yaml")


def test_a_stage_that_leaves_no_result_has_been_stopped(tmp_path, capsys):
    """A trainer that gets SIGTERM saves and exits with 0: what comes after it must not begin."""
    with pytest.raises(SystemExit) as ended:
        run_stage("atlas", tmp_path / "none", "simulate", out=tmp_path / "a.h5ad", donors=6, types=12, cells_per_type=2)
    assert ended.value.code == 143 and "[atlas] stopped; start the same command again" in capsys.readouterr().err
