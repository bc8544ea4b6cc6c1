"""The cold start: completion-only loss, nothing cut, one checkpoint that loads; and evaluation of saved predictions."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from data.puzzles import Puzzle, read_puzzles, read_rows
from data.variants import cell_level
from tests.helpers.commands import run_command, succeed
from trainer.policy import Policy
from trainer.sft.examples import encode_traces, split_by_puzzle
from trainer.sft.loop import learning_rate, token_losses
from trainer.sft.settings import SftConfig


def sft(pipeline, out, *more, **kwargs):
    return succeed(
        "sft",
        "--traces",
        pipeline / "traces.jsonl",
        "--model",
        pipeline / "base",
        "--out",
        out,
        "--lora-rank",
        0,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--lr",
        3e-3,
        *more,
        **kwargs,
    )


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_the_traces_negative_log_likelihood(pipeline, tmp_path):
    cfg = SftConfig(traces=str(pipeline / "traces.jsonl"), model=str(pipeline / "base"), out=str(tmp_path), lora_rank=0)
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    (example, *_), skipped = encode_traces(policy, read_rows(cfg.traces)[:4], cfg)
    assert skipped == 0 and example.response_ids[-1] == policy.chat.turn_end
    text = policy.chat.response_text(example.response_ids)
    assert text == read_rows(cfg.traces)[0]["assistant_msg"]
    ids = torch.tensor([example.prompt_ids + example.response_ids])
    with torch.no_grad(), policy.decoding():
        logits = policy.causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
        first = len(example.prompt_ids)
        expected = -logits[first - 1 : -1].gather(-1, ids[0, first:, None]).sum()
    with torch.no_grad():
        (loss,) = token_losses(policy, [example], cfg)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_long_traces_are_skipped_not_cut(pipeline, tmp_path):
    rows = read_rows(pipeline / "traces.jsonl")
    cfg = SftConfig(traces="t", model=str(pipeline / "base"), out=str(tmp_path), lora_rank=0)
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    whole, _ = encode_traces(policy, rows, cfg)
    sizes = sorted(len(e.prompt_ids) + len(e.response_ids) for e in whole)
    limit = sizes[len(sizes) // 2]
    kept, skipped = encode_traces(policy, rows, SftConfig(**{**vars(cfg), "max_tokens": limit}))
    assert len(kept) + skipped == len(rows) and skipped == sum(size > limit for size in sizes)
    with pytest.raises(ValueError, match="--max-tokens 3: none of the"):
        encode_traces(policy, rows, SftConfig(**{**vars(cfg), "max_tokens": 3}))


def test_the_authors_second_name_of_the_column_is_read(pipeline, tmp_path):
    rows = read_rows(pipeline / "traces.jsonl")[:4]
    cfg = SftConfig(traces="t", model=str(pipeline / "base"), out=str(tmp_path), lora_rank=0)
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    named = [{"answer" if key == "assistant_msg" else key: value for key, value in row.items()} for row in rows]
    (ours, _), (theirs, _) = encode_traces(policy, rows, cfg), encode_traces(policy, named, cfg)
    assert [e.response_ids for e in ours] == [e.response_ids for e in theirs]
    bare = [row | {"answer": row["answer"].rpartition("<answer>")[2].partition("<")[0]} for row in named]
    with pytest.raises(ValueError, match="no row has a reasoning trace .* --target answer"):
        encode_traces(policy, bare, cfg)


def test_holdout_splits_by_puzzle(pipeline, tmp_path):
    rows = read_rows(pipeline / "traces.jsonl")[:10]
    cfg = SftConfig(traces="t", model=str(pipeline / "base"), out=str(tmp_path), lora_rank=0)
    policy = Policy(cfg.model, lora_rank=0, lora_alpha=0, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    examples, _ = encode_traces(policy, rows + rows, cfg)
    kept, out = split_by_puzzle(examples, 0.3, seed=0)
    assert len(out) == 6 and not {e.puzzle_id for e in kept} & {e.puzzle_id for e in out}


def test_the_cells_of_a_batch_are_held_out_together():
    """They share candidates: the labels of all but one give the last away."""
    puzzles = [
        Puzzle(
            id=f"p{n}",
            context=f"Donor {n}.",
            cells=[["A"], ["B"], ["C"]],
            candidates=["x", "y", "z"],
            answer=["x", "y", "z"],
        )
        for n in range(20)
    ]
    puzzles = [cell for puzzle in puzzles for cell in cell_level(puzzle)] + puzzles  # and the batches themselves
    examples = [SimpleNamespace(puzzle=puzzle, puzzle_id=puzzle.id) for puzzle in puzzles]
    kept, out = ({e.puzzle_id.partition("/")[0] for e in side} for side in split_by_puzzle(examples, 0.3, seed=0))
    assert len(out) == 6 and len(kept) == 14 and not kept & out


def test_learning_rate_by_hand():
    cfg = SftConfig(traces="t", model="m", out="o", lr=1.0, warmup_steps=2)
    assert [learning_rate(step, 10, cfg) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(6, 10, cfg) == pytest.approx(0.1 + 0.45)
    assert learning_rate(9, 10, cfg) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 8)))


@pytest.mark.slow(3)
def test_one_and_two_processes_learn_the_same_and_the_checkpoint_loads(pipeline, tmp_path):
    sft(pipeline, tmp_path / "one")
    sft(pipeline, tmp_path / "two", ranks=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, abs=2e-3) and one[-1] < 0.7 * one[0]
    again = run_command(
        "sft", "--traces", pipeline / "traces.jsonl", "--model", pipeline / "base", "--out", tmp_path / "one"
    )
    assert again.returncode == 2 and "already holds a run; add --resume to go on with it" in again.stderr
    merged = tmp_path / "lora"
    sft(pipeline, merged, "--lora-rank", 4)
    policy = Policy(
        str(merged / "model"), lora_rank=0, lora_alpha=0, seed=0, device=torch.device("cpu"), dtype=torch.float32
    )
    assert not any("lora" in name for name in policy.trainable())


def test_evaluate_saved_predictions(pipeline, tmp_path):
    puzzles = read_puzzles(pipeline / "puzzles/test.parquet")
    right = [f"<think>x</think><answer>{' | '.join(p.answer)}</answer>" for p in puzzles]
    rows = [{"id": p.id, "prediction": text} for p, text in zip(puzzles, right, strict=True)]
    rows[0]["prediction"] = "no tags"
    rows.reverse()  # matched by id, not by order
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--puzzles", pipeline / "puzzles/test.parquet", "--predictions", tmp_path / "p.jsonl")
    succeed("evaluate", *arguments, "--out", tmp_path / "ev")
    metrics = json.loads((tmp_path / "ev/metrics.json").read_text())
    assert metrics["batch_accuracy"] == pytest.approx(1 - 1 / len(puzzles))
    assert metrics["format_validity"] == pytest.approx(1 - 1 / len(puzzles))
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    missing = run_command("evaluate", *arguments, "--out", tmp_path / "no")
    assert missing.returncode == 2 and "puzzles have no prediction, the first is" in missing.stderr
    assert not (tmp_path / "no").exists()
