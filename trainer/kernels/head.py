"""The passes over the logits in `trainer.logprobs.passes`, as one Triton kernel for a GPU: the same numbers, two passes.

Written with PyTorch's operations they read and write the logits eleven times, and the logits of 8,192 tokens are 5 GB.
One program of the kernel has one token. Its first pass keeps, for every column of a block, the largest logit so far
and the sum of exp(logit - largest): the online softmax (arXiv:1805.02867). The second writes the slope.

Axes: m tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program holds at a time: 16 KiB of registers."""
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
"""Below every logit, and finite: inf - inf would be no number."""


def passes(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, slope: torch.dtype | None, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See trainer.logprobs.passes. logits: [m,V] float32, left as they are; targets: [m] long."""
    m, vocabulary = logits.shape
    logprobs = logits.new_empty(m)
    entropies = logits.new_empty(m) if entropy else None
    slopes = logits.new_empty(m, vocabulary, dtype=slope) if slope is not None else None
    _two_passes[(m,)](
        logits.contiguous(),
        targets.contiguous(),
        logprobs,
        logprobs if entropies is None else entropies,  # a kernel takes no None; then nothing is written there
        logprobs if slopes is None else slopes,
        vocabulary,
        float(temperature),
        float(softcap or 0.0),
        CAPPED=bool(softcap),
        ENTROPY=entropy,
        SLOPE=slopes is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logprobs, entropies, slopes


@triton.jit
def _tempered(x, temperature, softcap, CAPPED: tl.constexpr):
    """(the logit after cap and temperature, d capped / d logit)."""
    steepness = 1.0
    if CAPPED:
        tanh = 2 * tl.sigmoid(2 * x / softcap) - 1
        steepness = 1 - tanh * tanh
        x = tanh * softcap
    return x / temperature, steepness


@triton.jit
def _two_passes(
    logits,
    targets,
    logprobs,
    entropies,
    slopes,
    vocabulary,
    temperature,
    softcap,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int32 ends at 2^31, and m * V does not
    columns = tl.arange(0, BLOCK)
    # of each column: the largest logit so far, sum exp(x - largest), and sum exp(x - largest) (x - largest)
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        x = tl.load(logits + row * vocabulary + start + columns, mask=inside, other=0.0)
        x, _ = _tempered(x, temperature, softcap, CAPPED)
        x = tl.where(inside, x, LOWEST)
        now = tl.maximum(largest, x)
        before, mine = tl.exp(largest - now), tl.where(inside, tl.exp(x - now), 0.0)
        if ENTROPY:
            spread = before * (spread + (largest - now) * total) + tl.where(mine > 0, mine * (x - now), 0.0)
        total = before * total + mine
        largest = now
    # the columns together
    top = tl.max(largest, 0)
    before = tl.exp(largest - top)
    if ENTROPY:
        spread_all = tl.sum(before * (spread + (largest - top) * total), 0)
    sum_all = tl.sum(before * total, 0)
    lse = top + tl.log(sum_all)
    target = tl.load(targets + row)
    chosen, _ = _tempered(tl.load(logits + row * vocabulary + target), temperature, softcap, CAPPED)
    tl.store(logprobs + row, chosen - lse)
    if ENTROPY:  # - sum p log p = log(sum) - sum p (x - top)
        tl.store(entropies + row, tl.log(sum_all) - spread_all / sum_all)
    if SLOPE:
        for start in range(0, vocabulary, BLOCK):
            inside = start + columns < vocabulary
            x = tl.load(logits + row * vocabulary + start + columns, mask=inside, other=0.0)
            x, steepness = _tempered(x, temperature, softcap, CAPPED)
            slope = (tl.where(start + columns == target, 1.0, 0.0) - tl.exp(x - lse)) * steepness
            tl.store(slopes + row * vocabulary + start + columns, slope.to(slopes.dtype.element_ty), mask=inside)
