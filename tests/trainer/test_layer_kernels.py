"""The Triton kernels between a layer's matrix products: run by Triton's interpreter inside transformers' own models."""

import json

import pytest
import torch

from tests.trainer.test_head_kernel import python

pytest.importorskip("triton")

from trainer.kernels import layers  # noqa: E402 (not importorskip: a fault of our own module must not skip its tests)

INTERPRETED = """
import copy, json, torch
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, LlamaConfig, OlmoConfig, Qwen2Config, Qwen3Config
from trainer.kernels import attention as attention_kernels, layers as layer_kernels
from trainer.model import attention

def switch(on):
    layer_kernels.runs_on = attention_kernels.runs_on = lambda x: on

switch(True)
layer_kernels.rounds_alike = lambda norm, x: True  # the interpreter cuts digits off where a GPU rounds to the nearest
layer_kernels.BLOCK = 64  # full blocks, and one that is not
shape = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1)
shape |= dict(num_attention_heads=3, num_key_value_heads=1, head_dim=8)
found = {}
for kind in (Qwen2Config, LlamaConfig, Qwen3Config, Gemma2Config, OlmoConfig):
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**shape)).to(dtype).requires_grad_(False)
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, std=0.5 if "norm" in name else 0.2)
        model.get_input_embeddings().weight.requires_grad_()
        results = {}
        for which, lm in (("exact", copy.deepcopy(model).double()), ("theirs", model), ("ours", copy.deepcopy(model))):
            switch(which == "ours")
            fused, rotates = 0, []
            if which == "ours":
                fused = layer_kernels.fuse_layers(lm, torch.device("cpu"))
                rotates = attention_kernels.fuse_rotary(lm, torch.device("cpu"))
            logits = lm(torch.arange(6)[None], attention_mask=torch.ones(1, 6)).logits
            logits.float().log_softmax(-1)[0, :, 7].sum().backward()
            results[which] = logits.detach().double(), lm.get_input_embeddings().weight.grad.double()
        errors = {
            which: [float((a - b).norm() / b.norm()) for a, b in zip(results[which], results["exact"])]
            for which in ("theirs", "ours")
        }
        found[f"{kind.__name__} {dtype}"] = [fused, len(rotates), errors["theirs"], errors["ours"]]
trained = AutoModelForCausalLM.from_config(Qwen2Config(**shape))
layer_kernels.fuse_layers(trained, torch.device("cpu"))
trained(torch.arange(5)[None]).logits.sum().backward()
assert all(p.grad is not None for p in trained.parameters()), "a weight that is trained gets its gradient"
other = AutoModelForCausalLM.from_config(CohereConfig(**shape))  # its pairs are neighbours, not halves
assert attention_kernels.fuse_rotary(other, torch.device("cpu")) == []
for size in (24, 4096):  # its norm subtracts the mean, which in long random vectors is nearly 0
    norm = CohereLayerNorm(size)
    assert layer_kernels.is_rms_norm(norm) and not layer_kernels.fuse_layers(norm, torch.device("cpu"))
switch(True)
rows = AutoModelForCausalLM.from_config(Qwen2Config(**shape)).requires_grad_(False)  # patched above
theirs = rows(torch.arange(12).view(2, 6)).logits
assert attention_kernels.fuse_rotary(rows, torch.device("cpu")) and layer_kernels.fuse_layers(rows, torch.device("cpu"))
torch.testing.assert_close(rows(torch.arange(12).view(2, 6)).logits, theirs)  # two rows with one row of positions
here, there = torch.randn(2, 7, 3, 8)
lse = torch.randn(2, 3, 9)[:, :, 1:8] * 30  # not contiguous, and far apart
for a, b in zip(attention_kernels.merged(here, there, *lse), attention.merged(here, there, *lse)):
    torch.testing.assert_close(a, b)
print(json.dumps(found))
"""

MADE_AGAIN = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config
from trainer.kernels import layers
from trainer.model import lora
from trainer.model.loading import recompute_layers

layers.runs_on = lambda x: True
layers.rounds_alike = lambda norm, x: True  # as above
shape = dict(vocab_size=50, hidden_size=24, intermediate_size=160, num_hidden_layers=3, num_attention_heads=3)


def gradients(again, dtype=torch.float32, checkpointing=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, num_key_value_heads=1, head_dim=8)).to(dtype)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
        if "lora_" in name:
            weight.data = weight.float()
    assert layers.fuse_layers(model, torch.device("cpu")) == 3 * 3 + 1 and lora.fuse_adapters(model) == 3 * 7
    if checkpointing:
        recompute_layers(model.base_model.model)
    kept, own = {}, layers.made_of
    layers.made_of = own if again else lambda out, *how: out

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype, dtype != torch.float32):
        loss = model(torch.arange(32)[None], attention_mask=torch.ones(1, 32)).logits.float().log_softmax(-1)[0, :, 7].sum()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    layers.made_of = own
    return size, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


for how in (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True), (torch.float32, False):
    less, again = gradients(True, *how)
    more, kept = gradients(False, *how)
    assert again.keys() == kept.keys() and len(kept) == 3 * 7 * 2
    for name, grad in kept.items():
        assert grad.abs().max() > 0 and torch.equal(again[name], grad), (how, name)
# of each layer the product of the MLP and the outputs of two norms, float32; but not of the very first norm, since nothing
# keeps the embeddings
assert more - less == 32 * (3 * (160 + 2 * 24) - 24) * 4, (more, less)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trainer.kernels import attention as attention_kernels, layers as layer_kernels

half, number = "*bf16", "*fp32"
rotated = dict.fromkeys(("x", "cosines", "sines", "out"), half) | dict.fromkeys(
    ("token_stride", "head_stride", "heads", "half"), "i32"
)
merged = {"here": half, "there": half, "lse_here": number, "lse_there": number, "out": half, "both": number}
merged |= dict.fromkeys(
    ("tokens", "heads", "size", "here_head", "here_token", "there_head", "there_token"), "i32"
)
of_attention = [("_rotate", (rotated, {"HEADS": 64, "HALF": 64, "BACKWARD": back})) for back in (False, True)]
of_attention.append(("_merge", (merged, {"HEADS": 64, "SIZE": 128})))
kernels = {
    "_norm": ({"rows": half, "weight": half, "out": half, "scales": "*fp32", "size": "i32", "epsilon": "fp32"}, 4096),
    "_norm_backward": ({"grads": half, "rows": half, "weight": half, "scales": "*fp32", "out": half, "size": "i32"}, 4096),
    "_gated": ({"gates": half, "ups": half, "out": half, "n": "i64"}, 2048),
    "_gated_backward": (dict.fromkeys(("grads", "gates", "ups", "grad_gates", "grad_ups"), half) | {"n": "i64"}, 2048),
}
cases = [(getattr(layer_kernels, name), of, {"BLOCK": block}, 8) for name, (of, block) in kernels.items()]
cases += [(getattr(attention_kernels, name), of, settings, 8) for name, (of, settings) in of_attention]
for function, signature, settings, warps in cases:
    source = ASTSource(
        fn=function, signature={**signature, **dict.fromkeys(settings, "constexpr")}, constexprs=settings
    )
    exact = attention_kernels.UNFUSED if function is attention_kernels._rotate else {}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **exact})
    assert len(made.asm["cubin"]) > 1000 and ".local" not in made.asm["ptx"], "registers are spilled"
    assert not exact or "fma" not in made.asm["ptx"], "products are not rounded before they are added"
"""

LAYERS = {"Qwen2Config": 4, "LlamaConfig": 4, "Qwen3Config": 6, "Gemma2Config": 0, "OlmoConfig": 1}
"""A layer with two norms and an MLP, a last norm, and Qwen 3's norms of queries and keys. Gemma's norm multiplies by
1 + w and its MLP has another activation; OLMo's norm has no weight."""


@pytest.mark.slow(20)
def test_models_give_the_same_numbers():
    found = json.loads(python(INTERPRETED, TRITON_INTERPRET="1"))
    assert len(found) == 10
    for case, (fused, rotates, theirs, ours) in found.items():
        assert fused == LAYERS[case.split()[0]] and rotates == 1, case
        if "float32" in case:
            assert all(error < 2e-6 for error in ours), case  # max() would pass over nan
        else:  # rounded at the same places, but by the interpreter
            assert all(error < 0.05 for error in ours) and ours[0] < 3 * theirs[0] and ours[1] < 3 * theirs[1], (
                case,
                theirs,
                ours,
            )


@pytest.mark.slow(10)
def test_inputs_of_adapters_are_made_again_in_backward_and_not_kept():
    python(MADE_AGAIN, TRITON_INTERPRET="1")


@pytest.mark.parametrize("rounds_twice", [True, False])
def test_a_norm_that_rounds_once_is_left_alone(monkeypatch, rounds_twice):
    norm = torch.nn.RMSNorm(512, eps=1e-6).to(torch.bfloat16)  # PyTorch's own rounds at the end

    def other(module: torch.nn.RMSNorm, _, x: torch.Tensor) -> torch.Tensor:
        normal = x.float() * (x.float().square().mean(-1, keepdim=True) + module.eps).rsqrt()
        return module.weight * normal.to(x.dtype) if rounds_twice else (module.weight.float() * normal).to(x.dtype)

    monkeypatch.setattr(layers, "_fused_norm", other)
    norm.weight.data = 1 + torch.randn(512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert layers.rounds_alike(norm, x) == (not rounds_twice)


@pytest.mark.slow(8)
def test_they_compile_for_an_h100(tmp_path):
    python(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
