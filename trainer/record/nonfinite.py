"""The first bad token: where a log-prob, ratio, KL, loss or gradient stops being a finite number, and with what values.

A step that would not be finite is refused before optimizer.step(), so the weights on disk and in memory stay good.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.objective import LossTerms
from trainer.packing import MicroBatch

CHECKED = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "ratio", "kl", "correction", "contribution")
"""In the order of the computation: the first of them that is not finite is the cause."""


@dataclass(frozen=True, kw_only=True)
class BadToken:
    row: int
    """Row of the micro-batch."""
    position: int
    """Token of the response, from 0."""
    what: str
    """The term that is not finite, or "gradient"."""
    values: dict[str, float]
    """Every term at that token."""

    def __str__(self) -> str:
        return f"{self.what} is not finite ({', '.join(f'{name} {value:.6g}' for name, value in self.values.items())})"


@torch.no_grad()
def first_bad_token(terms: LossTerms) -> BadToken | None:
    """The first trained token, row by row, with a term that is not finite. Waits for the device once."""
    fine = torch.ones_like(terms.mask)
    for name in CHECKED:
        fine = fine & torch.isfinite(getattr(terms, name))
    bad = (terms.mask & ~fine).nonzero()
    if not len(bad):
        return None
    row, position = bad[0].tolist()
    values = values_at(terms, row, position)
    what = next(name for name in CHECKED if not torch.isfinite(getattr(terms, name)[row, position]))
    return BadToken(row=row, position=position, what=what, values=values)


def values_at(terms: LossTerms, row: int, position: int) -> dict[str, float]:
    """Every term of one token."""
    values = {name: float(getattr(terms, name)[row, position].detach()) for name in CHECKED}
    return {**values, "advantage": float(terms.advantages[row, 0])}


def first_bad_gradient(terms_of: Callable[[], LossTerms], parameters: list[Tensor]) -> BadToken | None:
    """The first token whose own share of the loss has a gradient that is not finite; None when no single half has one.

    terms_of makes a fresh graph. Halves the set of trained tokens until one is left: about log2(tokens) backward passes.
    """
    terms = terms_of()
    tokens = terms.mask.nonzero()  # [M,2], row by row
    contribution = terms.contribution

    def overflows(part: Tensor) -> bool:
        share = contribution[part[:, 0], part[:, 1]].sum()
        gradients = torch.autograd.grad(share, parameters, retain_graph=True, allow_unused=True)
        return not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)

    if not len(tokens) or not overflows(tokens):
        return None
    while len(tokens) > 1:
        first, second = tokens.tensor_split(2)
        if overflows(first):
            tokens = first
        elif overflows(second):
            tokens = second
        else:
            return None  # only their sum overflows
    row, position = tokens[0].tolist()
    return BadToken(row=row, position=position, what="gradient", values=values_at(terms, row, position))


Found = tuple[MicroBatch, BadToken]


def bad_term_of(micro: MicroBatch, terms: LossTerms) -> Found | None:
    """(micro-batch, its first trained token with a term that is not finite); None when all are finite."""
    bad = first_bad_token(terms)
    return None if bad is None else (micro, bad)


def find_bad_gradient(
    micros: list[MicroBatch], terms_of: Callable[[MicroBatch], LossTerms], parameters: list[Tensor]
) -> Found | None:
    """(micro-batch, token) of the first whose share of the gradient is not finite. terms_of(micro) makes a fresh graph."""
    for micro in micros:
        bad = first_bad_gradient(partial(terms_of, micro), parameters)
        if bad is not None:
            return micro, bad
    return None


def describe(found: Found | None, responses: list[dict[str, Any]], rank: int) -> str | None:
    """One sentence that names puzzle, response, token and values. responses: of this rank, as in rollouts.jsonl."""
    if found is None:
        return None
    micro, bad = found
    row = responses[micro.rows[bad.row]]
    token = row["response_ids"][bad.position]
    return (
        f"puzzle {row['puzzle_id']}, response {row['response']}, token {bad.position + 1} of {len(row['response_ids'])} "
        f"(id {token}), rank {rank}: {bad}"
    )
