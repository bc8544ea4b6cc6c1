"""PPO's own arithmetic with numbers computed by hand: rewards of tokens, advantages, the value loss, the KL's weight."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from rollout import Rollout
from tests.helpers.commands import FIXTURES
from trainer.objective import value_loss
from trainer.packing import Denominators, ScoredGroup
from trainer.ppo.critic import KlControl, ValueSums, value_terms
from trainer.ppo.ppo import estimate, minibatches, token_rewards
from trainer.ppo.settings import PpoConfig

F64 = torch.float64
NAN = math.nan


def t64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def close(actual, expected, tolerance=1e-9) -> None:
    torch.testing.assert_close(actual, t64(expected), rtol=0, atol=tolerance)


def test_the_score_is_at_the_last_token_and_the_kl_at_every_one():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    kl = t64([[0.5, -0.5, 1.0], [2.0, NAN, NAN], [NAN, NAN, NAN]])
    rewards = token_rewards(t64([1.0, -1.0, 7.0]), kl, mask, 0.1)
    close(rewards, [[-0.05, 0.05, 0.9], [-1.2, 0.0, 0.0], [0.0, 0.0, 0.0]])


def group(*responses: dict) -> ScoredGroup:
    """A group of responses with their numbers per token; reward None: not scored."""
    rollouts = [
        Rollout(
            puzzle_id="p",
            prompt_ids=[1],
            response_ids=list(range(len(r["values"]))),
            sampler_logprobs=[0.0] * len(r["values"]),
            finish_reason="stop",
            adapter_version=0,
            adapter_hash="",
        )
        for r in responses
    ]
    names = {"old_values": "values", "old_logprobs": "old", "ref_logprobs": "ref"}
    return ScoredGroup(
        rollouts=rollouts,
        rows=[{"reward": r["reward"], "advantage": 0.0} for r in responses],
        advantages=torch.zeros(len(responses)),
        trained=torch.tensor([r["reward"] is not None for r in responses]),
        tokens={name: [t64(r[short]) for r in responses] for name, short in names.items()},
    )


GROUPS = [
    group({"reward": 1.0, "values": [0.25, 0.6], "old": [-1.0, -2.0], "ref": [-1.5, -1.0]}),
    group(
        {"reward": -1.0, "values": [0.2], "old": [-3.0], "ref": [-1.0]},
        {"reward": None, "values": [9.0, 9.0, 9.0], "old": [-9.0] * 3, "ref": [0.0] * 3},
    ),
]


def estimated(**settings):
    cfg = PpoConfig(**{"beta": 0.1, "gamma": 1.0, "lam": 1.0, **settings})
    critic = SimpleNamespace(kl=KlControl(cfg))
    groups, numbers = estimate(SimpleNamespace(cfg=cfg, critic=critic), GROUPS)
    return groups, numbers, critic.kl


def test_advantages_and_returns_by_hand():
    """k1 = old - ref: [0.5, -1], [-2]; rewards [-0.05, 1.1], [-0.8]; returns [1.05, 1.1], [-0.8].

    Return - value = [0.8, 0.5], [-1]: mean 0.1, deviations 0.7, 0.4, -1.1, variance 1.86 / 2 = 0.93. The unscored response
    takes no part.
    """
    groups, numbers, _ = estimated()
    close(groups[0].tokens["returns"][0], [1.05, 1.1])
    close(groups[1].tokens["returns"][0], [-0.8])
    root = math.sqrt(0.93 + 1e-8)
    close(groups[0].tokens["advantages"][0], [0.7 / root, 0.4 / root])
    close(groups[1].tokens["advantages"][0], [-1.1 / root])
    close(groups[1].tokens["advantages"][1], [0.0, 0.0, 0.0])
    assert groups[0].rows[0]["advantage"] == pytest.approx(0.55 / root)  # the mean over its tokens
    assert numbers["critic/values/mean"] == pytest.approx(1.05 / 3)
    assert numbers["critic/returns/mean"] == pytest.approx(1.35 / 3)
    # returns deviate by 0.6, 0.65, -1.25 from their mean: variance 2.345 / 2
    assert numbers["critic/vf_explained_var"] == pytest.approx(1 - 0.93 / (1.1725 + 1e-5))
    # per response -0.25 and -2: the mean of means, as verl's
    assert numbers["actor/reward_kl_penalty"] == pytest.approx(-1.125)
    assert numbers["actor/reward_kl_penalty_coeff"] == 0.1


def test_gamma_and_lambda():
    """delta = [-0.05 + 0.5 * 0.6 - 0.25, 1.1 - 0.6] = [0, 0.5]; A = [0 + 0.5 * 0.8 * 0.5, 0.5]; R = A + V."""
    groups, _, _ = estimated(gamma=0.5, lam=0.8)
    close(groups[0].tokens["returns"][0], [0.2 + 0.25, 0.5 + 0.6])


def test_the_kl_in_the_loss_leaves_the_rewards_alone():
    groups, numbers, kl = estimated(kl_in="loss")
    close(groups[0].tokens["returns"][0], [1.0, 1.0])
    assert numbers["actor/reward_kl_penalty"] == 0 and kl.beta == 0
    cfg = PpoConfig(kl_in="loss", beta=0.1)
    assert (cfg.loss_beta, cfg.reward_beta) == (0.1, 0.0)
    cfg = PpoConfig(beta=0.1)
    assert (cfg.loss_beta, cfg.reward_beta) == (0.0, 0.1)


def test_old_log_probs_go_on_only_where_a_batch_gets_several_updates():
    assert "old_logprobs" not in estimated()[0][0].tokens
    for settings in ({"epochs": 2}, {"minibatches": 2}):
        assert "old_logprobs" in estimated(**settings)[0][0].tokens


def test_a_step_without_a_scored_response_has_no_advantage():
    cfg = PpoConfig(beta=0.1)
    alone = [group({"reward": None, "values": [9.0], "old": [-9.0], "ref": [0.0]})]
    now = SimpleNamespace(cfg=cfg, critic=SimpleNamespace(kl=KlControl(cfg)))
    groups, numbers = estimate(now, alone)
    close(groups[0].tokens["advantages"][0], [0.0])
    assert all(math.isfinite(value) for value in numbers.values())


def test_the_adaptive_controller_is_verls():
    """error = clip(KL / target - 1, +-0.2); beta grows by the factor 1 + error * responses / horizon."""
    cfg = PpoConfig(beta=0.1, kl_control="adaptive", kl_target=0.5, kl_horizon=100)
    kl = KlControl(cfg)
    kl.steer(0.55, 10)  # error 0.1
    assert kl.beta == pytest.approx(0.1 * 1.01)
    kl.steer(5.0, 10)  # error 9, clipped to 0.2
    assert kl.beta == pytest.approx(0.1 * 1.01 * 1.02)
    kl.steer(-1.0, 50)  # error -3, clipped to -0.2
    assert kl.beta == pytest.approx(0.1 * 1.01 * 1.02 * 0.9)
    fixed = KlControl(PpoConfig(beta=0.1))
    fixed.steer(5.0, 10)
    assert fixed.beta == 0.1
    # the step's own rewards have beta as it was before the step: KL -1.125 lowers it only for the next
    _, numbers, kl = estimated(kl_control="adaptive", kl_target=0.5, kl_horizon=100)
    assert numbers["actor/reward_kl_penalty_coeff"] == 0.1
    assert kl.beta == pytest.approx(0.1 * (1 - 0.2 * 2 / 100))  # two responses were scored


def micro(mask, old, returns) -> SimpleNamespace:
    return SimpleNamespace(mask=mask, old_values=t64(old), returns=t64(returns))


def test_the_value_loss_token_by_token():
    """Clip 0.5. Token 1: (2 - 0)^2 / 2 against (0.5 - 0)^2 / 2: no clip. Token 2: (1 - 3)^2 / 2 against (0.5 - 3)^2 / 2 =
    3.125: the clip decides. Token 3: both (0.2 - 0.3)^2 / 2."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = t64([[2.0, 1.0, NAN], [0.2, NAN, NAN]]).requires_grad_()
    given = micro(mask, [[0.0, 0.0, NAN], [0.0, NAN, NAN]], [[0.0, 3.0, NAN], [0.3, NAN, NAN]])
    terms = value_terms(values, given, Denominators(2, 3), clip=0.5)
    close(terms.error.detach(), [[2.0, 3.125, 0.0], [0.005, 0.0, 0.0]])
    close(terms.contribution.detach(), [[2 / 3, 3.125 / 3, 0.0], [0.005 / 3, 0.0, 0.0]])
    assert terms.clipped.tolist() == [[False, True, False], [False, False, False]]
    terms.loss.backward()
    # (value - return) / tokens; none through the clip, none under the mask
    close(values.grad, [[2 / 3, 0.0, 0.0], [-0.1 / 3, 0.0, 0.0]])
    sums = ValueSums()
    sums.add(terms, terms.loss)
    sums.read()
    assert sums.sums == {"loss": pytest.approx(5.13 / 3), "clipped": 1.0, "tokens": 3.0}


def test_cut_into_micro_batches_the_value_loss_is_verls():
    """verl's number for the whole batch, from micro-batches of one row each with the batch's denominators."""
    verl = json.loads((FIXTURES / "parity_verl.json").read_text())
    mask = t64(verl["inputs"]["mask"]).bool()
    cases = [case for case in verl["cases"] if case["kind"] == "value_loss"]
    assert cases
    for case in cases:
        clip, values = case["cliprange_value"], t64(case["vpreds"])
        counts = Denominators(float(mask.any(-1).sum()), float(mask.sum()))
        rows = [
            value_terms(
                values[i : i + 1],
                micro(mask[i : i + 1], case["values"][i : i + 1], case["returns"][i : i + 1]),
                counts,
                clip,
            ).loss
            for i in range(len(mask))
        ]
        close(sum(rows), case["loss"], 1e-9)
        close(value_loss(values, t64(case["values"]), t64(case["returns"]), mask, clip), case["loss"], 1e-9)


def test_each_epoch_takes_every_group_once_in_an_order_of_its_own():
    cfg = PpoConfig(prompts_per_step=8, epochs=3, minibatches=2, seed=5)
    groups = list(range(8))
    parts = list(minibatches(groups, cfg, 0))
    assert [len(part) for part in parts] == [4] * 6
    epochs = [parts[i : i + 2] for i in (0, 2, 4)]
    for first, second in epochs:
        assert sorted(first + second) == groups
    assert len({tuple(first) for first, _ in epochs}) > 1, "an epoch that repeats the one before mixes nothing"
    assert parts == list(minibatches(groups, cfg, 0)) != list(minibatches(groups, cfg, 1))
