"""Shared-prefix packing and fused log-probs equal one unpadded forward pass per response."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from trainer.logprobs import fused_logprobs
from trainer.packing import ATTENTION, pack, split_by_tokens

GROUPS = [
    ([5, 6, 7, 8, 9], [[10, 11, 12], [13], [14, 15, 16, 17, 18, 19]]),
    ([20, 21], [[22, 23]]),
    ([3] * 11, [[4, 4], [1, 2, 3, 4, 5]]),
]


def tiny_model(attention: str, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    config._attn_implementation = attention
    model = Qwen2ForCausalLM(config).to(dtype)
    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):  # transformers rounds to float32 inside; a float64 check must not
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, True) + m.variance_epsilon)
            )
    return model


def one_row_per_response(model: Qwen2ForCausalLM) -> list[torch.Tensor]:
    rows = []
    for prompt, responses in GROUPS:
        for response in responses:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return rows


def packed_logprobs(model: Qwen2ForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    batch = pack(GROUPS)
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, layout=batch.layout, use_cache=False
    ).last_hidden_state[0]
    values = fused_logprobs(hidden[batch.predict_at], model.lm_head.weight, batch.targets, chunk=3)
    return batch.unpack(values), batch.mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_packed_equals_unpacked_in_value_and_gradient(dtype, tolerance):
    plain, packed = tiny_model("sdpa", dtype), tiny_model(ATTENTION, dtype)
    weights = torch.linspace(-1, 1, 19, dtype=dtype)
    (torch.cat(one_row_per_response(plain)) * weights).sum().backward()
    values_NT, mask_NT = packed_logprobs(packed)
    (values_NT[mask_NT] * weights).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(values_NT[mask_NT], torch.cat(one_row_per_response(plain)), rtol=0, atol=tolerance)
    theirs = dict(plain.named_parameters())
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=100 * tolerance, msg=name)


def test_pack_example_by_hand():
    batch = pack([([5, 6], [[7], [8, 9]])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.predict_at.tolist() == [1, 1, 3]
    assert batch.unpack(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert batch.mask.tolist() == [[True, False], [True, True]]


def test_split_by_tokens_keeps_the_budget_and_loses_no_response():
    sizes = [(10, [5, 5, 5]), (10, [20, 20, 20]), (3, [1])]
    plan = split_by_tokens(sizes, budget=40)
    assert plan == [[(0, [0, 1, 2])], [(1, [0])], [(1, [1])], [(1, [2]), (2, [0])]]
    for batch in plan:
        assert sum(sizes[g][0] + sum(sizes[g][1][i] for i in members) for g, members in batch) <= 40


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_logprobs_against_autograd(temperature):
    torch.manual_seed(1)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 2])
    assert torch.autograd.gradcheck(lambda h, w: fused_logprobs(h, w, targets, temperature, 3), (hidden, weight))
    plain = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(fused_logprobs(hidden, weight, targets, temperature, 3), plain, rtol=0, atol=1e-12)
