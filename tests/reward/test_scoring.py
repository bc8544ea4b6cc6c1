"""Scoring in worker processes, functions in TRL's and verl's styles, and re-scoring saved rollouts."""

import asyncio
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.errors import UserError
from data.files import sha256
from data.puzzles import Puzzle, read_puzzles, write_puzzles
from eval.report import stepview
from reward import Reward, Status, load_reward
from reward.scoring import Scorer
from rollout import group_numbers
from tests.helpers.commands import ROOT, run_command, succeed
from trainer.config import GrpoConfig
from trainer.grpo import compare, with_penalty
from trainer.inspect.ledger import contributions_by_group
from trainer.inspect.rescore import puzzles_of_run, rescore, summary_lines
from trainer.metrics import TokenSums, reward_metrics
from trainer.ranks.watch import is_gone
from trainer.record.steplog import explain_zeros

PUZZLE = Puzzle(
    id="p",
    context="blood",
    cells=[["CD3D"], ["MS4A1"]],
    candidates=["B cell", "T cell"],
    answer=["T cell", "B cell"],
    meta={"donor": "d1"},
)
RIGHT = "<think>x</think><answer>T cell | B cell</answer>"
REWARDS = """
import asyncio, os, sys, time

def plain(completion, puzzle):
    print("a reward may print")
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "none":
        return None
    if completion == "nan":
        return float("nan")
    if completion == "hang":
        open(__file__ + ".hangs", "w").close()
        while True:
            pass
    if completion == "die":
        os._exit(7)
    if completion == "exit":
        sys.exit(3)
    return len(completion)

started = 0

async def meet(completion, puzzle):
    global started
    started += 1
    while started < 41 or completion == "hang":  # no call ends before all have begun
        await asyncio.sleep(0.01)
    return float(len(completion))

async def fragile(completion, puzzle):
    if completion == "die":
        await asyncio.sleep(0.2)
        os._exit(7)
    if completion == "block":
        time.sleep(600)
    await asyncio.sleep(0.5)
    return 1.0

def whole(completion, puzzle):
    import numpy as np
    from reward import Reward
    if completion == "words":
        return Reward(total=1, parts={"why": "because"})
    return Reward(total=len(completion), parts={"share": np.float32(0.5)})

# ---- as written for TRL: batches in, a list out, columns as keywords
def trl_format(completions, **kwargs):
    return [1.0 if turns[0]["content"].endswith("</answer>") else 0.0 for turns in completions]

def trl_accuracy(prompts, completions, answer, log_metric=None, **kwargs):
    assert prompts[0][0]["role"] == "system" and prompts[0][1]["content"].startswith("Context: ")
    rewards = []
    for turns, gold in zip(completions, answer):
        content = turns[-1]["content"]
        if "<answer>" not in content:
            rewards.append(None)
            continue
        given = content.split("<answer>")[1].split("</answer>")[0].split(" | ")
        rewards.append(sum(a == b for a, b in zip(given, gold)) / len(gold))
        log_metric("labels", len(given))
    return rewards

async def trl_async(completions, puzzle_id):
    await asyncio.sleep(0)
    return [float(len(turns[0]["content"])) for turns in completions]

def trl_tokens(completions, completion_ids):
    return [len(ids) for ids in completion_ids]

# ---- as written for verl
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if ground_truth not in solution_str:
        return 0.0
    return {"score": 1.0 / extra_info["n_cells"], "acc": True, "pred": solution_str, "source": len(data_source)}

async def patient(completion, puzzle):
    while completion == "hang":
        await asyncio.sleep(1)
    return float(len(completion))

async def wordy(completion, puzzle):
    assert "<answer>" in completion, completion
    return 1.0

def later(completion, puzzle):
    time.sleep(0.002 * (len(completion) % 5))
    return len(completion)

def counted(completion, puzzle):
    with open(f"{__file__}.counted", "a") as file:
        file.write(f"{puzzle.id} {completion}\\n")
    if completion == "raise":
        raise KeyError("no such thing")
    return len(completion) + len(puzzle.id)

async def counted_later(completion, puzzle):
    await asyncio.sleep(0.01)
    return counted(completion, puzzle)

def slow(completion, puzzle):
    open(f"{__file__}.{completion}", "w").close()
    time.sleep(0.5)
    return 1.0
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(REWARDS)
    return str(file)


def score(
    path: str, texts: list[str], workers: int = 1, seconds: float = 60.0, cut: tuple[str, ...] = ()
) -> list[Reward]:
    scorer = Scorer(path, workers, seconds)
    try:
        return scorer.score(texts, [PUZZLE] * len(texts), [text in cut for text in texts])
    finally:
        scorer.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_scores_come_back_in_order(rewards, workers):
    got = score(f"{rewards}:plain", ["a", "bbb", "raise", "cc", "none", "nan", "dddd"], workers, cut=("cc", "raise"))
    assert [r.total for r in got if r.scored] == [1.0, 3.0, 2.0, 4.0]
    assert [str(r.status) for r in got] == ["ok", "ok", "error", "truncated", "error", "error", "ok"]
    assert got[2].message == "KeyError: 'no such thing' (rewards.py, line 7)" and math.isnan(got[2].total)
    assert "the reward is None: return a finite number or a Reward" in got[4].message


@pytest.mark.slow(2)
def test_a_function_that_hangs_or_dies_costs_only_its_own_response(rewards):
    got = score(f"{rewards}:plain", ["a", "hang", "bb", "die", "ccc", "exit", "dddd"], workers=2, seconds=5.0)
    assert [r.total for r in got if r.scored] == [1.0, 2.0, 3.0, 4.0]
    assert [str(got[i].status) for i in (1, 3, 5)] == ["timeout", "error", "error"]
    assert got[1].message == "it took longer than --reward-seconds 5"
    assert "ended with exit code 7" in got[3].message and got[5].message == "SystemExit: 3 (rewards.py, line 19)"


@pytest.mark.slow(3)
def test_coroutines_run_side_by_side_and_time_out_alone(rewards):
    got = score(f"{rewards}:meet", ["a" * n for n in range(1, 41)] + ["hang"], seconds=10.0)
    assert [r.total for r in got[:-1]] == [float(n) for n in range(1, 41)]
    assert got[-1].status is Status.TIMEOUT


@pytest.mark.slow(8)
def test_only_the_coroutine_at_fault_is_blamed(rewards):
    texts = ["a", "b", "die", "c", "block", "d"]
    got = score(f"{rewards}:fragile", texts, seconds=5.0)
    assert [str(r.status) for r in got] == ["ok", "ok", "error", "ok", "timeout", "ok"]
    assert "exit code 7" in got[2].message


def test_numbers_become_floats_and_words_are_refused(rewards):
    fine, bad = score(f"{rewards}:whole", ["abc", "words"])
    assert (fine.total, fine.parts) == (3.0, {"share": 0.5}) and isinstance(fine.total, float)
    assert "part 'why' of the reward is 'because'" in bad.message


def test_an_interrupt_leaves_the_rest_unscored(tmp_path):
    """Python ends when its threads have ended: after Ctrl-C they would score all that is left, for hours at a slow judge."""
    (tmp_path / "slow.py").write_text(
        "import time\n\ndef fn(completion, puzzle):\n    open(f'{__file__}.{completion}', 'w').close()\n    time.sleep(0.5)\n"
        "    return 1.0\n"
    )
    code = f"""
import os, signal
from data.puzzles import Puzzle
from reward.scoring import Scorer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["a", "b"], answer=["a", "b"])
scorer = Scorer({str(tmp_path / "slow.py:fn")!r}, 1, on_reply=lambda: os.kill(os.getpid(), signal.SIGINT))
scorer.score([str(i) for i in range(200)], [puzzle] * 200, [False] * 200)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert "KeyboardInterrupt" in done.stderr and done.returncode == -signal.SIGINT
    assert len(list(tmp_path.glob("slow.py.*"))) < 100  # of 200; 2 on an idle machine


def test_it_stops_at_the_first_failure_when_asked(rewards):
    scorer = Scorer(f"{rewards}:plain", 1, 60.0)
    got = scorer.score(["a", "raise", "b", "c"], [PUZZLE] * 4, [False] * 4, stop_at_failure=True)
    assert got[0].total == 1.0 and got[1].status is Status.ERROR and got[2:] == [None, None]
    again = scorer.score(["dd"], [PUZZLE], [False])
    scorer.close()
    assert again[0].total == 2.0
    with pytest.raises(
        ValueError, match="--reward nowhere.py:fn: its scoring process did not start: no file nowhere.py"
    ):
        score("nowhere.py:fn", ["a"])


@pytest.mark.parametrize("name", ["counted", "counted_later"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_was_begun_is_scored_once_and_gets_its_own_reward(rewards, name, workers):
    """Responses come in the order in which sampling ends, some twice, of two puzzles with one id; the others never began."""
    file = Path(f"{rewards}.counted")
    file.unlink(missing_ok=True)
    scorer, other = Scorer(f"{rewards}:{name}", workers), replace(PUZZLE, id=PUZZLE.id + "-other")
    twin = replace(PUZZLE)
    asked = [("a", PUZZLE), ("bb", other), ("a", PUZZLE), ("a", other), ("a", twin), ("dddd", PUZZLE), ("raise", other)]
    for place in (4, 1, 6, 0, 3):
        scorer.begin(*asked[place])
    while workers and len(file.read_text().splitlines() if file.is_file() else []) < 5:
        time.sleep(0.01)  # scored before anybody asked
    texts, puzzles = [text for text, _ in asked], [puzzle for _, puzzle in asked]
    got = scorer.score(texts, puzzles, [False] * 7)
    assert [reward.total for reward in got[:-1]] == [len(text) + len(puzzle.id) for text, puzzle in asked[:-1]]
    assert got[-1].status is Status.ERROR
    rows = sorted(f"{puzzle.id} {text}" for text, puzzle in asked)
    assert sorted(file.read_text().splitlines()) == rows, "each once"
    assert [reward.total for reward in scorer.score(["a"], [PUZZLE], [False])] == [1 + len(PUZZLE.id)]
    assert len(file.read_text().splitlines()) == 8, "what an earlier call was given is not given again"
    scorer.close()


def test_a_failure_that_was_begun_stops_the_rest(rewards):
    scorer = Scorer(f"{rewards}:counted", 1)
    scorer.begin("raise", PUZZLE)
    texts = ["a", "raise", *map(str, range(50))]
    got = scorer.score(texts, [PUZZLE] * len(texts), [False] * len(texts), stop_at_failure=True)
    assert got[1].status is Status.ERROR and got[-1] is None
    again = scorer.score(texts[2:], [PUZZLE] * 50, [False] * 50, stop_at_failure=True)
    scorer.close()
    assert all(reward.status is Status.OK for reward in again)
    broken = Scorer("nowhere.py:fn", 2)
    broken.begin("a", PUZZLE)  # said by score, not in the thread that feeds the worker
    with pytest.raises(UserError, match="--reward nowhere.py:fn: its scoring process did not start"):
        broken.score(["a", "b"], [PUZZLE] * 2, [False] * 2)
    broken.close()


def test_an_interrupt_while_responses_are_sampled_leaves_the_rest_unscored(rewards):
    code = f"""
import os, time
from data.puzzles import Puzzle
from reward.scoring import Scorer
puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["a", "b"], answer=["a", "b"])
scorer = Scorer({rewards + ":slow"!r}, 1, 600.0)
for number in range(200):
    scorer.begin(f"i{{number}}", puzzle)
while not os.path.exists({rewards + ".i0"!r}):
    time.sleep(0.01)
print(scorer.workers[0].process.pid, flush=True)
raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr and done.returncode == -signal.SIGINT
    while alive(int(done.stdout)):  # killed by the kernel when the trainer has ended
        time.sleep(0.05)
    assert len(list(Path(rewards).parent.glob("rewards.py.i*"))) < 100  # of 200; 1 on an idle machine


def test_what_was_begun_and_not_asked_for_is_given_up(rewards):
    """A hang that nobody asks for must not hold back the next score, nor the end."""
    scorer = Scorer(f"{rewards}:plain", 1, 1e6)
    hangs = Path(f"{rewards}.hangs")
    hangs.unlink(missing_ok=True)
    scorer.begin("a", PUZZLE)
    scorer.begin("hang", PUZZLE)
    while not hangs.exists():
        time.sleep(0.01)
    assert scorer.score(["a"], [PUZZLE], [False])[0].total == 1.0
    assert scorer.score(["bb"], [PUZZLE], [False])[0].total == 2.0
    for _ in range(3):
        scorer.begin("hang", PUZZLE)
    scorer.close()
    assert scorer.workers[0].process is None and not scorer.workers[0].thread.is_alive()
    many = Scorer(f"{rewards}:patient", 1, 1e6)  # async: several are in flight when they are given up
    for _ in range(3):
        many.begin("hang", PUZZLE)
    for text in ("a", "bb", "ccc"):  # each at once, while the process of the given up ones goes
        assert many.score([text, "x"], [PUZZLE] * 2, [False] * 2)[0].total == len(text)
        many.begin("hang", PUZZLE)
        many.begin("hang", PUZZLE)
    many.close()


def test_a_killed_worker_costs_what_was_begun_nothing(rewards):
    scorer = Scorer(f"{rewards}:later", 1)
    scorer.start()
    scorer.ready()
    for n in range(1, 40):
        scorer.begin("a" * n, PUZZLE)
        if n == 20:
            scorer.workers[0].kill()
    got = scorer.score(["a" * n for n in range(1, 40)], [PUZZLE] * 39, [False] * 39)
    scorer.close()
    failed = [reward for reward in got if not reward.scored]
    assert len(failed) <= 1, "at most the one that was in flight"
    assert [reward.total for n, reward in enumerate(got, 1) if reward.scored and reward.total != n] == []


@pytest.mark.parametrize("begin", [False, True])
def test_an_error_in_the_thread_that_feeds_a_worker_is_raised_by_score(rewards, monkeypatch, begin):
    """A process that the machine will not start, a puzzle that cannot be sent: `score` must not wait for ever."""
    scorer = Scorer(f"{rewards}:plain", 2)

    def full(*_, **__):
        raise OSError(24, "Too many open files")

    for what in ("os.pipe", "subprocess.Popen"):
        with monkeypatch.context() as patch:
            before = len(os.listdir("/proc/self/fd"))
            patch.setattr(f"reward.scoring.{what}", full)
            if begin:
                scorer.begin("a", PUZZLE)
            with pytest.raises(OSError, match="Too many open files"):
                scorer.score(["a", "bb", "ccc"], [PUZZLE] * 3, [False] * 3)
            assert len(os.listdir("/proc/self/fd")) == before, "its pipes are closed"
    circle = {}
    circle["itself"] = circle
    odd = replace(PUZZLE, meta=circle)
    if begin:
        scorer.begin("a", odd)
    with pytest.raises((ValueError, RecursionError)):
        scorer.score(["a", "bb"], [odd, PUZZLE], [False] * 2)
    assert [reward.total for reward in scorer.score(["a", "bb"], [PUZZLE] * 2, [False] * 2)] == [1.0, 2.0]
    scorer.close()


def test_a_scorer_that_nobody_closes_leaves_no_process(rewards):
    scorer = Scorer(f"{rewards}:plain", 1)
    assert scorer.score(["a"], [PUZZLE], [False])[0].total == 1.0
    process, thread = scorer.workers[0].process, scorer.workers[0].thread
    del scorer
    gc.collect()
    thread.join(timeout=600)
    assert process.poll() is not None


def test_cellpuzzles_rewards_keep_parts_and_status(rewards):
    right, wrong = score("reward.cellpuzzles:batch_reward", [RIGHT, "no format"])
    assert (right.total, right.parts["cell_accuracy"], right.status) == (1.0, 1.0, Status.OK)
    assert (wrong.total, wrong.status) == (-1.0, Status.INVALID_FORMAT)


def test_a_worker_does_not_outlive_a_killed_trainer(rewards):
    """kill -9 on the trainer while a reward function is in an endless loop."""
    code = f"""
import os
from data.puzzles import Puzzle
from reward.scoring import Scorer
scorer = Scorer({rewards + ":plain"!r}, 1, 600.0)
puzzle = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=["a", "b"], answer=["a", "b"])
scorer.score(["x"], [puzzle], [False])
print(scorer.workers[0].process.pid, flush=True)
scorer.score(["hang"], [puzzle], [False])
"""
    hangs = Path(f"{rewards}.hangs")
    hangs.unlink(missing_ok=True)  # of another test
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    while not hangs.exists():  # else the worker would still wait at its pipe, and end with it
        assert trainer.poll() is None
        time.sleep(0.05)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and alive(worker):
        time.sleep(0.2)
    assert not alive(worker)


def test_a_worker_serves_step_after_step(rewards):
    """A worker ends with the thread that started it, so that thread must outlive a call of score."""
    scorer = Scorer(f"{rewards}:plain", 2, 60.0)
    pids = []
    for _ in range(3):
        got = scorer.score(["a", "bb", "ccc"], [PUZZLE] * 3, [False] * 3)
        assert [reward.total for reward in got] == [1.0, 2.0, 3.0]
        time.sleep(0.1)
        assert all(alive(worker.process.pid) for worker in scorer.workers)
        pids.append([worker.process.pid for worker in scorer.workers])
    scorer.close()
    assert pids[0] == pids[1] == pids[2]
    assert not any(map(alive, pids[0]))


def test_workers_are_ready_before_the_first_response(rewards):
    scorer = Scorer(f"{rewards}:plain", 2, 60.0)
    scorer.start()
    scorer.ready()
    pids = [worker.process.pid for worker in scorer.workers]
    assert all(map(alive, pids))
    assert [reward.total for reward in scorer.score(["a", "bb"], [PUZZLE] * 2, [False] * 2)] == [1.0, 2.0]
    assert [worker.process.pid for worker in scorer.workers] == pids
    scorer.close()
    here = Scorer(f"{rewards}:plain", 0)  # it has none, so there is nothing to wait for
    here.start()
    here.ready()
    for wait in ("ready", "score"):  # whoever waits first says it
        broken = Scorer("nowhere.py:fn", 1)
        broken.start()
        with pytest.raises(ValueError, match="--reward nowhere.py:fn: its scoring process did not start: no file"):
            broken.ready() if wait == "ready" else broken.score(["a"], [PUZZLE], [False])
        broken.close()


def alive(pid: int) -> bool:
    return not is_gone(pid)


def test_functions_in_trls_style(rewards):
    assert [r.total for r in score(f"trl:{rewards}:trl_format", [RIGHT, "x"])] == [1.0, 0.0]
    half = RIGHT.replace("T cell | B cell", "T cell | T cell")
    right, wrong, declined = score(f"trl:{rewards}:trl_accuracy", [RIGHT, half, "no answer"])
    assert (right.total, right.parts) == (1.0, {"labels": 2.0}) and wrong.total == 0.5
    assert declined.status is Status.DECLINED and not declined.scored
    assert score(f"trl:{rewards}:trl_async", ["abc"])[0].total == 3.0
    with pytest.raises(ValueError, match="it needs 'completion_ids', which is not passed on here"):
        load_reward(f"trl:{rewards}:trl_tokens")


def test_functions_in_verls_style(rewards):
    right, wrong = score(f"verl:{rewards}:compute_score", [RIGHT, "x"])
    assert right.total == 0.5 and right.parts == {"acc": 1.0, "source": 9.0}
    assert wrong.total == 0.0 and wrong.scored


def test_a_response_that_was_not_scored_takes_no_part():
    """Group 0 without its failed member: rewards 1, 0; group 1 has one scored member left: nothing to compare."""
    failed = Reward(total=float("nan"), status=Status.ERROR)
    rewards = [Reward(total=1.0), failed, Reward(total=0.0), failed, failed, Reward(total=5.0)]
    advantages, trained = compare(rewards, GrpoConfig(group_size=3))
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    torch.testing.assert_close(advantages, torch.tensor([expected, 0.0, -expected, 0.0, 0.0, 0.0]))
    assert trained.tolist() == [True, False, True, False, False, True]


def rows_of(*groups: list[float | None]) -> list[dict]:
    return [{"reward": reward, "parts": {}} for group in groups for reward in group]


def test_rate_and_norm_are_those_of_the_last_update_that_was_made():
    made, empty, total = TokenSums(grad_norm=2.0, lr=0.5), TokenSums(), TokenSums()
    total.take_in(made)  # this rank had no token in it, and another had
    total.take_in(empty)  # none of its responses was scored, so no optimizer step was made
    assert (total.grad_norm, total.lr) == (2.0, 0.5)


def test_equal_rewards_are_right_or_wrong_only_where_that_is_known():
    """1 is right, 0 and -1 (an invalid format) are wrong; 0.25 of mixed_reward and 3 of somebody's reward are neither."""
    metrics = reward_metrics(rows_of([1.0, 1.0], [0.0, 0.0], [-1.0, -1.0], [0.25, 0.25], [3.0, 3.0]), group_size=2)
    kinds = {name.removeprefix("groups/"): share for name, share in metrics.items() if name.startswith("groups/")}
    assert kinds == {
        "all_right": 0.2,
        "all_wrong": 0.4,
        "all_equal": 0.4,
        "mixed": 0.0,
        "unscored": 0.0,
        "dropped_responses": 0.0,
    }
    assert metrics["frac_reward_zero_std"] == 1.0
    # without such a group the line has the keys that it always had
    assert "groups/all_equal" not in reward_metrics(rows_of([1.0, 1.0], [-1.0, 0.0]), group_size=2)


def test_groups_are_counted_and_zeros_explained():
    metrics = reward_metrics(rows_of([1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [None, 1.0]), group_size=2)
    assert metrics["groups/all_right"] == 0.5 and metrics["groups/all_wrong"] == metrics["groups/mixed"] == 0.25
    assert metrics["frac_reward_zero_std"] == 0.75 and metrics["groups/dropped_responses"] == 1 / 8
    assert metrics["reward"] == pytest.approx(4 / 7)

    def notes(groups: list, cfg: GrpoConfig, **values: float) -> list[str]:
        zeros = {
            "pg_loss": 0.0,
            "kl": 0.0,
            "clip_ratio/low_mean": 0.0,
            "clip_ratio/high_mean": 0.0,
            "clip_ratio/dual_mean": 0.0,
        }
        return [
            n.split(",")[0].split(" 0:")[-1]
            for n in explain_zeros({**zeros, **values, **reward_metrics(groups, 2)}, cfg)
        ]

    mixed, paper = rows_of([1.0, 0.0]), GrpoConfig()
    assert notes(mixed, paper) == [
        " fresh samples",
        "no clip: one update per batch",
        " the adapter starts at zero",
    ]
    dropped = notes(mixed, GrpoConfig(correction="seq-mis"), **{"sampling/dropped_tokens": 1.0})
    assert dropped[0] == " --correction seq-mis dropped every token"
    assert notes(mixed, GrpoConfig(lora_rank=0))[-1] == " the policy is still its reference"
    assert notes(rows_of([1.0, 1.0]), paper)[0] == " all groups right"
    assert notes(rows_of([0.0, 0.0]), paper)[0] == " all groups wrong"
    assert notes(rows_of([0.0, 0.0], [1.0, 1.0]), paper)[0] == " groups all right or all wrong"
    assert notes(rows_of([0.25, 0.25], [1.0, 1.0]), paper)[0] == " the rewards of each group are equal"
    assert notes(rows_of([None, None]), paper) == [" no response of the step was scored"]
    unscored = reward_metrics(rows_of([None, None], [1.0, 1.0]), 2)
    assert unscored["groups/unscored"] == unscored["groups/all_right"] == unscored["frac_reward_zero_std"] == 0.5
    assert reward_metrics(rows_of([None, None]), 2)["reward"] is None, "no reward is not a reward of 0"
    several = GrpoConfig(updates_per_batch=2, beta=0.0)
    assert notes(mixed, several, pg_loss=0.2) == [
        "no clip: no ratio went past the bound on its advantage's side",
        " no reference",
    ]
    busy = {"pg_loss": 0.1, "kl": 0.2, "clip_ratio/low_mean": 0.1}
    assert notes(mixed, several, **busy) == []


SMALL = (
    "--prompts-per-step",
    4,
    "--group-size",
    3,
    "--max-prompt-tokens",
    400,
    "--max-response-tokens",
    12,
    "--lora-rank",
    8,
    "--lora-alpha",
    16,
    "--insist",
    "--lr",
    1e-2,
    "--engine",
    "torch",
)


@pytest.fixture(scope="module")
def run(pipeline, tmp_path_factory):
    """A run whose reward fails for every response of an odd length, under --on-reward-error drop."""
    folder = tmp_path_factory.mktemp("drop")
    (folder / "odd.py").write_text(
        "def fails(completion, puzzle):\n"
        "    if len(completion) % 2:\n"
        "        raise RuntimeError('odd')\n"
        "    return -len(completion) / 50\n"
        "def longer(completion, puzzle):\n"
        "    return len(completion) / 50\n"
    )
    arguments = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", *SMALL)
    stopped = run_command(
        "grpo", *arguments, "--steps", 2, "--out", folder / "stop", "--reward", f"{folder}/odd.py:fails"
    )
    text = succeed(
        "grpo",
        *arguments,
        "--steps",
        2,
        "--out",
        folder / "run",
        "--reward",
        f"{folder}/odd.py:fails",
        "--on-reward-error",
        "drop",
    )
    return folder, stopped, text


def test_a_failing_reward_stops_the_run_by_name(run):
    folder, stopped, _ = run
    assert stopped.returncode == 2
    said = [line for line in stopped.stderr.splitlines() if line.startswith("Error: step 1: --reward")]
    assert said and len(set(said)) == 1, "every rank that gets to speak says the same"
    assert "RuntimeError: odd (odd.py, line 3)" in said[0] and "--resume --on-reward-error drop" in said[0]
    case = json.loads((folder / "stop/reward_failure.json").read_text())
    assert f"puzzle {case['puzzle_id']}, response {case['response']} of 3" in said[0] and case["step"] == 1
    # the other run sampled the same answers: the one that failed is where the sentence says
    rows = [json.loads(line) for line in (folder / "run/rollouts.jsonl").read_text().splitlines()]
    where = ("step", "puzzle_id", "response", "completion")
    failed = [[row[name] for name in where] for row in rows if row["status"] == "error"]
    assert [case[name] for name in where] in failed


def test_or_is_dropped_and_counted(run):
    folder, _, text = run
    metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (folder / "run/rollouts.jsonl").read_text().splitlines()]
    odd = [len(row["completion"]) % 2 == 1 for row in rows]
    assert any(odd) and not all(odd)
    assert [row["reward"] is None for row in rows] == odd == [row["status"] == "error" for row in rows]
    assert all(
        row["advantage"] == 0.0 and "RuntimeError: odd" in row["message"] for row in rows if row["reward"] is None
    )
    for step in metrics:
        own = [row for row in rows if row["step"] == step["step"]]
        scored = [row["reward"] for row in own if row["reward"] is not None]
        assert step["reward"] == pytest.approx(sum(scored) / len(scored))
        assert step["groups/dropped_responses"] == pytest.approx(1 - len(scored) / len(own))


def test_parts_are_means_over_the_responses_that_have_a_reward():
    rows = [{**row, "parts": {"x": value}} for row, value in zip(rows_of([1.0, None]), (0.5, -1.0), strict=True)]
    assert reward_metrics(rows, 2)["rewards/x"] == 0.5
    cfg, failed = GrpoConfig(overlong_buffer=0.5, max_response_tokens=4), Reward(total=math.nan, status=Status.TIMEOUT)
    long = SimpleNamespace(response_ids=[1, 2, 3, 4])
    assert with_penalty(failed, long, cfg) is failed
    assert with_penalty(Reward(total=1.0), long, cfg).parts["overlong_penalty"] < 0


def test_answers_are_scored_on_the_puzzles_that_were_asked(tmp_path):
    labels = ["x", "y"]
    one = Puzzle(id="p", context="", cells=[["A"], ["B"]], candidates=labels, answer=labels)
    write_puzzles(tmp_path / "p.jsonl", [one, one])
    asked = sha256(tmp_path / "p.jsonl")
    assert puzzles_of_run(str(tmp_path / "p.jsonl"), asked) == {"p": read_puzzles(tmp_path / "p.jsonl")[0]}
    write_puzzles(tmp_path / "p.jsonl", [one, replace(one, answer=["y", "x"])])
    with pytest.raises(UserError, match=r"p.jsonl: is not the file that the run asked \(other SHA-256\)"):
        puzzles_of_run(str(tmp_path / "p.jsonl"), asked)
    with pytest.raises(UserError, match="two different puzzles are called p"):
        puzzles_of_run(str(tmp_path / "p.jsonl"), None)


def test_a_puzzle_that_stands_twice_in_a_step_has_two_groups():
    """Training compares each group for itself; so do rescoring, the ledger's sums and the page of a step."""

    class Lengths:
        def score(self, completions, puzzles, truncated):
            return [Reward(total=float(len(text))) for text in completions]

    texts = ("aaaa", "aa", "a", "aaa", "aaaa", "aa")
    rows = [
        {"step": step, "puzzle_id": "p", "response": place % 2 + 1, "completion": text, "finish_reason": "stop"}
        | {"reward": 1.0, "advantage": 0.0}
        for place, (step, text) in enumerate(zip((1, 1, 1, 1, 2, 2), texts, strict=True))
    ]
    found = rescore(rows, {"p": None}, Lengths(), "dr_grpo", 1e-6)
    assert [row["advantage"] for row in found] == [1.0, -1.0, -1.0, 1.0, 1.0, -1.0]
    assert summary_lines(found)[0].startswith("6 responses in 3 groups,")
    assert "groups that teach        0 -> 3" in summary_lines(found)[2]
    # rows that were left out do not join what remains, and another puzzle begins a group whatever its number
    assert group_numbers(rows) == [0, 0, 1, 1, 2, 2] and group_numbers(rows[1:]) == [0, 1, 1, 2, 2]
    assert group_numbers([rows[0], {**rows[1], "puzzle_id": "q"}]) == [0, 1]
    tokens = [
        {"row": row, "puzzle_id": "p", "response": row % 2 + 1, "position": at + 1, "contribution": share}
        for row, shares in enumerate(((0.5, 0.25), (-1.0,), (2.0,), (4.0, 8.0)))
        for at, share in enumerate(shares)
    ]
    assert contributions_by_group(tokens) == {"p": -0.25, "p (again)": 14.0}
    more = dict.fromkeys(stepview.COLUMNS, 0) | {"mask": True}
    responses = [{**row, "status": "ok"} for row in rows[:4]]
    page = stepview.step_page(
        1, {}, responses, [more | token for token in tokens], {0: "the first prompt", 2: "the second"}, formula="w x s"
    )
    assert "4 responses in 2 groups" in page and page.count('"id":"p"') == 2
    assert page.count("the first prompt") == page.count("the second") == 1, "puzzles of two builds may share an id"


def test_rescore_says_what_changes(run, tmp_path):
    folder, _, _ = run
    rollouts = folder / "run/rollouts.jsonl"
    text = succeed("rescore", rollouts, "--reward", f"{folder}/odd.py:longer", "--out", tmp_path / "new.jsonl")
    old = [json.loads(line) for line in rollouts.read_text().splitlines()]
    new = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in new] == [pytest.approx(len(row["completion"]) / 50) for row in old]
    assert [row["old_reward"] for row in new] == [row["reward"] for row in old]
    for first in range(0, len(new), 3):
        rewards = np.array([row["reward"] for row in new[first : first + 3]])
        wanted = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        assert [row["advantage"] for row in new[first : first + 3]] == pytest.approx(wanted.tolist(), abs=1e-4)
    both = sum(row["reward"] is not None for row in old)
    assert f"{len(old)} responses in {len(old) // 3} groups, {len(old) - both} without one of the two rewards" in text
    last = old[-1]["step"]
    assert last > old[0]["step"]
    some, odd = folder / "run/some.jsonl", f"{folder}/odd.py:longer"
    # a row of another step is neither parsed nor asked for what it lacks
    rows = ['{"step": 1, not parsed}', *(json.dumps(row) for row in old if row["step"] == last), '{"step": 1}']
    some.write_text("\n".join(rows) + "\n")
    succeed("rescore", some, "--reward", odd, "--step", last, "--out", tmp_path / "some.jsonl")
    of_last = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert of_last == [row for row in new if row["step"] == last]
    refused = run_command("rescore", some, "--reward", odd, "--step", last, "--step", 1)
    assert refused.returncode == 2 and "some.jsonl" in refused.stderr and "Traceback" not in refused.stderr
    some.unlink()
    bare = {name: old[1][name] for name in ("step", "puzzle_id", "response", "completion", "reward", "advantage")}
    (tmp_path / "short.jsonl").write_text(json.dumps(old[0]) + "\n" + json.dumps(bare) + "\n")
    own = tmp_path / "train.jsonl"  # named by config.json alone
    (tmp_path / "other").mkdir()
    shutil.copy(rollouts, tmp_path / "other/rollouts.jsonl")
    (tmp_path / "other/config.json").write_text(json.dumps({"settings": {"puzzles": str(own)}}))
    before = rollouts.read_bytes()
    for arguments, says in (
        ([rollouts, "--reward", "reward.cellpuzzles:nope"], "has no 'nope'"),
        (
            [folder / "run/metrics.jsonl", "--reward", "reward.cellpuzzles:batch_reward"],
            "not the rollouts of a GRPO run",
        ),
        ([rollouts, "--reward", "reward.cellpuzzles:batch_reward", "--step", 9], "holds no rollout of step 9"),
        (
            [tmp_path / "short.jsonl", "--reward", "reward.cellpuzzles:batch_reward"],
            "not the rollouts of a GRPO run (no 'finish_reason' in row 2)",
        ),
        (
            [rollouts, "--reward", "reward.cellpuzzles:batch_reward", "--out", folder / "x/../run/rollouts.jsonl"],
            "is an input, which would be lost; name another file",
        ),
        (
            [tmp_path / "other/rollouts.jsonl", "--reward", "reward.cellpuzzles:batch_reward", "--out", own],
            "is an input, which would be lost; name another file",
        ),
    ):
        done = run_command("rescore", *arguments)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr[-1500:]
    assert rollouts.read_bytes() == before
    shutil.copy(rollouts, tmp_path / "rollouts.jsonl")
    config = tmp_path / "config.json"
    for text, says in (
        ("{", "config.json: damaged, not JSON"),
        ('{"model_type": "llama"}', "name them with --puzzles"),
        ('{"settings": {"critic_lr": 1e-5}}', "of a PPO run, whose advantages come from a critic"),
        ('{"settings": {"puzzles": "p.parquet"}, "data": {"puzzles": "0"}}', "p.parquet"),
    ):
        config.write_text(text)
        done = run_command("rescore", tmp_path / "rollouts.jsonl", "--reward", "reward.cellpuzzles:batch_reward")
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr[-1500:]


def test_a_function_for_verl_gets_the_data_source_of_its_row(rewards):
    """The reward of Cell-o1's authors gives -1 to rows whose source does not hold "cell_data"."""
    fn = load_reward(f"verl:{rewards}:compute_score")
    right = "T cell | B cell"
    assert fn(right, PUZZLE).parts["source"] == len("cell_data")
    assert fn(right, replace(PUZZLE, meta={"data_source": "mine"})).parts["source"] == len("mine")


def test_long_answers_of_an_async_reward_block_nothing(rewards):
    """It answers at once, with messages that fill its pipe before the last job is written."""
    scorer = Scorer(f"{rewards}:wordy", 1, 20.0)
    starts, start = [], scorer.workers[0].start
    scorer.workers[0].start = lambda: (starts.append(scorer.workers[0].process), start())[1]
    try:
        got = scorer.score(["a" * 12_000 + str(i) for i in range(128)], [PUZZLE] * 128, [False] * 128)
    finally:
        scorer.close()
    assert {r.status for r in got} == {Status.ERROR} and all("AssertionError" in r.message for r in got)
    assert starts.count(None) == 1, "the worker was not killed for a silence that was ours"


def test_a_scorer_that_is_closed_while_it_scores_ends(rewards):
    scorer, found = Scorer(f"{rewards}:slow", 1), []
    texts = [str(i) for i in range(50)]
    thread = threading.Thread(target=lambda: found.extend(scorer.score(texts, [PUZZLE] * 50, [False] * 50)))
    thread.start()
    while not list(Path(rewards).parent.glob("rewards.py.[0-9]*")):
        time.sleep(0.05)
    scorer.close()
    thread.join(timeout=60)
    assert not thread.is_alive() and found[-1] is None and scorer.workers[0].process is None
    assert len(list(Path(rewards).parent.glob("rewards.py.[0-9]*"))) < 25
    assert scorer.score(texts, [PUZZLE] * 50, [False] * 50) == [None] * 50, "nor does it begin again"


def test_calls_side_by_side_get_their_own_rewards(rewards):
    scorer, found = Scorer(f"{rewards}:later", 2), {}
    texts = {name: [name * (1 + i % 7) for i in range(40)] for name in ("a", "bbbbbbbbbb")}

    def ask(name: str) -> None:
        found[name] = [reward.total for reward in scorer.score(texts[name], [PUZZLE] * 40, [False] * 40)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    scorer.close()
    assert found == {name: [float(len(text)) for text in own] for name, own in texts.items()}


def test_an_async_reward_in_a_notebook_is_refused_with_what_to_do(rewards):
    async def cell():
        return Scorer(f"{rewards}:wordy", 0).score(["x"], [PUZZLE], [False])

    with pytest.raises(UserError, match="cannot be awaited inside a running event loop .*; use workers=1"):
        asyncio.run(cell())
