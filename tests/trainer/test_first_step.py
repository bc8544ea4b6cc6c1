"""A run whose first step has no usable response stops and says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward import Status
from reward.result import nothing_usable
from tests.helpers.commands import SMALL_GRPO, run_command, succeed
from trainer.record.steplog import LEFT, set_first_step_aside

SMALL = (*(word for word in SMALL_GRPO if word != "--insist"), "--engine", "torch", "--steps", 1)


def row(status: Status, message: str = "", text: str = "no tags") -> dict:
    return {"status": str(status), "puzzle_id": "p1", "completion": text, **({"message": message} if message else {})}


NO_TAG, TWICE = "<think> occurs 0 times, not once", "<answer> occurs 2 times, not once"


def test_the_reasons_are_counted_and_one_response_is_shown():
    rows = [
        row(Status.TRUNCATED, NO_TAG, "cut"),
        *[row(Status.INVALID_FORMAT, NO_TAG)] * 3,
        *[row(Status.INVALID_FORMAT, TWICE)] * 2,
        row(Status.INVALID_FORMAT, "label 1 of the answer is empty"),
        row(Status.TRUNCATED),
    ]
    assert nothing_usable(rows) == (
        "each of the 8 responses has an invalid format or was cut, so there is nothing to learn from: "
        f"3 x {NO_TAG}; 2 x it was cut at --max-response-tokens; 2 x {TWICE}. Puzzle p1 was answered 'no tags'"
    )
    assert nothing_usable([row(Status.TRUNCATED, text="a" * 300 + "b" * 300)] * 2) == (
        "each of the 2 responses was cut at the length limit, so there is nothing to learn from: 2 x it was cut at "
        f"--max-response-tokens. Puzzle p1 was answered '{'a' * 200} ... {'b' * 200}'"
    )


def test_one_other_response_is_enough():
    """Also where a reward of the user's own knows no format: then every status is OK."""
    assert nothing_usable([row(Status.INVALID_FORMAT, NO_TAG), row(Status.OK)]) == ""
    assert nothing_usable([row(Status.DECLINED), row(Status.OK)]) == ""
    assert nothing_usable([row(Status.OK)] * 4) == ""


def test_a_step_that_was_not_scored_is_as_useless():
    none = "the function returned None"
    assert nothing_usable([row(Status.DECLINED, none)] * 3 + [row(Status.TIMEOUT)]) == (
        "each of the 4 responses was not scored, so there is nothing to learn from: 3 x the function returned None; 1 x its "
        "status is timeout. Puzzle p1 was answered 'no tags'"
    )
    assert nothing_usable([row(Status.ERROR, "KeyError"), row(Status.TRUNCATED)]).startswith(
        "each of the 2 responses has an invalid format or was cut, or was not scored, so "
    )


def test_what_is_not_of_the_run_stays_where_it_is(tmp_path):
    """--out may be a folder that holds puzzles, models and paid traces too: a second refusal would have deleted them."""
    for name in ("puzzles/train.parquet", "traces.raw.jsonl", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for step in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(str(step))
        (tmp_path / "steps").mkdir()
        assert set_first_step_aside(tmp_path, is_main=True) == tmp_path / "refused_step"
        assert (tmp_path / "refused_step/metrics.jsonl").read_text() == str(step)
        assert {path.name for path in tmp_path.iterdir()} == {
            "puzzles",
            "traces.raw.jsonl",
            "config.json",
            "refused_step",
        }
    assert (tmp_path / "puzzles/train.parquet").exists()


@pytest.mark.slow(12)
def test_what_a_step_leaves_is_what_is_set_aside(pipeline, tmp_path):
    """All that a run of one step has in OUT, but for what says that it was a run."""
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path, *SMALL)
    succeed("grpo", *given, "--insist", "--steps", 1, "--save-steps", 1, "--log", "tensorboard")
    found = {path.name for path in tmp_path.iterdir()} - {"checkpoints", "finished.json", "config.json", "status.json"}
    assert {"metrics.jsonl", "rollouts.jsonl", "steps", "tensorboard"} <= found
    assert {name for name in found if not name.startswith(".")} <= set(LEFT)


@pytest.mark.slow(12)
@pytest.mark.parametrize("ranks", [None, 2])
def test_the_run_stops_on_all_ranks_and_goes_on_when_told_to(pipeline, tmp_path, ranks):
    out = tmp_path / "run"
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", out, *SMALL)
    done = run_command("grpo", *given, ranks=ranks)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert ranks or done.returncode == 2
    (said,) = {line for line in done.stderr.splitlines() if "Error: step 1: " in line}
    assert "each of the 12 responses was cut at the length limit" in said and "with --insist" in said
    assert f"all are in {out}/refused_step/rollouts.jsonl" in said
    rows = [json.loads(line) for line in (out / "refused_step/rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["step"] for row in rows} == {1} and not (out / "finished.json").exists()
    assert repr(rows[0]["completion"]) in said
    # no step was made: other settings may begin there, with --resume and without
    resume = () if ranks else ("--resume",)
    done = run_command("grpo", *given, "--max-response-tokens", 7, *resume, "--insist", ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "finished.json").exists()
    assert len((out / "rollouts.jsonl").read_text().splitlines()) == 12
    assert {path.name for path in (out / "refused_step").iterdir()} == {
        "metrics.jsonl",
        "rollouts.jsonl",
        "timing.jsonl",
    }


REWARDS = """
def shorter(completion, puzzle):
    return -len(completion) / 1000


def no_opinion(completions, **columns):
    return [None] * len(completions)


def broken(completion, puzzle):
    return None
"""


def ends_soon(base: Path, folder: Path) -> Path:
    """The checkpoint with weights that end a response at about every second token, so that none is cut."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 50.0  # the same large number in every hidden state
    tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    tensors["lm_head.weight"][2, 0] = 1.0  # <|im_end|>
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    return folder


@pytest.mark.slow(8)
@pytest.mark.parametrize("name", ["shorter", "trl no_opinion", "broken"])
def test_a_reward_of_the_users_own_does_not_make_the_alarm_deaf(pipeline, tmp_path, name):
    (tmp_path / "mine.py").write_text(REWARDS)
    style, _, function = name.rpartition(" ")
    reward = f"{f'{style}:' if style else ''}{tmp_path / 'mine.py'}:{function}"
    base = ends_soon(pipeline / "base", tmp_path / "base")
    given = ("--model", base, "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run")
    given = (*given, *SMALL, "--reward", reward, "--on-reward-error", "drop")
    done = run_command("grpo", *given)
    asked = r"<|im_end|>\n<|im_start|>assistant\n'"
    if name == "shorter":  # -len() is what it was asked for: said once, and no reason to stop
        assert done.returncode == 0
        (said,) = {line for line in done.stdout.splitlines() if line.startswith("note: none of the 12 responses")}
        assert f"although --reward {reward} scored them" in said and "The prompt ends in" in said and asked in said
        return
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Error: step 1: each of the 12 responses was not scored, so there is nothing to learn" in done.stderr
    assert f"Does --reward {reward} score such responses?" in done.stderr and asked in done.stderr
    assert run_command("grpo", *given, "--resume", "--insist").returncode == 0
