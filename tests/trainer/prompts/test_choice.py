"""Which prompts a step asks: --curriculum and --oversample."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles
from rollout import Rollout
from tests.helpers.commands import SMALL_GRPO, kill_at, run_command, succeed
from trainer.advantages import group_advantages
from trainer.config import GrpoConfig
from trainer.metrics import Clock, reward_metrics
from trainer.packing import ScoredGroup
from trainer.policy import Prompt
from trainer.prompts.choice import is_mixed, other_prompts, prompts_of_step, replace_equal_groups

SMALL = (*SMALL_GRPO, "--engine", "torch", "--reward-workers", 0, "--save-every", 2, "--date", "2026-11-26")


def prompt(name: str, difficulty: float = 0.0) -> Prompt:
    puzzle = Puzzle(id=name, context="", cells=[["A"]], candidates=["x", "y"], answer=["x"])
    return Prompt(puzzle=puzzle, ids=[1], difficulty=difficulty)


def group(name: str, *rewards: float | None) -> ScoredGroup:
    rollout = Rollout(
        puzzle_id=name,
        prompt_ids=[1],
        response_ids=[2],
        sampler_logprobs=[0.0],
        finish_reason="stop",
        adapter_version=0,
        adapter_hash="",
    )
    zeros = torch.zeros(len(rewards))
    return ScoredGroup(
        rollouts=[rollout] * len(rewards),
        rows=[{"reward": r} for r in rewards],
        advantages=zeros,
        trained=zeros.bool(),
    )


PROMPTS = [prompt(name) for name in "abcdefghij"]
BATCH = [group("a", 0, 1), group("b", 1, 1), group("c", 0, 0), group("d", None, None)]


def rounds_of(mixed: set[str], oversample: int) -> tuple[list[str], dict, list[list[str]]]:
    """(puzzles kept, keys of metrics.jsonl, prompts asked per round) when only the groups of `mixed` are mixed."""
    asked: list[list[str]] = []

    def more(prompts: list[Prompt], part: str) -> list[ScoredGroup]:
        asked.append([p.puzzle.id for p in prompts])
        assert part == f"round-{len(asked)}"
        return [group(p.puzzle.id, *((0, 1) if p.puzzle.id in mixed else (1, 1))) for p in prompts]

    cfg = GrpoConfig(prompts_per_step=4, oversample=oversample)
    kept, numbers = replace_equal_groups(BATCH, more, PROMPTS, cfg, step=3)
    return [g.rollouts[0].puzzle_id for g in kept], numbers, asked


def test_without_oversampling_nothing_is_asked():
    assert rounds_of(set(), 1) == (["a", "b", "c", "d"], {}, [])


def test_equal_groups_are_replaced_in_place_until_the_batch_is_mixed():
    kept, numbers, asked = rounds_of(set("abcdefghij"), 4)
    assert len(asked) == 1 and len(asked[0]) == 3, "as many as are missing: b, c and d"
    assert not set(asked[0]) & set("abcd"), "others than the batch's"
    assert kept == ["a", *asked[0]]
    # 7 groups of two, three of them without different rewards; rewards 0 1, 1 1, 0 0 and three times 0 1
    assert numbers == {
        "dynamic_sampling/num_gen_batches": 7 / 4,
        "dynamic_sampling/filtered_groups": 3 / 7,
        "dynamic_sampling/reward": 6 / 12,
    }


def test_it_ends_when_k_batches_were_asked_and_places_left_keep_their_groups():
    kept, numbers, asked = rounds_of(set(), 2)
    assert [len(part) for part in asked] == [3, 1], "four more prompts, three of them first"
    assert kept == ["a", "b", "c", "d"]
    assert numbers["dynamic_sampling/num_gen_batches"] == 2 and numbers["dynamic_sampling/filtered_groups"] == 7 / 8
    order = [p.puzzle.id for p, _ in zip(other_prompts(PROMPTS, set("abcd"), 0, 3), range(10), strict=False)]
    assert [name for part in asked for name in part] == order[:4], "a round goes on where the last one ended"
    assert set(order[:6]) == set("efghij") and set(order[6:]) == set("abcd"), "the batch's own come last"


def test_rewards_that_differ_only_beyond_float32_are_equal():
    """Advantages are made in float32: the group would be kept as one that teaches, and all its advantages are 0."""
    sums = [0.1 + 0.2, 0.3, None]
    assert sums[0] != sums[1] and group_advantages(
        torch.tensor(sums[:2]), torch.zeros(2, dtype=torch.long)
    ).tolist() == [0, 0]
    assert not is_mixed(SimpleNamespace(rows=[{"reward": reward} for reward in sums]))
    assert is_mixed(SimpleNamespace(rows=[{"reward": reward} for reward in (0.3, 0.3001)]))
    assert not is_mixed(SimpleNamespace(rows=[{"reward": None}]))
    rows = [{"reward": reward, "parts": {}} for reward in sums[:2]]
    assert reward_metrics(rows, group_size=2)["groups/all_equal"] == 1


def test_some_found_fill_the_first_places():
    asked = rounds_of(set(), 3)[2]
    second = asked[0][1]
    kept, _, again = rounds_of({second}, 3)
    assert again[0] == asked[0] and kept == ["a", second, "c", "d"]
    assert [len(part) for part in again] == [3, 2, 2, 1], "two are missing from the second round on; eight in all"


def test_oversampling_with_staleness_is_refused():
    with pytest.raises(
        UserError, match="--oversample 2 and --max-staleness 1: groups that come later would be of a newer"
    ):
        GrpoConfig(oversample=2, max_staleness=1, placement="split", correction="tis")


# ---- curriculum


def test_an_epoch_goes_from_easy_to_hard_and_equals_stay_shuffled():
    plain = prompts_of_step(PROMPTS, 10, 0, seed=5)
    assert prompts_of_step([prompt(p.puzzle.id, 0.5) for p in PROMPTS], 10, 0, seed=5) == [
        prompt(p.puzzle.id, 0.5) for p in plain
    ]
    graded = [prompt(name, difficulty) for name, difficulty in zip("abcdef", (1, 0, 0.5, 0, 1, 0.5), strict=True)]
    first, second = prompts_of_step(graded, 3, 0, 1), prompts_of_step(graded, 3, 1, 1)
    assert [p.difficulty for p in first + second] == [0, 0, 0.5, 0.5, 1, 1]
    orders = {tuple(p.puzzle.id for p in prompts_of_step(graded, 6, epoch, 1)) for epoch in range(6)}
    assert len(orders) > 1, "another order of equals in every epoch"


def test_the_hardest_have_their_turn_too_where_an_epoch_has_a_ragged_end():
    graded = [prompt(name, place / 10) for place, name in enumerate("abcdefghij")]
    epochs = [[p for step in (2 * e, 2 * e + 1) for p in prompts_of_step(graded, 4, step, 1)] for e in range(12)]
    assert {p.puzzle.id for epoch in epochs for p in epoch} == set("abcdefghij")
    for epoch in epochs:
        assert len(epoch) == 8 and epoch == sorted(epoch, key=lambda p: p.difficulty)


@pytest.mark.slow(2)
def test_a_run_with_a_curriculum_begins_with_what_the_model_can_do(pipeline, tmp_path):
    puzzles = read_puzzles(pipeline / "puzzles/train.parquet")
    easy = {p.id for p in puzzles[::10]}
    right = "<think></think><answer>{}</answer>"
    with open(tmp_path / "answers.jsonl", "w") as file:
        for p in puzzles:
            good = right.format(" | ".join(p.answer))
            samples = [good, good, ""] if p.id in easy else [good, "", ""]
            file.write(json.dumps({"id": p.id, "prediction": samples[0], "samples": samples}) + "\n")
    given = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet", *SMALL)
    given = (*given, "--curriculum", tmp_path / "answers.jsonl")
    said = succeed("grpo", *given, "--steps", 1, "--out", tmp_path / "run")
    assert f"1 steps take the 4 easiest of {len(puzzles) // 4 * 4} puzzles, and none of the others" in said
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    assert {row["puzzle_id"] for row in rows} <= easy and len(rows) == 12
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text("\n".join(lines[1:]) + "\n")
    done = run_command("grpo", *given, "--steps", 1, "--out", tmp_path / "other")
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"puzzles have no prediction, the first is {puzzles[0].id}" in done.stderr
    done = run_command("grpo", *given[:-1], tmp_path / "none.jsonl", "--steps", 1, "--out", tmp_path / "other")
    assert done.returncode == 2 and f"--curriculum {tmp_path / 'none.jsonl'}: no such file" in done.stderr


# ---- dynamic sampling in a run

REWARD = """
def thirds(completion, puzzle):
    return float(len(completion) % 3 == 0)  # three responses agree in a third of all groups
"""


@pytest.fixture(scope="module")
def options(pipeline, tmp_path_factory) -> tuple:
    file = tmp_path_factory.mktemp("reward") / "thirds.py"
    file.write_text(REWARD)
    data = ("--model", pipeline / "base", "--puzzles", pipeline / "puzzles/train.parquet")
    return (*data, "--reward", f"{file}:thirds", *SMALL, "--oversample", 3)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed("grpo", *options, "--out", out, "--steps", 4)
    return out


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow(3)
def test_a_batch_is_full_of_mixed_groups_and_the_waste_is_reported(whole):
    rows = metrics(whole)
    asked = [row["dynamic_sampling/num_gen_batches"] for row in rows]
    assert all(1 <= batches <= 3 for batches in asked) and max(asked) > 1
    for row in rows:
        full = row["groups/mixed"] == 1
        assert full or row["dynamic_sampling/num_gen_batches"] == 3
        # of 4 x num_gen_batches groups those that are not mixed
        equal = 4 * row["dynamic_sampling/num_gen_batches"] * row["dynamic_sampling/filtered_groups"]
        assert not full or equal == pytest.approx(4 * (row["dynamic_sampling/num_gen_batches"] - 1))
    rollouts = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 4 * 4 * 3, "the groups that are trained on"


@pytest.mark.slow(3)
def test_kill_and_resume_give_the_same_bytes(options, whole, tmp_path):
    kill_at("step 3/", tmp_path / "cut", "grpo", *options, "--out", tmp_path / "cut", "--steps", 4)
    succeed("grpo", *options, "--out", tmp_path / "cut", "--steps", 4, "--resume")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow(4)
@pytest.mark.parametrize("more", [(), ("--placement", "split")], ids=["colocate", "split"])
def test_two_processes_give_the_same_numbers(options, whole, tmp_path, more):
    succeed("grpo", *options, *more, "--out", tmp_path / "run", "--steps", 4, ranks=2)
    for one, two in zip(metrics(whole), metrics(tmp_path / "run"), strict=True):
        for key in ("reward", "groups/mixed", *(key for key in one if key.startswith("dynamic_sampling/"))):
            assert one[key] == two[key], key
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_the_rounds_of_dynamic_sampling_count_as_sampling(monkeypatch):
    """They come after the phase "score" of the step's own batch, which must not swallow them."""
    seconds = iter((0.0, 1.0, 3.0, 6.0, 10.0, 15.0))  # the clock is made, and five phases begin
    monkeypatch.setattr("trainer.metrics.time.perf_counter", lambda: next(seconds))
    world = type("World", (), {"enter": lambda self, phase, step: None})()
    clock = Clock(world, 1)
    for phase in ("sample", "score", "sample", "score", "update"):
        clock.enter(phase)
    assert clock.laps == {"timing_s/sample": 2.0 + 4.0, "timing_s/score": 3.0 + 5.0}
