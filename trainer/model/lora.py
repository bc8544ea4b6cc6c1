"""A linear layer with its LoRA adapter (arXiv:2106.09685) as one function: PEFT's numbers in fewer passes over memory.

    y = x W^T + bias + scale (x A^T) B^T

PEFT writes (x A^T) B^T out, multiplies it and adds it: six passes over something as large as y, where the product with B
can add to y as it goes (two). Backward alike: the scale goes to the [M,r] tensors, and dx is added to in place.

The gradient of A needs x. Where a quick kernel makes x from tensors that are kept anyway (the output of a norm, the product
of a gated MLP), each layer makes x again in backward instead of keeping it: see `made_of`.

Axes: M tokens, r rank.
"""

from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.lora import Linear
from torch import Tensor

from trainer.logprobs import refuse_second_derivatives


def fuse_adapters(model: torch.nn.Module) -> int:
    """Let every linear layer with a plain LoRA adapter compute both at once. Returns the number of such layers.

    Others stay PEFT's: DoRA, and weights in 4 bits.
    """
    layers = [layer for layer in model.modules() if type(layer) is Linear and not layer.lora_variant]
    layers = [layer for layer in layers if type(layer.base_layer) is torch.nn.Linear]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)


def made_of(out: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Tell the layers that get `out` how to make it again: make(*sources), bit for bit. The sources must be kept anyway."""
    if out.requires_grad:
        out.again = make, [source.detach() for source in sources], out._version
    return out


def _made_again(x: Tensor) -> tuple[Callable[..., Tensor] | None, list[Tensor]]:
    """(make, sources) of made_of; (None, []) of a tensor that came from elsewhere, or was written to since."""
    if not hasattr(x, "again"):
        return None, []
    make, sources, version = x.again
    return (make, sources) if x._version == version else (None, [])


def _forward(layer: Linear, x: Tensor) -> Tensor:
    """In place of peft's forward. The adapter that is active (a policy's, or a critic's), or none."""
    base = layer.base_layer
    if layer.merged:  # PEFT's merge_adapter: the weights hold the adapter already, or are given back without it
        return Linear.forward(layer, x)
    if layer.disable_adapters:
        return base(x)
    (name,) = layer.active_adapters
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    tensors = (x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
    x, *cast = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    return _LinearWithLora.apply(x, *cast, layer.scaling[name], *_made_again(x))


class _LinearWithLora(torch.autograd.Function):
    """W and bias are frozen: they get no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale: float, make: Callable | None, sources: list[Tensor]) -> Tensor:
        """x [...,in], weight [out,in], bias [out] or None, a [r,in], b [out,r] -> [...,out]. make, sources: see made_of."""
        rows = x.flatten(0, -2)  # [M,in]
        low = rows @ a.T  # [M,r]
        out = torch.nn.functional.linear(rows, weight, bias)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(weight, a, b, low, *(sources if make else [rows]))
        ctx.scale, ctx.shape, ctx.make = scale, x.shape, make
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives("the forward of PEFT")
        weight, a, b, low, *kept = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # [M,out]
        grad_low = (grad @ b).mul_(ctx.scale)  # [M,r]
        grad_x = None
        if ctx.needs_input_grad[0]:  # not of the first layer: the embedding is frozen
            grad_x = (grad @ weight).addmm_(grad_low, a).view(ctx.shape)
        rows = ctx.make(*kept).flatten(0, -2) if ctx.make else kept[0]
        return grad_x, None, None, grad_low.T @ rows, (grad.T @ low).mul_(ctx.scale), None, None, None
