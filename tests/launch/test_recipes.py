"""The recipes of published objectives: what they set, put after another recipe, and what a run with them computes."""

import json

import pytest

from launch.options import resolve
from tests.helpers.commands import SMALL_GRPO, run_command, succeed
from trainer.advantages import overlong_penalty
from trainer.config import GrpoConfig

OBJECTIVES = ("dr_grpo", "rloo", "gspo", "dapo", "cispo", "tis")
SMALL = (*SMALL_GRPO, "--engine", "torch", "--reward-workers", 0, "--steps", 2, "--save-steps", "every:1")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_goes_on_top_of_another_recipe(name):
    demo, both = (resolve(GrpoConfig, recipes, {}) for recipes in (["demo"], ["demo", name]))
    changed = {key for key, value in vars(both).items() if value != vars(demo)[key]}
    sizes = {"model", "puzzles", "steps", "prompts_per_step", "group_size", "max_response_tokens", "lora_rank", "lr"}
    assert changed and not changed & sizes
    assert resolve(GrpoConfig, ["demo", name], {"lr": 0.5}).lr == 0.5, "a flag wins over both"
    over = resolve(GrpoConfig, [name], {"preset": "verl"})
    assert over.dual_clip == (None if name == "cispo" else 3), "of the preset, unless it would bound another surrogate"


def test_the_later_recipe_wins(tmp_path):
    for name, steps in (("a", 3), ("b", 5)):
        (tmp_path / f"{name}.yaml").write_text(f"steps: {steps}\n" + ("seed: 7\n" if name == "a" else ""))
    both = resolve(GrpoConfig, [tmp_path / "a.yaml", tmp_path / "b.yaml"], {})
    assert (both.steps, both.seed) == (5, 7)


@pytest.fixture
def words(pipeline, tmp_path) -> tuple:
    file = tmp_path / "short.py"
    file.write_text("def fewer_letters(completion, puzzle):\n    return -len(completion) / 50\n")
    data = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run")
    return (*data, "--reward", f"{file}:fewer_letters", *SMALL)


@pytest.mark.slow(3)
def test_dapo_penalises_length_and_rescoring_adds_the_same(words, tmp_path):
    succeed("grpo", "--recipe", "dapo", *words, "--overlong-buffer", 0.5)
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        penalty = overlong_penalty(len(row["response_ids"]), 16, 0.5)
        assert row["parts"]["overlong_penalty"] == penalty
        assert row["reward"] == pytest.approx(-len(row["completion"]) / 50 + penalty, abs=1e-12)
    assert min(row["parts"]["overlong_penalty"] for row in rows) == -1.0, "some are cut at 16 tokens"
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    of_first = [row["parts"]["overlong_penalty"] for row in rows if row["step"] == 1]
    assert first["rewards/overlong_penalty"] == pytest.approx(sum(of_first) / len(of_first), abs=1e-12)
    assert first["kl"] == 0 and first["dynamic_sampling/num_gen_batches"] >= 1
    reward = words[words.index("--reward") + 1]
    said = succeed("rescore", tmp_path / "run/rollouts.jsonl", "--reward", reward)
    assert "changed for 0 responses" in said, said


@pytest.mark.slow(4)
def test_cispo_runs_and_its_ledger_sums_to_the_loss(words, tmp_path):
    succeed("grpo", "--recipe", "cispo", *words, "--clip-low", 1e-4, "--clip-high", 1e-4)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any(step["clip_ratio/low_mean"] + step["clip_ratio/high_mean"] > 0 for step in steps)
    said = succeed("replay", tmp_path / "run/steps/step-000002-update-4", "--row", 0)
    assert "gradient_hash" in said and "DIFFERS" not in said
    assert "A log new" in said


def test_what_excludes_one_another_is_refused(pipeline, tmp_path):
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run")
    for more, says in (
        (("--recipe", "cispo", "--dual-clip", 3), "--dual-clip 3.0: is for --surrogate clip; unset it"),
        (("--overlong-buffer", 1), "--overlong-buffer 1.0: must be at least 0 and below 1"),
        (("--log", "tensorbord"), "--log tensorbord: 'tensorbord' is not one of tensorboard, wandb, trackio, mlflow"),
    ):
        done = run_command("grpo", *given, *more)
        assert done.returncode == 2 and says in done.stderr, done.stderr[-2000:]
