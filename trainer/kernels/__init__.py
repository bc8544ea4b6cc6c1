"""Triton kernels for a GPU: what lies between the matrix products of a model, in fewer passes over memory."""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fuse(causal_lm: "torch.nn.Module", device: "torch.device") -> None:
    """Let a frozen model with an adapter compute with the kernels that give its own numbers; on a CPU it stays as it is."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from trainer.kernels.attention import fuse_rotary
        from trainer.kernels.layers import fuse_layers

        fuse_rotary(causal_lm, device)
        fuse_layers(causal_lm, device)
