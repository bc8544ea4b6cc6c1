"""The PPO command end to end: resume, ranks, replay, and what it refuses."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from data.errors import UserError
from tests.helpers.commands import SMALL_GRPO, kill_at, run_command, succeed
from trainer.ppo.settings import PpoConfig

SMALL = (
    *(*SMALL_GRPO, "--engine", "torch", "--critic-lr", 1e-2, "--critic-warmup", 1, "--epochs", 2, "--minibatches", 2),
    *("--beta", 0.1, "--kl-control", "adaptive", "--kl-target", 0.05, "--kl-horizon", 100, "--date", "2026-11-26"),
    *("--save-every", 2, "--micro-tokens", 250),
)


@pytest.fixture(scope="module")
def options(pipeline, tmp_path_factory) -> tuple:
    """The options of every run here; the reward can be moved by a random model: the share of short answers."""
    file = tmp_path_factory.mktemp("reward") / "short.py"
    file.write_text("def fewer_letters(completion, puzzle):\n    return -len(completion) / 50\n")
    data = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet")
    return (*data, "--reward", f"{file}:fewer_letters", *SMALL)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """Four steps in one process, every step kept."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed("ppo", *options, "--out", out, "--steps", 4, "--save-steps", "every:1")
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def replay(*arguments: object):
    """launch/replay.py in this process: (exit code, standard output, standard error)."""
    from launch.replay import main

    threads = torch.get_num_threads()
    done = CliRunner().invoke(main, [str(word) for word in arguments])
    torch.set_num_threads(threads)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.slow(4)
def test_a_run_leaves_what_its_settings_say(whole):
    steps = metrics(whole)
    assert steps[0]["grad_norm"] == 0 and steps[0]["kl"] == 0 and steps[0]["critic/lr"] == 1e-2, "critic warm-up"
    compared = ["sampling/effective_sample_size" in step for step in steps]
    assert compared == [False, True, True, True], "no policy pass, so nothing to compare the sampler with"
    assert all(step["grad_norm"] > 0 and step["critic/vf_loss"] > 0 for step in steps[1:])
    assert len({step["adapter_hash"] for step in steps}) == 4 and steps[1]["clip_ratio/high_mean"] > 0
    # the critic's head starts at 0: what it then expects moves towards the returns
    assert steps[0]["critic/values/mean"] == 0 and steps[1]["critic/values/mean"] < -0.1
    # beta follows verl's rule, with the KL that the metrics report
    beta = 0.1
    for step in steps:
        assert step["actor/reward_kl_penalty_coeff"] == pytest.approx(beta, rel=1e-12)
        error = min(max(step["actor/reward_kl_penalty"] / 0.05 - 1, -0.2), 0.2)
        beta *= 1 + error * 12 / 100
    rows = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 48 and any(row["advantage"] > 0 for row in rows) and any(row["advantage"] < 0 for row in rows)
    stored = load_file(whole / "checkpoints/step-000004/training/optimizer.safetensors")
    kinds = {name.split("/")[1] for name in stored if name.startswith("beside/")}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step", "kl_beta"}
    assert stored["beside/kl_beta"].item() == pytest.approx(beta, rel=1e-12)


@pytest.mark.slow(8)
def test_kill_and_resume_give_the_same_bytes(options, whole, tmp_path):
    # checkpointed at step 2
    kill_at("step 3/", tmp_path / "cut", "ppo", *options, "--out", tmp_path / "cut", "--steps", 4)
    succeed("ppo", *options, "--out", tmp_path / "cut", "--steps", 4, "--resume")
    names = ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step-000004/adapter_model.safetensors")
    for name in (*names, "checkpoints/step-000004/training/optimizer.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    other = run_command("ppo", *options, "--out", tmp_path / "cut", "--steps", 4, "--resume", "--gamma", 0.9)
    assert other.returncode == 2 and "--resume: gamma was 1.0" in other.stderr


@pytest.mark.slow(6)
def test_two_ranks_plain_packing_and_other_micro_batches_give_the_same_numbers(options, whole, tmp_path):
    more = ("--packing", "plain", "--micro-tokens", 100, "--save-steps", "2")
    succeed("ppo", *options, "--out", tmp_path / "two", "--steps", 3, *more, ranks=2)
    for one, two in zip(metrics(whole), metrics(tmp_path / "two"), strict=False):
        assert one["reward"] == two["reward"]
        for key in (
            "loss",
            "critic/vf_loss",
            "critic/values/mean",
            "critic/vf_explained_var",
            "actor/reward_kl_penalty",
        ):
            assert one[key] == pytest.approx(two[key], abs=1e-4), key
        for key in ("grad_norm", "critic/grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-3), key
    code, text, error = replay(tmp_path / "two/steps/step-000002-update-3")
    assert code == 0 and len(re.findall(r"_?gradient_hash +recorded .*equal\n", text)) == 2, text + error


def test_a_step_is_replayed_bit_for_bit_with_a_ledger_of_each_loss(whole, tmp_path):
    bundle = whole / "steps/step-000003-update-4"
    policy, critic, page = tmp_path / "policy.csv", tmp_path / "critic.csv", tmp_path / "step.html"
    code, text, error = replay(bundle, "--ledger", policy, "--value-ledger", critic, "--row", 2, "--html", page)
    assert code == 0, text + error
    for name in ("loss", "gradient_hash", "value_loss", "value_gradient_hash"):
        assert re.search(rf"(?m)^{name} +recorded .*equal$", text), name
    recorded = json.loads((bundle / "bundle.json").read_text())["recorded"]
    for path, name in ((policy, "loss"), (critic, "value_loss")):
        with open(path, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        assert math.fsum(float(row["contribution"]) for row in rows) == pytest.approx(recorded[name], abs=1e-6)
        assert len({row["row"] for row in rows}) == 6, "two of four groups, of three responses each"
        for row in rows:  # every share from its factors
            if name == "value_loss":
                value, old, wanted = (float(row[key]) for key in ("value", "old_value", "return"))
                clipped = min(max(value, old - 0.5), old + 0.5)
                error_ = 0.5 * max((value - wanted) ** 2, (clipped - wanted) ** 2)
                share = float(row["weight"]) * error_
            else:
                share = float(row["weight"]) * float(row["surrogate"])  # the KL is in the rewards
            assert float(row["contribution"]) == pytest.approx(share, rel=1e-9, abs=1e-15)
        if name == "loss":
            assert len({row["advantage"] for row in rows if row["row"] == "0"}) > 1, "an advantage per token"
    assert "Return: GAE with gamma 1, lambda 1" in text and "already in the rewards" in text
    html = page.read_text()
    assert html.count('"token":') == 6 and "PPO step 3, token by token" in html
    data = json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["formula"] == "weight x (surrogate x correction)" and data["advantage"].startswith(
        "one number per token"
    )


def test_a_warm_up_step_is_replayed_by_its_critic_alone(whole):
    code, text, _ = replay(whole / "steps/step-000001-update-2")
    assert code == 0 and re.search(r"value_gradient_hash +recorded .*equal", text)
    assert not re.search(r"(?m)^gradient_hash", text)
    code, _, error = replay(whole / "steps/step-000001-update-2", "--value-ledger", "x.txt")
    assert code == 2 and "--value-ledger x.txt: name a file that ends in .csv" in error


@pytest.mark.slow(3)
def test_a_critic_that_explodes_stops_the_run_and_names_the_token(options, tmp_path):
    out = tmp_path / "run"
    done = run_command("ppo", *options, "--out", out, "--steps", 3, "--critic-lr", 1e30)
    assert done.returncode == 1, done.stderr[-3000:]
    where = r"puzzle (\S+), response (\d+), token (\d+) of 16 .*"
    said = re.search(rf"Error: step 1, update 2: {where}: (\w+) is not finite", done.stderr)
    assert said and said[4] == "contribution" and "values " in done.stderr and "advantage" not in done.stderr
    code, text, _ = replay(out / "steps/step-000001-update-2")
    assert code == 0
    assert f"puzzle {said[1]}, response {said[2]}, token {said[3]}: contribution is not finite" in text


def test_settings_that_cannot_work_are_refused():
    for settings, says in (
        ({"prompts_per_step": 4, "minibatches": 3}, "--prompts-per-step 4 and --minibatches 3: the second must divide"),
        ({"kl_control": "adaptive", "kl_in": "loss"}, "--kl-control adaptive: steers the KL in the reward"),
        (
            {"kl_control": "adaptive", "prompts_per_step": 32, "group_size": 8, "kl_horizon": 51},
            "--kl-horizon 51: a step of 256 responses could make beta negative; give more than 51",
        ),
        ({"kl_control": "adaptive", "beta": 0.0}, "it needs --kl-in reward and --beta above 0"),
        ({"shard": "fsdp"}, "--shard fsdp: the critic is not sharded; use --shard none"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            PpoConfig(**settings)


@pytest.mark.slow(2)
def test_a_critic_with_another_vocabulary_is_refused(pipeline, options, tmp_path):
    succeed(
        "create_policy",
        "--puzzles",
        pipeline / "traces.jsonl",
        "--out",
        tmp_path / "other",
        "--hidden",
        32,
        "--layers",
        1,
    )
    out = tmp_path / "run"
    shutil.copytree(pipeline / "base", tmp_path / "short")
    settings = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps(settings | {"max_position_embeddings": 64}))
    for critic, says in (
        (tmp_path / "short", "has positions for 64 tokens, and --max-prompt-tokens"),
        (tmp_path / "other", "its tokenizer has another vocabulary than that of --model"),
        (tmp_path / "nowhere", "no Hugging Face checkpoint there"),
    ):
        done = run_command("ppo", *options, "--out", out, "--steps", 1, "--critic", critic)
        assert done.returncode == 2 and says in done.stderr and f"--critic {critic}" in done.stderr, done.stderr[-2000:]
        assert not out.exists()


@pytest.mark.slow(6)
def test_a_run_is_recorded_and_guarded_as_grpos(pipeline, options, tmp_path):
    """Status, notice, dtype, a damaged checkpoint, and other weights of a critic of its own."""
    out, critic, told = tmp_path / "run", tmp_path / "critic", tmp_path / "told"
    shutil.copytree(pipeline / "base", critic)
    start = (*options, "--critic", critic, "--out", out, "--eager", "--save-every", 1)
    succeed("ppo", *start, "--steps", 3, "--notify", f'echo "$RUN_STATE $RUN_STEP/$RUN_STEPS" > {told}')
    status, record = (json.loads((out / name).read_text()) for name in ("status.json", "config.json"))
    assert (status["state"], status["step"]) == ("finished", 3) and told.read_text() == "finished 3/3\n"
    assert record["settings"]["dtype"] == "float32" and record["settings"]["eager"]
    assert record["critic"] == record["model"] and "model.safetensors" in record["critic"]
    # the critic lies in the checkpoint's moments: a flipped bit there sets the checkpoint aside
    before, moments = metrics(out), out / "checkpoints/step-000003/training/optimizer.safetensors"
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    done = run_command("ppo", *start, "--steps", 3, "--resume")
    assert done.returncode == 0 and "--resume goes on from step-000002" in done.stderr, done.stderr[-2000:]
    assert metrics(out) == before
    weights = load_file(critic / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    save_file(weights, critic / "model.safetensors", {"format": "pt"})
    done = run_command("ppo", *start, "--steps", 4, "--resume")
    assert done.returncode == 2 and f"--resume: {critic / 'model.safetensors'} is another file" in done.stderr
