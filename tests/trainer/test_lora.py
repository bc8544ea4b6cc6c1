"""A layer and its adapter as one function: PEFT's numbers and gradients, in all that a run does with adapters."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor

import trainer.policy
from rollout.vllm_versions import drawing_from
from tests.trainer.ppo.test_critic import config, learn, policy_of
from tests.trainer.test_packing import GROUPS, tiny_model
from trainer.logprobs import fused_logprobs
from trainer.model.attention import ATTENTION
from trainer.model.loading import recompute_layers, seeded
from trainer.model.lora import fuse_adapters, made_of
from trainer.packing import pack
from trainer.policy import matrix_products, predicting_packed
from trainer.ppo.critic import Critic


def logprobs_and_gradients(model, bfloat16: bool = False) -> tuple[Tensor, Tensor]:
    """Of the adapter that is being trained."""
    batch = pack(GROUPS)
    with matrix_products(torch.device("cpu"), bfloat16):
        hidden = predicting_packed(model, batch)
    values = fused_logprobs(hidden.to(model.dtype), model.lm_head.weight, batch.targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    return values, torch.cat([grad.flatten() for grad in torch.autograd.grad(values.sum(), trained)])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])  # qwen2: with biases
def test_it_is_pefts_layer(kind, checkpointing):
    found = []
    for fuses in (False, True):
        model = tiny_model(kind, ATTENTION, torch.float64, tied=False)
        if checkpointing:
            recompute_layers(model)
        if fuses:
            assert fuse_adapters(model) == 3 * 7
        found.append(logprobs_and_gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_in_bfloat16_it_is_no_further_from_float32():
    exact = logprobs_and_gradients(tiny_model("qwen2", ATTENTION, torch.float32, tied=False))
    errors = []
    for fuses in (False, True):
        model = tiny_model("qwen2", ATTENTION, torch.float32, tied=False)
        for module in model.modules():
            module.cast_input_dtype_enabled = False
        if fuses:
            fuse_adapters(model)
        found = logprobs_and_gradients(model, bfloat16=True)
        errors.append([float((a - b).detach().norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    (peft_values, peft_gradient), (values, gradient) = errors
    assert 0 < values < 1.2 * peft_values < 0.05 and 0 < gradient < 1.2 * peft_gradient < 0.1


def test_the_adapter_can_be_off_or_a_critics(pipeline, monkeypatch):
    """Reference policy, PPO's second adapter on the same layers, and layers that are left to PEFT."""
    found = []
    for fuses in (False, True):
        monkeypatch.setattr(trainer.policy, "fuse_adapters", fuse_adapters if fuses else lambda model: 0)
        policy = policy_of(pipeline)
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.trainable().values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        batch = pack(GROUPS)
        with torch.no_grad():
            logprobs = [policy.response_logprobs(batch, reference=reference) for reference in (True, False)]
        critic = Critic(policy, config(pipeline, lr=1e-2, value_clip=10.0))
        learn(critic, 3)
        with torch.no_grad():
            logprobs.append(policy.response_logprobs(batch))
        found.append([*logprobs, critic.weights()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert not torch.allclose(found[1][0], found[1][1]) and torch.equal(found[1][1], found[1][2])
    for more in ({"dora": True}, {"quantize": "nf4"}):
        assert fuse_adapters(policy_of(pipeline, **more).model) == 0


def test_an_input_is_made_again_only_as_it_was():
    """In backward, from its sources; an input that was written to since is kept instead."""
    torch.manual_seed(0)
    layer = Linear(torch.nn.Linear(6, 5).requires_grad_(False), "default", LoraConfig(), r=2, lora_alpha=4)
    model, asked, grads = torch.nn.Sequential(layer), [], []
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    assert fuse_adapters(model) == 1

    def double(x: Tensor) -> Tensor:
        asked.append(tuple(x.shape))
        return 2 * x

    source = torch.randn(2, 3, 6, requires_grad=True)
    for tells, changes in ((False, False), (True, False), (False, True), (True, True)):
        x = 2 * source
        x = made_of(x, double, source) if tells else x
        if changes:
            x += 1
        model(x).square().sum().backward()
        assert asked == ([(2, 3, 6)] if tells and not changes else [])
        asked.clear()
        grads.append([p.grad.clone() for p in (source, *model.parameters()) if p.requires_grad])
        model.zero_grad()
        source.grad = None
    assert (
        len(grads[0]) == 3 and all(map(torch.equal, grads[0], grads[1])) and all(map(torch.equal, grads[2], grads[3]))
    )


def test_a_block_of_a_seed_touches_the_generator_of_this_process_alone(monkeypatch):
    """On a node of eight GPUs torch would warn, and every rank would set up all eight."""
    state, asked, fork = torch.get_rng_state(), [], torch.random.fork_rng
    with seeded(3):
        first = torch.rand(2)
    with seeded(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=None: asked.append(devices) or fork([]))
    with seeded(3), drawing_from(3):
        pass
    assert asked == [[5], [5]]


def test_a_merged_adapter_counts_once(pipeline):
    """PEFT's merge_adapter, in a notebook: the weights hold the adapter, and a reference pass takes it out."""
    policy = policy_of(pipeline, lora_rank=4)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.02)
    batch = pack([([1, 2, 3], [[4, 5, 6]])], policy.device)
    with torch.no_grad():
        before = policy.response_logprobs(batch), policy.response_logprobs(batch, reference=True)
        policy.model.merge_adapter()
        after = policy.response_logprobs(batch), policy.response_logprobs(batch, reference=True)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before[0], before[1], atol=1e-3)


def test_second_derivatives_are_refused_and_not_wrong():
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    found = fused_logprobs(hidden, torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="no second derivative; use log_softmax where"):
        torch.autograd.grad(found.sum(), hidden, create_graph=True)
    model = tiny_model("qwen2", ATTENTION, torch.float64, tied=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = predicting_packed(model, pack(GROUPS))
    with pytest.raises(RuntimeError, match="no second derivative; use scaled_dot_product_attention where"):
        torch.autograd.grad(hidden.sum(), trained, create_graph=True)
    fuse_adapters(model)
    hidden = predicting_packed(model, pack(GROUPS))  # a layer after the last attention comes first in the backward pass
    with pytest.raises(RuntimeError, match="no second derivative; use the forward of PEFT where"):
        torch.autograd.grad(hidden.sum(), trained, create_graph=True)
