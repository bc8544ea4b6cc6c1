"""A model as its own teacher, with the real commands: answers through vLLM, training, a second round and call."""

import json

import pytest

from data.distill.rounds import SelfDistillConfig, record_settings
from data.errors import UserError
from data.puzzles import read_puzzles, read_rows, write_puzzles
from launch.selfdistill import evaluate
from tests.helpers.commands import run_command, succeed


def test_an_evaluation_that_was_stopped_goes_on(tmp_path, monkeypatch):
    asked = []

    def stage(name, result, *words, **flags):
        asked.append("--resume" in words)
        result.write_text("{}")

    monkeypatch.setattr("launch.selfdistill.run_stage", stage)
    config = SelfDistillConfig(model="m", puzzles="p", out=str(tmp_path), test="t.parquet")
    evaluate(config, tmp_path, tmp_path)
    (tmp_path / "predictions.partial.jsonl").touch()
    evaluate(config, tmp_path, tmp_path)
    assert asked == [False, True]


@pytest.mark.vllm
@pytest.mark.slow(105)
@pytest.mark.timeout(3600)  # a dozen processes, one after the other
def test_rounds_run_and_are_found_again(pipeline, tmp_path):
    """A cold start that has the format, one round; what is finished is not run again."""
    succeed(
        "sft",
        "--traces",
        pipeline / "traces.jsonl",
        "--model",
        pipeline / "base",
        "--out",
        tmp_path / "sft",
        "--lora-rank",
        0,
        "--epochs",
        25,
        "--batch-size",
        8,
        "--lr",
        3e-3,
        "--holdout",
        0,
    )
    words = (
        "--model",
        tmp_path / "sft/model",
        "--puzzles",
        pipeline / "puzzles/train.parquet",
        "--out",
        tmp_path / "out",
        "--test",
        pipeline / "puzzles/test.parquet",
        "--rounds",
        1,
        "--candidates",
        2,
        "--limit",
        24,
        "--lora-rank",
        0,
        "--max-response-tokens",
        64,
        "--lr",
        1e-3,
        "--batch-size",
        8,
        "--accept",
        "reward.cellpuzzles:mixed_reward",
        "--accept-at",
        0.3,
    )
    succeed("selfdistill", *words, timeout=3000)
    table = json.loads((tmp_path / "out/rounds.json").read_text())
    assert [row["round"] for row in table] == [0, 1]
    accepted = read_rows(tmp_path / "out/round-1/traces.jsonl")
    assert table[1]["accepted"] == len(accepted) > 0 and 0 <= table[1]["batch_accuracy"] <= 1
    drawn = [row for row in read_rows(tmp_path / "out/round-1/traces.raw.jsonl") if "text" in row]
    assert len(drawn) == 48, "two answers to each of 24 puzzles, every one kept"
    again = succeed("selfdistill", *words)
    assert again.count("] found ") == 4, "evaluation, answers, training and evaluation are not run again"
    for more, says in (
        (("--lr", 5e-4), "was begun with 0.001, and now it is 0.0005"),
        (("--model", tmp_path / "none"), "no checkpoint folder (config.json is missing)"),
        (("--new-puzzles",), "was begun with None, and now it is True"),
        (("--new-puzzles", "--rounds", 90), "90 rounds of 24 answer 2,160 puzzles, and"),
    ):
        refused = run_command("selfdistill", *words, *more)
        assert refused.returncode == 2 and says in refused.stderr
    held_out = tmp_path / "test.jsonl"
    write_puzzles(held_out, read_puzzles(pipeline / "puzzles/test.parquet")[:2])
    config = SelfDistillConfig(model=str(pipeline / "base"), puzzles=str(held_out), out="o", test=str(held_out))
    (tmp_path / "changed").mkdir()
    record_settings(config, tmp_path / "changed")
    write_puzzles(held_out, read_puzzles(pipeline / "puzzles/test.parquet")[:3])
    with pytest.raises(UserError, match="--puzzles .*: is not what .* was begun with .other SHA-256.; put that back"):
        record_settings(config, tmp_path / "changed")
    # a workflow, from the same model: its own accuracy is the ceiling of what the round can teach
    more = ("--workflow", "tools", "--candidates", 3, "--lookups", 1, "--comparisons", 2, "--out", tmp_path / "tools")
    refused = run_command("selfdistill", *words, *more, "--hint")
    assert refused.returncode == 2 and "--hint shows the right answer, --workflow tools finds" in refused.stderr
    assert not (tmp_path / "tools").exists()
    said = succeed("selfdistill", *words, *more, "--eval-limit", 8, timeout=3000)
    (row,) = json.loads((tmp_path / "tools/rounds.json").read_text())[1:]
    found = json.loads((tmp_path / "tools/round-1/traces.report.json").read_text())["workflow"]
    assert row["workflow"] == found["final"]["batch_accuracy"] and row["vote"] == found["vote"]["batch_accuracy"]
    raw = [row for row in read_rows(tmp_path / "tools/round-1/traces.raw.jsonl") if "text" in row]
    assert row["sampled_tokens"] == sum(one["completion_tokens"] for one in raw) and "workflow" in said
    kept = read_rows(tmp_path / "tools/round-1/traces.jsonl")
    assert len(kept) == row["accepted"] > 0 and {one["workflow"] for one in kept} == {"tools"}
    asked = [one for one in raw if " [tools " in one["puzzle_id"]]
    assert found["asked_about"] > 0 and len(asked) >= 2 * found["asked_about"]
    plain = ("--candidates", 3, "--eval-limit", 8, "--out", tmp_path / "tools")
    refused = run_command("selfdistill", *words, *plain)
    assert refused.returncode == 2 and "was begun with tools, and now it is none" in refused.stderr
    refused = run_command("selfdistill", *words, "--rounds", 0)
    assert refused.returncode == 2 and "--rounds 0: must be at least 1" in refused.stderr


def test_rounds_with_new_puzzles_skip_those_of_the_rounds_before():
    given = {"model": "m", "puzzles": "p.jsonl", "out": "out"}
    same, new = (SelfDistillConfig(**given, limit=24, new_puzzles=new) for new in (False, True))
    assert [same.skipped(number) for number in (1, 2)] == [None, None]
    assert [new.skipped(number) for number in (1, 2, 3)] == [0, 24, 48]
    with pytest.raises(UserError, match="--new-puzzles: say with --limit how many"):
        SelfDistillConfig(**given, new_puzzles=True)
