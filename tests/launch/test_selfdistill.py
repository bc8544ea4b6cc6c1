"""A model as its own teacher, with the real commands: answers through vLLM, training, a second round and call."""

import json

import pytest

from data.puzzles import read_rows
from tests.helpers.commands import run_command, succeed


@pytest.mark.vllm
@pytest.mark.slow(62)
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
    succeed("selfdistill", *words)
    table = json.loads((tmp_path / "out/rounds.json").read_text())
    assert [row["round"] for row in table] == [0, 1]
    accepted = read_rows(tmp_path / "out/round-1/traces.jsonl")
    assert table[1]["accepted"] == len(accepted) > 0 and 0 <= table[1]["batch_accuracy"] <= 1
    drawn = [row for row in read_rows(tmp_path / "out/round-1/traces.raw.jsonl") if "text" in row]
    assert len(drawn) == 48, "two answers to each of 24 puzzles, every one kept"
    again = succeed("selfdistill", *words)
    assert again.count("] found ") == 4, "evaluation, answers, training and evaluation are not run again"
    for more, says in (
        (("--lr", 5e-4), "--lr 0.0005: was 0.001 when"),
        (("--model", tmp_path / "none"), "no checkpoint folder (config.json is missing)"),
    ):
        refused = run_command("selfdistill", *words, *more)
        assert refused.returncode == 2 and says in refused.stderr
    refused = run_command("selfdistill", *words, "--rounds", 0)
    assert refused.returncode == 2 and "--rounds 0: must be at least 1" in refused.stderr
