"""The GRPO command end to end with real vLLM and real torch.distributed."""

import json
import os
import signal
from pathlib import Path

import pytest

from data.puzzles import Puzzle, read_puzzles
from reward.scoring import Scorer
from tests.helpers.alone import alone
from tests.helpers.commands import ROOT, SMALL_GRPO, kill_at, run_command, start_command, succeed
from trainer.config import GrpoConfig
from trainer.grpo import train
from trainer.ppo import ppo
from trainer.ppo.settings import PpoConfig

SMALL = (*SMALL_GRPO, "--save-every", 2)


def words(pipeline: Path, out: Path) -> tuple:
    """The options that every run here has."""
    return ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", out, *SMALL)


def grpo(pipeline: Path, out: Path, *more: object, **kwargs) -> str:
    return succeed("grpo", *words(pipeline, out), *more, **kwargs)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def length_reward(tmp_path) -> str:
    """A reward a random model can move: the share of short answers."""
    file = tmp_path / "short.py"
    file.write_text("def fewer_letters(completion, puzzle):\n    return -len(completion) / 50\n")
    return f"{file}:fewer_letters"


@pytest.mark.vllm
@pytest.mark.slow(20)
def test_one_process_learns_a_swapped_reward_with_vllm(pipeline, tmp_path, length_reward):
    out = tmp_path / "run"
    # a cold random model: at temperature 1 its 3,000 tokens are nearly equally likely, and 32 responses say little about each
    learning = ("--steps", 20, "--group-size", 8, "--temperature", 0.3)
    grpo(pipeline, out, *learning, "--reward", length_reward)
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 21))
    mean = [sum(row["reward"] for row in part) / 5 for part in (rows[:5], rows[-5:])]
    assert mean[1] > mean[0] + 0.1, mean
    assert all(row["sampling/logp_difference/mean"] < 1e-4 for row in rows), "vLLM samples from the trainer's policy"
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    assert len({row["adapter_hash"] for row in rows}) == 20
    rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 20 * 4 * 8
    assert {r["adapter_hash"] for r in rollouts if r["step"] == 3} == {rows[1]["adapter_hash"]}, (
        "step 3 samples step 2's adapter"
    )
    # ---- the sampler's adapter is the trainer's, and not the base model
    checkpoint = out / "checkpoints/step-000020"
    said = succeed(ROOT / "tests/helpers/sampler_check.py", pipeline / "base", checkpoint)
    result = next(line for line in said.splitlines() if line.startswith("RESULT")).split()
    assert float(result[1]) < 1e-4 and float(result[2]) > 1e-3
    assert result[3:] == ["20", rows[-1]["adapter_hash"]]


@pytest.mark.slow(4)
@pytest.mark.parametrize("how", ["grpo", "oversample", "ppo"])
def test_every_response_is_begun_to_be_scored_when_it_is_sampled(pipeline, tmp_path, monkeypatch, how):
    """Each once, with its own puzzle; and the run is the very one of --score-last, which begins none."""
    (tmp_path / "thirds.py").write_text(
        "def thirds(completion, puzzle):\n"
        "    with open(f'{__file__}.calls', 'a') as file:\n"
        "        file.write(puzzle.id + '\\n')\n"
        "    return len(completion) % 3\n"
    )
    shape = {"prompts_per_step": 4, "group_size": 3, "max_prompt_tokens": 400, "max_response_tokens": 16, "steps": 2}
    shape |= {"lora_rank": 8, "lora_alpha": 16, "lr": 1e-2, "insist": True, "engine": "torch"}
    files = {"model": str(pipeline / "base"), "puzzles": str(pipeline / "puzzles/train.parquet")}
    more = {"oversample": {"oversample": 3}, "ppo": {"minibatches": 2, "epochs": 1}}.get(how, {})
    kind, loop = (PpoConfig, ppo.train_rank) if how == "ppo" else (GrpoConfig, None)
    puzzles, begun, begin = read_puzzles(files["puzzles"]), [], Scorer.begin

    def see(scorer: Scorer, completion: str, puzzle: Puzzle) -> None:
        begun.append((puzzle.id, completion))
        begin(scorer, completion, puzzle)

    monkeypatch.setattr(Scorer, "begin", see)
    for name in ("early", "late"):
        more["score_last"] = name == "late"
        cfg = kind(**shape, **files, **more, out=str(tmp_path / name), reward=str(tmp_path / "thirds.py:thirds"))
        with alone():
            train(cfg, puzzles, rank_work=loop)
        rows = [json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        calls = (tmp_path / "thirds.py.calls").read_text().splitlines()
        (tmp_path / "thirds.py.calls").unlink()
        assert len(calls) == len(begun), name
        if how == "oversample":  # groups that taught nothing are not recorded
            assert {(row["puzzle_id"], row["completion"]) for row in rows} <= set(begun) and len(begun) > len(rows)
        else:
            assert sorted(begun) == sorted((row["puzzle_id"], row["completion"]) for row in rows)
    for file in ("rollouts.jsonl", "metrics.jsonl"):
        assert (tmp_path / "early" / file).read_bytes() == (tmp_path / "late" / file).read_bytes()


@pytest.mark.slow(2)
def test_one_and_two_processes_give_the_same_numbers(pipeline, tmp_path, length_reward):
    more = ("--steps", 3, "--engine", "torch", "--reward", length_reward)
    grpo(pipeline, tmp_path / "one", *more)
    grpo(pipeline, tmp_path / "two", *more, ranks=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for run in ("one", "two"):
        for row in map(json.loads, (tmp_path / run / "timing.jsonl").read_text().splitlines()):
            assert row["packing/sharing"] > 1.5 and 0 < row["packing/fill"] <= 1, "three responses share each prompt"
            assert 0.6 < row["packing/balance"] <= 1 and 0 < row["sampling/share"] < 1
            assert row["sampling/tokens_per_second"] > 0
    for a, b in zip(one, two, strict=True):
        assert a["reward"] == b["reward"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.slow(2)
def test_several_updates_per_batch_move_the_ratio(pipeline, tmp_path, length_reward):
    out = tmp_path / "run"
    grpo(
        pipeline,
        out,
        "--steps",
        2,
        "--engine",
        "torch",
        "--reward",
        length_reward,
        "--updates-per-batch",
        2,
        "--clip-low",
        1e-4,
        "--clip-high",
        1e-4,
    )
    assert any(row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"] > 0 for row in metrics(out))


@pytest.mark.vllm
@pytest.mark.slow(25)
def test_kill_and_resume_give_the_same_metrics_bit_for_bit(pipeline, tmp_path, length_reward):
    """The whole run is a real process, the others are forked: the bytes also say that forked vLLM samples the same."""
    more = ("--reward", length_reward)  # with vLLM; test_nodes.py does it with the torch engine, sampling ahead
    grpo(pipeline, tmp_path / "whole", "--steps", 4, *more, fresh=True)
    words = ["--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "cut"]
    kill_at("step 3/", tmp_path / "cut", "grpo", *words, *SMALL, "--steps", 4, *more)  # checkpointed at step 2
    grpo(pipeline, tmp_path / "cut", "--steps", 4, "--resume", *more)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert (tmp_path / "cut/rollouts.jsonl").read_bytes() == (tmp_path / "whole/rollouts.jsonl").read_bytes()


@pytest.mark.slow(2)
def test_sigterm_finishes_the_step_saves_and_exits_0(pipeline, tmp_path, length_reward):
    words = ["--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run"]
    process = start_command("grpo", *words, *SMALL, "--steps", 4000, "--engine", "torch")
    while not process.stdout.readline().startswith("step 1/"):
        assert process.poll() is None
    os.killpg(
        process.pid, signal.SIGTERM
    )  # the whole group, as torchrun and schedulers do: the reward worker must live on
    process.communicate()
    assert process.returncode == 0
    step = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{step:06d}/state.json").is_file()


@pytest.mark.slow(1)
def test_bad_input_is_one_sentence_and_leaves_nothing(pipeline, tmp_path):
    out = tmp_path / "run"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("group_sise: 4\n")
    model, puzzles = ("--model", pipeline / "base"), ("--puzzles", pipeline / "puzzles/train.parquet")
    cases = [
        ([*model, *puzzles, "--reward", "reward.cellpuzzles:nope"], "has no 'nope'"),
        ([*model, *puzzles, "--recipe", recipe], "no setting is called 'group_sise'; the nearest is 'group_size'"),
        ([*model, "--puzzles", tmp_path / "none.parquet"], "none.parquet: no such file"),
        (["--model", tmp_path, *puzzles], "no Hugging Face checkpoint there"),
        ([*model, *puzzles, *SMALL, "--prompts-per-step", 1000], "fewer than --prompts-per-step 1000"),
        ([*model, *puzzles, "--steps", 0], "--steps 0: must be at least 1"),
        ([*model], "--model needs --puzzles"),
    ]
    for arguments, says in cases:
        done = run_command("grpo", *arguments, "--out", out, "--engine", "torch")
        assert done.returncode == 2 and says in done.stderr, (arguments, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
        assert not out.exists(), arguments


@pytest.mark.vllm
@pytest.mark.slow(2)
def test_too_few_puzzles_are_refused_before_vllm_starts(pipeline, tmp_path):
    """--base shared starts it before the trainer's model is loaded."""
    files = ["--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", "--out", tmp_path / "run"]
    done = run_command("grpo", *files, *SMALL, "--base", "shared", "--prompts-per-step", 1000)
    assert done.returncode == 2 and "fewer than --prompts-per-step 1000" in done.stderr
    assert "frozen base in memory" not in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.slow(2)
def test_a_run_that_made_no_step_can_be_started_again(pipeline, tmp_path, length_reward):
    """With the same command or with --resume, and with the setting corrected that was at fault."""
    for again in ((), ("--resume",)):
        out = tmp_path / f"run{len(again)}"
        bad = tmp_path / "bad.py"
        bad.write_text("def fn(completion, puzzle):\n    raise LookupError('no such table')\n")
        arguments = words(pipeline, out)
        died = run_command("grpo", *arguments, "--engine", "torch", "--steps", 1, "--reward", f"{bad}:fn")
        assert died.returncode == 2 and "no such table" in died.stderr and (out / "config.json").is_file()
        succeed("grpo", *arguments, "--engine", "torch", "--steps", 1, "--reward", length_reward, *again)
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
        assert json.loads((out / "config.json").read_text())["settings"]["reward"] == str(length_reward)
    (out / "config.json").write_text('{"settings"')
    done = run_command("grpo", *arguments, "--engine", "torch", "--steps", 2, "--reward", length_reward, "--resume")
    assert done.returncode == 2 and "config.json: damaged, not JSON" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow(2)
def test_a_folder_with_another_run_is_refused(pipeline, tmp_path, length_reward):
    out = tmp_path / "run"
    grpo(pipeline, out, "--steps", 1, "--engine", "torch", "--reward", length_reward)
    before = (out / "metrics.jsonl").read_bytes()
    arguments = words(pipeline, out)
    again = run_command("grpo", *arguments, "--engine", "torch")
    assert again.returncode == 2 and "already holds a run; add --resume" in again.stderr
    other = run_command("grpo", *arguments, "--engine", "torch", "--resume", "--reward", length_reward, "--beta", 0.5)
    assert other.returncode == 2 and "--resume: beta was 0.001" in other.stderr
    dry = run_command("grpo", *arguments, "--engine", "torch", "--resume", "--dry-run")  # says what the run would say
    assert dry.returncode == 2 and "--resume: reward was" in dry.stderr, dry.stderr
    assert "; give the old value again, or name another --out" in dry.stderr
    assert (out / "metrics.jsonl").read_bytes() == before
