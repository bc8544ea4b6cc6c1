"""The demo as a command: what is refused before it begins, what may change when it goes on, every stage on two tiny files."""

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from data.errors import UserError
from data.options import naming, words_of
from data.processes import usable_cores
from data.prompts import ChatFormat
from data.puzzles import read_puzzles, read_rows, write_rows
from eval.demo.record import MADE, last_of, record_settings, refuse_other_settings
from eval.demo.settings import bought_already
from eval.run_files import summary_text
from launch.demo import DemoConfig, main, recipe_values, refuse_wrong_options, response_tokens, training_files
from launch.options import RECIPES, read_recipe, resolve
from launch.stages import evaluate_files, run_stage
from launch.together import write_both
from tests.helpers.commands import run_command, succeed
from trainer.config import GrpoConfig
from trainer.model.loading import load_tokenizer
from trainer.record.runfolder import ADAPTER, FREE_ON_RESUME
from trainer.start.ahead import cold_start_ranks, refuse_lengths

OF_DEMO = [
    path.stem
    for path in sorted(RECIPES.glob("*.yaml"))
    if {"h5ad", "cells_h5ad"} & set(yaml.safe_load(path.read_text()))
]
BUILD = ["min-cells=3", "max-cells=3", "top-genes=8", "puzzles-per-n=24", "test-puzzles-per-n=6"]


def test_options_become_words_of_a_command():
    assert words_of(("teacher-voice=plain", "constant=tissue=blood", "autocast")) == [
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


@pytest.mark.parametrize("recipe", [None, *OF_DEMO])
def test_the_stages_take_the_options_of_every_recipe(recipe):
    refuse_wrong_options(resolve(DemoConfig, [recipe] if recipe else [], {}))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--build", "min-cels=3"), "--build: No such option '--min-cels'"),
        (
            ("--cells-h5ad", __file__, "--cells-build", "min-cells=5", "--cells-build", "max-cells=3"),
            "--cells-build: --min-cells 5 is larger than",
        ),
        (("--cells-build", "min-cells=3"), "--cells-build: of which file? Name it with --cells-h5ad"),
        (("--distill", "teacher-voice=loud"), "--distill: Invalid value for '--teacher-voice': 'loud' is not one of"),
        (("--traces-from", "0"), "--traces-from 0: must be at least 1"),
        (("--sft", "lora-rank=many"), "--sft: Invalid value for '--lora-rank': 'many' is not a valid integer"),
        (("--hidden", "130"), "--hidden 130: must be a multiple of 8, twice --heads"),
        (("--layers", "0"), "--layers 0: must be at least 1"),
        (("--sft-epochs", "0"), "--sft-epochs 0: must be at least 1"),
        (
            ("--grpo-recipe", "smolm2_grpo"),
            "--grpo-recipe: smolm2_grpo: no such file, and not one of cispo, dapo, demo",
        ),
        (("--grpo-recipe", "pbmc"), "pbmc.yaml: no setting is called 'h5ad'"),
        (("--grpo-steps", "0"), "--grpo-steps 0: must be at least 1"),
        (("--eval-puzzles", "0"), "--eval-puzzles 0: must be at least 1"),
        (("--annotate", "cluster=leiden"), "--annotate: No such option '--cluster'"),
        (("--donors", "0"), "--donors 0 is too few: give at least 6"),
        (("--seed", "-1"), "--seed -1 is negative: give 0 or more"),
        (("--sft", "lr=banana"), "--sft lr=banana: the demo sets --lr itself; use --sft-lr"),
        (("--build", "seed=3"), "--build seed=3: the demo sets --seed itself; use --seed"),
        (
            ("--traces-from", "9", "--distill", "limit=3"),
            "--distill limit=3: the demo sets --limit itself; use --traces-from",
        ),
        (("--annotate", "max_response_tokens=9"), "the demo sets --max-response-tokens itself; use --grpo-recipe"),
    ],
)
def test_an_option_that_a_late_stage_would_refuse_is_refused_at_once(tmp_path, words, says):
    done = CliRunner().invoke(main, ["--out", str(tmp_path / "run"), *words])
    assert done.exit_code == 2 and done.output.startswith("Error: --") and says in done.output, done.output
    assert done.output.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_grpo_recipe_is_a_name_or_a_file_and_may_leave_the_response_limit_out(tmp_path):
    (tmp_path / "mine.yaml").write_text("max_response_tokens: 20\n")
    recipes = ("smollm2_grpo", "dapo", str(tmp_path / "mine.yaml"))
    assert [response_tokens(DemoConfig(grpo_recipe=recipe)) for recipe in recipes] == [256, 3000, 20]


def made(out: Path, *files: str) -> None:
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).touch()


def begin(out: Path, **settings) -> DemoConfig:
    """What the command does before its first stage."""
    config = DemoConfig(out=str(out), **settings)
    refuse_other_settings(config, recipe_values(config), FREE_ON_RESUME)
    record_settings(config, recipe_values(config))
    return config


def test_a_setting_keeps_its_value_once_something_was_made_with_it(tmp_path):
    begin(tmp_path, noise=-1.0)
    begin(
        tmp_path, noise=0.3, sft=("lora-rank=16", "autocast")
    )  # the first stage had refused the noise: nothing is made
    made(tmp_path, "atlas.h5ad", "puzzles/report.json")
    with pytest.raises(UserError) as refused:
        begin(tmp_path, noise=0.5, sft=("lora-rank=16", "autocast"))
    assert str(refused.value) == (
        f"--noise: {tmp_path} was begun with 0.3, and now gets 0.5; give the old value again, or name another --out"
    )
    free = {"notify": "true", "annotate": ("cluster-key=leiden",), "grpo_recipe": "smollm2_grpo", "sft_epochs": 1}
    begin(tmp_path, noise=0.3, sft=("lora-rank=32", "autocast"), **free)  # no cold start is there yet
    made(tmp_path, "sft/model/config.json")
    with pytest.raises(
        UserError, match="--sft: .* was begun with autocast, lora-rank=32, and now gets lora-rank=8; give"
    ):
        begin(tmp_path, noise=0.3, sft=("lora-rank=8",), **free)
    begin(tmp_path, noise=0.3, sft=("save-every=5", "autocast", "lora-rank=32"), **free)  # checkpoints change no model
    with pytest.raises(UserError, match="--sft-epochs: .* was begun with 1, and now gets 3; give the old value"):
        begin(tmp_path, noise=0.3, sft=("lora-rank=32", "autocast"))


def test_of_the_grpo_recipe_the_values_count_and_not_its_name(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 1.0e-3\nmax_response_tokens: 20\nsteps: 5\n")
    out = tmp_path / "run"
    begin(out, grpo_recipe=str(mine))
    made(out, "eval/base/test/metrics.json")
    same = tmp_path / "same.yaml"
    same.write_text("lr: 0.001\nmax_response_tokens: 20\nsteps: 9\nsave_every: 1\n")
    begin(out, grpo_recipe=str(same))  # GRPO has not ended, and its --resume takes more steps
    made(out, "grpo/finished.json")
    with pytest.raises(UserError, match="--grpo-steps: .* was begun with 9, and now gets 5; give the old value"):
        begin(out, grpo_recipe=str(mine))
    begin(out, grpo_recipe=str(mine), grpo_steps=9)
    mine.write_text("lr: 1.0e-3\nmax_response_tokens: 30\nsteps: 9\n")
    with pytest.raises(UserError, match="--grpo-recipe max-response-tokens: .* begun with 20, and now gets 30; give"):
        begin(out, grpo_recipe=str(mine))


def test_what_a_finished_stage_was_made_with_may_not_change_unseen(tmp_path):
    """decay_steps may change while a run goes on, and --base of a teacher is no --base of GRPO."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 1.0e-3\nmax_response_tokens: 20\nsteps: 5\ndecay_steps: 2\n")
    given = {"grpo_recipe": str(mine), "distill": ("base=B1",)}
    out = tmp_path / "run"
    begin(out, **given)
    made(out, "traces.jsonl")
    mine.write_text(mine.read_text().replace("decay_steps: 2", "decay_steps: 3"))
    begin(out, **given)
    made(out, "grpo/finished.json")
    mine.write_text(mine.read_text().replace("decay_steps: 3", "decay_steps: 0"))
    with pytest.raises(UserError, match="--grpo-recipe: .* was begun with decay_steps=3, and now gets decay_steps=0"):
        begin(out, **given)
    mine.write_text(mine.read_text().replace("decay_steps: 0", "decay_steps: 3"))
    with pytest.raises(UserError, match="--distill: .* was begun with base=B1, and now gets base=B2"):
        begin(out, **given | {"distill": ("base=B2",)})
    begin(out, **given | {"distill": ("base=B1", "reward-workers=4", "memory-fraction=0.3")})  # how the machine is used


def test_a_folder_without_a_record_goes_on(tmp_path):
    """One of an earlier version, or of launch/ablate.py: nobody knows what it was made with, so nothing is claimed."""
    made(tmp_path, "atlas.h5ad")
    begin(tmp_path, noise=0.3)
    assert not (tmp_path / "demo.json").exists()
    begin(tmp_path, noise=0.5)


def test_every_recorded_setting_is_one_of_the_command():
    assert {name.partition(" ")[0] for name in MADE} <= set(vars(DemoConfig()))
    assert set(vars(DemoConfig())) - set(MADE) == {"out", "annotate", "notify"}


@pytest.mark.vllm
@pytest.mark.slow(60)
@pytest.mark.timeout(3600)  # twenty processes, one after the other
def test_a_run_on_two_files_evaluates_held_out_cells_too(tmp_path):
    """The path of `make smollm2`; a policy from scratch stands for the pretrained one, and answers badly in seconds."""
    atlas, cells, model = tmp_path / "atlas.h5ad", tmp_path / "cells.h5ad", tmp_path / "model"
    for seed, file in enumerate((atlas, cells)):
        succeed("simulate", "--out", file, "--donors", 8, "--types", 12, "--seed", seed)
    succeed("build", "--h5ad", atlas, "--out", tmp_path / "words", *words_of(BUILD))
    succeed("create_policy", "--puzzles", tmp_path / "words/train.parquet", "--out", model, "--layers", 1)
    grpo = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_prompt_tokens": 192, "max_response_tokens": 12}
    grpo |= {"lora_rank": 4, "lora_alpha": 8, "lr": 1e-3, "insist": True}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    settings = {"out": str(tmp_path / "run"), "model": str(model), "h5ad": str(atlas), "cells_h5ad": str(cells)}
    settings |= {"build": BUILD, "cells_build": [*BUILD, "split=cell", "test-fraction=0.3"], "eval_puzzles": 4}
    settings |= {"distill": ["teacher-voice=plain", "teacher-glance=0.5"], "grpo_recipe": str(tmp_path / "grpo.yaml")}
    settings |= {"sft": ["lora-rank=4", "lora-alpha=8", "batch-size=16", "holdout=0.1"], "sft_epochs": 1}
    settings |= {"annotate": ["cluster-key=cell_type", "screens=1", "samples=1", "max-donors=1"]}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(settings))
    done, run = run_command("demo", "--recipe", tmp_path / "demo.yaml", timeout=3000), tmp_path / "run"
    printed = done.stdout
    # the last stage: what this policy answers cannot label a cluster, and the run has its numbers and its page all the same
    assert done.returncode == 1 and "none of 17 answers can be used" in done.stderr, done.stderr[-6000:]
    assert f"[annotate] $ python launch/annotate.py {cells} --cluster-key cell_type --screens 1" in printed
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
    assert not (run / "base").exists() and re.search(r"^SFT {.*}  0\.\d min left$", printed, re.MULTILINE)
    before, merged = (load_file(folder / "model.safetensors") for folder in (model, run / "sft/model"))
    learnt = {name for name, tensor in merged.items() if not tensor.equal(before[name])}
    assert learnt and all(name.endswith("proj.weight") for name in learnt), "of the adapter nothing else is merged"
    assert list((run / "sft/checkpoints").glob(f"*/{ADAPTER}")) and not (run / "sft/model" / ADAPTER).exists()
    summary = json.loads((run / "summary.json").read_text())
    assert "seed" in summary["run"]["config"] and "notify" not in summary["run"]["config"], "it may hold a key"
    assert {stage: set(summary[stage]) for stage in ("base", "sft", "grpo")} == dict.fromkeys(
        ("base", "sft", "grpo"), {"test", "cells"}
    )
    assert set(summary["baselines"]) == {"random", "markers", "nearest", "nearest-assigned"}
    assert all(set(of_split) == {"test", "cells"} for of_split in summary["baselines"].values())
    assert "markers           cells" in summary_text(run)
    compared = json.loads((run / "eval/grpo/cells/metrics.json").read_text())
    assert {"difference", "interval"} <= set(compared["compare"]["metrics"]["batch_accuracy"])
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["unit"], status["step"], status["steps"]) == ("failed", "part", 5, 6)
    page = (run / "report.html").read_text()
    assert "This run: held-out real cells" in page and "marker table, one to one" in page
    # all stages are done for who wants no annotation; what is made keeps its settings
    recipe, settings["annotate"] = tmp_path / "without.yaml", []
    recipe.write_text(yaml.safe_dump(settings))
    assert "already holds a finished demo" in succeed("demo", "--recipe", recipe)
    done = run_command("demo", "--recipe", tmp_path / "demo.yaml", "--eval-puzzles", 3)
    assert done.returncode == 2 and f"--eval-puzzles: {run} was begun with 4, and now gets 3; give" in done.stderr


@pytest.fixture
def grown(pipeline, tmp_path):
    """(settings of GRPO as a demo reads them, traces) of the pipeline, with other lengths."""

    def settings(**changed) -> GrpoConfig:
        lengths = {"max_prompt_tokens": 400, "max_response_tokens": 200, "prompts_per_step": 4, "lora_rank": 8}
        files = {"model": str(pipeline / "base"), "puzzles": str(pipeline / "puzzles/train.parquet")}
        return GrpoConfig(**files, **lengths | changed, out=str(tmp_path / "grpo"))

    return settings, pipeline / "traces.jsonl"


def test_what_grpo_would_refuse_is_refused_before_the_cold_start(grown):
    settings, traces = grown
    assert refuse_lengths(settings(), traces) == []
    puzzles = read_puzzles(settings().puzzles)
    with (
        pytest.raises(UserError, match=r"--grpo-recipe: 0 of \d+ prompts fit its max_prompt_tokens 9 \(longest \d+\)"),
        naming("--grpo-recipe"),
    ):
        refuse_lengths(settings(max_prompt_tokens=9), traces)
    assert "traces are longer" in refuse_lengths(settings(max_response_tokens=9), traces)[0]
    with (
        pytest.raises(UserError, match="--grpo-recipe: --max-prompt-tokens 400 .* more than the model's"),
        naming("--grpo-recipe"),
    ):
        refuse_lengths(settings(max_response_tokens=100_000), traces)
    chat = ChatFormat(load_tokenizer(settings().model), settings().model)
    lengths = sorted(len(chat.prompt_ids(puzzle.chat())) for puzzle in puzzles)
    said = refuse_lengths(settings(max_prompt_tokens=lengths[-1] - 1), traces)
    assert len(said) == 1 and f"of {len(puzzles)} prompts are longer than GRPO's max_prompt_tokens" in said[0]


def test_a_cold_start_has_one_process_where_two_do_not_fit(pipeline, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cores, room = usable_cores(), psutil.virtual_memory()
    assert cold_start_ranks(pipeline / "base") == min(2, cores)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room._replace(available=1 << 20))
    assert cold_start_ranks(pipeline / "base") == 1


def test_a_model_that_a_stage_would_refuse_is_refused_first(pipeline, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pipeline / "base", model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"num_experts": 8}))
    done = CliRunner().invoke(main, ["--out", str(tmp_path / "run"), "--model", str(model)])
    assert done.exit_code == 2 and "a mixture of experts (num_experts 8)" in done.output, done.output
    assert not (tmp_path / "run").exists()


def test_columns_of_the_annotation_are_looked_up_first(pipeline, tmp_path):
    words = ["--out", str(tmp_path / "run"), "--h5ad", str(pipeline / "atlas.h5ad"), "--build", "min-cells=3"]
    done = CliRunner().invoke(main, [*words, "--annotate", "cluster-key=louvain"])
    assert done.exit_code == 2 and "--annotate: " in done.output and "no obs column 'louvain'" in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow(8)
def test_a_build_without_held_out_puzzles_is_refused_before_the_cold_start(tmp_path):
    atlas, run = tmp_path / "atlas.h5ad", tmp_path / "run"
    succeed("simulate", "--out", atlas, "--donors", 6, "--types", 12, "--cells-per-type", 4)
    words = [word for item in (*BUILD, "test-fraction=0") for word in ("--build", item)]
    done = run_command("demo", "--out", run, "--h5ad", atlas, *words)
    assert done.returncode == 2 and "has no held-out puzzle to evaluate on; give a test-fraction above 0" in done.stderr
    assert (run / "base/config.json").is_file() and not (run / "sft").exists()


def test_responses_that_cost_something_are_not_asked_for_again(tmp_path):
    traces, bought = tmp_path / "traces.jsonl", DemoConfig(distill=("teacher=openai", "model=m"))
    assert bought_already(traces, bought) == []
    made(tmp_path, "traces.raw.jsonl")
    assert bought_already(traces, bought) == ["--resume"]
    for free in ((), ("teacher=vllm", "teacher=embedded")):
        assert bought_already(traces, DemoConfig(distill=free)) == []


def test_a_demo_whose_page_is_missing_is_not_finished(tmp_path):
    made(tmp_path, "summary.json", "annotate/labelled.csv")
    done = CliRunner().invoke(main, ["--out", str(tmp_path), "--grpo-recipe", "none"])
    assert done.exit_code == 2 and "none: no such file" in done.output


def test_a_finished_demo_is_not_taken_for_one_with_other_settings(tmp_path):
    begin(tmp_path, seed=0)
    made(tmp_path, "atlas.h5ad", "summary.json", "report.html", "annotate/labelled.csv")
    same, other = (CliRunner().invoke(main, ["--out", str(tmp_path), "--seed", seed]) for seed in "01")
    assert same.exit_code == 0 and "already holds a finished demo" in same.output
    assert other.exit_code == 2 and "--seed: " in other.output and "was begun with 0, and now gets 1" in other.output


def test_a_folder_with_a_checkpoint_is_not_taken_for_a_demo(tmp_path):
    made(tmp_path, "config.json", "labels.json")
    done = CliRunner().invoke(main, ["--out", str(tmp_path)])
    assert done.exit_code == 2 and "holds a checkpoint, or a run of a trainer (config.json)" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "labels.json"]


def test_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert read_recipe(GrpoConfig, "demo")["lora_rank"] > 0


def test_a_stage_that_is_killed_is_said_to_be(tmp_path, capsys, monkeypatch):
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr("launch.stages.LAUNCH", tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_stage("sft", None, "dies")
    said = capsys.readouterr().err
    assert ended.value.code == 137 and "[sft] was killed by SIGKILL (the system does that when memory is full)" in said


def test_an_evaluation_goes_on_after_the_splits_that_it_has(tmp_path, monkeypatch):
    asked, last = [], []
    monkeypatch.setattr(
        "launch.stages.run_stage",
        lambda stage, result, *words, **flags: last.append(result) or asked.append("--resume" in words) or {},
    )
    files = ["a/test.parquet", "a/unseen.parquet"]
    evaluate_files(tmp_path, "evaluate sft", files, 4, model="m")
    made(tmp_path, "test/metrics.json")
    evaluate_files(tmp_path, "evaluate sft", files, 4, model="m")
    evaluate_files(tmp_path, "evaluate random", files, 4, baseline="random")  # in seconds, and it has no --resume
    assert asked == [False, True, False]
    assert set(last) == {tmp_path / "average.json"}, "what the command writes last"


def test_a_stage_that_leaves_no_result_has_been_stopped(tmp_path, capsys):
    """A trainer that gets SIGTERM saves and exits with 0: what comes after it must not begin."""
    with pytest.raises(SystemExit) as ended:
        run_stage("atlas", tmp_path / "none", "simulate", out=tmp_path / "a.h5ad", donors=6, types=12, cells_per_type=2)
    assert ended.value.code == 143 and "[atlas] stopped; start the same command again" in capsys.readouterr().err


def test_two_builds_put_together_follow_their_parts(tmp_path):
    parts = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for part in parts:
        write_rows(part, [{"id": "1", "text": "old"}])
    write_both(parts, tmp_path / "both.jsonl")
    before = (tmp_path / "both.jsonl").stat()
    write_both(parts, tmp_path / "both.jsonl")
    assert (tmp_path / "both.jsonl").stat().st_ino == before.st_ino
    write_rows(parts[0], [{"id": "1", "text": "new"}])
    write_both(parts, tmp_path / "both.jsonl")
    parts[1].unlink()
    write_both(parts, tmp_path / "both.jsonl")
    assert [row["text"] for row in read_rows(tmp_path / "both.jsonl")] == ["new", "old"]


def test_a_finished_run_without_its_checkpoints_is_named(tmp_path):
    assert last_of([tmp_path / "a", tmp_path / "b"], tmp_path) == tmp_path / "b"
    with pytest.raises(UserError, match="is finished and holds no checkpoint; put .*checkpoints back"):
        last_of([], tmp_path)
