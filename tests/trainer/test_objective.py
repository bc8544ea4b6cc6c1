"""The objective and the advantages by hand-computed numbers, sign included."""

import math

import pytest
import torch

from trainer.advantages import gae, group_advantages, overlong_penalty, whiten
from trainer.objective import (
    CLIPS,
    aggregate,
    aggregation_weights,
    cispo_surrogate,
    clip_fired,
    clipped_surrogate,
    grpo_terms,
    importance_ratio,
    kl_estimate,
    rollout_correction,
    value_loss,
)

torch.set_default_dtype(torch.float32)
F64 = torch.float64


def t64(*rows):
    return torch.tensor(rows, dtype=F64)


def test_grpo_advantages_by_hand():
    # group 0: rewards 1, 0, -1 -> mean 0, unbiased std 1; group 1: all equal; group 2: alone
    rewards = torch.tensor([1.0, 0.3, 0.0, 0.3, -1.0, 5.0], dtype=F64)
    groups = torch.tensor([0, 1, 0, 1, 0, 2])
    expected = torch.tensor([1, 0, 0, 0, -1, 0], dtype=F64) / (1 + 1e-6)
    torch.testing.assert_close(group_advantages(rewards, groups), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize(("reward", "size"), [(0.7, 7), (2.3, 16), (12.7, 7), (25.3, 3)])
def test_equal_rewards_give_0_where_their_mean_is_off_by_a_rounding(reward, size, kind):
    """The mean of these, summed in float32, is another number: divided by the deviation it would give up to 0.5."""
    rewards = torch.full((size,), reward)
    assert group_advantages(rewards, torch.zeros(size, dtype=torch.long), kind).tolist() == [0.0] * size


def test_dr_grpo_and_rloo_by_hand():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=F64), torch.zeros(4, dtype=torch.long)
    assert group_advantages(rewards, groups, "dr_grpo").tolist() == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(rewards, groups, "rloo").tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert group_advantages(torch.tensor([2.0]), torch.tensor([7]), "rloo").tolist() == [0.0]
    with pytest.raises(ValueError, match="not one of grpo, dr_grpo, rloo"):
        group_advantages(rewards, groups, "gropo")


def test_ratio_token_and_sequence():
    new, old = t64([math.log(0.5), math.log(0.2), float("nan")]), t64([math.log(0.25), math.log(0.4), float("nan")])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(importance_ratio(new, old, mask), t64([2.0, 0.5, 1.0]))
    # log 2 and -log 2 average to 0
    torch.testing.assert_close(importance_ratio(new, old, mask, "sequence"), t64([1.0, 1.0, 1.0]))
    assert importance_ratio(t64([100.0]), t64([0.0]), torch.tensor([[True]])).item() == pytest.approx(math.exp(20))
    far = t64([30.0, 50.0]).requires_grad_()
    ratio = importance_ratio(far, t64([0.0, 0.0]), torch.tensor([[True, True]]), "sequence")
    ratio.sum().backward()
    torch.testing.assert_close(ratio.detach(), t64([math.exp(10)] * 2))
    assert far.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "loss"),
    [
        (1.0, 2.0, None, -2.0),  # good token, on-policy: increase it
        (1.5, 2.0, None, -2.4),  # clipped at 1.2
        (0.5, 2.0, None, -1.0),  # below the range with a good token: not clipped
        (0.5, -1.0, None, 0.8),  # clipped at 0.8
        (5.0, -1.0, None, 5.0),  # unbounded without dual clip
        (5.0, -1.0, 3.0, 3.0),
        (5.0, 1.0, 3.0, -1.2),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, dual, loss):
    out = clipped_surrogate(t64([ratio]), torch.tensor([advantage], dtype=F64), 0.2, 0.2, dual)
    assert out.item() == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "fired"),
    [
        (1.0, 2.0, None, ""),
        (1.5, 2.0, None, "high"),
        (1.3, 2.0, None, ""),  # clip_high is 0.4
        (0.5, 2.0, None, ""),
        (0.5, -1.0, None, "low"),
        (0.85, -1.0, None, ""),
        (5.0, -1.0, None, ""),
        (5.0, -1.0, 3.0, "dual"),
        (5.0, 1.0, 3.0, "high"),
        (0.5, 0.0, 3.0, ""),
    ],
)
def test_the_clip_that_fired_is_the_one_that_takes_the_gradient(ratio, advantage, dual, fired):
    ratios, advantages = t64([ratio]).requires_grad_(), torch.tensor([advantage], dtype=F64)
    clipped_surrogate(ratios, advantages, 0.2, 0.4, dual).sum().backward()
    assert CLIPS[clip_fired(ratios.detach(), advantages, 0.2, 0.4, dual).item()] == fired
    assert (ratios.grad.item() == 0) == bool(fired or advantage == 0)


def test_at_a_bound_a_token_still_has_a_gradient_and_no_clip_fired():
    """With --clip-low 0 every token of a fresh sample stands on the bound."""
    for ratio, advantage, dual in ((0.75, -1.0, None), (1.25, 1.0, None), (3.0, -1.0, 3.0)):
        ratios, advantages = t64([ratio]).requires_grad_(), torch.tensor([advantage], dtype=F64)
        clipped_surrogate(ratios, advantages, 0.25, 0.25, dual).sum().backward()
        assert CLIPS[clip_fired(ratios.detach(), advantages, 0.25, 0.25, dual).item()] == "" and ratios.grad.item() != 0


def test_kl_estimators_by_hand():
    new, ref = t64([math.log(0.5)]), t64([math.log(0.25)])  # d = ref - new = -log 2
    log2 = math.log(2)
    for kind, value in (("k1", log2), ("k2", log2**2 / 2), ("k3", 0.5 + log2 - 1), ("low_var", 0.5 + log2 - 1)):
        assert kl_estimate(new, ref, kind).item() == pytest.approx(value, abs=1e-12)
    assert kl_estimate(t64([-30.0]), t64([0.0]), "low_var").item() == 10.0
    far = t64([-1000.0]).requires_grad_()  # exp(1000) overflows; the clamp at 20 keeps value and gradient finite
    kl_estimate(far, t64([0.0]), "low_var").sum().backward()
    assert far.grad.item() == 0.0


def test_kl_pulls_the_policy_towards_the_reference():
    """The KL term must push log-probs up where the reference is higher: its gradient is 1 - exp(ref - new)."""
    new = t64([-2.0, -1.0]).requires_grad_()
    kl_estimate(new, t64([-1.0, -2.0])).sum().backward()
    torch.testing.assert_close(new.grad, t64([1 - math.e, 1 - math.exp(-1)]))


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        ("seq-mean-token-mean", (1.5 + 4) / 2),
        ("token-mean", (1 + 2 + 4) / 3),
        ("seq-mean-token-sum", (3 + 4) / 2),
        ("seq-mean-token-sum-norm", (3 + 4) / 2 / 10),
    ],
)
def test_aggregate_by_hand(mode, value):
    nan = float("nan")
    per_token = t64([1.0, 2.0, nan], [4.0, nan, nan], [nan, nan, nan])  # the last row has no token: it does not count
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert aggregate(per_token, mask, mode, norm=10).item() == pytest.approx(value, abs=1e-12)


def test_weights_of_micro_batches_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 5, generator=generator, dtype=F64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 0, 2, 4])[:, None]
    for mode in ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        parts = [
            (aggregation_weights(mask[i : i + 2], mode, 5, 15, 5, F64) * values[i : i + 2]).sum() for i in (0, 2, 4)
        ]
        assert sum(parts).item() == pytest.approx(aggregate(values, mask, mode).item(), abs=1e-12)


def test_rollout_correction_by_hand():
    old, sampler = t64([math.log(0.6), math.log(0.1)]), t64([math.log(0.2), math.log(0.2)])
    mask = torch.tensor([[True, True]])
    assert rollout_correction(old, sampler, mask, "none").tolist() == [[1.0, 1.0]]
    assert rollout_correction(old, sampler, mask, "tis").tolist() == [pytest.approx([2.0, 0.5])]
    assert rollout_correction(old, sampler, mask, "mis").tolist() == [pytest.approx([0.0, 0.5])]
    huge = rollout_correction(t64([50.0]), t64([0.0]), torch.tensor([[True]]), "tis", cap=math.inf)
    assert huge.item() == pytest.approx(math.exp(20))


def test_sequence_corrections_by_hand():
    """Row 0: 3 * 0.5 = 1.5; row 1: 3 * 3 = 9; the masked-out token counts in neither."""
    log3, half = math.log(3), math.log(0.5)
    old, sampler = t64([log3, half, 5.0], [log3, log3, 0.0]), t64([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tis = rollout_correction(old, sampler, mask, "seq-tis")
    assert tis.tolist() == [pytest.approx([1.5, 1.5, 1.0]), pytest.approx([2.0, 2.0, 2.0])]
    mis = rollout_correction(old, sampler, mask, "seq-mis", cap=3.0, floor=1.6)
    assert mis.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]  # below the floor; above the cap
    kept = rollout_correction(old, sampler, mask, "seq-mis", cap=10.0, floor=1.0)
    assert kept.tolist() == [pytest.approx([1.5, 1.5, 1.0]), pytest.approx([9.0, 9.0, 9.0])]
    with pytest.raises(ValueError, match="not one of none, tis, mis, seq-tis, seq-mis"):
        rollout_correction(old, sampler, mask, "ris")


def test_the_correction_multiplies_the_surrogate_and_not_the_kl():
    one = torch.tensor([[True]])
    terms = grpo_terms(
        logprobs=t64([math.log(0.5)]),
        old_logprobs=t64([math.log(0.5)]),
        ref_logprobs=t64([math.log(0.25)]),
        sampler_logprobs=t64([math.log(0.4)]),
        mask=one,
        advantages=torch.tensor([2.0], dtype=F64),
        weight=aggregation_weights(one, "token-mean", 1, 1, dtype=F64),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        beta=0.1,
        kl_kind="k1",
        ratio_level="token",
        correction="tis",
        correction_cap=2.0,
    )
    assert terms.contribution.item() == pytest.approx(-2.0 * 1.25 + 0.1 * math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "clip"),
    [
        (1.0, 2.0, 1.0, ""),  # on-policy: the plain policy gradient
        (1.5, 2.0, 1.2, "high"),  # a good token above: its weight is bounded, and its gradient stays
        (1.5, -2.0, 1.2, "high"),  # a bad one too: the clip does not look at the advantage
        (0.5, 2.0, 0.9, "low"),
        (0.5, -2.0, 0.9, "low"),
        (1.1, -2.0, 1.1, ""),
    ],
)
def test_cispo_bounds_the_weight_and_keeps_every_gradient(ratio, advantage, weight, clip):
    one, new = torch.tensor([[True]]), t64([math.log(0.4)]).requires_grad_()
    terms = grpo_terms(
        logprobs=new,
        old_logprobs=new.detach() - math.log(ratio),
        ref_logprobs=None,
        sampler_logprobs=new.detach(),
        mask=one,
        advantages=torch.tensor([advantage], dtype=F64),
        weight=aggregation_weights(one, "token-mean", 1, 1, dtype=F64),
        clip_low=0.1,
        clip_high=0.2,
        dual_clip=None,
        beta=0.0,
        kl_kind="k1",
        ratio_level="token",
        correction="none",
        correction_cap=2.0,
        surrogate="cispo",
    )
    assert terms.loss.item() == pytest.approx(-weight * advantage * math.log(0.4), abs=1e-12)
    assert CLIPS[terms.clip.item()] == clip
    terms.loss.backward()
    assert new.grad.item() == pytest.approx(-weight * advantage, abs=1e-12)  # descent raises a good token's log-prob
    again = cispo_surrogate(terms.ratio, new, torch.tensor([advantage], dtype=F64), 0.1, 0.2)  # advantages [N]
    assert again.item() == terms.surrogate.item()


def test_the_soft_penalty_grows_over_the_last_share_of_the_limit():
    # DAPO's own numbers: a limit of 20,480 tokens of which the last 4,096 are the buffer
    assert [overlong_penalty(n, 20480, 0.2) for n in (1, 16384, 18432, 20480)] == [0.0, 0.0, -0.5, -1.0]
    assert overlong_penalty(20480, 20480, 0.0) == 0.0


def test_gae_by_hand():
    rewards, values = t64([0.0, 0.0, 1.0, 9.0]), t64([0.5, 0.4, 0.3, 9.0])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    last = 1.0 - 0.3
    middle = 0.9 * 0.3 - 0.4 + 0.72 * last
    first = 0.9 * 0.4 - 0.5 + 0.72 * middle
    torch.testing.assert_close(advantages, t64([first, middle, last, 0.0]))
    torch.testing.assert_close(returns, t64([first + 0.5, middle + 0.4, 1.0, 0.0]))


def test_whiten_and_value_loss_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(whiten(t64([1.0, 2.0, 3.0, 99.0]), mask), t64([-1.0, 0.0, 1.0, 0.0]), atol=1e-7, rtol=0)
    # token 0: |v - R| = 1 beats the clipped 0.5; token 1: clipped v = 0.2 is farther from R = 1 than v = 0.9
    loss = value_loss(t64([1.0, 0.9]), t64([0.3, 0.0]), t64([0.0, 1.0]), mask[:, :2], clip=0.2)
    assert loss.item() == pytest.approx(0.5 * (1.0 + 0.64) / 2, abs=1e-12)


def test_terms_sum_to_the_loss_and_nan_under_the_mask_is_harmless():
    nan = float("nan")
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = t64([-1.0, -2.0], [-0.5, nan]).requires_grad_()
    weight = aggregation_weights(mask, "seq-mean-token-mean", 2, 3, dtype=F64)
    terms = grpo_terms(
        logprobs=logprobs,
        old_logprobs=None,
        ref_logprobs=t64([-1.5, -2.0], [-0.5, nan]),
        sampler_logprobs=t64([-1.0, -2.0], [-0.5, nan]),
        mask=mask,
        advantages=torch.tensor([2.0, -1.0], dtype=F64),
        weight=weight,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        beta=0.1,
        kl_kind="low_var",
        ratio_level="token",
        correction="none",
        correction_cap=2.0,
    )
    kl = math.exp(-0.5) + 0.5 - 1
    assert terms.loss.item() == pytest.approx((-2.0 + 0.1 * kl / 2) / 2 + 1.0 / 2, abs=1e-12)
    terms.loss.backward()
    pull = 0.1 * (1 - math.exp(-0.5)) / 4
    torch.testing.assert_close(logprobs.grad, t64([-0.5 + pull, -0.5], [0.5, 0.0]))


def test_values_under_the_mask_reach_no_gradient_of_the_value_loss():
    values = torch.tensor([[1.0, float("nan"), float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    value_loss(values, torch.zeros(1, 3), torch.full((1, 3), float("nan")).masked_fill(mask, 3.0), mask, 9.0).backward()
    assert values.grad.tolist() == [[-2.0, 0.0, 0.0]]


def test_advantages_do_not_depend_on_the_kind_of_number():
    rewards, groups = [1, 0, 0, 1, 1, 1], torch.tensor([0, 0, 0, 0, 1, 1])
    expected = group_advantages(torch.tensor(rewards, dtype=torch.float32), groups)
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float16):
        assert torch.equal(group_advantages(torch.tensor(rewards).to(dtype), groups), expected), dtype
    # a sum in bfloat16 stops at 160, so the bad ones would have 0
    many = torch.tensor([10.0] * 8 + [10.25] * 8, dtype=torch.bfloat16)
    found = group_advantages(many, torch.zeros(16, dtype=torch.long))
    assert found[0] == -found[-1] and -1 < found[0] < -0.9
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_the_overlong_penalty_is_minus_one_at_most():
    """Above the limit too (DAPO, Eq. 13)."""
    assert [overlong_penalty(length, 100, 0.2) for length in (100, 120, 1000)] == [-1.0] * 3
