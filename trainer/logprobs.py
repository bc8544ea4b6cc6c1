"""Log-probs of chosen tokens straight from hidden states, never holding a [tokens, V] tensor.

M tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def fused_logprobs(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """log softmax(hidden @ lm_head_weight.T / temperature)[targets].

    hidden: [M,H]; lm_head_weight: [V,H]; targets: [M] long. Returns [M], float32 (float64 for float64 input).
    `chunk` tokens of logits exist at a time; they are recomputed in backward. Differentiable in hidden and in the weight.
    """
    return _FusedLogprobs.apply(hidden, lm_head_weight, targets, temperature, chunk)


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[m,V] logits with float32 (or float64) accumulation."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = _chunk_logits(hidden[rows], weight, temperature)
            logprobs[rows] = -F.cross_entropy(logits, targets[rows], reduction="none")
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            # d logprob / d logits = onehot(target) - softmax
            grad_logits = _chunk_logits(hidden[rows], weight, ctx.temperature).softmax(-1)
            grad_logits[torch.arange(len(grad_logits), device=grad.device), targets[rows]] -= 1
            grad_logits.mul_(-grad[rows, None] / ctx.temperature)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows].to(grad_logits.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
