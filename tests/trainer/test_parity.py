"""The objective against numbers that verl's and TRL's own functions gave (tests/fixtures/parity_*.json), value and gradient.

Every case of the two files is either compared here or listed in NOT_OFFERED with the reason; where we differ on purpose,
a test states the difference. parity_trl.json quotes, per loss: value, sum of |gradient|, gradient of row 0.
"""

import json
import math

import pytest
import torch

from tests.helpers.commands import FIXTURES
from trainer.advantages import gae, group_advantages, whiten
from trainer.config import PRESETS, GrpoConfig, preset_values
from trainer.objective import (
    aggregate,
    aggregation_weights,
    cispo_surrogate,
    clipped_surrogate,
    grpo_terms,
    importance_ratio,
    kl_estimate,
    rollout_correction,
    value_loss,
)

VERL = json.loads((FIXTURES / "parity_verl.json").read_text())
BOTH = json.loads((FIXTURES / "parity_trl.json").read_text())
F64 = torch.float64
NOT_OFFERED = {
    # losses of other papers
    "sapo",
    "sapo/beta0",
    "vespo/beta0",
    "luspo/sequence",
    # KL variants: |log-ratio|, straight-through gradients, KL times the ratio
    "abs",
    "kl/abs/token-mean",
    "kl/k1+/token-mean",
    "kl/low_var_kl+/token-mean",
    "dapo/beta.04/bias_corrected_kl",
    # TRL's two-sided cap, off-policy sequence mask, entropy bonus; verl's plain token sum
    "grpo/delta1.1",
    "grpo/opsm.05",
    "grpo/entropy.01",
    "dapo/entropy.01",
    "vanilla/token-sum",
    # other estimators
    "adv/rf++_baseline",
    "adv/batch",
}


def t64(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def close(actual, expected, tolerance=1e-9) -> None:
    expected = expected if isinstance(expected, torch.Tensor) else t64(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)  # the verl file has ten digits


# ---- verl_objectives: 10 x 7, groups of 5, ten digits

V = {name: t64(values) for name, values in VERL["inputs"].items()}
V_MASK = V["mask"].bool()
V_CASES = {
    f"{c['kind']}:{c['name']}:{c.get('agg', c.get('rewards_tag', ''))}:{i}": c for i, c in enumerate(VERL["cases"])
}


def verl_cases(kind: str) -> list:
    return [pytest.param(c, id=n) for n, c in V_CASES.items() if c["kind"] == kind and c["name"] not in NOT_OFFERED]


@pytest.mark.parametrize("case", verl_cases("policy_loss"))
def test_verl_policy_loss(case):
    logprobs = V["logprobs"].clone().requires_grad_()
    level = "sequence" if case["name"] == "gspo" else "token"
    low, high = case["params"].get("clip_ratio_low", 0.2), case["params"].get("clip_ratio_high", 0.2)
    # verl's dual clip is always on (c = 3), but for gspo
    dual = None if level == "sequence" else case["params"].get("clip_ratio_c", 3.0)
    ratio = importance_ratio(logprobs, V["old_logprobs"], V_MASK, level)
    surrogate = clipped_surrogate(ratio, V["advantages"], low, high, dual)
    if case["name"] == "cispo":
        surrogate = cispo_surrogate(ratio, logprobs, V["advantages"], low, high)
    if case["importance_weights"]:
        surrogate = surrogate * V["rollout_is_weights"]
    loss = aggregate(surrogate, V_MASK, case["agg"])
    loss.backward()
    close(loss, case["loss"])
    close(logprobs.grad, case["grad_logprobs"])


@pytest.mark.parametrize("case", verl_cases("kl"))
def test_verl_kl(case):
    kind = {"kl": "k1", "mse": "k2", "low_var_kl": "low_var"}[case["name"]]
    logprobs = V["logprobs"].clone().requires_grad_()
    value = kl_estimate(logprobs, V["ref_logprobs"], kind)
    torch.where(V_MASK, value, torch.zeros_like(value)).sum().backward()
    close(value, case["value"])
    close(logprobs.grad, case["grad_of_masked_sum"])


@pytest.mark.parametrize("case", verl_cases("group_advantage"))
def test_verl_group_advantages(case):
    scores, groups = t64(case["scores"]), torch.tensor(case["prompt_index"])
    ours = group_advantages(scores, groups, case["name"])
    theirs = t64(case["advantages"])[:, 0]  # the first token is trained in every row
    if case["rewards_tag"] == "groups_of_one":
        # on purpose: a group of one has nothing to be compared with. verl lets the raw score through
        assert ours.tolist() == [0.0] * len(scores)
        close(theirs, scores / (1 + 1e-6))
        return
    close(ours, theirs)


@pytest.mark.parametrize("case", verl_cases("gae"))
def test_verl_gae(case):
    advantages, returns = gae(t64(case["token_rewards"]), t64(case["values"]), V_MASK, case["gamma"], case["lam"])
    close(whiten(advantages, V_MASK)[V_MASK], t64(case["advantages"])[V_MASK], 2e-9)  # ten digits in, ten out
    close(returns[V_MASK], t64(case["returns"])[V_MASK])


@pytest.mark.parametrize("case", verl_cases("value_loss"))
def test_verl_value_loss(case):
    values = t64(case["vpreds"]).requires_grad_()
    loss = value_loss(values, t64(case["values"]), t64(case["returns"]), V_MASK, case["cliprange_value"])
    loss.backward()
    close(loss, case["loss"])
    close(values.grad, case["grad_vpreds"])


# ---- trl_verl_golden: 6 x 6, groups of 3, 2 and 1, a hole in a mask, a row without a trained token, saturated KL;
# clip 0.2 below and 0.28 above where nothing else is said

B = {name: t64(values) for name, values in BOTH["inputs"].items() if name != "uid"}
B_MASK = B["mask"].bool()
GROUPS = torch.tensor([{"a": 0, "b": 1, "c": 2}[name] for name in BOTH["inputs"]["uid"]])
N_ROWS, N_TOKENS = 5, 22  # the sixth row has no trained token


def token_loss(
    logprobs,
    *,
    advantages=B["A"],
    beta=0.0,
    kl="k3",
    dual=None,
    level="token",
    low=0.2,
    high=0.28,
    correction="none",
    cap=2.0,
    floor=0.0,
):
    ratio = importance_ratio(logprobs, B["old"], B_MASK, level)
    loss = clipped_surrogate(ratio, advantages, low, high, dual)
    loss = loss * rollout_correction(B["old"], B["rollout"], B_MASK, correction, cap, floor)
    return loss + beta * kl_estimate(logprobs, B["ref"], kl) if beta else loss


def check(expected, make_loss, factor=1.0) -> None:
    """factor: what our value is multiplied with to be theirs."""
    logprobs = B["new"].clone().requires_grad_()
    loss = make_loss(logprobs) * factor
    loss.backward()
    close(loss, expected[0])
    close(logprobs.grad.abs().sum(), expected[1])
    close(logprobs.grad[0], expected[2])


def mean(mode="token-mean", **terms):
    return lambda logprobs: aggregate(token_loss(logprobs, **terms), B_MASK, mode)


def cispo(low: float, high: float):
    def loss(logprobs):
        ratio = importance_ratio(logprobs, B["old"], B_MASK)
        # the fixture's padding is not a number, and the log-prob of a token is a factor here
        new = torch.where(B_MASK, logprobs, torch.zeros_like(logprobs))
        return aggregate(cispo_surrogate(ratio, new, B["A"], low, high), B_MASK, "token-mean")

    return loss


# TRL divides by all rows of the micro-batch, we by those with a trained token: 5 of 6 here
ALL_ROWS = N_ROWS / 6
VERL_LOSSES = {
    "vanilla/token-mean": mean(dual=3.0),
    "vanilla/seq-mean-token-sum": mean("seq-mean-token-sum", dual=3.0),
    "vanilla/seq-mean-token-sum-norm": mean("seq-mean-token-sum-norm", dual=3.0),
    "vanilla/token-mean/tis2": mean(dual=3.0, correction="tis"),
    "vanilla/token-mean/icepop.5_2": mean(dual=3.0, correction="mis", floor=0.5),
    "vanilla/token-mean/seqtis2": mean(dual=3.0, correction="seq-tis"),
    "vanilla/token-mean/dualclip(A -> -A)": mean(dual=3.0, advantages=-B["A"]),
    "vanilla/token-mean/noDualclip(A -> -A, c=100)": mean(dual=100.0, advantages=-B["A"]),
    "cispo/token-mean": cispo(0.2, 0.28),
    "kl/k1/token-mean": lambda x: aggregate(kl_estimate(x, B["ref"], "k1"), B_MASK, "token-mean"),
    "kl/k2/token-mean": lambda x: aggregate(kl_estimate(x, B["ref"], "k2"), B_MASK, "token-mean"),
    "kl/low_var_kl/token-mean": lambda x: aggregate(kl_estimate(x, B["ref"], "low_var"), B_MASK, "token-mean"),
}
VERL_SEQUENCE_MEANS = {  # verl adds 1e-8 to each row's token count
    "vanilla/seq-mean-token-mean": mean("seq-mean-token-mean", dual=3.0),
    "gspo(clip 3e-4/4e-4)": mean("seq-mean-token-mean", level="sequence", low=3e-4, high=4e-4),
}
TRL_LOSSES = {
    "bnpo/beta0": (mean(), 1.0),
    "dapo/beta0": (mean(), 1.0),
    "dapo/beta.04": (mean(beta=0.04), 1.0),
    "cispo/beta0": (cispo(1.0, 4.0), 1.0),  # TRL's epsilon_high 5 is the cap itself, and it has no lower one
    "dapo/token_truncate2": (mean(correction="tis"), 1.0),
    "dapo/token_mask2": (mean(correction="mis"), 1.0),
    "dapo/sequence_mask3(default)": (mean(correction="seq-mis", cap=3.0), 1.0),
    "grpo/beta0": (mean("seq-mean-token-mean"), ALL_ROWS),
    "grpo/beta.04": (mean("seq-mean-token-mean", beta=0.04), ALL_ROWS),
    # TRL's gradient flows through the row's mean log-ratio, ours (verl's) through each token's own log-prob: the same numbers
    "grpo/sequence(GSPO)": (mean("seq-mean-token-mean", level="sequence"), ALL_ROWS),
    "grpo/ga4": (mean("seq-mean-token-mean"), ALL_ROWS / 4),  # one of four accumulated micro-batches
    "dr_grpo/beta0": (mean("seq-mean-token-sum-norm"), ALL_ROWS),
    "dr_grpo/maxlen64": (
        lambda x: aggregate(token_loss(x), B_MASK, "seq-mean-token-sum-norm", norm=64),
        ALL_ROWS,
    ),
    # 50 tokens in the whole batch on 2 ranks whose gradients TRL averages; we count globally and add
    "dapo/world2,items=50": (
        lambda x: (aggregation_weights(B_MASK, "token-mean", N_ROWS, 50, dtype=F64) * token_loss(x)).sum(),
        2.0,
    ),
}


@pytest.mark.parametrize("name", VERL_LOSSES)
def test_golden_verl_losses(name):
    check(BOTH["verl"][name], VERL_LOSSES[name])


@pytest.mark.parametrize("name", VERL_SEQUENCE_MEANS)
def test_golden_verl_sequence_means(name):
    """Ours is exact; verl's 1e-8 in the row's denominator moves value and gradient by less than 1e-8."""
    logprobs = B["new"].clone().requires_grad_()
    loss = VERL_SEQUENCE_MEANS[name](logprobs)
    loss.backward()
    expected = BOTH["verl"][name]
    close(loss, expected[0], 1e-8)
    close(logprobs.grad.abs().sum(), expected[1], 1e-8)
    close(logprobs.grad[0], expected[2], 1e-8)


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_golden_trl_losses(name):
    loss, factor = TRL_LOSSES[name]
    check(BOTH["trl"][name], loss, factor)


def test_golden_ratio_and_correction_weights():
    for kind, name, options in (
        ("tis", "rollout_is/token_tis2", {}),
        ("mis", "rollout_is/icepop.5_2", {"floor": 0.5}),
    ):
        ours = rollout_correction(B["old"], B["rollout"], B_MASK, kind, **options)
        close(ours[B_MASK], t64(BOTH["verl"][name])[B_MASK])
    rows = B_MASK.any(-1)
    ours = rollout_correction(B["old"], B["rollout"], B_MASK, "seq-tis")
    close(ours[:, 0][rows], t64(BOTH["verl"]["rollout_is/seq_tis2"])[rows])
    raw = rollout_correction(B["old"], B["rollout"], B_MASK, "seq-tis", cap=1e9)
    close(raw[:, 0][rows], t64(BOTH["trl"]["seq_is_ratio"])[rows])


def test_golden_advantages():
    rewards, expected = B["R"], BOTH["verl"]
    alone = GROUPS == 2
    for ours, name in (("grpo", "adv/grpo"), ("dr_grpo", "adv/grpo_nostd"), ("rloo", "adv/rloo")):
        got = group_advantages(rewards, GROUPS, ours)
        close(got[~alone], t64(expected[name])[~alone])
        assert (
            got[alone].item() == 0.0 and abs(expected[name][5]) > 0.7
        )  # on purpose: verl's group of one keeps its score
    close(group_advantages(rewards, GROUPS, "rloo"), expected["adv/rloo_vectorized"])
    # verl's vectorised version uses another eps; the mean difference shows in the eighth digit
    close(group_advantages(rewards, GROUPS, "grpo")[:3], t64(expected["adv/grpo_vectorized"])[:3], 1e-7)


def test_golden_trl_advantages():
    rewards, groups = t64([1, 0.25, -1, 0.5]), torch.tensor([0, 0, 1, 1])
    close(group_advantages(rewards, groups, "grpo", eps=1e-4), BOTH["trl"]["adv/group(n=2, R=[1,.25,-1,.5])"])
    close(group_advantages(rewards, groups, "dr_grpo"), BOTH["trl"]["adv/none"])
    # None takes no part: R = [1, None, 0, 1 | None, None, 2, None]
    kept, expected = torch.tensor([0, 2, 3, 6]), BOTH["trl"]["adv/group with None: R=[1,None,0,1 | None,None,2,None]"]
    ours = torch.zeros(8, dtype=F64)
    ours[kept] = group_advantages(t64([1, 0, 1, 2]), torch.tensor([0, 0, 0, 1]), "grpo", eps=1e-4)
    close(ours, expected)


def test_golden_gae_and_value_loss():
    case = BOTH["verl"]["gae(g=.99,l=.95)"]
    mask = t64(case["mask"]).bool()
    advantages, returns = gae(t64(case["rewards"]), t64(case["values"]), mask, 0.99, 0.95)
    close(whiten(advantages, mask)[mask], t64(case["adv_whitened"])[mask])
    close(returns[mask], t64(case["returns"])[mask])
    assert (advantages[~mask] == 0).all()  # on purpose: verl leaves the next token's advantage in the padding
    values = t64(case["values"]) + t64([0.3, -0.7, 0.1, 0.9, -0.2, 0.0])
    loss = value_loss(values, t64(case["values"]), t64(case["returns"]), mask, 0.5)
    close(loss, BOTH["verl"]["value_loss(c=.5,token-mean,vpreds=values+[.3,-.7,.1,.9,-.2,0])"][0], 1e-8)


def test_saturated_low_var_kl():
    new, ref = t64([[-30.0, -1.0, -25.0]]).requires_grad_(), t64([[-0.1, -40.0, -0.2]])
    value = kl_estimate(new, ref, "low_var")
    value.sum().backward()
    close(value[0], BOTH["verl"]["kl/low_var_kl/extreme(new=[-30,-1,-25],ref=[-.1,-40,-.2])"][0])
    assert new.grad.abs().sum() == 0


def test_every_case_is_compared_or_named_as_not_offered():
    compared = {*VERL_LOSSES, *VERL_SEQUENCE_MEANS, *TRL_LOSSES, "seq_is_ratio"}
    compared |= {
        name
        for name in BOTH["verl"]
        if name.startswith(("rollout_is/", "gae(", "value_loss(", "kl/low_var_kl/extreme"))
    }
    compared |= {"adv/grpo", "adv/grpo_nostd", "adv/grpo_vectorized", "adv/rloo", "adv/rloo_vectorized", "adv/none"}
    compared |= {name for name in BOTH["trl"] if name.startswith("adv/group")}
    assert {*BOTH["verl"], *BOTH["trl"]} - compared <= NOT_OFFERED
    tested = {c["kind"] for c in VERL["cases"]}
    assert tested == {"policy_loss", "kl", "group_advantage", "gae", "value_loss"}
    assert {c["name"] for c in VERL["cases"]} & NOT_OFFERED == {"abs"}


def test_nan_in_padding_is_harmless_where_verl_is_poisoned():
    """On purpose: verl's sequence modes multiply by the mask, so NaN in padding becomes a NaN loss."""
    poisoned = {
        name: torch.where(B_MASK, B[name], torch.full_like(B[name], float("nan"))) for name in ("new", "old", "ref")
    }
    ratio = importance_ratio(poisoned["new"], poisoned["old"], B_MASK)
    per_token = clipped_surrogate(ratio, B["A"], 0.2, 0.28) + 0.04 * kl_estimate(poisoned["new"], poisoned["ref"], "k3")
    for mode in ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        close(aggregate(per_token, B_MASK, mode), mean(mode, beta=0.04)(B["new"]))


# ---- presets: the whole objective of each program at once


def preset_loss(logprobs, preset: str, **changed):
    """The trainer's own assembly of the loss. changed: parity_trl.json was made with clip_high 0.28, nobody's default."""
    values = {**preset_values(preset), **changed}
    weight = aggregation_weights(B_MASK, values.pop("aggregation"), N_ROWS, N_TOKENS, dtype=F64)
    reference = B["ref"] if values["beta"] else None
    del values["advantage"], values["advantage_eps"]
    return grpo_terms(
        logprobs=logprobs,
        old_logprobs=B["old"],
        ref_logprobs=reference,
        sampler_logprobs=B["rollout"],
        mask=B_MASK,
        advantages=B["A"],
        weight=weight,
        **values,
    ).loss


def test_preset_trl_is_trls_default_loss():
    check(BOTH["trl"]["dapo/sequence_mask3(default)"], lambda x: preset_loss(x, "trl", clip_high=0.28))


def test_preset_verl_is_verls_loss_and_kl():
    verl = BOTH["verl"]
    expected = verl["vanilla/token-mean"][0] + 0.001 * verl["kl/low_var_kl/token-mean"][0]
    gradient = t64(verl["vanilla/token-mean"][2]) + 0.001 * t64(verl["kl/low_var_kl/token-mean"][2])
    logprobs = B["new"].clone().requires_grad_()
    loss = preset_loss(logprobs, "verl", clip_high=0.28)
    loss.backward()
    close(loss, expected)
    close(logprobs.grad[0], gradient)


def test_preset_paper_is_equation_1_by_hand():
    """Eq. (1), per response and token, in plain Python."""
    values = preset_values("paper")
    assert (values["beta"], values["clip_low"], values["clip_high"], values["dual_clip"]) == (0.001, 0.2, 0.2, None)
    responses = []
    for i in range(5):
        tokens = []
        for t in range(6):
            if not B_MASK[i, t]:
                continue
            a = B["A"][i].item()
            new, old, ref = (B[k][i, t].item() for k in ("new", "old", "ref"))
            ratio = math.exp(new - old)
            kl = min(math.exp(ref - new) - (ref - new) - 1, 10.0)
            tokens.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a) + 0.001 * kl)
        responses.append(sum(tokens) / len(tokens))
    close(preset_loss(B["new"], "paper"), sum(responses) / 5)


def test_presets_are_whole_and_the_defaults_are_the_papers():
    config = GrpoConfig()
    for setting, values in PRESETS.items():
        assert set(values) == {"paper", "verl", "trl"}
        assert getattr(config, setting) == values["paper"], setting
