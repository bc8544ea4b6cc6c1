"""Runs with --distill-failures: what they record, replay, resume, ranks; and the teacher against transformers."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.prompts import showing_an_answer
from data.puzzles import read_puzzles
from tests.helpers.commands import SMALL_GRPO, run_command, succeed
from trainer.model.opening import open_checkpoint


@pytest.fixture(scope="module")
def options(pipeline, tmp_path_factory) -> tuple:
    """A random model never answers a puzzle: here an answer is right when its length is even."""
    file = tmp_path_factory.mktemp("reward") / "even.py"
    file.write_text(
        "from reward import Reward\n\n"
        "def even(completion, puzzle):\n"
        "    right = float(len(completion) % 2 == 0)\n"
        "    return Reward(total=right, parts={'batch_accuracy': right})\n"
    )
    data = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet")
    more = ("--engine", "torch", "--date", "2026-11-26", "--beta", 0.1, "--distill-failures", 0.5)
    return (*data, "--reward", f"{file}:even", *SMALL_GRPO, *more)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """Three steps in one process, every step kept."""
    out = tmp_path_factory.mktemp("whole") / "run"
    more = ("--distill-schedule", "linear", "--save-steps", "every:1", "--save-every", 1)
    succeed("grpo", *options, *more, "--out", out, "--steps", 3)
    return out


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow(4)
def test_a_run_says_what_it_taught(whole):
    steps, rows = rows_of(whole / "metrics.jsonl"), rows_of(whole / "rollouts.jsonl")
    assert [step["distill/weight"] for step in steps] == pytest.approx([0.5, 1 / 3, 1 / 6])
    for step in steps:
        of_step = [row for row in rows if row["step"] == step["step"]]
        taught = [row for row in of_step if "taught_by" in row]
        assert step["distill/responses"] == pytest.approx(len(taught) / 12) and step["distill/too_long"] == 0
        groups = [of_step[i : i + 3] for i in range(0, 12, 3)]
        for group_ in groups:
            right = [row["response"] for row in group_ if row["reward"] == 1]
            for row in group_:
                assert row.get("taught_by") == (right[0] if right and row["reward"] == 0 else None)
    assert any(step["distill/responses"] > 0 and step["distill/loss"] > 0 for step in steps)


def test_the_teacher_is_the_policy_that_sees_the_right_answer(pipeline, whole):
    """In step 1 the adapter is 0, so transformers' own forward pass of the base gives the teacher's numbers."""
    bundle = whole / "steps/step-000001"
    content, tensors = json.loads((bundle / "bundle.json").read_text()), load_file(bundle / "tensors.safetensors")
    (plan,) = [rank["micro_batches"] for rank in content["ranks"]]
    assert len(plan) == 1
    puzzles = {p.id: p for p in read_puzzles(pipeline / "puzzles/train.parquet")}
    chat = open_checkpoint(str(pipeline / "base")).chat
    model = AutoModelForCausalLM.from_pretrained(pipeline / "base").eval()
    responses, checked, differences = content["ranks"][0]["responses"], 0, []
    for place, number in enumerate(plan[0]["rows"]):
        row = responses[number]
        weights = tensors["0.0.teacher_weight"][place]
        if "taught_by" not in row:
            assert not weights.any()
            continue
        first = number - number % 3
        sibling = responses[first + row["taught_by"] - 1]
        prompt = chat.prompt_ids(showing_an_answer(puzzles[row["puzzle_id"]].chat(), sibling["completion"]))
        ids = torch.tensor([prompt + row["response_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(tensors["0.0.teacher"][place][: len(own)], own, rtol=0, atol=1e-4)
        assert weights[: len(own)].tolist() == [0.5] * len(own) and not weights[len(own) :].any()
        differences += (torch.tensor(row["sampler_logprobs"]) - own).tolist()
        checked += 1
    assert checked > 0
    assert rows_of(whole / "metrics.jsonl")[0]["distill/kl"] == pytest.approx(
        sum(differences) / len(differences), abs=1e-4
    )


def replay(*arguments: object) -> tuple[int, str]:
    from launch.replay import main

    threads = torch.get_num_threads()
    done = CliRunner().invoke(main, [str(word) for word in arguments])
    torch.set_num_threads(threads)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.output


def test_a_step_is_replayed_bit_for_bit_with_its_ledger(whole, tmp_path):
    bundle = whole / "steps/step-000002"
    responses = json.loads((bundle / "bundle.json").read_text())["ranks"][0]["responses"]
    taught = next(i for i, row in enumerate(responses) if "taught_by" in row)
    code, text = replay(bundle, "--ledger", tmp_path / "tokens.csv", "--row", taught)
    assert code == 0, text
    for name in ("loss", "gradient_hash"):
        assert re.search(rf"(?m)^{name} +recorded .*equal$", text), name
    assert re.search(r"distillation weight x \(new - teacher\)\^2 / 2, teacher -", text)
    assert re.search(r"distillation of \d+ wrong responses: \d+ tokens, share \+", text)
    with open(tmp_path / "tokens.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    with_teacher = [row for row in rows if row["teacher_logprob"]]
    assert {row["row"] for row in with_teacher} == {
        str(i) for i, response in enumerate(responses) if "taught_by" in response
    }
    weight = torch.tensor(1 / 3).item()  # as float32 holds it
    for row in rows:  # every share from its factors
        number = {name: float(row[name]) for name in ("weight", "surrogate", "correction", "kl", "logprob")}
        term = weight * (number["logprob"] - float(row["teacher_logprob"])) ** 2 / 2 if row["teacher_logprob"] else 0
        assert float(row["distillation"]) == pytest.approx(term, rel=1e-9, abs=1e-15)
        share = number["weight"] * (number["surrogate"] * number["correction"] + 0.1 * number["kl"] + term)
        assert float(row["contribution"]) == pytest.approx(share, rel=1e-9, abs=1e-15)
    metrics = rows_of(whole / "metrics.jsonl")[1]
    assert math.fsum(float(row["contribution"]) for row in rows) == pytest.approx(metrics["loss"], abs=1e-6)
    assert math.fsum(float(row["weight"]) * float(row["distillation"]) for row in rows) == pytest.approx(
        metrics["distill/loss"], rel=1e-5
    )


@pytest.mark.slow(5)
@pytest.mark.parametrize("layout", [("--packing", "plain", "--micro-tokens", 100), ("--shard", "fsdp")])
def test_two_ranks_in_another_layout_give_the_same_numbers(options, whole, tmp_path, layout):
    """Under fsdp a rank with fewer lessons than the other, or none, goes through the same layers."""
    more = (*layout, "--distill-schedule", "linear")
    succeed("grpo", *options, *more, "--out", tmp_path / "two", "--steps", 3, ranks=2)
    for one, two in zip(rows_of(whole / "metrics.jsonl"), rows_of(tmp_path / "two/metrics.jsonl"), strict=True):
        assert one["reward"] == two["reward"] and one["distill/responses"] == two["distill/responses"]
        for key in ("loss", "distill/loss", "distill/kl"):
            assert one[key] == pytest.approx(two[key], abs=1e-4), key
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


@pytest.mark.slow(6)
def test_a_resumed_run_gives_the_same_bytes(options, tmp_path):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    succeed("grpo", *options, "--out", unbroken, "--steps", 3)
    succeed("grpo", *options, "--out", resumed, "--steps", 2)
    succeed("grpo", *options, "--out", resumed, "--steps", 3, "--resume")
    for name in ("metrics.jsonl", "rollouts.jsonl", "checkpoints/step-000003/adapter_model.safetensors"):
        assert (resumed / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_a_reward_without_the_part_ends_the_run_in_one_sentence(options, tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("def even(completion, puzzle):\n    return float(len(completion) % 2)\n")
    done = run_command("grpo", *options, "--out", tmp_path / "run", "--steps", 1, "--reward", f"{file}:even")
    assert done.returncode == 2 and "does not say which responses are right" in done.stderr
