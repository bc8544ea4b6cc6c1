"""Floating-point operations of a forward pass: what balances ranks, and what benchmarks count."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Floating-point operations of a forward pass; what balances ranks, and what benchmarks count."""

    token: float
    """Of one token in all linear layers."""
    pair: float
    """Of one query and one key it sees, in all layers."""
    target: float
    """Of one response token in the head."""

    def of(self, prompt: int, responses: list[int]) -> float:
        """One prompt and the responses that share it."""
        pairs = _causal(prompt) + sum(_causal(n) + n * prompt for n in responses)
        return self.token * (prompt + sum(responses)) + self.pair * pairs + self.target * sum(responses)


def _causal(n: int) -> float:
    """Pairs of a causal segment."""
    return n * (n + 1) / 2


def cost_of(causal_lm: torch.nn.Module, lora_rank: int) -> Cost:
    """Of a forward pass through the model with an adapter on every linear layer."""
    shape = causal_lm.config
    linear = [m for layer in causal_lm.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.in_features * m.out_features + lora_rank * (m.in_features + m.out_features) for m in linear)
    return Cost(
        token=2.0 * weights,
        pair=4.0 * shape.num_attention_heads * head_size(shape) * shape.num_hidden_layers,
        target=2.0 * shape.vocab_size * shape.hidden_size,
    )


def head_size(shape: Any) -> int:
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
