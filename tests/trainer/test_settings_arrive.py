"""Every setting of an update reaches the arithmetic that it is for: objective, clipping, learning rate, decay, seed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.puzzles import Puzzle
from rollout import Sampling
from trainer import grpo
from trainer.config import GrpoConfig
from trainer.grpo import ask, clip_gradients, compare, make_canary, optimizer_step, terms_of
from trainer.packing import Denominators, make_micro_batch
from trainer.policy import Prompt
from trainer.prompts.choice import prompts_of_step
from trainer.sft.loop import batch_of_step, set_learning_rate, sum_and_clip_gradients
from trainer.sft.settings import SftConfig
from trainer.start.parts import make_optimizer

CPU = torch.device("cpu")
OBJECTIVE = {
    "clip_low": 0.11,
    "clip_high": 0.22,
    "dual_clip": 3.3,
    "beta": 0.044,
    "kl_kind": "k2",
    "ratio_level": "sequence",
    "correction": "seq-mis",
    "correction_cap": 5.5,
    "correction_floor": 0.66,
    "surrogate": "clip",
}


@pytest.mark.parametrize("changed", [{}, {"surrogate": "cispo", "dual_clip": None, "ratio_level": "token"}])
def test_the_objective_gets_its_settings_under_their_names(monkeypatch, changed):
    """A default in place of one setting would change a loss by a little, and no run would look wrong."""
    given = {}
    monkeypatch.setattr(grpo, "grpo_terms", lambda **values: given.update(values) or "terms")
    wanted = OBJECTIVE | changed
    micro = make_micro_batch(
        [([1, 2], [[3, 4], [5]])], [0, 1], torch.tensor([1.0, -1.0]), torch.ones(2).bool(), [0.0] * 3, CPU
    )
    cfg = GrpoConfig(**wanted, aggregation="seq-mean-token-sum-norm", max_response_tokens=50)
    assert terms_of(torch.zeros(2, 2), micro, Denominators(4, 9), cfg) == "terms"
    assert {name: given[name] for name in wanted} == wanted
    assert given["weight"].tolist() == [[pytest.approx(1 / 200)] * 2, [pytest.approx(1 / 200), 0.0]]
    assert given["advantages"] is micro.advantages and given["mask"] is micro.mask
    assert given["sampler_logprobs"] is micro.sampler_logprobs


@pytest.mark.parametrize(
    ("advantage", "wanted"),
    [
        ("dr_grpo", [2 / 3, -1 / 3, -1 / 3]),
        ("rloo", [1.0, -0.5, -0.5]),
        ("grpo", [2 / 3 / (3**-0.5 + 0.5), None, None]),
    ],
)
def test_advantages_are_of_the_kind_that_was_asked_for(advantage, wanted):
    rewards = [SimpleNamespace(scored=True, total=total) for total in (1.0, 0.0, 0.0)]
    cfg = GrpoConfig(group_size=3, advantage=advantage, advantage_eps=0.5)
    found = compare(rewards, cfg)[0].tolist()
    assert [b for b, a in zip(found, wanted, strict=True) if a is not None] == pytest.approx(
        [a for a in wanted if a is not None]
    )


@pytest.mark.parametrize(("largest", "wanted"), [(1.0, [0.6, 0.8]), (5.5, [3.0, 4.0]), (10.0, [3.0, 4.0])])
def test_a_gradient_is_scaled_to_the_largest_norm_and_never_up(largest, wanted):
    for how in ("grpo", "sft"):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0])
        if how == "grpo":
            clip_gradients([p], torch.tensor(5.0), largest)
        else:
            world = SimpleNamespace(sum_gradients=lambda parameters: None)
            assert sum_and_clip_gradients([p], largest, world) == 5.0
        assert p.grad.tolist() == pytest.approx(wanted, rel=1e-5), how


def test_the_rate_warms_up_and_the_gradient_is_clipped_before_the_step():
    rates, moved = [], []
    for step in (0, 1, 3, 9):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0])
        optimizer = torch.optim.SGD([p], lr=77.0)  # moves by lr x gradient, which shows both
        learner = SimpleNamespace(parameters={"p": p}, optimizer=optimizer, lr=0.5)
        now = SimpleNamespace(step=step, cfg=GrpoConfig(warmup_steps=4, grad_clip=1.0))
        rates.append(optimizer_step(now, learner, SimpleNamespace(denominators=Denominators(1, 2)), torch.tensor(5.0)))
        moved.append(p.tolist())
    assert rates == [0.125, 0.25, 0.5, 0.5]
    assert moved == [pytest.approx([-0.6 * rate, -0.8 * rate], rel=1e-5) for rate in rates]
    run = SimpleNamespace(
        n_steps=10, optimizer=optimizer, cfg=SftConfig(traces="t", model="m", out="o", lr=1.0, warmup_steps=2)
    )
    assert (set_learning_rate(run, 0), optimizer.param_groups[0]["lr"]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [(4, [0.4, 0.8, 0.8, 0.6, 0.4, 0.2]), (0, [0.4, *[0.8] * 5]), (9, [0.4, *(0.8 * k / 6 for k in (5, 4, 3, 2, 1))])],
)
def test_the_rate_falls_evenly_over_the_last_steps(decay, wanted):
    """Of a run that is shorter than that (demo.py --grpo-steps), over all of it."""
    rates = []
    for step in range(6):
        p = torch.nn.Parameter(torch.zeros(1))
        p.grad = torch.ones(1)
        learner = SimpleNamespace(parameters={"p": p}, optimizer=torch.optim.SGD([p], lr=7.0), lr=0.8)
        now = SimpleNamespace(step=step, cfg=GrpoConfig(steps=6, warmup_steps=2, decay_steps=decay, grad_clip=9.0))
        rates.append(optimizer_step(now, learner, SimpleNamespace(denominators=Denominators(1, 2)), torch.tensor(1.0)))
        assert p.item() == pytest.approx(-rates[-1])
    assert rates == pytest.approx(wanted)


def test_without_a_scored_token_no_optimizer_step_is_made():
    """Weight decay and the moments of earlier steps would move the weights."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.ones(2)
    optimizer.step()
    before, p.grad = p.detach().clone(), torch.zeros(2)
    learner = SimpleNamespace(parameters={"p": p}, optimizer=optimizer, lr=0.5)
    now = SimpleNamespace(step=3, cfg=GrpoConfig())
    batch = SimpleNamespace(denominators=Denominators(0, 0))
    assert optimizer_step(now, learner, batch, torch.tensor(0.0)) == 0.0
    assert torch.equal(p, before) and p.grad is None


def test_every_trace_of_an_epoch_is_trained_on_once():
    cfg = SftConfig(traces="t", model="m", out="o", batch_size=4)
    epochs = [[batch_of_step(list(range(10)), cfg, epoch, place) for place in range(3)] for epoch in (0, 1)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(sum(batches, [])) == list(range(10))
    other = [batch_of_step(list(range(10)), replace(cfg, seed=1), 0, place) for place in range(3)]
    assert epochs[0] != epochs[1] and epochs[0] != other
    assert epochs[0][1] == batch_of_step(list(range(10)), cfg, 0, 1)


def test_the_optimizer_gets_rate_and_decay():
    optimizer = make_optimizer(GrpoConfig(lr=0.25, weight_decay=0.3), [torch.nn.Parameter(torch.zeros(2))], (0.8, 0.7))
    assert [optimizer.defaults[name] for name in ("lr", "weight_decay", "betas")] == [0.25, 0.3, (0.8, 0.7)]


def test_every_seed_step_and_part_draws_its_own_responses():
    asked: list[Sampling] = []
    engine = SimpleNamespace(ask=lambda step, ids, prompts, sampling, part: asked.append(sampling))
    policy = SimpleNamespace(chat=SimpleNamespace(stop_ids=(2,)))
    for seed, step, part in ((0, 0, ""), (0, 1, ""), (1, 0, ""), (0, 0, "round-1"), (0, 0, "")):
        ask(
            engine,
            policy,
            [],
            GrpoConfig(seed=seed, temperature=0.7, top_p=0.9, group_size=3, engine="torch"),
            step,
            part,
        )
    seeds = [sampling.seed for sampling in asked]
    assert len(set(seeds)) == 4 and seeds[4] == seeds[0]
    assert (asked[0].n, asked[0].temperature, asked[0].top_p, asked[0].stop_ids) == (3, 0.7, 0.9, (2,))


def test_every_seed_and_epoch_has_its_own_order():
    labels = ["x", "y"]
    puzzles = [
        Puzzle(id=f"p{i}", context="", cells=[["A"], ["B"]], candidates=labels, answer=labels) for i in range(40)
    ]
    prompts = [Prompt(puzzle=puzzle, ids=[1], difficulty=0.0) for puzzle in puzzles]

    def order(seed: int, epoch: int) -> list[str]:
        found = [prompts_of_step(prompts, 8, epoch * 5 + step, seed) for step in range(5)]
        return [prompt.puzzle.id for batch in found for prompt in batch]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert order(0, 0) == orders[0] and all(sorted(one) == sorted(p.id for p in puzzles) for one in orders)
    assert len({tuple(one) for one in orders}) == 3


@pytest.mark.parametrize(
    ("dtype", "autocast", "sampler", "tolerance"),
    [
        ("float32", False, "auto", 1e-4),
        ("bfloat16", False, "auto", 0.05),
        ("float32", True, "auto", 0.05),
        ("float32", False, "bfloat16", 0.05),
    ],
)
def test_the_canary_allows_what_the_numbers_of_policy_and_sampler_round_to(dtype, autocast, sampler, tolerance):
    policy = SimpleNamespace(lora=None, autocast=autocast)
    assert make_canary(policy, [1, 2], GrpoConfig(dtype=dtype, sampler_dtype=sampler)).tolerance == tolerance
    if sampler == "auto":  # SFT's sampler has no dtype of its own
        config = SftConfig(traces="t", model="m", out="o", dtype=dtype)
        assert make_canary(policy, [1, 2], config).tolerance == tolerance
