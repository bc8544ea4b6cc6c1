"""Floating-point operations of a forward pass: used to balance the ranks, and by the benchmarks.

A product of an [a,b] and a [b,c] matrix counts 2abc operations. Norms, activations and softmax are left out: they are a
small and constant share.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Floating-point operations of a forward pass, per unit of work."""

    token: float
    """Of one token, in all linear layers."""
    pair: float
    """Of one query and one key that it sees, in the attention of all layers."""
    target: float
    """Of one response token, in the LM head."""

    def of(self, prompt: int, responses: list[int]) -> float:
        """Operations of a prompt and the responses that share it. prompt, responses: numbers of tokens."""
        # a response sees itself causally, and all of the prompt; prompt tokens are not scored, so the head skips them
        pairs = _causal(prompt) + sum(_causal(n) + n * prompt for n in responses)
        return self.token * (prompt + sum(responses)) + self.pair * pairs + self.target * sum(responses)


def _causal(n: int) -> float:
    """(query, key) pairs of n tokens that see each other causally."""
    return n * (n + 1) / 2


def cost_of(causal_lm: Any, lora_rank: int) -> Cost:
    """The cost of a model with a LoRA adapter on every linear layer (lora_rank 0: none)."""
    shape = causal_lm.config
    linear = [m for layer in causal_lm.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    # W x is in * out weights; B (A x) adds rank * (in + out) (arXiv:2106.09685)
    weights = sum(m.in_features * m.out_features + lora_rank * (m.in_features + m.out_features) for m in linear)
    return Cost(
        token=2.0 * weights,  # a multiplication and an addition per weight
        # q k and p v: two products of head_size per head, 2 operations each
        pair=4.0 * shape.num_attention_heads * head_size(shape) * shape.num_hidden_layers,
        target=2.0 * shape.vocab_size * shape.hidden_size,
    )


def head_size(shape: Any) -> int:
    """Channels of one attention head. shape: the model's configuration; some say it, else it is hidden / heads."""
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
