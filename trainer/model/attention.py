"""Shared-prefix attention, registered with transformers, and the kernels it uses.

The G responses of a prompt are packed behind one copy of it. Response tokens see the prompt and their own response.
Attention over both sets of keys is computed as two ordinary calls and merged exactly, so no mask and no copy of the
prompt is needed:

    S = q k^T scale                     scores of one call
    lse = log sum_j exp(S_j)            over the keys of one call
    out = sum_j exp(S_j - lse) v_j
    lse_both = log(exp(lse_1) + exp(lse_2))
    out_both = exp(lse_1 - lse_both) out_1 + exp(lse_2 - lse_both) out_2

FlashAttention (arXiv:2205.14135) computes out and lse without the matrix of scores. Its backward (arXiv:2307.08691,
Algorithm 2) recomputes the probabilities from the logsumexp it is given, p = exp(S - lse), and needs the output only in
the row sums D = sum_d dout_d out_d:

    dv = p^T dout        dp = dout v^T        dS = p (dp - D)        dq = dS k scale        dk = dS^T q scale

Given lse_both and out_both, each of the two calls therefore returns its exact share of the gradient, and the shares add
up.

Axes: L packed tokens, Lq queries and Lk keys of one call, Hq query heads, Hkv key-value heads (Hq is a multiple of Hkv:
grouped-query attention, arXiv:2305.13245), D head size. No kernel copies the keys once per query head, and only PLAIN
builds the matrix of scores.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from data.errors import UserError, first_sentence
from trainer.logprobs import refuse_second_derivatives

ATTENTION = "shared_prefix"
"""Name of our attention in transformers, with PyTorch's kernels."""
FLASH_ATTENTION = "shared_prefix_fa"
"""The same with the kernels of the flash-attn package. Were "flash" in the name, transformers would look for a package of that
name."""

aten = torch.ops.aten  # torch's public attention hides the logsumexp, without which two calls cannot be merged

Spans = tuple[tuple[int, int], ...]
"""(first token, number of tokens) of each segment."""


@dataclass(frozen=True)
class Segments:
    """Which queries see which keys in one call: the queries of segment i see the keys of segment i."""

    queries: Spans
    keys: Spans
    causal: bool
    """True: query j of a segment sees its keys 0..j. False: it sees all keys of the segment."""
    device: torch.device

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            _ = self.cumulative  # now: a copy to the GPU waits, and while a row is packed there is nothing to wait for

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor]:
        """[n+1] int32 each, of queries and of keys, packed side by side: where each segment starts, and the end."""
        # made once per packed row and kept for all layers. int32: as the kernels want it
        ends = ([0, *accumulate(length for _, length in spans)] for spans in (self.queries, self.keys))
        queries, keys = (torch.tensor(end, dtype=torch.int32, device=self.device) for end in ends)
        return queries, keys

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest segment of queries and of keys."""
        return max(n for _, n in self.queries), max(n for _, n in self.keys)


class Layout(NamedTuple):
    """The attention of a packed row, as two calls of a kernel."""

    own: Segments
    """Every prompt and every response, causal to itself. A prompt with a single response is one segment with it."""
    prompts: Segments | None
    """The responses of a group, side by side, to all of their prompt; None if no prompt is shared."""


class Call(NamedTuple):
    """The inputs of one kernel call."""

    q: Tensor
    """[Lq,Hq,D]"""
    k: Tensor
    """[Lk,Hkv,D]"""
    v: Tensor
    """[Lk,Hkv,D]"""
    segments: Segments
    scale: float
    """Factor of the scores, usually D ** -0.5."""


class Kernel(NamedTuple):
    forward: Callable[[Call], tuple[Tensor, Tensor]]
    """call -> (out [Lq,Hq,D], logsumexp [Hq,Lq])"""
    backward: Callable[[Call, Tensor, Tensor, Tensor], list[Tensor]]
    """(call, grad of out [Lq,Hq,D], out [Lq,Hq,D], logsumexp [Hq,Lq]) -> gradients of q, k, v"""


def _attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, flash=False, **kwargs
):
    """transformers' attention signature: query [1,Hq,L,D], key and value [1,Hkv,L,D] -> ([1,L,Hq,D], None)."""
    assert layout is not None and query.shape[0] == 1, "shared_prefix attention serves packed batches only"
    changed = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    assert not changed, f"shared_prefix attention knows no {changed}"  # loading.why_not_shared refuses such models
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [L,H,D]
    if torch.is_autocast_enabled(q.device.type):  # rotary embeddings leave q and k in the dtype of the residual stream
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    kernel = kernel_for(q)
    if flash and kernel is VARLEN:
        kernel = flash_kernel()
    # None: transformers' place for the attention weights, which no kernel keeps
    return _SharedPrefixAttention.apply(q, k, v, layout, scaling or q.shape[-1] ** -0.5, kernel)[None], None


class _SharedPrefixAttention(torch.autograd.Function):
    """Two merged calls of an ordinary attention kernel: every segment to itself, and responses to their prompt."""

    @staticmethod
    def forward(ctx, q, k, v, layout: Layout, scale: float, kernel: Kernel) -> Tensor:
        """q [L,Hq,D], k and v [L,Hkv,D] -> [L,Hq,D]."""
        compute = partial(_both_calls, q, k, v, layout, scale, kernel)
        out, lse = _Running.current.computed(compute) if _Running.current else compute()
        # out and lse are those of both calls, which is what makes the two backward calls shares of one gradient
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives("scaled_dot_product_attention")
        q, k, v, out, lse = ctx.saved_tensors
        own, prompts = ctx.layout
        grads = ctx.kernel.backward(Call(q, k, v, own, ctx.scale), grad, out, lse)
        if prompts:
            at, keys = prompts.queries, prompts.keys
            call = _to_prompts(q, k, v, prompts, ctx.scale)
            parts = ctx.kernel.backward(call, _take(grad, at), _take(out, at), _take(lse, at, 1))
            # a prompt's keys and values get gradient from the prompt itself and from all of its responses
            for total, part, spans in zip(grads, parts, (at, keys, keys), strict=True):
                _put(total, spans, part, add=True)
        return *grads, None, None, None  # layout, scale and kernel have no gradient


def _both_calls(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """(out [L,Hq,D], logsumexp [Hq,L]) over all keys that a token sees."""
    out, lse = kernel.forward(Call(q, k, v, layout.own, scale))  # [L,Hq,D], [Hq,L]
    if prompts := layout.prompts:
        # only the rows of shared responses change; prompts and single responses are complete after the first call
        there, lse_there = kernel.forward(_to_prompts(q, k, v, prompts, scale))
        here, lse_here = _take(out, prompts.queries), _take(lse, prompts.queries, 1)
        joined, both = merge_for(here, lse_here)(here, there, lse_here, lse_there)
        _put(out, prompts.queries, joined)
        _put(lse, prompts.queries, both, 1)
    return out, lse


def merged(here: Tensor, there: Tensor, lse_here: Tensor, lse_there: Tensor) -> tuple[Tensor, Tensor]:
    """(out [M,Hq,D], logsumexp [Hq,M]) over the keys of two calls; here and there [M,Hq,D], their logsumexp [Hq,M]."""
    both = torch.logaddexp(lse_here, lse_there)  # stable: exp(lse) alone would overflow
    # the flash kernels give lse in float32, so both parts are added before the one rounding to the dtype of out
    weights = [(part - both).exp().T.unsqueeze(-1) for part in (lse_here, lse_there)]  # [M,Hq,1]
    return (weights[0] * here + weights[1] * there).to(here.dtype), both


def merge_for(out: Tensor, lse: Tensor) -> Callable:
    """`merged`, or its kernel where there is a GPU and Triton. To step through `merged` on a GPU, let this return it."""
    if out.is_cuda and lse.dtype == torch.float32 and importlib.util.find_spec("triton"):
        from trainer.kernels import attention as attention_kernels

        return attention_kernels.merged
    return merged


class _Running:
    """While it is entered, the outputs of attention are kept, or given back in place of another computation."""

    current: "_Running | None" = None

    def __init__(self, outputs: list[tuple[Tensor, Tensor]], again: bool) -> None:
        self.outputs, self.again, self.place = outputs, again, 0

    def __enter__(self) -> None:
        # a layer runs inside no other, and backward, in whatever thread, while no forward pass does
        _Running.current, self.place = self, 0  # 0: a second backward pass enters once more

    def __exit__(self, *error: object) -> None:
        _Running.current = None

    def computed(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not self.again:
            out, lse = compute()
            self.outputs.append((out.detach(), lse))  # detach: autograd marks the very tensor that a function returns
            return out, lse
        self.place += 1
        out, lse = self.outputs[self.place - 1]
        return out.detach(), lse


def keep_attention() -> tuple[_Running, _Running]:
    """A context_fn of torch's checkpoint: contexts of a layer's first forward pass and of the one in backward.

    In the second, attention returns what it computed in the first: the same bits, since both have the same inputs.
    """
    outputs: list[tuple[Tensor, Tensor]] = []
    return _Running(outputs, again=False), _Running(outputs, again=True)


def _to_prompts(q: Tensor, k: Tensor, v: Tensor, prompts: Segments, scale: float) -> Call:
    """The second call: the responses' queries to their prompts' keys."""
    return Call(_take(q, prompts.queries), _take(k, prompts.keys), _take(v, prompts.keys), prompts, scale)


def _take(x: Tensor, spans: Spans, dim: int = 0) -> Tensor:
    """The tokens of the spans, one after another; a view if there is one span."""
    parts = [x.narrow(dim, first, length) for first, length in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _put(x: Tensor, spans: Spans, values: Tensor, dim: int = 0, add: bool = False) -> None:
    """Write (or add) values to the tokens of the spans, in place."""
    for (first, length), part in zip(spans, values.split([length for _, length in spans], dim), strict=True):
        target = x.narrow(dim, first, length)
        target.add_(part) if add else target.copy_(part)


def kernel_for(q: Tensor) -> Kernel:
    """PyTorch's flash kernels on CPU and GPU; plain matrix products for what they do not support (float32 on a GPU)."""
    if q.device.type == "cpu":
        return CPU
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:  # the limits of the flash kernels
        return VARLEN
    return PLAIN


def _each(segments: Segments, q_like: tuple[Tensor, ...], k_like: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
    """Per segment, [1,H,n,D] views of the tensors over queries, then of those over keys."""
    # a call's tensors hold its segments side by side, so a split finds them without copying
    n_q, n_k = [length for _, length in segments.queries], [length for _, length in segments.keys]
    split = [*(x.split(n_q) for x in q_like), *(x.split(n_k) for x in k_like)]
    for parts in zip(*split, strict=True):
        yield [part.transpose(0, 1)[None] for part in parts]


def _side_by_side(per_segment: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """[1,H,n,D] of every segment -> [L,H,D], for each kind of tensor."""
    return [torch.cat([part[0].transpose(0, 1) for part in parts]) for parts in zip(*per_segment, strict=True)]


# ---- CPU: PyTorch's flash kernel. It has no form for packed segments, so every segment is a call.


def _cpu_forward(call: Call) -> tuple[Tensor, Tensor]:
    segments = call.segments
    done = [
        aten._scaled_dot_product_flash_attention_for_cpu(*qkv, is_causal=segments.causal, scale=call.scale)
        for qkv in _each(segments, (call.q,), (call.k, call.v))
    ]
    return _side_by_side([(out,) for out, _ in done])[0], torch.cat([lse[0] for _, lse in done], 1)


def _cpu_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    segments = call.segments
    # in bfloat16 this kernel takes three times as long for a segment of 150 tokens, and for one of 600 no less (LOG.md)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    # lse as [L,Hq,1], so that it can be split like the others
    over_queries = tuple(x.to(wide) for x in (grad, call.q, out, lse.T[..., None]))
    over_keys = call.k.to(wide), call.v.to(wide)
    found = _side_by_side(
        [
            aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_i, q_i, k_i, v_i, out_i, lse_i[..., 0], 0.0, segments.causal, scale=call.scale
            )
            for grad_i, q_i, out_i, lse_i, k_i, v_i in _each(segments, over_queries, over_keys)
        ]
    )
    return [x.to(call.q.dtype) for x in found]


# ---- VARLEN: PyTorch's flash kernel on GPUs, all segments in one call


def _varlen_forward(call: Call) -> tuple[Tensor, Tensor]:
    segments = call.segments
    out, lse, *_ = aten._flash_attention_forward(
        call.q,
        call.k,
        call.v,
        *segments.cumulative,
        *segments.longest,
        0.0,  # dropout
        segments.causal,
        False,  # return_debug_mask
        scale=call.scale,
    )
    return out, lse


def _varlen_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    segments = call.segments
    unused = torch.empty(2, dtype=torch.uint64, device=call.q.device)  # the random state of dropout, which is off
    return aten._flash_attention_backward(
        grad,
        call.q,
        call.k,
        call.v,
        out,
        lse.contiguous(),  # _take of a single span is a strided view
        *segments.cumulative,
        *segments.longest,
        0.0,  # dropout
        segments.causal,
        unused,
        unused,
        scale=call.scale,
    )


# ---- FLASH_ATTN: the flash-attn package (GPU)


def _flash_attn_forward(call: Call) -> tuple[Tensor, Tensor]:
    # the private functions: the public one has no backward from a logsumexp of our own
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    segments = call.segments
    out, lse, *_ = _flash_attn_varlen_forward(
        call.q,
        call.k,
        call.v,
        *segments.cumulative,
        *segments.longest,
        dropout_p=0.0,
        softmax_scale=call.scale,
        causal=segments.causal,
    )
    return out, lse


def _flash_attn_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    segments, qkv = call.segments, (call.q, call.k, call.v)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv]  # written by the kernel
    _flash_attn_varlen_backward(
        grad,
        *qkv,
        out,
        lse.contiguous(),
        *grads,
        *segments.cumulative,
        *segments.longest,
        dropout_p=0.0,
        softmax_scale=call.scale,
        causal=segments.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,  # dq is summed with atomic adds: its last bits may differ from run to run
    )
    return grads


# ---- FLASH_ATTN_4: the flash-attn-4 package (GPUs from Hopper on)


def _flash_attn_4_forward(call: Call) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    segments = call.segments
    out, lse, *_ = _flash_attn_fwd(
        call.q, call.k, call.v, **_named(segments), softmax_scale=call.scale, causal=segments.causal, return_lse=True
    )
    return out, lse


def _flash_attn_4_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    segments, qkv = call.segments, (call.q, call.k, call.v)
    flags = {"softmax_scale": call.scale, "causal": segments.causal}
    return list(_flash_attn_bwd(*qkv, out, grad, lse.contiguous(), **_named(segments), **flags)[:3])


def _named(segments: Segments) -> dict[str, Tensor | int]:
    (queries, keys), (longest_q, longest_k) = segments.cumulative, segments.longest
    return {"cu_seqlens_q": queries, "cu_seqlens_k": keys, "max_seqlen_q": longest_q, "max_seqlen_k": longest_k}


# ---- PLAIN: the formulas at the top of this file, written out


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[1,Hkv,Hq/Hkv,n,m] scaled scores; -inf above the diagonal of a causal segment."""
    # k broadcasts over the query heads of its group
    scores = q.unflatten(1, (k.shape[1], -1)) @ k[:, :, None].transpose(-1, -2) * scale
    return (
        scores.masked_fill(torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1), -torch.inf) if causal else scores
    )


def _plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    done = []
    for q_i, k_i, v_i in _each(call.segments, (call.q,), (call.k, call.v)):
        scores = _scores(q_i, k_i, call.segments.causal, call.scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ v_i[:, :, None]  # exp(S - lse) is the softmax
        done.append((out.flatten(1, 2), lse.flatten(1, 2)[..., None]))
    out, lse = _side_by_side(done)
    return out, lse[..., 0].T.contiguous()


def _plain_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
    done = []
    over_queries = (grad, call.q, out, lse.T[..., None])
    for *per_query, k_i, v_i in _each(call.segments, over_queries, (call.k, call.v)):
        # the query heads are grouped as in _scores: all heads of a group share one key-value head
        grad_i, q_i, out_i, lse_i = (x.unflatten(1, (k_i.shape[1], -1)) for x in per_query)  # [1,Hkv,Hq/Hkv,n,*]
        # with the logsumexp of both calls p is this call's part of the softmax; its rows sum to less than 1
        p = (_scores(per_query[1], k_i, call.segments.causal, call.scale) - lse_i).exp()
        d_p = grad_i @ v_i[:, :, None].transpose(-1, -2)
        row_sums = (grad_i * out_i).sum(-1, keepdim=True)  # D of the formulas
        d_scores = p * (d_p - row_sums) * call.scale
        d_q = (d_scores @ k_i[:, :, None]).flatten(1, 2)
        # the query heads of a group share their key-value head, so their gradients add up (sum over dimension 2)
        done.append((d_q, (d_scores.transpose(-1, -2) @ q_i).sum(2), (p.transpose(-1, -2) @ grad_i).sum(2)))
    return _side_by_side(done)


CPU = Kernel(_cpu_forward, _cpu_backward)
VARLEN = Kernel(_varlen_forward, _varlen_backward)
FLASH_ATTN = Kernel(_flash_attn_forward, _flash_attn_backward)
FLASH_ATTN_4 = Kernel(_flash_attn_4_forward, _flash_attn_4_backward)
PLAIN = Kernel(_plain_forward, _plain_backward)


def kernels_for(attn: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """What --attn comes to: "sdpa", PyTorch's own kernels, or "flash", those of the flash-attn package.

    attn: "flash" raises UserError where those cannot run, or do not give PyTorch's numbers; "auto" takes them where they do.
    dtype: of the products. head_size: D.
    """
    if attn == "sdpa":
        return attn
    missing = why_no_flash(device, dtype)
    problem = missing or why_not_equal(flash_kernel(), VARLEN, device, dtype, head_size)
    if not problem:
        return "flash"
    if attn == "flash":
        raise UserError(f"--attn flash: {problem}")
    if not missing:
        warnings.warn(f"PyTorch's attention is used, not flash-attn's, since {problem}", stacklevel=2)
    return "sdpa"


NAMES = {"sdpa": ATTENTION, "flash": FLASH_ATTENTION}
"""In transformers, of our attention with those kernels."""


def why_no_flash(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Why the kernels of the flash-attn package cannot run on a device, and what to do; "" if they can."""
    if device.type != "cuda":
        return "needs an NVIDIA GPU; leave it out, and PyTorch's own flash kernels are used"
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"its kernels do not compute in {str(dtype).removeprefix('torch.')}; add --dtype bfloat16, or leave it out"
        )
    if importlib.util.find_spec("flash_attn") is None:
        return "no package is installed; pip install flash-attn-4 (from H100 on) or flash-attn, or leave it out"
    return ""


@cache
def flash_kernel() -> Kernel:
    """Of flash-attn-4 where it is installed and the GPU is a Hopper or newer, else of flash-attn."""
    newer = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return FLASH_ATTN_4 if newer and importlib.util.find_spec("flash_attn.cute") is not None else FLASH_ATTN


def why_not_equal(kernel: Kernel, known: Kernel, device: torch.device, dtype: torch.dtype, head_size: int = 128) -> str:
    """Why a kernel cannot take the place of a known one, found by using both on two small groups; "" if it can.

    The functions of these packages that take a logsumexp are private: a new version may change what they mean.
    """
    spans, shared = ((0, 40), (40, 33), (73, 70), (143, 21)), Segments(((40, 103),), ((0, 40),), False, device)
    layout = Layout(Segments(spans, spans, True, device), shared)
    generator = torch.Generator(device).manual_seed(0)
    # the model's head size: a package that compiles does it for the run as well
    shapes = [(164, n, head_size) for n in (4, 2, 2, 4)]
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    found = []
    for each in (kernel, known):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        try:
            out = _SharedPrefixAttention.apply(*leaves, layout, head_size**-0.5, each)
            out.backward(inputs[3])
        except Exception as error:  # whatever the package raises: another signature, no compiler, no such GPU
            return f"its kernels fail here ({type(error).__name__}: {first_sentence(error)}); leave it out"
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for name, one, other in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        if not error < 0.02:
            return f"its kernels do not give PyTorch's numbers here ({name} differs by {error:.1%}); leave it out"
    return ""


for name, function in ((ATTENTION, _attention), (FLASH_ATTENTION, partial(_attention, flash=True))):
    AttentionInterface.register(name, function)
    # and no AttentionMaskInterface: for a name without one transformers makes no mask. The layout says who sees whom
