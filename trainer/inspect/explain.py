"""Explain one response of a step: the formulas of the objective with the response's numbers filled in."""

import statistics
from typing import Any

from trainer.advantages import differ
from trainer.config import GrpoConfig
from trainer.inspect.ledger import total_contribution
from trainer.ppo.settings import PpoConfig
from trainer.record.bundle import Bundle

FORMULAS = {
    "grpo": "(r - mean) / (std + {eps:g})",
    "dr_grpo": "r - mean",
    "rloo": "r - mean of the others",
}
KL_FORMULAS = {
    "k1": "-d",
    "k2": "d^2 / 2",
    "k3": "exp(d) - d - 1",
    "low_var": "exp(d) - d - 1, d clamped to +-20, value to +-10",
}
WEIGHTS = {
    "seq-mean-token-mean": "1 / (trained tokens of the response x trained responses of the step)",
    "token-mean": "1 / trained tokens of the step",
    "seq-mean-token-sum": "1 / trained responses of the step",
    "seq-mean-token-sum-norm": "1 / (trained responses of the step x max_response_tokens)",
}


def explain_response(
    bundle: Bundle, rows: list[dict[str, Any]], row: int, of_values: list[dict[str, Any]] | None = None
) -> str:
    """The text of launch/replay.py --row. rows: the ledger. row: number of the response in bundle.responses.

    of_values: the critic's ledger, of PPO.
    """
    responses = bundle.responses
    # groups are never split over ranks, and each has group_size rows
    first = row - row % bundle.config.group_size
    group = responses[first : first + bundle.config.group_size]
    tokens = [token for token in rows if token["row"] == row]
    trained = [token for token in tokens if token["mask"]]
    response, cfg = responses[row], bundle.config
    lines = [
        f"Response {row}: puzzle {response['puzzle_id']}, response {response['response']} of {len(group)}, "
        f"{len(tokens)} tokens, reward {_number(response['reward'])} ({response['status']})",
        response["completion"],
        "",
    ]
    if not trained:
        return "\n".join(
            [*lines, f"It was not scored ({response.get('message', '')}), so no token of it is trained: share 0."]
        )
    # GRPO's advantage, and the weight, are the same for all tokens of a response, so its first trained token has them
    if isinstance(cfg, PpoConfig):
        values = [token for token in of_values or [] if token["row"] == row]
        lines += [*_value_lines(values, trained, cfg), ""]
    else:
        lines += [*_advantage_lines(group, response, trained, cfg), ""]
    lines += [
        f"Weight of each token ({cfg.aggregation}): {WEIGHTS[cfg.aggregation]} = {trained[0]['weight']:.9g}",
        f"    trained responses {bundle.denominators.n_rows:g}, trained tokens {bundle.denominators.n_tokens:g}, "
        f"of this response {len(trained)}",
        "",
        *_token_lines(max(trained, key=lambda token: abs(token["contribution"])), cfg),
        "",
        f"All {len(trained)} tokens: {total_contribution(trained):+.9g} of the step's loss "
        f"{total_contribution(rows):+.9g}",
    ]
    # codes of CLIPS as text: "" is no clip
    clipped = sum(bool(token["clip"]) for token in trained)
    kept = [token for token in trained if token["correction"]]  # of the others the surrogate has no gradient
    lines.append(
        f"    {clipped} of them clipped (the ratio, which is only a weight here); they push {_direction(kept)}"
        if cfg.surrogate == "cispo"
        else f"    {clipped} of them clipped (no gradient from the surrogate there); the rest push "
        f"{_direction([token for token in kept if not token['clip']])}"
    )
    if dropped := len(trained) - len(kept):
        lines.append(
            f"    {dropped} of them dropped by --correction {cfg.correction}: the surrogate has no gradient there"
        )
    return "\n".join(lines)


def share_formula(cfg: GrpoConfig | PpoConfig, distilled: bool) -> str:
    """What a token's share of the loss is made of. distilled: the step has --distill-failures."""
    kl, more = " + beta x KL" if cfg.loss_beta else "", " + distillation" if distilled else ""
    return f"weight x (surrogate x correction{kl}{more})"


def _direction(trained: list[dict]) -> str:
    """Where the surrogate pushes the tokens of a response."""
    better, worse = (sum(sign * token["advantage"] > 0 for token in trained) for sign in (1, -1))
    if better and worse:
        return f"{better} tokens up and {worse} down"
    return "the response " + ("up" if better else "down" if worse else "nowhere")


def _value_lines(values: list[dict], trained: list[dict], cfg: PpoConfig) -> list[str]:
    """The response's rewards against the critic's values (trainer/ppo/ppo.py). values: of the critic's ledger."""
    largest = max(values, key=lambda token: token["contribution"])
    first, last = values[0], values[-1]
    a = [token["advantage"] for token in trained]
    return [
        f"Return: GAE with gamma {cfg.gamma:g}, lambda {cfg.lam:g} over the rewards of the tokens (the score at the last one"
        f"{', minus beta x KL at each' if cfg.reward_beta else ''}), plus the value",
        f"    before the first token {first['return']:.6g}, where the critic expected {first['old_value']:.6g}; before the last "
        f"{last['return']:.6g}, expected {last['old_value']:.6g}",
        f"Advantage: return - value, whitened over all tokens of the step: {min(a):+.6g} to {max(a):+.6g}, mean "
        f"{statistics.fmean(a):+.6g}",
        "",
        f"The critic's share: token {largest['position']}, {largest['token']!r}, has the largest:",
        f"    0.5 max((value - return)^2, (value clipped to {largest['old_value']:.6g} +- {cfg.value_clip:g} - return)^2) = "
        f"{largest['error']:.6g} at value {largest['value']:.6g}, return {largest['return']:.6g}"
        f"{'; the clip decided' if largest['clipped'] else ''}",
        f"    share       weight x error = {largest['weight']:.6g} x {largest['error']:.6g} = {largest['contribution']:.9g}",
    ]


def _advantage_lines(group: list[dict], response: dict, trained: list[dict], cfg) -> list[str]:
    """The response's reward against its group (trainer/advantages.py). trained: rows of the ledger, of its tokens."""
    advantage = trained[0]["advantage"]
    rewards = [member["reward"] for member in group if member["reward"] is not None]  # as in compare()
    mean, r = statistics.fmean(rewards), response["reward"]
    lines = [
        f"Advantage ({cfg.advantage}): {FORMULAS[cfg.advantage].format(eps=cfg.advantage_eps)}",
        f"    rewards of the group: {', '.join(map(_number, rewards))}",
    ]
    # decided as group_advantages does, by equality: r - mean of equal floats need not be exactly 0
    if not differ(rewards):
        return [*lines, "    all equal: 0, this group teaches nothing"]
    filled = f"{_number(r)} - {mean:.6g}"
    if cfg.advantage == "grpo":
        filled = f"({filled}) / ({statistics.stdev(rewards):.6g} + {cfg.advantage_eps:g})"  # over G - 1, as in training
    if cfg.advantage == "rloo":
        filled = f"{_number(r)} - {(sum(rewards) - r) / (len(rewards) - 1):.6g}"
    meaning = (
        f"but --correction {cfg.correction} drops all of its tokens: the surrogate leaves them alone"
        if not any(token["correction"] for token in trained)
        else "better than its group: its tokens are made likelier"
        if advantage > 0
        else "worse than its group: its tokens are made less likely"
        if advantage < 0
        else "its group's mean: the surrogate leaves its tokens alone"
    )
    return [*lines, f"    {filled} = {advantage:+.6g}, {meaning}"]


def _token_lines(token: dict, cfg) -> list[str]:
    """Every factor of one token's share of the loss (trainer/objective.py). token: a row of the ledger."""
    a, ratio = token["advantage"], token["ratio"]
    # with beta 0 there is no reference: the ledger has None, and the KL of the record is 0
    d = 0.0 if token["ref_logprob"] is None else token["ref_logprob"] - token["logprob"]
    reference = "none (beta is 0)" if token["ref_logprob"] is None else f"{token['ref_logprob']:.6g}"
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    clipped = min(max(ratio, low), high)
    level = "exp(new - old)" if cfg.ratio_level == "token" else "exp(mean of new - old over the response)"
    dual = f", at most {cfg.dual_clip:g} |A| where A < 0 (dual clip)" if cfg.dual_clip else ""
    filled = (
        f"max(-ratio A, -clip(ratio, {low:g}, {high:g}) A){dual} = max({-ratio * a:.6g}, {-clipped * a:.6g})"
        if cfg.surrogate == "clip"
        else f"-clip(ratio, {low:g}, {high:g}) A log new = {-clipped:.6g} x {a:.6g} x {token['logprob']:.6g}"
    )
    teacher, formula, distilled = token.get("teacher_logprob"), "surrogate x correction + beta x KL", ""
    if teacher is not None:  # --distill-failures
        formula, distilled = f"{formula} + distillation", f" + {token['distillation']:.6g}"
    kl = f"KL {cfg.kl_kind}: d = ref - new = {d:.6g}; {KL_FORMULAS[cfg.kl_kind]} = {token['kl']:.6g}"
    if cfg.beta != cfg.loss_beta:  # PPO's --kl-in reward
        kl = f"KL k1: old - ref = {token['old_logprob'] - token['ref_logprob']:.6g}, already in the rewards"
    return [
        f"Token {token['position']} of the response, {token['token']!r}, has the largest share:",
        f"    log-probs   new {token['logprob']:.6g}, old {token['old_logprob']:.6g}, "
        f"sampler {token['sampler_logprob']:.6g}, reference {reference}",
        f"    ratio       {level} = {ratio:.6g}",
        f"    surrogate   {filled} -> {token['surrogate']:.6g}; "
        f"{token['clip'] + ' clip fired' if token['clip'] else 'no clip'}",
        f"    correction  {cfg.correction}: {token['correction']:.6g}",
        f"    {kl if cfg.beta else 'KL          beta is 0'}",
        *(
            [f"    distillation weight x (new - teacher)^2 / 2, teacher {teacher:.6g}: {token['distillation']:.6g}"]
            if distilled
            else []
        ),
        f"    share       weight ({formula}) = {token['weight']:.6g} "
        f"({token['surrogate']:.6g} x {token['correction']:.6g} + {cfg.loss_beta:g} x {token['kl']:.6g}{distilled}) = "
        f"{token['contribution']:.9g}",
    ]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
