"""The loss ledger: one row per token with every number behind its share of the loss. The shares add up to the loss.

PPO has two losses, and a ledger of each: the policy's (`ledger`) and the critic's (`value_ledger`).
The terms are computed again in float64 from the recorded log-probs. So the sum is exact to 1e-12, and a difference to
the run's own loss is the rounding of its float32 arithmetic and not the objective.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollout import group_numbers
from trainer.grpo import terms_of
from trainer.objective import CLIPS, LossTerms
from trainer.packing import MicroBatch, make_micro_batch
from trainer.ppo.critic import ValueTerms, value_terms
from trainer.ppo.settings import PpoConfig
from trainer.record.bundle import Bundle

TOLERANCE = 1e-12
"""Largest relative error of the sum of the shares, in float64."""


def in_float64(terms: LossTerms, micro: MicroBatch, bundle: Bundle) -> LossTerms:
    """The terms of a micro-batch in float64, from the same log-probs."""
    sampled = micro.sampler_logprobs[micro.packed.rows, micro.packed.cols].double()  # [M], without padding
    wide = make_micro_batch(
        micro.groups, micro.rows, micro.advantages.double(), micro.mask.any(-1), sampled, torch.device("cpu")
    )
    names = ("ref_logprobs", "old_logprobs", "teacher_logprobs", "teacher_weight")
    wide = replace(wide, **{name: _double(getattr(micro, name)) for name in names})
    # float32 -> float64 is exact: log-probs and advantages are the run's, and only the arithmetic on them is wider
    return terms_of(terms.logprobs.detach().double(), wide, bundle.denominators, bundle.config)


def values_in_float64(terms: ValueTerms, micro: MicroBatch, bundle: Bundle) -> ValueTerms:
    """The terms of a micro-batch's value loss in float64, from the same values and returns."""
    assert isinstance(bundle.config, PpoConfig)
    wide = replace(micro, old_values=_double(micro.old_values), returns=_double(micro.returns))
    return value_terms(terms.values.detach().double(), wide, bundle.denominators, bundle.config.value_clip)


def _double(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.double()


def ledger(bundle: Bundle, terms: list[list[LossTerms]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The ledger's rows, in order of response and position. terms[rank][micro-batch]: from trainer.inspect.replay.

    Keys: row (response of the step, from 0), rank, puzzle_id, response (within its group, from 1), position (from 1),
    token_id, token, logprob, old_logprob, sampler_logprob, ref_logprob, ratio, clip ("", low, high, dual), advantage,
    surrogate, kl, correction, mask, weight, contribution; in a step with --distill-failures also teacher_logprob (None in a
    response without a teacher) and distillation. Asserts that the contributions sum to the float64 loss.
    """
    return _rows_of(bundle, terms, in_float64, _policy_columns, tokenizer)


def value_ledger(
    bundle: Bundle, terms: list[list[ValueTerms]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The ledger of the critic's loss, as ledger(). Keys instead of the policy's: value, old_value, return, clipped, error
    (weight and contribution are there too)."""
    return _rows_of(bundle, terms, values_in_float64, _value_columns, tokenizer)


def _rows_of(
    bundle: Bundle, terms: list[list], widen: Callable, columns_of: Callable, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """widen: gives a micro-batch's terms in float64. columns_of(terms, micro, place): {key: a value per token} of a response."""
    rows, losses, first = [], [], 0
    for rank, inputs in enumerate(bundle.ranks):
        for micro, of_micro in zip(inputs.micro_batches, terms[rank], strict=True):
            wide = widen(of_micro, micro, bundle)
            losses.append(wide.loss.item())
            for place, row in enumerate(micro.rows):
                named = {"row": first + row, "rank": rank}
                rows += _response_rows(named, inputs.responses[row], columns_of(wide, micro, place), tokenizer)
        first += len(inputs.responses)  # as Bundle.responses counts: rank after rank
    rows.sort(key=lambda row: (row["row"], row["position"]))  # packing may have put the longest groups first
    # relative to the size of the shares: their sum is often near 0, since advantages of a group cancel
    scale = max(1.0, math.fsum(abs(row["contribution"]) for row in rows))
    assert abs(total_contribution(rows) - math.fsum(losses)) <= TOLERANCE * scale, "the ledger does not sum to the loss"
    return rows


def _response_rows(
    named: dict[str, Any], response: dict[str, Any], columns: dict[str, list], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """One row per token of a response. named: the keys that all of them share. columns: of its tokens, and padding."""
    named |= {"puzzle_id": response["puzzle_id"], "response": response["response"]}
    return [
        {
            **named,
            "position": t + 1,
            "token_id": token,
            "token": tokenizer.decode([token]),  # a part of a character shows as a replacement sign
            **{name: values[t] for name, values in columns.items()},
        }
        for t, token in enumerate(response["response_ids"])
    ]


def _value_columns(terms: ValueTerms, micro: MicroBatch, place: int) -> dict[str, list]:
    columns = {
        "value": terms.values,
        "old_value": terms.old_values,
        "return": terms.returns,
        "error": terms.error,
        "clipped": terms.clipped,
        "mask": terms.mask,
        "weight": terms.weight,
        "contribution": terms.contribution,
    }
    return {name: values[place].tolist() for name, values in columns.items()}


def _policy_columns(terms: LossTerms, micro: MicroBatch, place: int) -> dict[str, list]:
    """place: of the response in the micro-batch."""
    columns: dict[str, Tensor] = {
        "logprob": terms.logprobs,
        "old_logprob": terms.old_logprobs,
        "sampler_logprob": terms.sampler_logprobs,
        "ref_logprob": terms.ref_logprobs,
        "ratio": terms.ratio,
        "surrogate": terms.surrogate,
        "kl": terms.kl,
        "correction": terms.correction,
        "weight": terms.weight,
        "contribution": terms.contribution,
    }
    numbers = {name: values[place].tolist() for name, values in columns.items()}
    if micro.ref_logprobs is None:  # with beta 0 no reference pass is made
        numbers["ref_logprob"] = [None] * terms.mask.shape[1]
    if terms.distillation is not None:
        taught = micro.teacher_weight[place] > 0
        of_teacher = zip(micro.teacher_logprobs[place].tolist(), taught.tolist(), strict=True)
        numbers["teacher_logprob"] = [value if known else None for value, known in of_teacher]
        numbers["distillation"] = terms.distillation[place].tolist()
    codes, mask = terms.clip[place].tolist(), terms.mask[place].tolist()
    return {
        **numbers,
        "clip": [CLIPS[code] if trained else "" for code, trained in zip(codes, mask, strict=True)],
        "advantage": terms.advantages.expand(terms.mask.shape)[place].tolist(),
        "mask": mask,
    }


def total_contribution(rows: Iterable[dict[str, Any]]) -> float:
    """Sum of the contributions: the loss for all rows, their share of the loss for some rows."""
    # fsum is exact before the final rounding, so the order of the rows does not matter
    return math.fsum(row["contribution"] for row in rows)


def contributions_by(rows: Iterable[dict[str, Any]], key: str) -> dict[Any, float]:
    """{value of column `key`: its share of the loss}, e.g. by "row" or "clip"."""
    shares: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        shares[row[key]].append(row["contribution"])
    return {value: math.fsum(parts) for value, parts in shares.items()}


def contributions_by_group(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """{puzzle: the share of the loss of its group}. A puzzle's second group is named "PUZZLE (again)".

    rows: of all tokens, in order.
    """
    rows = list(rows)
    responses = list({row["row"]: row for row in rows}.values())
    group_of = dict(zip((row["row"] for row in responses), group_numbers(responses), strict=True))
    names: dict[int, str] = {}
    for response in responses:
        name, number = response["puzzle_id"], group_of[response["row"]]
        while number not in names and name in names.values():
            name += " (again)"
        names.setdefault(number, name)
    shares = contributions_by([{**row, "group": group_of[row["row"]]} for row in rows], "group")
    return {names[number]: share for number, share in shares.items()}
