"""Parts of a decoder layer between its matrix products, as Triton kernels for a GPU: RMSNorm and the gated activation.

    RMSNorm (arXiv:1910.07467):   y = w x / sqrt(mean(x^2) + epsilon)
    gated MLP (arXiv:2002.05202): down(silu(gate(x)) up(x))

Written with PyTorch's operations, a forward and a backward pass of a norm read or write its input some 25 times, those of
the activation 13 times, and keep a tensor of every step for backward. Here it is 5 and 8 times, and only inputs are kept.
Layers with an adapter make the outputs again from them, 2 or 3 times more each (trainer/model/lora.py).
The numbers are those of transformers' own code, rounded at the same places; only sums are in another order.

Axes: M tokens (or tokens x heads), H size of a norm, n all elements.
"""

import copy
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from trainer.kernels.same import gives_the_same, runs_on
from trainer.model.lora import made_of

LARGEST_NORM = 16384
"""H that one program holds: 64 KiB of registers."""
BLOCK = 2048
"""Elements that one program of the activation computes."""


def fuse_layers(model: nn.Module, device: torch.device) -> int:
    """Let norms and gated MLPs of a model compute with these kernels. Returns the number of modules that do.

    A class of modules is changed only where both ways give the same numbers on an example.
    """
    found, same = 0, {}
    for module in model.modules():
        if is_rms_norm(module):
            fused, is_the_same = _fused_norm, norm_is_the_same
        elif is_gated_mlp(module):
            fused, is_the_same = _fused_mlp, mlp_is_the_same
        else:
            continue
        if type(module) not in same:
            same[type(module)] = is_the_same(module, device)
        if same[type(module)]:
            module.forward = partial(fused, module, module.forward)
            found += 1
    return found


def is_rms_norm(module: nn.Module) -> bool:
    """One weight, and an epsilon under one of transformers' names."""
    weight = getattr(module, "weight", None)
    alone = [name for name, _ in module.named_parameters()] == ["weight"] and not list(module.children())
    return alone and weight.dim() == 1 and len(weight) <= LARGEST_NORM and _epsilon(module) is not None


def _epsilon(norm: nn.Module) -> float | None:
    return next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)


def is_gated_mlp(module: nn.Module) -> bool:
    """Llama's and Qwen's MLP: three linear layers and SiLU."""
    names = {name for name, _ in module.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and _is_silu(module.act_fn)


def _is_silu(function: nn.Module) -> bool:
    x = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    return torch.allclose(function(x), nn.functional.silu(x))


def rounds_alike(norm: nn.Module, x: Tensor) -> bool:
    """Outputs of the dtype and, but for the order of a sum, of the bits of a norm's own: it may round once, or twice."""
    theirs, ours = norm.forward(x), _fused_norm(norm, norm.forward, x)
    return theirs.dtype == ours.dtype and float((theirs != ours).float().mean()) < 0.02


def norm_is_the_same(norm: nn.Module, device: torch.device) -> bool:
    """Does a norm give the same numbers in both ways, and round them alike?"""
    # the module itself may be spread over ranks, or hold weights that hide a difference: all ones, or zeros
    generator = torch.Generator().manual_seed(0)
    # a mean that is not 0: a layer norm subtracts it
    weight, *x = (1 + torch.randn(3, len(norm.weight), generator=generator)).to(device)
    example = copy.copy(norm)
    example._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    x, fused = torch.stack(x), partial(_fused_norm, example, example.forward)
    return gives_the_same(example.forward, fused, x) and rounds_alike(example.to(torch.bfloat16), x.to(torch.bfloat16))


def mlp_is_the_same(mlp: nn.Module, device: torch.device) -> bool:
    """Does an MLP give the same numbers in both ways? A small one of its class and activation is asked."""
    example, generator = copy.copy(mlp), torch.Generator().manual_seed(0)
    example._modules = {"act_fn": mlp.act_fn}
    for name, wide, narrow in (("gate_proj", 48, 16), ("up_proj", 48, 16), ("down_proj", 16, 48)):
        layer = nn.Linear(narrow, wide, bias=False)
        layer.weight.data = torch.randn(wide, narrow, generator=generator)
        example._modules[name] = layer.to(device).requires_grad_(False)
    x = torch.randn(5, 16, generator=generator).to(device)
    return gives_the_same(example.forward, partial(_fused_mlp, example, example.forward), x)


def _fused_norm(norm: nn.Module, own_forward, x: Tensor, *more, **named) -> Tensor:
    """In place of a norm's forward; its own where its weight is trained, or its output would have another dtype."""
    if more or named or not runs_on(x) or norm.weight.requires_grad or x.dtype != norm.weight.dtype:
        return own_forward(x, *more, **named)
    epsilon = _epsilon(norm)
    return made_of(_Norm.apply(x, norm.weight, epsilon), partial(_normal, epsilon=epsilon), x, norm.weight)


def _fused_mlp(mlp: nn.Module, own_forward, x: Tensor) -> Tensor:
    """In place of a gated MLP's forward."""
    if not runs_on(x):
        return own_forward(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    return mlp.down_proj(made_of(_Gated.apply(gate, up), _gated_product, gate, up))


class _Norm(torch.autograd.Function):
    """The weight is frozen: it gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x [...,H], weight [H] -> [...,H]."""
        out, rows, scales = _normal_with_scales(x, weight, epsilon)
        ctx.save_for_backward(rows, weight, scales)
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, scales = ctx.saved_tensors
        grad = grad.reshape(rows.shape).contiguous()
        out = torch.empty_like(rows)
        if len(rows):
            size = {"BLOCK": triton.next_power_of_2(rows.shape[1]), "num_warps": _warps(rows.shape[1])}
            _norm_backward[(len(rows),)](grad, rows, weight, scales, out, rows.shape[1], **size)
        return out.view(ctx.shape), None, None


def _normal(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _normal_with_scales(x, weight, epsilon)[0]


def _normal_with_scales(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y [...,H], x as rows [M,H], 1 / sqrt(mean(x^2) + epsilon) [M])."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.is_contiguous() else rows.contiguous()
    out, scales = torch.empty_like(rows), rows.new_empty(len(rows), dtype=torch.float32)
    if len(rows):
        size = {"BLOCK": triton.next_power_of_2(rows.shape[1]), "num_warps": _warps(rows.shape[1])}
        _norm[(len(rows),)](rows, weight, out, scales, rows.shape[1], epsilon, **size)
    return out.view(x.shape), rows, scales


def _warps(size: int) -> int:
    """Groups of 32 threads of a program that holds `size` numbers."""
    return min(16, max(1, triton.next_power_of_2(size) // 512))


class _Gated(torch.autograd.Function):
    """silu(gate) up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate.contiguous(), up.contiguous())
        return _gated_product(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad, grad_gate, grad_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        if n := gate.numel():
            _gated_backward[(triton.cdiv(n, BLOCK),)](grad, gate, up, grad_gate, grad_up, n, BLOCK=BLOCK, num_warps=8)
        return grad_gate, grad_up


def _gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if n := gate.numel():
        _gated[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=8)
    return out


@triton.jit
def _norm(rows, weight, out, scales, size, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # M * H may pass 2^31
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(rows + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / size + epsilon)
    tl.store(scales + row, scale)
    # rounded before the weight is applied, as transformers and vLLM do
    normal = (x * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + columns, (normal * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(grads, rows, weight, scales, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(rows + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grads + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + row)
    normal = x * scale
    grad = (grad * w).to(out.dtype.element_ty).to(tl.float32)  # of what was rounded above
    # d normal / d x = scale (1 - normal normal^T / H)
    along = tl.sum(grad * normal, 0) / size
    tl.store(out + row * size + columns, (scale * (grad - normal * along)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gates, ups, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(grads, gates, ups, grad_gates, grad_ups, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    grad = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=inside, other=0.0).to(tl.float32)
    dtype = grad_gates.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(dtype).to(tl.float32)
    tl.store(grad_ups + at, (grad * silu).to(dtype), mask=inside)
    # d silu / d gate = sigmoid (1 + gate (1 - sigmoid))
    of_silu = (grad * up).to(dtype).to(tl.float32)
    tl.store(grad_gates + at, (of_silu * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=inside)
