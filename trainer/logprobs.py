"""Log-probs of chosen tokens straight from hidden states, without ever holding a [tokens, V] tensor.

At a vocabulary of 152,000 the float32 logits of 16,000 tokens take 9.7 GB, and autograd would keep several such tensors.

Axes: M tokens, H hidden size, V vocabulary, m tokens of a chunk.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits that exist at a time at most, or those of FEWEST tokens: 32 and 512 MiB of float32."""
FEWEST = 220
"""Tokens of a chunk that every vocabulary gets: 128 MiB at 152,000 tokens. Each chunk reads the head twice, and with 56
tokens that takes longer than the products (1.5 times the time in float32 on a CPU)."""
TILE = 128
"""Rows of a GPU's matrix product that are computed together: a chunk is a multiple of it."""


def fused_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: bool = False,
    softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ lm_head_weight.T / temperature)[targets], the log-prob of each target token.

    hidden: [M,H]; lm_head_weight: [V,H]; targets: [M] long. Returns [M] in float32 (float64 for float64 input); with entropy
    also the entropy of each distribution, [M] in nats, without a graph. Differentiable in hidden and in the weight.
    softcap: Gemma's bound of the logits, softcap * tanh(logits / softcap), before the temperature (arXiv:2408.00118).

    The logits of at most `chunk` tokens exist at a time, in one buffer. The gradient of a log-prob with respect to its hidden
    state is (weight[target] - softmax @ weight) / temperature. It is known as soon as the logits are, so forward keeps it
    ([M,H]) and backward only scales each row by the gradient that arrives. The logits are computed again in backward only
    where the head itself is trained.
    """
    chunk = tokens_of_chunk(len(lm_head_weight), hidden.device.type, chunk)
    logprobs, entropies = _FusedLogprobs.apply(hidden, lm_head_weight, targets, temperature, chunk, entropy, softcap)
    return (logprobs, entropies) if entropy else logprobs


def tokens_of_chunk(vocabulary: int, device: str, most: int = 1024) -> int:
    """How many tokens have logits at a time: fewer with a large vocabulary, since it is the logits that cost memory."""
    tokens = max(1, min(most, max(FEWEST, CHUNK_LOGITS[device] // vocabulary)))
    return tokens - tokens % TILE if device == "cuda" and tokens > TILE else tokens


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, entropy, softcap):
        # bfloat16 keeps about 3 digits: a logsumexp over 152,000 values, and the small ratios made of it, need more
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(targets), dtype=accurate)
        entropies = torch.empty_like(logprobs) if entropy else None
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # [M,H]
        kept = None if slopes is None else weight.dtype  # under no_grad nothing is kept
        all_of = passes_for(logprobs)
        for rows, logits in _chunks(hidden, weight, chunk):
            logprobs[rows], spread, slope = all_of(logits, targets[rows], temperature, softcap, kept, entropy)
            if entropy:
                entropies[rows] = spread
            if slopes is not None:
                slopes[rows] = slope @ weight  # [m,V] @ [V,H]
        ctx.save_for_backward(hidden, weight, targets, slopes)
        ctx.temperature, ctx.chunk, ctx.softcap = temperature, chunk, softcap
        if entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad, _):  # _: of the entropies, which have no graph
        refuse_second_derivatives("log_softmax")  # `slopes` has no graph
        hidden, weight, targets, slopes = ctx.saved_tensors
        scaled = grad[:, None] / ctx.temperature  # [M,1]; the logits were divided by it
        grad_hidden = None if slopes is None else (slopes * scaled).to(hidden.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=grad.dtype)  # added up in float32, rounded once at the end
            all_of = passes_for(grad_weight)
            for rows, logits in _chunks(hidden, weight, ctx.chunk):
                rest = (ctx.temperature, ctx.softcap, logits.dtype, False)
                slope = all_of(logits, targets[rows], *rest)[2]
                grad_weight.addmm_(slope.T, hidden[rows].to(slope.dtype) * scaled[rows])  # [V,m] @ [m,H]
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None  # one per argument of forward


def refuse_second_derivatives(instead: str) -> None:
    """To be called in a backward whose parts are computed without a graph: a derivative of it would lack them unseen."""
    if torch.is_grad_enabled():  # only with create_graph=True
        raise RuntimeError(f"this operation has no second derivative; use {instead} where you need create_graph=True")


def _chunks(hidden: Tensor, weight: Tensor, chunk: int):
    """Yields (rows, their logits [m,V]) in float32 (or float64).

    All chunks share one buffer: the logits of a chunk are gone when the next one is made.
    """
    accurate = torch.promote_types(hidden.dtype, torch.float32)
    buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=accurate)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        part = hidden[rows]
        logits = buffer[: len(part)]
        if part.dtype == accurate:
            torch.mm(part, weight.T, out=logits)
        elif part.is_cuda:
            torch.mm(part, weight.T, out_dtype=accurate, out=logits)
        else:  # no product of bfloat16 with a float32 result on a CPU
            logits.copy_(part @ weight.T)
        yield rows, logits


def passes(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, slope: torch.dtype | None, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All that is wanted of a chunk's logits [m,V], which are overwritten.

    Returns (log-probs of the targets [m]; with entropy: entropies [m]; with a dtype for the slope: in it, d log-prob of the
    target / d logits before the cap, times the temperature [m,V]).
    """
    steepness = _cap_and_temper(logits, softcap, temperature)
    at = targets[:, None]  # [m,1]
    chosen = logits.gather(1, at)[:, 0]  # [m]; before _softmax overwrites the logits
    softmax, lse = _softmax(logits)
    entropies = torch.special.entr(softmax).sum(1) if entropy else None  # before _slope overwrites it; entr(0) = 0
    return chosen - lse, entropies, None if slope is None else _slope(softmax, at, steepness).to(slope)


def passes_for(like: Tensor) -> Callable:
    """`passes`, or its kernel, for logits with the dtype and device of `like`: the kernel where there is a GPU and Triton.

    To step through `passes` on a GPU, let this return it.
    """
    if like.is_cuda and like.dtype == torch.float32 and importlib.util.find_spec("triton"):
        from trainer.kernels import head as head_kernel

        return head_kernel.passes
    return passes


def _cap_and_temper(logits: Tensor, softcap: float | None, temperature: float) -> Tensor | None:
    """Apply the cap and the temperature to the logits, in place. Returns d capped / d logits [m,V]; None without a cap."""
    steepness = None
    if softcap:
        logits.div_(softcap).tanh_()
        steepness = 1 - logits.square()  # of tanh; the cap itself cancels
        logits.mul_(softcap)
    if temperature != 1.0:
        logits.div_(temperature)
    return steepness


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [m,V], written over the logits to save a copy; logsumexp [m])."""
    # the largest logit is subtracted first: exp of it would overflow
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    return logits.div_(total), (largest + total.log())[:, 0]


def _slope(softmax: Tensor, targets: Tensor, steepness: Tensor | None) -> Tensor:
    """d log-prob of the targets [m,1] / d logits before the cap, times the temperature; written over the softmax."""
    slope = softmax.neg_().scatter_add_(1, targets, torch.ones_like(targets, dtype=softmax.dtype))  # one-hot - softmax
    return slope if steepness is None else slope.mul_(steepness)
