"""Run by tests/test_models.py: log-probs and gradients of tiny models of every type, in one process with vLLM.

python tests/helpers/architectures.py CHECKPOINT FOLDER          # CHECKPOINT lends its tokenizer

Prints a line "RESULT {...}" per model. Distances are in nats per token: the sampler's log-probs of its own responses
against the packed trainer's.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from data.prompts import chat
from rollout import LocalEngine, Rollout, Sampling
from rollout.sync import Parcel
from rollout.torch_engine import TorchEngine
from rollout.vllm_engine import VLLMEngine
from trainer.model.loading import load_tokenizer
from trainer.packing import pack
from trainer.policy import Policy
from trainer.ranks.world import join_world, leave_world

WINDOW = {"sliding_window": 64, "head_dim": 32, "query_pre_attn_scalar": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
GRANITE = {"logits_scaling": 4.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "embedding_multiplier": 6.0}
TYPES: dict[str, tuple[str, dict]] = {
    "Qwen 2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen 3": ("qwen3", {"head_dim": 32}),
    "Llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral with a window": ("mistral", {"sliding_window": 64}),
    "Gemma": ("gemma", {"head_dim": 32}),
    "Gemma 2": ("gemma2", WINDOW),
    "Gemma 3": ("gemma3_text", {**WINDOW, "num_hidden_layers": 6}),
    "Phi-3": ("phi3", {}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", GRANITE),
    "GLM": ("glm", {"head_dim": 32}),
    "GLM-4": ("glm4", {"head_dim": 32, "partial_rotary_factor": 0.5}),
    "StarCoder 2": ("starcoder2", {"sliding_window": None}),
    "Command R": ("cohere", {"logit_scale": 0.25}),
}
"""{name: (model type of transformers, what differs from COMMON)}"""
COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "initializer_range": 0.08,
}
MERGED = ("Phi-3", "GLM-4", "SmolLM3", "Gemma 2")
"""Types that pack their weights in other ways than Qwen, or that vLLM runs as transformers' class."""
TEMPERATURE = 0.8


def make_checkpoint(folder: Path, tokenizer, kind: str, **more: object) -> Path:
    """A random checkpoint of a model type, with the tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = {**COMMON, "vocab_size": -(-len(tokenizer) // 64) * 64, **ids, **more}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings)).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained_policy(folder: Path) -> Policy:
    """A policy whose adapter is not zero, so that a sampler without it is noticed."""
    policy = Policy(str(folder), lora_rank=8, lora_alpha=16, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    for name, parameter in policy.trainable().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return policy


def sampling_of(policy: Policy, **more: object) -> Sampling:
    settings = {"n": 3, "max_tokens": 24, "temperature": TEMPERATURE, "top_p": 1.0, "seed": 1}
    return Sampling(**{**settings, "stop_ids": policy.chat.stop_ids, **more})


def prompts_of(policy: Policy) -> list[list[int]]:
    """A short prompt, and one that is longer than the windows."""
    return [policy.chat.prompt_ids(chat("Assign.", "Cell 1: CD3D, MS4A1 " * n)) for n in (3, 20)]


def sample(engine: LocalEngine, policy: Policy, **more: object) -> list[list[Rollout]]:
    return engine.generate(["a", "b"], prompts_of(policy), sampling_of(policy, **more))


def packed(policy: Policy, groups: list[list[Rollout]]):
    return pack([(ids, [r.response_ids for r in group]) for ids, group in zip(prompts_of(policy), groups, strict=True)])


@torch.no_grad()
def distance(policy: Policy, groups: list[list[Rollout]], temperature: float = TEMPERATURE) -> float:
    """Mean |log-prob of the sampler - log-prob of the packed trainer|, in nats per token."""
    batch = packed(policy, groups)
    trainer = policy.response_logprobs(batch, temperature)[batch.mask]
    sampler = torch.tensor([x for group in groups for r in group for x in r.sampler_logprobs])
    return float((trainer - sampler).abs().mean())


def gradient_error(policy: Policy, groups: list[list[Rollout]]) -> float:
    """|gradient of the packed trainer - gradient of transformers' eager forward, response by response| / |the latter|."""
    parameters = list(policy.trainable().values())
    ours = torch.autograd.grad(policy.response_logprobs(packed(policy, groups), TEMPERATURE).sum(), parameters)
    before = policy.causal_lm.config._attn_implementation
    policy.causal_lm.config._attn_implementation = "eager"
    total = torch.zeros(())
    for prompt, group in zip(prompts_of(policy), groups, strict=True):
        for response in group:
            ids = torch.tensor([prompt + response.response_ids])
            logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            total = total + logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum()
    theirs = torch.autograd.grad(total, parameters)
    policy.causal_lm.config._attn_implementation = before
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (ours, theirs)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def vllm_engine(folder: Path, policy: Policy, **more: object) -> VLLMEngine:
    engine = VLLMEngine(
        str(folder), lora=policy.lora, max_model_len=512, kv_cache_bytes=1 << 28, **{"sampler_lora": "kernel", **more}
    )
    parcel = Parcel.of(policy.adapter_tensors())
    engine.load_adapter(parcel, parcel.manifest(), version=1)
    return engine


def compare(folder: Path, name: str) -> dict:
    """Distances of both samplers, and the error of the gradient."""
    policy = trained_policy(folder)
    groups = sample(TorchEngine(policy.model, policy.decoding), policy)
    found = {
        "torch": distance(policy, groups),
        "gradient": gradient_error(policy, groups),
        "shares": not policy.cannot_share,
    }
    engine = vllm_engine(folder, policy)
    found["vllm"] = distance(policy, sample(engine, policy))
    # a hand-over: later versions go another way than the first (SlotPlan)
    for parameter in policy.trainable().values():
        parameter.data *= -0.7
    for version in (2, 3):
        parcel = engine_parcel(engine, policy)
        engine.load_adapter(parcel, parcel.manifest(), version=version)
    found["vllm, third adapter"] = distance(policy, sample(engine, policy))
    engine.close()
    if name in MERGED:
        engine = vllm_engine(folder, policy, sampler_lora="merged")
        found["merged"] = distance(policy, sample(engine, policy))
        engine.close()
    gc.freeze()  # as the fork server did: vLLM's shutdown undoes it, and each later collection would look at all libraries
    return found


def engine_parcel(engine: VLLMEngine, policy: Policy) -> Parcel:
    parcel = Parcel.of(policy.adapter_tensors())
    if engine.parcel is not None and engine.parcel.layout == parcel.layout:
        engine.parcel.buffer.copy_(parcel.buffer)
    else:
        engine.parcel = parcel
    return engine.parcel


def check_sampling(folder: Path) -> dict:
    """What leaks into a sampler: a nucleus, settings of generation_config.json, other ends than ours."""
    leaking = {"top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0, "temperature": 0.1, "do_sample": True}
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, **leaking}))
    policy = trained_policy(folder)
    engines = {
        "torch": TorchEngine(policy.model, policy.decoding),
        "vllm": vllm_engine(folder, policy, nucleus=True),
    }
    found = {}
    for name, engine in engines.items():
        groups = sample(engine, policy, temperature=1.0)
        found[f"{name}, whole"] = distance(policy, groups, 1.0)
        found[f"{name}, distinct"] = len({tuple(r.response_ids) for group in groups for r in group})
        found[f"{name}, nucleus"] = distance(policy, sample(engine, policy, temperature=1.0, top_p=0.5), 1.0)
        ends = tuple(range(1000, policy.causal_lm.config.vocab_size))  # most tokens: responses end soon
        stopped = [r for group in sample(engine, policy, stop_ids=ends) for r in group]
        found[f"{name}, stops"] = [
            r.finish_reason == "stop" and r.response_ids[-1] in ends and not set(r.response_ids[:-1]) & set(ends)
            for r in stopped
        ]
    engines["vllm"].close()
    return found


def main(checkpoint: str, out: str) -> None:
    join_world()
    tokenizer = load_tokenizer(checkpoint)
    for name, (kind, more) in TYPES.items():
        folder = make_checkpoint(Path(out) / name.replace(" ", "-"), tokenizer, kind, **more)
        print("RESULT", json.dumps({"name": name, **compare(folder, name)}), flush=True)
    folder = make_checkpoint(Path(out) / "sampled", tokenizer, "qwen2")
    print("RESULT", json.dumps({"name": "sampling", **check_sampling(folder)}), flush=True)
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
