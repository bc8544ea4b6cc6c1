"""The page of one optimizer step, with every token coloured by advantage, ratio, KL or share of the loss.

Works offline.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from eval.report.html import with_policy
from rollout import group_numbers

TEMPLATE = Path(__file__).with_name("stepview.html")
COLUMNS = (
    "token",
    "token_id",
    "mask",
    "clip",
    "logprob",
    "old_logprob",
    "sampler_logprob",
    "ref_logprob",
    "ratio",
    "advantage",
    "surrogate",
    "correction",
    "kl",
    "weight",
    "contribution",
)


def step_page(
    step: int,
    settings: dict[str, Any],
    responses: list[dict],
    rows: list[dict[str, Any]],
    prompts: dict[int, str],
    *,
    formula: str,
    ppo: bool = False,
) -> str:
    """The page of a step as HTML.

    settings: of the objective. responses: {puzzle_id, response, reward, status} of each. rows: the loss ledger, with
    one row per token. prompts: {place in responses: text}. formula: of a token's share of the loss. ppo: a step of PPO,
    where each token has an advantage of its own.
    """
    names = (*COLUMNS, *[name for name in ("distillation",) if rows and name in rows[0]])
    tokens: list[list[dict]] = [[] for _ in responses]
    for row in rows:
        tokens[row["row"]].append(row)
    groups: dict[int, dict] = {}
    numbers = group_numbers(responses)  # not by puzzle: the same puzzle may stand in a step twice
    for place, (response, own) in enumerate(zip(responses, tokens, strict=True)):
        group = groups.setdefault(
            numbers[place],
            {"id": response["puzzle_id"], "prompt": prompts.get(place, ""), "rows": []},
        )
        columns = {name: [_short(token[name]) for token in own] for name in names}
        group["rows"].append(
            {
                "row": place,
                "response": response["response"],
                "reward": response["reward"],
                "status": response["status"],
                **columns,
            }
        )
    loss = sum(row["contribution"] for row in rows)
    advantage = (
        "one number per token: the rewards still to come, against what the critic expected."
        if ppo
        else "one number per response, how its reward compares with its group's."
    )
    data = {"groups": list(groups.values()), "scales": _scales(rows), "formula": formula, "advantage": advantage}
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)
    lead = (
        f"{len(responses)} responses in {len(groups)} groups, {sum(row['mask'] for row in rows):,} trained tokens. "
        f"The shares of all tokens sum to the loss, {loss:.3g}. Settings: {shown}."
    )
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        with_policy(TEMPLATE.read_text(encoding="utf-8"))
        .replace("{{title}}", f"{'PPO' if ppo else 'GRPO'} step {step}, token by token")
        .replace("{{lead}}", escape(lead))
        .replace("{{data}}", text)
    )


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _scales(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{colouring: value at full colour}: the 99th percentile of absolute values, so that no outlier hides the rest."""
    trained = [row for row in rows if row["mask"]]

    def scale(values: list[float]) -> float:
        ordered = sorted(values)
        return (ordered[int(0.99 * (len(ordered) - 1))] or ordered[-1] or 1.0) if ordered else 1.0

    return {
        "advantage": scale([abs(row["advantage"]) for row in trained]),
        "ratio": max(scale([abs(row["ratio"] - 1) for row in trained]), 1e-6),
        "kl": scale([abs(row["kl"]) for row in trained]),
        "contribution": scale([abs(row["contribution"]) for row in trained]),
    }
