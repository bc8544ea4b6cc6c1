"""Find the first token whose log-prob, ratio, KL, loss or gradient is not a finite number, and report its values.

A step that would not be finite is refused before optimizer.step(): one NaN in the summed gradient would make every
weight NaN. So the weights in memory and on disk stay usable.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.objective import LossTerms
from trainer.packing import MicroBatch

POLICY_TERMS = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "ratio", "kl", "correction")
CHECKED = (*POLICY_TERMS, "distillation", "values", "old_values", "returns", "contribution")
"""Terms of LossTerms and of PPO's ValueTerms, in the order of the computation: the first that is not finite is the cause of
the others."""


@dataclass(frozen=True, kw_only=True)
class BadToken:
    """A token with a value that is not finite."""

    row: int
    """Row of the micro-batch."""
    position: int
    """Position in the response, from 0."""
    what: str
    """The term that is not finite, or "gradient"."""
    values: dict[str, float]
    """{term of CHECKED, or "advantage": its value at that token}; "values" is the critic's"""

    def __str__(self) -> str:
        return f"{self.what} is not finite ({', '.join(f'{name} {value:.6g}' for name, value in self.values.items())})"


@torch.no_grad()
def first_bad_token(terms: LossTerms) -> BadToken | None:
    """The first trained token, row by row, with a term that is not finite; None if all are finite."""
    bad = bad_tokens(terms).nonzero()  # waits for the device; without a bad token this is the only wait
    if not len(bad):
        return None
    row, position = bad[0].tolist()
    values = values_at(terms, row, position)
    # in the order of CHECKED, not of the values: a bad log-prob makes every later term bad too
    what = next(name for name in checked(terms) if not torch.isfinite(getattr(terms, name)[row, position]))
    return BadToken(row=row, position=position, what=what, values=values)


def bad_tokens(terms: LossTerms) -> Tensor:
    """[N,T] bool: a trained token with a term that is not finite. Stays on the device."""
    fine = torch.ones_like(terms.mask)
    for name in checked(terms):
        fine = fine & torch.isfinite(getattr(terms, name))
    return terms.mask & ~fine


def values_at(terms: LossTerms, row: int, position: int) -> dict[str, float]:
    """{name: value} of every term of CHECKED at one token, and its advantage in a policy's loss."""
    values = {name: float(getattr(terms, name)[row, position].detach()) for name in checked(terms)}
    if hasattr(terms, "advantages"):
        values["advantage"] = float(terms.advantages.expand(terms.mask.shape)[row, position])
    return values


def checked(terms: Any) -> list[str]:
    """The names of CHECKED that the terms have."""
    return [name for name in CHECKED if getattr(terms, name, None) is not None]


def first_bad_gradient(terms_of: Callable[[], LossTerms], parameters: list[Tensor]) -> BadToken | None:
    """The first token whose own share of the loss has a gradient that is not finite; None if only sums overflow.

    terms_of() computes the terms with a new graph. A bisection over the trained tokens: about 2 log2(tokens) backward
    passes.
    """
    terms = terms_of()
    tokens = terms.mask.nonzero()  # [M,2], row by row
    contribution = terms.contribution

    def overflows(part: Tensor) -> bool:

        share = contribution[part[:, 0], part[:, 1]].sum()
        # retain_graph: every half uses the same forward pass
        gradients = torch.autograd.grad(share, parameters, retain_graph=True, allow_unused=True)
        return not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)

    if not len(tokens) or not overflows(tokens):
        return None
    # the first half is tried first, and halves keep the order: the first bad token of the micro-batch is found
    while len(tokens) > 1:
        first, second = tokens.tensor_split(2)
        if overflows(first):
            tokens = first
        elif overflows(second):
            tokens = second
        else:
            return None  # each half is finite, only their sum overflows
    row, position = tokens[0].tolist()
    # all its terms are finite: a term that is not would have been found before (bad_term_of)
    return BadToken(row=row, position=position, what="gradient", values=values_at(terms, row, position))


Found = tuple[MicroBatch, BadToken]


def bad_term_of(micro: MicroBatch, terms: LossTerms) -> Found | None:
    """(micro-batch, its first trained token with a term that is not finite); None if all terms are finite."""
    bad = first_bad_token(terms)
    return None if bad is None else (micro, bad)


def without_graph(terms: Any) -> Any:
    """The terms, which can be kept until all micro-batches have run; their graph would keep activations."""
    tensors = {name: value.detach() for name, value in vars(terms).items() if isinstance(value, Tensor)}
    return dataclasses.replace(terms, **tensors)


@torch.no_grad()
def first_bad_of(passes: list[tuple[MicroBatch, Any]]) -> Found | None:
    """bad_term_of the first micro-batch that has one. passes: (micro-batch, its terms); one wait for the device."""
    flags = torch.stack([bad_tokens(terms).any() for _, terms in passes]).tolist() if passes else []
    return next((bad_term_of(*done) for done, bad in zip(passes, flags, strict=True) if bad), None)


def find_bad_gradient(
    micros: list[MicroBatch], terms_of: Callable[[MicroBatch], LossTerms], parameters: list[Tensor]
) -> Found | None:
    """(micro-batch, token) of the first token whose share of the gradient is not finite.

    terms_of(micro) computes the micro-batch's terms with a new graph. Not for sharded models: the ranks would make
    different numbers of passes.
    """
    for micro in micros:
        bad = first_bad_gradient(partial(terms_of, micro), parameters)
        if bad is not None:
            return micro, bad
    return None


def describe_bad_token(found: Found | None, responses: list[dict[str, Any]], rank: int) -> str | None:
    """One sentence that names puzzle, response, token and values. responses: this rank's rows of rollouts.jsonl."""
    if found is None:
        return None
    micro, bad = found
    row = responses[micro.rows[bad.row]]  # row of the micro-batch -> response of the rank
    token = row["response_ids"][bad.position]
    return (
        f"puzzle {row['puzzle_id']}, response {row['response']}, token {bad.position + 1} of "
        f"{len(row['response_ids'])} (id {token}), rank {rank}: {bad}"
    )
