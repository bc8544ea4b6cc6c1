"""What is done to queries, keys and outputs around the attention kernels, as Triton kernels for a GPU.

    rotary embedding (arXiv:2104.09864): x cos + rotate_half(x) sin, rotate_half(x) = (-second half, first half)
    merging two calls of attention:      see trainer/model/attention.py

With PyTorch's operations the first takes 11 passes over queries and keys in each direction, the second 9 over the
outputs. Here it is 2 and 3. The numbers are rounded at the same places.

Axes: L packed tokens, H heads, D head size, M tokens that are merged.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from trainer.kernels.same import gives_the_same, runs_on

ROTARY = "apply_rotary_pos_emb"
"""The function of this name in the file of a transformers model."""
UNFUSED = {"enable_fp_fusion": False}
"""Of a kernel whose products are rounded before they are added: the compiler would make one operation of both."""


def fuse_rotary(model: nn.Module, device: torch.device) -> list[str]:
    """Let the attention layers of a model rotate with our kernel; returns the names of the model files that do.

    A layer finds the function by its name in the file of its class, so it is replaced there, for all models of that file.
    That is done only if both functions give the same numbers on an example. On a CPU the file's own function is called.
    """
    generator, changed = torch.Generator().manual_seed(0), []
    shapes = ((1, 3, 5, 8), (1, 1, 5, 8), (1, 5, 8), (1, 5, 8))
    q, k, cos, sin = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    for file in sorted({type(module).__module__ for module in model.modules() if hasattr(module, "q_proj")}):
        own = getattr(sys.modules[file], ROTARY, None)
        if own is None:
            continue
        if not isinstance(own, partial):
            fused = partial(_fused_rotary, own)
            if not gives_the_same(partial(_rotate_with, own, cos, sin), partial(_rotate_with, fused, cos, sin), q, k):
                continue
            setattr(sys.modules[file], ROTARY, fused)
        changed.append(file)
    return changed


def _rotate_with(rotate: Callable, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, sin)


def _fused_rotary(own: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest, **named):
    """In place of a model file's function. q [1,Hq,L,D], k [1,Hkv,L,D], cos and sin [1,L,D] -> (q, k) rotated."""
    # vLLM compiles transformers' class for a model that it has no code for, and the function with it
    ours = not torch.compiler.is_compiling() and not rest and not named and runs_on(q)
    # rows side by side may have one row of positions in common
    ours = ours and len(q) == len(k) == 1 and q.dim() == k.dim() == 4 and cos.shape == (1, *q.shape[2:])
    ours = ours and q.dtype == k.dtype == cos.dtype
    if not ours:
        return own(q, k, cos, sin, *rest, **named)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [1,H,L,D], cos and sin [1,L,D] -> [1,H,L,D]; in memory [L,H,D], as attention reads it."""
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _rotated(grad, *ctx.saved_tensors, backward=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    _, heads, tokens, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(tokens, heads, size)
    if x.numel():
        tile = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(size // 2)}
        strides = (x.stride(2), x.stride(1))
        settings = {"BACKWARD": backward, "num_warps": _warps(heads), **UNFUSED}
        _rotate[(tokens,)](x, cos, sin, out, *strides, heads, size // 2, **tile, **settings)
    return out.transpose(0, 1)[None]


def _warps(heads: int) -> int:
    """Groups of 32 threads of a program that holds one token of all heads."""
    return 8 if heads > 32 else 4


def merged(here: Tensor, there: Tensor, lse_here: Tensor, lse_there: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, of its two calls: (out [M,H,D], logsumexp [H,M]).

    here and there: [M,H,D]; lse_here and lse_there: [H,M] float32.
    """
    here, there = here.contiguous(), there.contiguous()
    tokens, heads, size = here.shape
    out, both = torch.empty_like(here), torch.empty_like(lse_here, memory_format=torch.contiguous_format)
    if here.numel():
        tile = {"HEADS": triton.next_power_of_2(heads), "SIZE": triton.next_power_of_2(size)}
        places = (*lse_here.stride(), *lse_there.stride())
        _merge[(tokens,)](
            here, there, lse_here, lse_there, out, both, tokens, heads, size, *places, **tile, num_warps=_warps(heads)
        )
    return out, both


@triton.jit
def _rotate(
    x,
    cosines,
    sines,
    out,
    token_stride,
    head_stride,
    heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # L * H * D may pass 2^31
    head, column = tl.arange(0, HEADS)[:, None].to(tl.int64), tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    dtype = out.dtype.element_ty
    at = x + token * token_stride + head * head_stride + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    wave = token * 2 * half + column
    cos_1 = tl.load(cosines + wave, mask=column < half, other=0.0).to(tl.float32)
    cos_2 = tl.load(cosines + wave + half, mask=column < half, other=0.0).to(tl.float32)
    sin_1 = tl.load(sines + wave, mask=column < half, other=0.0).to(tl.float32)
    sin_2 = tl.load(sines + wave + half, mask=column < half, other=0.0).to(tl.float32)
    if BACKWARD:  # the transposed rotation
        turned_1, turned_2 = second * sin_2, -first * sin_1
    else:
        turned_1, turned_2 = -second * sin_1, first * sin_2
    # every product is rounded before the sum, as transformers does
    out_1 = (first * cos_1).to(dtype).to(tl.float32) + turned_1.to(dtype).to(tl.float32)
    out_2 = (second * cos_2).to(dtype).to(tl.float32) + turned_2.to(dtype).to(tl.float32)
    to = out + (token * heads + head) * 2 * half + column
    tl.store(to, out_1.to(dtype), mask=inside)
    tl.store(to + half, out_2.to(dtype), mask=inside)


@triton.jit
def _merge(
    here,
    there,
    lse_here,
    lse_there,
    out,
    both,
    tokens,
    heads,
    size,
    here_head,
    here_token,
    there_head,
    there_token,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS), tl.arange(0, SIZE)
    one = tl.load(lse_here + head * here_head + token * here_token, mask=head < heads, other=0.0)
    other = tl.load(lse_there + head * there_head + token * there_token, mask=head < heads, other=0.0)
    largest = tl.maximum(one, other)
    total = largest + tl.log(tl.exp(one - largest) + tl.exp(other - largest))
    tl.store(both + head * tokens + token, total, mask=head < heads)
    at = (token * heads + head[:, None]) * size + column[None, :]
    inside = (head[:, None] < heads) & (column[None, :] < size)
    x = tl.load(here + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(there + at, mask=inside, other=0.0).to(tl.float32)
    # both parts are added before the one rounding
    sums = tl.exp(one - total)[:, None] * x + tl.exp(other - total)[:, None] * y
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)
