"""Shared-prefix packing and fused log-probs equal one unpadded forward pass per response."""

import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen3Config

from data.errors import UserError
from trainer.logprobs import fused_logprobs
from trainer.model import attention
from trainer.model.attention import ATTENTION
from trainer.model.cost import Cost
from trainer.model.loading import load_base, recompute_layers, why_not_shared
from trainer.objective import aggregation_weights, grpo_terms
from trainer.packing import balance, count_trained, filler, make_layout, make_micro_batch, pack, split_by_tokens
from trainer.policy import predicting_packed, predicting_padded
from trainer.ranks.world import World

GROUPS = [
    ([5, 6, 7, 8, 9], [[10, 11, 12], [13], [14, 15, 16, 17, 18, 19]]),
    ([20, 21], [[22, 23]]),
    ([3] * 11, [[4, 4], [1, 2, 3, 4, 5]]),
]
MODELS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig}


def tiny_model(kind: str, attn: str, dtype: torch.dtype, tied: bool):
    """With a LoRA adapter on every linear layer, its two factors away from 0."""
    torch.manual_seed(0)
    config = MODELS[kind](
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation=attn,
        sliding_window=None,
    )
    assert why_not_shared(config) == ""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=dtype) * 0.2
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers rounds to float32 inside; a float64 check must not
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.square().mean(-1, True) + m.variance_epsilon)
            )
    return model.eval()


def one_row_per_response(model) -> list[torch.Tensor]:
    rows = []
    for prompt, responses in GROUPS:
        for response in responses:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return rows


def packed_logprobs(model) -> tuple[torch.Tensor, torch.Tensor]:
    batch = pack(GROUPS)
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, layout=batch.layout, use_cache=False
    ).last_hidden_state[0]
    values = fused_logprobs(hidden[batch.predict_at], model.lm_head.weight, batch.targets, chunk=3)
    return batch.unpack(values), batch.mask


def loss_of(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The paper's objective with made-up advantages, old and reference log-probs near the policy's."""
    noise = torch.linspace(-0.3, 0.3, mask.numel(), dtype=logprobs.dtype).view(mask.shape) * mask
    near = {name: logprobs.detach() + noise * k for k, name in enumerate(("old_logprobs", "ref_logprobs"), 1)}
    weight = aggregation_weights(
        mask, "seq-mean-token-mean", float(len(mask)), float(mask.sum()), norm=6, dtype=logprobs.dtype
    )
    return grpo_terms(
        logprobs=logprobs,
        sampler_logprobs=near["old_logprobs"],
        **near,
        mask=mask,
        weight=weight,
        advantages=torch.linspace(-1, 1.3, len(mask), dtype=logprobs.dtype),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        beta=0.05,
        kl_kind="low_var",
        ratio_level="token",
        correction="none",
        correction_cap=2.0,
        correction_floor=0.0,
    ).loss


@pytest.mark.slow(2)
@pytest.mark.parametrize("kernel", ["CPU", "PLAIN"])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False), ("llama", False), ("mistral", False)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_packed_equals_unpacked_in_value_loss_and_gradient(dtype, tolerance, kind, tied, kernel, monkeypatch):
    monkeypatch.setattr(attention, "kernel_for", lambda q: getattr(attention, kernel))
    plain, packed = (tiny_model(kind, attn, dtype, tied) for attn in ("sdpa", ATTENTION))
    rows = one_row_per_response(plain)
    values, mask = packed_logprobs(packed)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    torch.testing.assert_close(values, padded, rtol=0, atol=tolerance)
    ours, theirs = loss_of(values, mask), loss_of(padded, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    ours.backward()
    theirs.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if ".lora_" in name}
    assert len(expected) == 3 * 7 * 2
    for name, parameter in packed.named_parameters():
        if name in expected:
            assert expected[name].abs().max() > 100 * tolerance, f"{name}: no gradient to compare"
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("kernel", ["CPU", "PLAIN"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_shared_prefix_attention_is_attention_with_a_mask(heads, kv_heads, kernel, monkeypatch):
    """Values and gradients against softmax over scores of a written-out mask [L,L], float64, grouped heads."""
    monkeypatch.setattr(attention, "kernel_for", lambda q: getattr(attention, kernel))
    torch.manual_seed(2)
    sizes = [(3, [2, 5]), (4, [1]), (1, [1, 1, 3]), (6, [2, 2])]
    segment, prompt_of, length = [], [], 0
    for prompt, responses in sizes:
        for place, n in enumerate((prompt, *responses)):
            segment += [length + place] * n
            prompt_of += [length] * n  # the prompt's own number
        length += 1 + len(responses)
    seg, pre = torch.tensor(segment), torch.tensor(prompt_of)
    visible = ((seg[:, None] == seg) | (pre[:, None] == seg)).tril()
    q, k, v = (
        torch.randn(1, n, len(seg), 8, dtype=torch.float64, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    )
    out, _ = attention._attention(None, q, k, v, None, layout=make_layout(sizes, "cpu"))
    scores = (q @ k.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) / 8**0.5).masked_fill(
        ~visible, -torch.inf
    )
    expected = (scores.softmax(-1) @ v.repeat_interleave(heads // kv_heads, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_of_attention_in_bfloat16_are_rounded_once_on_a_cpu():
    """PyTorch's kernel for CPUs adds up in bfloat16 what it computes in it: twice the error, and no less time."""
    layout = make_layout([(150, [40, 60])], "cpu")
    random = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(250, n, 64, generator=random).to(torch.bfloat16) for n in (6, 2, 2, 6))
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention._SharedPrefixAttention.apply(*inputs, layout, 0.125, attention.CPU)
        found.append(torch.autograd.grad(out, inputs, grad.to(dtype)))
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16 and float((ours - exact).norm() / exact.norm()) < 3e-3


def test_the_gpu_path_runs_without_data():
    """No GPU here: shapes and dtypes of every step, and the call of PyTorch's varlen kernels, on the meta device."""

    class Context:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    with torch.no_grad():
        layout, context = make_layout([(40, [10, 7]), (12, [5])], "meta"), Context()
        q, k, v = (torch.empty(74, n, 64, device="meta", dtype=torch.bfloat16) for n in (8, 2, 2))
        assert attention.kernel_for(q) is attention.VARLEN and attention.kernel_for(q.float()) is attention.PLAIN
        out = attention._SharedPrefixAttention.forward(context, q, k, v, layout, 0.125, attention.VARLEN)
        assert out.shape == (74, 8, 64) and out.dtype == torch.bfloat16
        grads = attention._SharedPrefixAttention.backward(context, out)
        assert [g.shape for g in grads[:3]] == [x.shape for x in (q, k, v)] and grads[3:] == (None, None, None)


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


def test_largest_first_where_in_order_wastes_a_micro_batch():
    sizes = [(10, [30]), (10, [50]), (10, [30]), (10, [50])]  # 40, 60, 40, 60 of 100: in order 3, else 2
    assert split_by_tokens(sizes, budget=100) == [[(0, [0]), (1, [0])], [(2, [0]), (3, [0])]]
    sizes = [(10, [30]), (10, [30]), (10, [50]), (10, [50])]  # in order: 80, 60, 60
    assert split_by_tokens(sizes, budget=100) == [[(0, [0]), (2, [0])], [(1, [0]), (3, [0])]]


def test_cost_counts_what_is_computed():
    cost = Cost(token=100.0, pair=1.0, target=10.0)
    # prompt 3: 6 pairs; responses 2 and 1: 3 + 2*3 and 1 + 1*3
    assert cost.of(3, [2, 1]) == 100 * 6 + (6 + 9 + 4) + 10 * 3


def test_ranks_get_even_loads_and_at_least_one_group():
    generator = torch.Generator().manual_seed(0)
    costs = (torch.rand(64, generator=generator) ** 3).tolist()
    for ranks in (1, 2, 7, 16, 64):
        dealt = balance(costs, ranks)
        assert sorted(item for items in dealt for item in items) == list(range(64)) and all(dealt)
        loads = [sum(costs[i] for i in items) for items in dealt]
        assert max(loads) <= max(1.03 * sum(costs) / ranks, max(costs)), loads
    assert balance([1.0, 1.0, 1.0, 1.0], 2) == [[0, 2], [1, 3]]


def test_what_is_trained_is_counted_from_lengths_as_the_mask_counts_it():
    """Responses of 3, 1, 6; 2; 2, 5 tokens, of which the second, the fourth and the last could not be scored."""
    cpu, trained = torch.device("cpu"), torch.tensor([True, False, True, False, True, False])
    micro = make_micro_batch(GROUPS, list(range(6)), torch.zeros(6), trained, [0.0] * 19, cpu)
    empty = filler(cpu)
    for each, expected in ((micro, (3, 3 + 6 + 2)), (empty, (0, 0))):
        assert each.trained == expected == (each.mask.any(-1).sum(), each.mask.sum())
    assert count_trained([micro, empty, micro], World(rank=0, size=1, device=cpu)) == (6.0, 22.0)


def test_a_model_with_a_sliding_window_goes_row_by_row():
    """The fallback's log-probs and gradients are those of single rows in the model's own attention, window included."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.2,
    )
    assert "sliding window" in why_not_shared(config)
    model = MistralForCausalLM(config).eval()
    batch = pack(GROUPS)
    values = fused_logprobs(predicting_padded(model, batch), model.lm_head.weight, batch.targets)
    expected = torch.cat(one_row_per_response(model))
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x.sum(), list(model.parameters())) for x in (values, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    config.sliding_window = None
    assert why_not_shared(config) == ""


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_attention_that_is_kept_is_not_computed_again_and_gives_the_same_bits(kind, monkeypatch):
    calls = []
    cpu = attention.CPU
    monkeypatch.setattr(attention, "CPU", cpu._replace(forward=lambda call: calls.append(1) or cpu.forward(call)))
    batch, found = pack(GROUPS), {}
    for name, settings in (("all", None), ("nothing", {}), ("attention", {"keep": True})):
        model = tiny_model(kind, ATTENTION, torch.float32, tied=False)
        if settings is not None:
            recompute_layers(model, **settings)
        calls.clear()
        hidden = predicting_packed(model, batch)
        forward = len(calls)
        values = fused_logprobs(hidden, model.lm_head.weight, batch.targets)
        with torch.no_grad():  # of the reference policy, in between: it keeps nothing
            assert torch.equal(predicting_packed(model, batch), hidden)
        calls.clear()
        trained = [p for name, p in model.named_parameters() if ".lora_" in name]
        gradients = torch.autograd.grad(values.sum(), trained, retain_graph=True)
        found[name] = (forward, len(calls), values, gradients)
        again = torch.autograd.grad(values.sum(), trained)  # as a debugger may
        assert all(map(torch.equal, gradients, again))
    assert [counts[:2] for counts in found.values()] == [(6, 0), (6, 6), (6, 0)]  # 3 layers, 2 calls each
    for name in ("nothing", "attention"):
        assert torch.equal(found[name][2], found["all"][2]) and all(map(torch.equal, found[name][3], found["all"][3]))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_logprobs_against_autograd(temperature, softcap):
    torch.manual_seed(1)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 2])

    def fused(hidden, weight):
        return fused_logprobs(hidden, weight, targets, temperature, 3, softcap=softcap)

    assert torch.autograd.gradcheck(fused, (hidden, weight))
    logits = hidden @ weight.T
    capped = softcap * (logits / softcap).tanh() if softcap else logits
    plain = (capped / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(fused(hidden, weight), plain, rtol=0, atol=1e-12)


def test_entropy_and_its_absence_from_the_graph():
    torch.manual_seed(3)
    hidden, weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True), torch.randn(13, 6, dtype=torch.float64)
    targets = torch.arange(9)
    logprobs, entropy = fused_logprobs(hidden, weight, targets, temperature=0.8, chunk=4, entropy=True)
    expected = torch.distributions.Categorical(logits=hidden @ weight.T / 0.8).entropy()
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-12)
    assert not entropy.requires_grad and logprobs.requires_grad
    torch.testing.assert_close(logprobs, fused_logprobs(hidden, weight, targets, 0.8), rtol=0, atol=1e-12)


def test_logits_are_bounded_by_the_vocabulary_too(monkeypatch):
    """A chunk is cut so that one buffer of logits holds no more than CHUNK_LOGITS numbers, or FEWEST tokens."""
    from trainer import logprobs

    # (vocabulary, device): tokens
    sizes = {
        (4096, "cpu"): 1024,
        (32_000, "cpu"): 262,
        (152_064, "cpu"): 220,
        (152_064, "cuda"): 768,
        (64, "cuda"): 1024,
    }
    assert {size: logprobs.tokens_of_chunk(*size) for size in sizes} == sizes
    assert logprobs.tokens_of_chunk(152_064, "cuda", 100) == 100 and logprobs.tokens_of_chunk(10, "cpu", 0) == 1
    monkeypatch.setitem(logprobs.CHUNK_LOGITS, "cpu", 50)
    monkeypatch.setattr(logprobs, "FEWEST", 1)
    made = []
    real = logprobs._softmax
    monkeypatch.setattr(logprobs, "_softmax", lambda logits: made.append(tuple(logits.shape)) or real(logits))
    fused_logprobs(torch.randn(9, 6), torch.randn(13, 6), torch.arange(9))
    assert made == [(3, 13)] * 3


def test_a_kernel_that_computes_something_else_is_refused():
    """What --attn flash is compared with at the start; here the CPU's kernel with PLAIN, and broken ones."""
    cpu, dtype = torch.device("cpu"), torch.float32
    good = attention.CPU

    def without_scale(call):
        return good.forward(call._replace(scale=1.0))

    def swapped(call, grad, out, lse):
        dq, dk, dv = good.backward(call, grad, out, lse)
        return [dq, dv, dk]

    def fails(call):
        raise TypeError("unexpected keyword argument 'return_lse'")

    def problem(kernel: attention.Kernel) -> str:
        return attention.why_not_equal(kernel, attention.PLAIN, cpu, dtype)

    assert problem(good) == ""
    assert "do not give PyTorch's numbers here (out differs" in problem(good._replace(forward=without_scale))
    assert "(dk differs" in problem(good._replace(backward=swapped))
    assert "fail here (TypeError: unexpected keyword argument 'return_lse'" in problem(good._replace(forward=fails))
    assert "(out differs by nan%)" in problem(
        good._replace(forward=lambda call: [x * torch.nan for x in good.forward(call)])
    )


def test_auto_takes_flash_attention_only_where_it_is_right(monkeypatch):
    cpu, gpu, half = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    assert attention.kernels_for("auto", cpu, half, 64) == "sdpa" == attention.kernels_for("sdpa", gpu, half, 64)
    assert "do not compute in float32" in attention.why_no_flash(gpu, torch.float32)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)  # installed
    asked, answers = [], ["", "dq differs", "dq differs"]
    monkeypatch.setattr(attention, "why_not_equal", lambda *given: asked.append(given[2:]) or answers.pop(0))
    assert attention.kernels_for("auto", gpu, half, 96) == "flash" and asked == [(gpu, half, 96)]
    with pytest.warns(UserWarning, match="PyTorch's attention is used, not flash-attn's, since dq differs"):
        assert attention.kernels_for("auto", gpu, half, 96) == "sdpa"
    with pytest.raises(UserError, match="--attn flash: dq differs"):
        attention.kernels_for("flash", gpu, half, 96)
    assert attention.kernels_for("auto", gpu, torch.float32, 96) == "sdpa" and not answers  # nothing is compiled for it


def test_a_model_computes_under_each_name_of_our_attention(pipeline):
    """transformers takes a name with "flash" in it for a package, and does not load the model."""
    found = []
    for name in attention.NAMES.values():
        model = load_base(str(pipeline / "base"), torch.float32, "none", torch.device("cpu"), False, name)
        assert model.config._attn_implementation == name
        found.append(packed_logprobs(model)[0])
    assert torch.equal(*found)


def test_flash_attention_4_is_called_as_its_own_varlen_function_does(monkeypatch):
    """No GPU here: a module with its two functions' parameters (4.0.0b36) computes with the CPU's kernel."""
    made = []

    def call_of(q, k, v, cu_q, cu_k, scale, causal) -> attention.Call:
        spans = [tuple(zip(cu[:-1].tolist(), cu.diff().tolist(), strict=True)) for cu in (cu_q, cu_k)]
        return attention.Call(q, k, v, attention.Segments(*spans, causal, q.device), scale)

    def forward(
        q, k, v, qv=None, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse
    ):
        made.append((max_seqlen_q, max_seqlen_k, return_lse))
        out, lse = attention.CPU.forward(call_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal))
        return out, lse, None, None, None

    def backward(
        q, k, v, out, dout, lse, softmax_scale, causal, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    ):
        call = call_of(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return tuple(attention.CPU.backward(call, dout, out, lse))

    interface = types.SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, interface)
    assert attention.why_not_equal(attention.FLASH_ATTN_4, attention.PLAIN, torch.device("cpu"), torch.float32) == ""
    assert made == [(70, 70, True), (103, 40, True)]
