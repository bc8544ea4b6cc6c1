"""Kernels and small policies on this machine's device, against float64 or float32: what a GPU computes, and how fast.

    python -m tests.bench.kernels attention head lora around checksums policy quantized   # in this order; default: all
    python -m tests.bench.kernels --small                               # the same with small shapes, for a CPU

Prints one line per number, `RESULT <name> <value>`. Relative errors are norms: |a - b| / |b|. On a CPU the kernels are
those that the trainer uses there, in float32.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor

from rollout.crc import device_checksums, host_checksums
from rollout.sync import Parcel
from tests.bench.update import Task, make_checkpoint
from trainer import logprobs
from trainer.logprobs import fused_logprobs
from trainer.model import attention
from trainer.model.attention import Kernel, Layout, Segments
from trainer.model.lora import fuse_adapters
from trainer.packing import Group, pack
from trainer.policy import Policy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
QKV = ("out", "dq", "dk", "dv")


def say(name: str, value: object) -> None:
    """Print a figure; numbers with four significant digits."""
    print(f"RESULT {name} {value:.4g}" if isinstance(value, float) else f"RESULT {name} {value}", flush=True)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def milliseconds(function: Callable[[], None], repeats: int = 5) -> float:
    """The median time of a call; the first call warms up."""

    def wait() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    taken = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[1:])


# ---- attention


def layout_of(prompt: int, responses: list[int], groups: int = 1) -> tuple[Layout, int]:
    """(the layout of groups of equal size, side by side; all tokens)."""
    own, queries, prompts, at = [], [], [], 0
    for _ in range(groups):
        own.append((at, prompt))
        prompts.append((at, prompt))
        at += prompt
        queries.append((at, sum(responses)))
        for n in responses:
            own.append((at, n))
            at += n
    spans = tuple(own)
    shared = Segments(tuple(queries), tuple(prompts), False, DEVICE)
    return Layout(Segments(spans, spans, True, DEVICE), shared), at


def attend(inputs: list[Tensor], layout: Layout, kernel: Kernel, dtype: torch.dtype) -> list[Tensor]:
    """[out, dq, dk, dv] of shared-prefix attention. inputs: q, k, v and the gradient of out."""
    *qkv, grad = (x.to(dtype) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attention._SharedPrefixAttention.apply(*leaves, layout, qkv[0].shape[-1] ** -0.5, kernel)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def random_inputs(tokens: int, heads: int, kv_heads: int, size: int) -> list[Tensor]:
    shapes = [(tokens, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in shapes]


def measure_attention(small: bool) -> None:
    """Errors against float64, ours beside plain products of the same dtype; then the speed at the paper's lengths."""
    torch.manual_seed(0)
    for heads, kv_heads, size in ((8, 2, 64), (28, 4, 128)):
        layout, tokens = layout_of(300, [100, 37, 211, 1, 64])
        inputs = random_inputs(tokens, heads, kv_heads, size)
        exact = attend(inputs, layout, attention.PLAIN, torch.float64)
        kernels = (("ours", attention.kernel_for(inputs[0])), ("plain", attention.PLAIN))
        for name, kernel in kernels:
            for what, a, b in zip(QKV, attend(inputs, layout, kernel, DTYPE), exact, strict=True):
                say(f"attention_{heads}_{kv_heads}_{size}_{name}_{what}_error", distance(a, b))
    prompt, responses = (200, [90, 130]) if small else (2000, [900, 1300, 1100, 1500, 930])
    layout, tokens = layout_of(prompt, responses, groups=2)
    *qkv, grad = random_inputs(tokens, 28, 4, 128)
    leaves = [x.requires_grad_() for x in qkv]
    kernel = attention.kernel_for(qkv[0])

    kernels = {"": kernel}
    if DEVICE.type == "cuda" and importlib.util.find_spec("flash_attn"):
        problem = attention.why_not_equal(attention.flash_kernel(), attention.VARLEN, DEVICE, DTYPE)
        say("flash_attn", problem or "gives PyTorch's numbers")
        kernels |= {} if problem else {"flash_": attention.flash_kernel()}
    own, shared = layout.own, layout.prompts
    pairs = sum(n * (n + 1) / 2 for _, n in own.queries)
    pairs += sum(n * m for (_, n), (_, m) in zip(shared.queries, shared.keys, strict=True))
    flops = 4 * 28 * 128 * pairs  # two products, a multiplication and an addition each
    # the backward pass makes 2.5 times the operations of the forward pass (arXiv:2307.08691)
    for whose, kernel in kernels.items():

        def forward(kernel: Kernel = kernel) -> Tensor:
            return attention._SharedPrefixAttention.apply(*leaves, layout, 128**-0.5, kernel)

        for name, call, share in (("forward", forward, 1.0), ("both", lambda run=forward: run().backward(grad), 3.5)):
            taken = milliseconds(call)
            say(f"attention_{whose}{tokens}_tokens_{name}_ms", taken)
            say(f"attention_{whose}{tokens}_tokens_{name}_tflops", share * flops / taken / 1e9)


# ---- the head


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


def without_kernel(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """fused_logprobs with PyTorch's operations on the logits."""
    kept = logprobs.passes_for
    logprobs.passes_for = lambda logits: logprobs.passes
    try:
        return fused_logprobs(hidden, weight, targets)
    finally:
        logprobs.passes_for = kept


def measure_head(small: bool) -> None:
    """Time and memory of log-probs fused with the head, beside those without our kernel, and those of plain logits."""
    torch.manual_seed(0)
    size, vocabulary = (64, 4096) if small else (3584, 152_064)
    counts = (256,) if small else (1024, 4096, 8192)
    hidden = torch.randn(counts[-1], size, device=DEVICE, dtype=DTYPE) * 0.5
    weight = torch.randn(vocabulary, size, device=DEVICE, dtype=DTYPE) * 0.02
    targets = torch.randint(vocabulary, (counts[-1],), device=DEVICE)
    grad = torch.randn(counts[-1], device=DEVICE)
    for n in counts:
        gradients, found = {}, {}
        for name, function in (("fused", fused_logprobs), ("operations", without_kernel), ("plain", plain_logprobs)):
            leaf = hidden[:n].detach().requires_grad_()

            def both(leaf: Tensor = leaf, function: Callable = function, n: int = n) -> None:
                leaf.grad = None
                function(leaf, weight, targets[:n]).backward(grad[:n])

            both()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            taken = milliseconds(both)
            say(f"head_{n}_{name}_ms", taken)
            if DEVICE.type == "cuda":
                say(f"head_{n}_{name}_gb", (torch.cuda.max_memory_allocated() - before) / 1e9)
            gradients[name], found[name] = leaf.grad, function(leaf, weight, targets[:n]).detach()
            # two products, a multiplication and an addition each
            say(f"head_{n}_{name}_tflops", 4 * n * size * vocabulary / taken / 1e9)
        for name, other in (("gradient", "plain"), ("kernel", "operations")):
            say(f"head_{n}_{name}_error", distance(gradients["fused"], gradients[other]))
            say(f"head_{n}_{name}_logprob_difference", float((found["fused"] - found[other]).abs().max()))


# ---- a layer with its adapter


def measure_lora(small: bool) -> None:
    """Forward and backward of the widest layer of the 7B shape with an adapter of rank 256: PEFT's, and as one function."""
    width, wider, rank, tokens = (64, 96, 8, 300) if small else (3584, 18_944, 256, 15_460)
    found, inputs = {}, torch.randn(tokens, width, device=DEVICE, dtype=DTYPE)
    for name in ("peft", "fused"):
        torch.manual_seed(0)
        layer = Linear(
            torch.nn.Linear(width, wider, bias=False).to(DEVICE, DTYPE).requires_grad_(False),
            "default",
            LoraConfig(),
            r=rank,
            lora_alpha=2 * rank,
        ).to(DEVICE)
        layer.cast_input_dtype_enabled = False
        model = torch.nn.Sequential(layer)
        for factor in ("lora_A", "lora_B"):
            getattr(layer, factor)["default"].weight.data.normal_(std=0.02)
        if name == "fused":
            assert fuse_adapters(model) == 1
        leaf = inputs.detach().requires_grad_()

        def both(model: torch.nn.Module = model, leaf: Tensor = leaf) -> None:
            leaf.grad = None
            with torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE != torch.float32):
                model(leaf).sum().backward()

        say(f"lora_{name}_ms", milliseconds(both))
        found[name] = leaf.grad
    say("lora_gradient_difference", distance(found["fused"], found["peft"]))


# ---- between the products: rotary embeddings, and the merge of attention's two calls


def measure_around(small: bool) -> None:
    """Our kernels for 8,192 tokens of the 7B shape against the code that they replace: numbers, and time. GPU only."""
    if DEVICE.type != "cuda":
        say("around", "skipped: the kernels run on a GPU only")
        return
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    from trainer.kernels import attention as kernels

    torch.manual_seed(0)
    tokens = 256 if small else 8192
    *inputs, out = random_inputs(tokens, 28, 4, 128)
    q, k = (x.transpose(0, 1)[None].requires_grad_() for x in inputs[:2])
    angles = 6 * torch.rand(1, tokens, 64, device=DEVICE)
    waves = [torch.cat([wave, wave], -1).to(DTYPE) for wave in (angles.cos(), angles.sin())]
    own = getattr(apply_rotary_pos_emb, "args", (apply_rotary_pos_emb,))[0]  # fuse_rotary may have replaced it
    grads, found = [torch.randn_like(x) for x in (q, k)], []
    for name, rotate in (("kernel", partial(kernels._fused_rotary, own)), ("operations", own)):

        def both(rotate: Callable = rotate) -> None:
            q.grad = k.grad = None
            torch.autograd.backward(rotate(q, k, *waves), grads)

        say(f"rotary_{name}_ms", milliseconds(both))
        found.append([x.detach() for x in (*rotate(q, k, *waves), q.grad, k.grad)])
    say("rotary_equal_bits", str(all(map(torch.equal, *found))))
    say("rotary_error", max(map(distance, *found)))
    lses = torch.randn(2, 28, tokens, device=DEVICE)
    merges = {"kernel": kernels.merged, "operations": attention.merged}
    for name, merge in merges.items():
        say(f"merge_{name}_ms", milliseconds(partial(merge, out, out.flip(0), *lses)))
    say("merge_error", max(map(distance, *(merge(out, out.flip(0), *lses) for merge in merges.values()))))


# ---- the checksums of an adapter


def measure_checksums(small: bool) -> None:
    """Of an adapter of rank 256 on the 7B shape, in float32: where it is, and after a copy to main memory."""
    torch.manual_seed(0)
    inputs = (64, 96) if small else (*(3584,) * 6, 18_944)  # of q, k, v, o, gate, up, down
    outputs = (64, 96) if small else (3584, 512, 512, 3584, 18_944, 18_944, 3584)
    layers, widths = 2 if small else 28, (*inputs, *outputs)
    tensors = {f"{i}.{j}": torch.randn(256, n, device=DEVICE) for i in range(layers) for j, n in enumerate(widths)}
    parcel = Parcel.of(tensors)

    def copied() -> list[int]:
        return host_checksums(parcel.buffer.cpu(), parcel.spans)

    ours = partial(device_checksums, parcel.buffer, parcel.spans)
    assert ours() == copied()
    say("checksums_gb", parcel.buffer.numel() / 1e9)
    say("checksums_on_the_device_ms", milliseconds(ours))
    say("checksums_after_a_copy_ms", milliseconds(copied))


# ---- a small policy


def small_task(small: bool, folder: str, dtype: str = "float32") -> tuple[Task, list[Group]]:
    """A 40 M model (or a tiny one) with fabricated rollouts of a tenth of the paper's lengths, and those rollouts."""
    task = Task(model="tiny" if small else "40M", scale=0.1, prompts=2, folder=folder, dtype=dtype)
    make_checkpoint(task, Path(folder))
    return task, task.groups()


def policy_of(folder: str, dtype: torch.dtype, quantize: str = "none") -> Policy:
    """With an adapter that does something: lora_B starts at 0."""
    policy = Policy(folder, lora_rank=8, lora_alpha=16, seed=0, device=DEVICE, dtype=dtype, quantize=quantize)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def measure_policy(small: bool) -> None:
    """Shared against plain packing, and bfloat16 against float32: log-probs and LoRA gradients of one batch."""
    with tempfile.TemporaryDirectory() as folder:
        _, groups = small_task(small, folder)
        copies = [(prompt, [response]) for prompt, responses in groups for response in responses]
        exact = None
        for dtype in ("float32", "bfloat16"):
            for packing, batch in (("shared", groups), ("plain", copies)):
                policy = policy_of(folder, getattr(torch, dtype))
                values = policy.response_logprobs(pack(batch, DEVICE))
                (values.sum() / values.numel()).backward()
                found = values.detach(), torch.cat([p.grad.flatten() for p in policy.trainable().values()])
                exact = exact or found
                for what, a, b in zip(("logprobs", "gradient"), found, exact, strict=True):
                    say(f"policy_{dtype}_{packing}_{what}_error", distance(a, b))


def measure_quantized(small: bool) -> None:
    """Steps with a base in 4 bits and moments in 8: log-probs against the same rounded weights held in full, and the loss."""
    if importlib.util.find_spec("bitsandbytes") is None:
        say("quantized", "skipped: bitsandbytes is not installed")
        return
    from bitsandbytes.optim import AdamW8bit

    from trainer.model.merge import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        _, groups = small_task(small, f"{folder}/base", "bfloat16")
        batch = pack(groups, DEVICE)
        write_checkpoint(f"{folder}/base", Path(folder, "rounded"), DTYPE, quantize="nf4", base_dtype=DTYPE)
        four_bits, rounded = policy_of(f"{folder}/base", DTYPE, "nf4"), policy_of(f"{folder}/rounded", DTYPE)
        values = [policy.response_logprobs(batch).detach() for policy in (four_bits, rounded)]
        say("nf4_logprobs_error", distance(*values))
        for name, policy, optimizer in (("nf4_adamw8bit", four_bits, AdamW8bit), ("adamw", rounded, torch.optim.AdamW)):
            stepper, losses = optimizer(list(policy.trainable().values()), lr=1e-3), []

            def step(policy: Policy = policy, stepper: torch.optim.Optimizer = stepper, losses: list = losses) -> None:
                stepper.zero_grad(set_to_none=True)
                values = policy.response_logprobs(batch)
                loss = -values.sum() / batch.mask.sum()
                loss.backward()
                stepper.step()
                losses.append(loss.item())

            say(f"{name}_step_ms", milliseconds(step))
            say(f"{name}_loss_first", losses[0])
            say(f"{name}_loss_last", losses[-1])


PIECES = {
    "attention": measure_attention,
    "head": measure_head,
    "lora": measure_lora,
    "around": measure_around,
    "checksums": measure_checksums,
    "policy": measure_policy,
    "quantized": measure_quantized,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="piece", help=f"some of {', '.join(PIECES)}; default: all")
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    arguments = parser.parse_args()
    if unknown := set(arguments.pieces) - set(PIECES):
        parser.error(f"no piece is called {sorted(unknown)[0]}; there are {', '.join(PIECES)}")
    say("torch", torch.__version__)
    say("device", torch.cuda.get_device_name().replace(" ", "_") if DEVICE.type == "cuda" else "cpu")
    for piece in arguments.pieces or PIECES:
        PIECES[piece](arguments.small)


if __name__ == "__main__":
    main()
