"""The numbers of metrics.jsonl by hand: users judge a run by them, and a wrong one would not look wrong."""

import math
from types import SimpleNamespace

import pytest
import torch

from trainer.config import GrpoConfig
from trainer.metrics import TokenSums, step_metrics
from trainer.objective import CLIPS, LossTerms
from trainer.ranks.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def terms(**given) -> LossTerms:
    """Two responses of two tokens, the last of which is not trained on; every field 0 unless given, [2,2] each."""
    mask = torch.tensor([[True, True], [True, False]])
    names = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "advantages", "surrogate", "kl")
    fields = {name: torch.zeros(2, 2) for name in names}
    ones = {name: torch.ones(2, 2) for name in ("ratio", "correction")}
    clip, weight = torch.zeros(2, 2, dtype=torch.int8), mask / 4
    given = {name: torch.tensor(value) for name, value in given.items()}
    return LossTerms(**{**fields, **ones, "mask": mask, "clip": clip, "weight": weight, "beta": 0.5, **given})


def row(reward: float, length: int, prompt: int, cut: bool = False) -> dict:
    return {
        "reward": reward,
        "parts": {},
        "status": "ok",
        "response_ids": [7] * length,
        "prompt_tokens": prompt,
        "finish_reason": "length" if cut else "stop",
    }


ROWS = [row(1.0, 3, 30), row(0.0, 1, 30), row(1.0, 2, 40, cut=True), row(1.0, 2, 40)]
"""Two groups of two."""


def line(*micro_batches: LossTerms, **settings) -> dict:
    sums = TokenSums(grad_norm=2.5, lr=0.125)
    for one in micro_batches:
        sums.add(one, one.loss)
    sums.read()
    return step_metrics(4, ROWS, sums.over_ranks(WORLD), GrpoConfig(group_size=2, **settings), "hash")


def test_how_far_the_sampler_was_from_the_trainer():
    """Trainer minus sampler is -0.5 and 0.25 nats, and for a third token 0."""
    found = line(terms(old_logprobs=[[-1.5, -0.25], [-1.0, 0.0]], sampler_logprobs=[[-1.0, -0.5], [-1.0, 0.0]]))
    weights = [math.exp(-0.5), math.exp(0.25), 1.0]
    assert found["sampling/logp_difference/mean"] == pytest.approx(0.75 / 3)
    assert found["sampling/logp_difference/max"] == pytest.approx(0.5)
    k3 = (math.exp(-0.5) + 0.5 - 1) + (math.exp(0.25) - 0.25 - 1)  # of KL(sampler || trainer)
    assert found["sampling/kl"] == pytest.approx(k3 / 3, rel=1e-5)
    size = sum(weights) ** 2 / sum(weight**2 for weight in weights) / 3
    assert found["sampling/effective_sample_size"] == pytest.approx(size, rel=1e-5) and size < 0.95


def test_losses_are_means_over_the_updates_and_the_kl_over_the_tokens():
    one = terms(surrogate=[[1.0, -3.0], [2.0, 0.0]], correction=[[1.0, 0.5], [2.0, 1.0]], kl=[[0.1, 0.2], [0.6, 0.0]])
    for updates, made in ((1, [one]), (2, [one, one])):
        found = line(*made, updates_per_batch=updates)
        assert found["pg_loss"] == pytest.approx((1.0 - 1.5 + 4.0) / 4)
        assert found["loss"] == pytest.approx((1.0 - 1.5 + 4.0) / 4 + 0.5 * 0.9 / 4)
        assert found["kl"] == pytest.approx(0.3)
    assert (found["step"], found["grad_norm"], found["lr"], found["adapter_hash"]) == (4, 2.5, 0.125, "hash")


def test_each_clip_is_counted_by_itself_and_among_trained_tokens():
    codes = [CLIPS.index(name) for name in ("low", "dual", "high")]
    found = line(terms(clip=[codes[:2], [0, codes[2]]]))  # the last token is not trained on
    assert [found[f"clip_ratio/{name}_mean"] for name in ("low", "high", "dual")] == pytest.approx([1 / 3, 0, 1 / 3])
    found = line(terms(clip=[[codes[2], 0], [codes[2], 0]]))
    assert [found[f"clip_ratio/{name}_mean"] for name in ("low", "high", "dual")] == pytest.approx([0, 2 / 3, 0])


def test_tokens_that_a_correction_dropped_and_the_entropy():
    one = terms(correction=[[0.0, 0.7], [1.0, 0.0]], entropy=[[0.5, 1.0], [0.3, 9.0]])
    assert line(one, correction="mis", entropy=True)["sampling/dropped_tokens"] == pytest.approx(1 / 3)
    assert line(one, correction="mis", entropy=True)["entropy"] == pytest.approx(0.6)
    assert not {"sampling/dropped_tokens", "entropy"} & line(one).keys()


def test_lengths_tokens_and_rewards():
    found = line(terms())
    assert found["completions/mean_length"] == 2 and found["completions/max_length"] == 3
    assert found["completions/clipped_ratio"] == 0.25
    assert found["num_tokens"] == 8 + 30 + 40  # a prompt counts once for its group
    assert found["reward"] == 0.75 and found["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)  # unbiased; then 0
    assert found["frac_reward_zero_std"] == 0.5


def test_the_largest_difference_is_that_of_all_micro_batches_and_ranks():
    small, large = (terms(old_logprobs=[[-x, 0.0], [0.0, 0.0]]) for x in (0.125, 0.75))
    assert line(large, small)["sampling/logp_difference/max"] == 0.75
    other = SimpleNamespace(
        total=lambda *values: [2 * value for value in values], largest=lambda value: max(value, 2.0)
    )
    sums = TokenSums()
    sums.add(small, small.loss)
    sums.read()
    assert sums.over_ranks(other).mismatch_max == 2.0 and sums.over_ranks(other).sums["tokens"] == 6
