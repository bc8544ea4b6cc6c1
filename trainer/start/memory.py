"""Does a rank have enough memory? An estimate for --dry-run, and for the note before a run.

It is exact for weights, adapter, gradients and AdamW. For activations it is a count of the tensors that autograd keeps of
one packed row at its longest. tests/trainer/test_preflight.py holds it to what autograd keeps, and to what runs of the 7B
shape took on a GPU (within 15 %).
"""

import importlib.util
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from rollout.vllm_versions import MOST_SEQUENCES, merges_adapter, prompt_batch, vllm_rank
from trainer.config import OnlineConfig
from trainer.model.cost import head_size
from trainer.model.shared import sampler_dtype, why_two_copies, with_sampler_dtype
from trainer.record.runfolder import settings_of_run
from trainer.start.preflight import GIB, Launch, Row, batch_parts, row_of

CONTEXT = 0.7 * GIB
"""Of a process on a GPU beside torch's tensors: CUDA's context and libraries (a common value; not measured apart)."""
ASLEEP = 0.5 * GIB
"""What vLLM keeps on a GPU while it sleeps: CUDA graphs and workspaces (an upper estimate; not measured apart)."""
GRAPHS = 1.2 * GIB
"""What vLLM takes beyond its share (--memory-fraction) when it compiles and captures CUDA graphs; not taken apart. On an H200
(vLLM 0.26, 7B, 20 responses) a run took 22.1 GiB while it sampled, and 20.8 with --eager."""
OURS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families (model_type) whose norms and MLPs compute with trainer/kernels on a GPU; others are counted as PyTorch's."""
GAPS = 0.03
"""Memory that torch's allocator holds beyond the tensors, as a share of them: blocks are rounded up, and have gaps."""


@dataclass(frozen=True, kw_only=True)
class SamplerMemory:
    """Bytes of one rank of a vLLM sampler."""

    weights: float
    """With the slots of the adapter."""
    work: float
    """Activations of the largest batch of prompt tokens, and the logits of all responses."""
    cache: float
    """KV cache; not above 0 if the weights leave no room for it."""
    response: float
    """KV cache of one prompt and response of full length."""

    @property
    def total(self) -> float:
        return self.weights + self.work + self.cache


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a rank that trains."""

    kept: dict[str, float]
    """{what: bytes} that is there all the time, also while the sampler works, but for the gradients."""
    gathered: float
    """Whole tensors that a hand-over makes of sharded ones."""
    backward: dict[str, float]
    """{what: bytes} of the largest packed row, when its backward pass begins."""
    one_row: bool
    """Does an optimizer step have a single packed row? Then there are no gradients yet when its backward begins."""
    optimizer: float
    """What the optimizer step holds besides."""

    @property
    def kept_while_sampling(self) -> float:
        """Gradients are freed by the optimizer step."""
        return sum(size for what, size in self.kept.items() if "gradients" not in what)

    @property
    def peak(self) -> float:
        """Of a training step. This is what torch.cuda.max_memory_allocated() reports."""
        backward = sum(self.backward.values()) - (self.kept["gradients"] if self.one_row else 0.0)
        return sum(self.kept.values()) + max(backward, self.optimizer)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank: the two sides, and what both come to."""

    trainer: TrainingMemory
    sampler: SamplerMemory
    beside: float
    """What a process on a GPU takes besides torch's tensors."""
    training: float
    """While it trains."""
    sampling: float
    """While it samples."""
    peak: float

    def fits(self, cfg: OnlineConfig, launch: Launch) -> bool:
        beside = beside_sampler(cfg) if launch.device == "cuda" else 0.0
        parcel = self.trainer.kept["copy to hand over"] / (1 + cfg.max_staleness) if launch.device == "cuda" else 0.0
        apart = cfg.placement == "split" and self.sampler.total + beside + parcel > launch.rank_bytes
        return self.peak <= launch.rank_bytes and not apart


def estimate_memory(cfg: OnlineConfig, launch: Launch) -> list[Row]:
    """Estimate the memory of a rank while it trains and while it samples; the larger of both must fit."""
    from trainer.model.loading import empty_model  # loads transformers, and check_launch() must answer at once

    cfg = with_sampler_dtype(cfg, launch.device == "cuda", settings_of_run(cfg))
    base = empty_model(str(cfg.model), getattr(torch, cfg.dtype), "sdpa")
    rank = rank_memory(cfg, launch, base)
    memory, sampler, kept = rank.trainer, rank.sampler, rank.trainer.kept_while_sampling
    rows = [
        Row(what=f"  {name}", value=gib(value)) for name, value in {**memory.kept, **memory.backward}.items() if value
    ]
    if launch.device == "cuda":
        what = "(context, libraries, graphs, unused parts of blocks)"
        rows.append(Row(what="  CUDA and gaps", value=f"{gib(rank.beside)} {what}"))
    rows.append(Row(what="while training", value=gib(rank.training)))
    rows.append(Row(what="while sampling", value=f"{gib(rank.sampling)}, of which the trainer keeps {gib(kept)}"))
    instead = what_would_fit(cfg, launch, base)
    if cfg.engine == "vllm":
        rows.append(
            row_of(
                "sampler" + (" (its own ranks)" if cfg.placement == "split" else ""),
                f"{gib(sampler.total)}: weights {gib(sampler.weights)}, batches {gib(sampler.work)}, KV cache for "
                f"{max(sampler.cache, 0) / sampler.response:.1f} responses at full length",
                (sampler.cache > sampler.response, f"the KV cache holds no response of full length: {instead}"),
            )
        )
    rows.append(
        row_of(
            "peak memory",
            f"{gib(rank.peak)} of {gib(launch.rank_bytes)}",
            (rank.fits(cfg, launch), f"a rank needs more memory than it has: {instead}"),
        )
    )
    return rows


def beside_sampler(cfg: OnlineConfig) -> float:
    """Bytes of a GPU that a sampling process takes beside its weights and KV cache."""
    return CONTEXT + (0.0 if cfg.eager else GRAPHS)


def rank_memory(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> RankMemory:
    """What a rank needs. base: the model without its weights.

    On a GPU a rank takes more than what torch has allocated: CONTEXT, GRAPHS or ASLEEP, and the gaps between blocks (GAPS).
    """
    on_gpu = launch.device == "cuda"
    memory, sampler = training_memory(cfg, launch, base), sampler_memory(cfg, launch, base)
    # shared weights, with the adapter's slots, stay where they are: the trainer counts them as its own
    held = sampler.weights if not why_two_copies(cfg, on_gpu) else 0.0
    here = 0.0 if cfg.placement == "split" or cfg.engine == "torch" else sampler.total - held
    kept = memory.kept_while_sampling
    beside = CONTEXT + GAPS * (memory.peak - held) + (ASLEEP if here else 0.0) if on_gpu else 0.0
    training = memory.peak + beside
    # on a GPU vLLM sleeps while the trainer runs, so the two peaks do not add up; on a CPU it keeps its memory
    awake = beside_sampler(cfg) if here else CONTEXT
    sampling = kept + memory.gathered + here + (awake + GAPS * (kept - held) if on_gpu else 0.0)
    peak = max(training, sampling) if on_gpu else training + memory.gathered + here
    return RankMemory(trainer=memory, sampler=sampler, beside=beside, training=training, sampling=sampling, peak=peak)


def what_would_fit(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> str:
    """The remedy where the memory does not do: the first changes, each added to those before, with which it would.

    Only settings that leave the objective as it is.
    """
    one_row = cfg.max_prompt_tokens + cfg.max_response_tokens
    changes: list[dict[str, Any]] = [
        {"base": "auto"},  # one copy for both where it can be, which may take less than two in 4 bits
        {"quantize": "none"} if cfg.quantize == "nf4" and launch.device == "cuda" else {},
        {"checkpointing": True},
        {"micro_tokens": min(cfg.micro_tokens, max(4096, one_row))},
        {"micro_tokens": min(cfg.micro_tokens, one_row)},
        {"keep_attention": False},
        {"eager": True} if launch.device == "cuda" and cfg.engine == "vllm" else {},
    ]
    if importlib.util.find_spec("bitsandbytes") and cfg.shard == "none":
        changes += [{"optimizer": "adamw8bit"}, {"quantize": "nf4"} if cfg.lora_rank else {}]
    if cfg.placement == "colocate" and launch.ranks > 1 and cfg.algorithm != "PPO":  # whose critic cannot be sharded
        changes.append({"quantize": "none", "optimizer": "adamw", "shard": "fsdp"})
    made: dict[str, Any] = {}
    for change in ({}, *changes):
        made = {**made, **change}
        values = dict(made)  # the share of vLLM is of this change alone
        tried = replace(cfg, **values)
        rank = rank_memory(tried, launch, base)
        if launch.device == "cuda" and cfg.engine == "vllm" and cfg.placement == "colocate":
            # all that vLLM may have beside the trainer; a hundredth is left
            room = launch.rank_bytes - (rank.sampling - cfg.memory_fraction * launch.rank_bytes)
            share = math.floor(100 * room / launch.rank_bytes) / 100
            if (rank.sampling > launch.rank_bytes or rank.sampler.cache <= rank.sampler.response) and 0 < share < 1:
                values["memory_fraction"] = share
                tried = replace(cfg, **values)
                rank = rank_memory(tried, launch, base)
        if rank.fits(tried, launch) and (cfg.engine != "vllm" or rank.sampler.cache > rank.sampler.response):
            words = {name: value for name, value in values.items() if getattr(cfg, name) != value}
            return f"{' '.join(map(as_option, words, words.values()))} would fit"
    return "take a smaller model, a smaller --lora-rank or shorter responses, or share it out (--shard fsdp, --tensor-parallel)"


def as_option(name: str, value: Any) -> str:
    """A setting as it is given on the command line."""
    name = name.replace("_", "-")
    return f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name} {value}"


def training_memory(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> TrainingMemory:
    """The memory of a rank while it trains. base: the model without its weights."""
    from trainer.logprobs import CHUNK_LOGITS, FEWEST
    from trainer.model.loading import why_not_shared

    size = getattr(torch, cfg.dtype).itemsize
    trainers = max(1, launch.ranks - cfg.ranks_apart)
    shards = trainers if cfg.shard == "fsdp" else 1
    n_base, n_layer, n_layers = n_weights(base), n_weights(base.model.layers[0]), len(base.model.layers)
    shared = not why_two_copies(cfg, launch.device == "cuda")  # then vLLM's weights are these, and not counted again
    copies = 1 if cfg.lora_rank or not cfg.beta else 2  # without an adapter the reference is a second, frozen copy
    weights = float(n_base * size)
    if cfg.quantize == "nf4":  # 4 bits per weight, and a float32 scale per block of 64 (QLoRA, arXiv:2305.14314)
        weights -= sum(m.weight.numel() for m in linear_layers(base)) * (size - 0.5 - 4 / 64)
    trained = trained_bytes(cfg, base)
    eight_bits = cfg.optimizer == "adamw8bit"
    moment = 1 / trained_itemsize(cfg) if eight_bits else 1  # 8 bits: one byte per moment
    if why_not_shared(base.config):
        cfg = replace(cfg, packing="plain")  # as the run will
    of_step = cfg.prompts_per_step / (trainers * batch_parts(cfg)[0])
    prompts = 1 if cfg.packing == "shared" else cfg.group_size  # copies of each
    of_step *= prompts * cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    tokens = max(min(cfg.micro_tokens, of_step), cfg.max_prompt_tokens + cfg.max_response_tokens)
    return TrainingMemory(
        kept={
            "weights": copies * weights / shards,
            "sampler's adapter": slot_bytes(cfg, base) if shared and launch.device == "cuda" else 0.0,
            "adapter": trained / shards if cfg.lora_rank else 0.0,  # else it is part of the weights
            "gradients": trained / shards,
            "AdamW moments": 2 * trained * moment / shards,
            "critic": critic_bytes(cfg, weights, trained, moment),
            "critic's gradients": trained if cfg.algorithm == "PPO" else 0.0,
            # rollout/sync.py, Parcel: made once and filled again; under split one for each adapter that is under way
            "copy to hand over": trained * (1.0 + cfg.max_staleness),
        },
        gathered=float(trained) if shards > 1 else 0.0,
        backward={
            # FSDP prefetches: two layers are whole at a time, beside embedding, norm and head
            "gathered layers": 0.0 if shards == 1 else (2 * n_layer + (n_base - n_layer * n_layers)) * size,
            "activations": activation_bytes(cfg, base, tokens, launch.device == "cuda")
            + autocast_bytes(cfg, trained, base),
            "attention scores": score_bytes(cfg, base.config, tokens, launch.device == "cuda"),
            # of a chunk of at most 1024 tokens: in float32, and rounded for the product with the head (a GPU's kernel writes
            # beside them in float32 too)
            "logits": min(
                max(CHUNK_LOGITS[launch.device], FEWEST * base.config.vocab_size), 1024 * base.config.vocab_size
            )
            * (4.0 + (size if size < 4 or launch.device == "cuda" else 0)),
        },
        one_row=of_step <= cfg.micro_tokens,
        # the roots of the second moments, of all weights at once on a GPU
        optimizer=trained / shards if launch.device == "cuda" and not eight_bits else 0.0,
    )


def score_bytes(cfg: OnlineConfig, shape: Any, tokens: float, on_gpu: bool) -> float:
    """Of attention that makes matrices of scores: capped ones (Gemma 2), and with shared prompts in float32 on a GPU.

    No kernel computes these.

    Where prompts are shared the responses to a prompt look at it in one call, and each at itself in another.
    """
    from trainer.model.loading import why_not_shared

    prompt, response = cfg.max_prompt_tokens, cfg.max_response_tokens
    if getattr(shape, "attn_logit_softcapping", None):
        return capped_score_bytes(cfg, shape, tokens, prompt + response)
    if cfg.compute_dtype != "float32" or not on_gpu or why_not_shared(shape):  # its own attention, which has a kernel
        return 0.0
    own = min(tokens - prompt, cfg.group_size * response)
    scores = max(own * prompt, max(prompt, response) ** 2) if cfg.packing == "shared" else (prompt + response) ** 2
    return 4 * 4.0 * shape.num_attention_heads * scores  # of one layer, in its backward pass


def capped_score_bytes(cfg: OnlineConfig, shape: Any, tokens: float, longest: int) -> float:
    """Of Gemma 2's attention: every token's scores with all `longest` places of its row.

    Every layer keeps their tanh, the softmax in float32 and that rounded; one layer's backward pass holds gradients of the
    rounded one, and twice of the one in float32.
    """
    size = 2 if cfg.compute_dtype == "bfloat16" else 4
    kept = size + 4 + (size if size < 4 else 0)
    layers = 1 if cfg.checkpointing else shape.num_hidden_layers
    return (layers * kept + size + 2 * 4) * shape.num_attention_heads * tokens * longest


def sampler_memory(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> SamplerMemory:
    """What vLLM takes of a rank: --memory-fraction of a GPU; on a CPU its weights and 1 GiB of KV cache."""
    shape, on_gpu = base.config, launch.device == "cuda"
    size = sampler_itemsize(cfg, on_gpu)
    tp = cfg.tensor_parallel
    weights = n_weights(base) * size / tp  # vLLM's copy; nf4 is written out in full
    work = 0.0
    if on_gpu:
        weights += slot_bytes(cfg, base) / tp
        sequences = min(cfg.sequences(launch.ranks - cfg.ranks_apart), MOST_SEQUENCES["cuda"])
        batch = prompt_batch(sequences, launch.rank_bytes)
        work = batch * (3 * shape.intermediate_size / tp + 4 * shape.hidden_size) * size
        work += 2 * 4 * sequences * shape.vocab_size / tp  # float32 logits, and their log-probs
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size(shape) * size  # keys and values
    return SamplerMemory(
        weights=weights,
        work=work,
        cache=cfg.memory_fraction * launch.rank_bytes - weights - work if on_gpu else float(GIB),
        response=token * ((cfg.max_prompt_tokens + cfg.max_response_tokens) / tp),
    )


def linear_layers(base: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for layer in base.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]


def sampler_itemsize(cfg: OnlineConfig, on_gpu: bool) -> int:
    """Bytes of a number in vLLM: of a weight, of a key."""
    return getattr(torch, sampler_dtype(cfg, on_gpu)).itemsize


def trained_itemsize(cfg: OnlineConfig) -> int:
    """Bytes of one trained weight: LoRA weights are float32 whatever the base is."""
    return 4 if cfg.lora_rank else getattr(torch, cfg.dtype).itemsize


def trained_bytes(cfg: OnlineConfig, base: torch.nn.Module) -> int:
    """Bytes of all trained weights, unsharded: the adapter, or every weight."""
    n_adapter = sum(cfg.lora_rank * (m.in_features + m.out_features) for m in linear_layers(base))
    return (n_adapter if cfg.lora_rank else n_weights(base)) * trained_itemsize(cfg)


def slot_bytes(cfg: OnlineConfig, base: torch.nn.Module) -> float:
    """Bytes of vLLM's slots for the adapter on a GPU, which are in the dtype of its weights."""
    if not cfg.lora_rank or cfg.engine != "vllm":
        return 0.0
    if merges_adapter(cfg.sampler_lora, str(cfg.model), cfg.dtype, on_gpu=True):
        return 0.0
    slot = replace(cfg, lora_rank=vllm_rank(cfg.lora_rank))
    return trained_bytes(slot, base) / trained_itemsize(cfg) * sampler_itemsize(cfg, on_gpu=True)


def critic_bytes(cfg: OnlineConfig, weights: float, trained: float, moment: float) -> float:
    """Bytes of PPO's critic without its gradients: what it trains, its moments, and its base where it shares none.

    weights, trained, moment: the policy's; a critic is taken to have its shape. Its activations are gone before the policy's.
    """
    if cfg.algorithm != "PPO":
        return 0.0
    own_base = cfg.critic or not cfg.lora_rank
    return (weights if own_base else 0.0) + trained * ((1 if cfg.lora_rank else 0) + 2 * moment)


def activation_bytes(cfg: OnlineConfig, base: Any, tokens: float, on_gpu: bool) -> float:
    """Bytes that a packed row of `tokens` tokens takes when its backward pass begins, without scores of attention."""
    shape = base.config
    h, size = shape.hidden_size, getattr(torch, cfg.dtype).itemsize
    # with --checkpointing the input of every layer (--keep-attention: and its attention's output), and all of the one layer
    # that is computed again
    layer, n_layers = layer_bytes_per_token(cfg, base, size, on_gpu), shape.num_hidden_layers
    again = h * size + (attention_bytes(shape, size) if cfg.keep_attention else 0)
    kept = n_layers * again + layer if cfg.checkpointing else n_layers * layer
    # gradients of the three large tensors of the last MLP; what the last norm and the head keep, and two gradients
    return tokens * (kept + 3 * size * shape.intermediate_size + 5 * size * h)


def layer_bytes_per_token(cfg: OnlineConfig, base: Any, size: int, on_gpu: bool) -> float:
    """Bytes that autograd keeps per token of one decoder layer. size: bytes of an activation between layers."""
    shape = base.config
    h, i = shape.hidden_size, shape.intermediate_size
    kv = shape.num_key_value_heads * head_size(shape)
    q = shape.num_attention_heads * head_size(shape)
    kernels = on_gpu and cfg.lora_rank and shape.model_type in OURS
    # what such a norm or MLP makes for linear layers with our adapter (trainer/model/lora.py) is made again, and not kept
    again = kernels and cfg.quantize == "none"
    # two norms: the input (PyTorch's operations keep it in float32), and the output, which is the linear layers' input
    norms = 2 * h * ((size if kernels else 4) + (0 if again else size))
    # the inputs of others: of queries and keys (Qwen 3, OLMo 2), and after attention and MLP (Gemma 2 and 3, GLM-4)
    norms += (size if kernels else 4) * (sum(norm_widths(base, h, q, kv)) - 2 * h)
    if cfg.lora_rank and cfg.compute_dtype != cfg.dtype:  # --autocast
        # the norms' inputs in float32; q, k, v, gate and up each keep a rounded copy of theirs
        norms, size = 4 * sum(norm_widths(base, h, q, kv)) + 5 * h * 2, 2
    attention = size * (q + 2 * kv) + attention_bytes(shape, size)  # q, k, v, and what attention makes of them
    gated = kernels and shape.hidden_act == "silu"
    # gate, up and their product; PyTorch's operations keep silu(gate) as well
    mlp = size * i * (4 if not gated else 2 if again else 3)
    lora = 7 * size * cfg.lora_rank  # x A of each of the 7 linear layers
    # trained too: the normalised input
    weights_of_norms = 0 if cfg.lora_rank else size * sum(norm_widths(base, h, q, kv))
    return norms + attention + mlp + lora + weights_of_norms


def norm_widths(base: Any, h: int, q: int, kv: int) -> list[int]:
    """Numbers per token that each norm of a decoder layer takes. h, q, kv: widths of a layer's input, queries and keys."""
    of_heads = {"q": q, "k": kv}
    names = [n for n, m in base.model.layers[0].named_modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")]
    return [of_heads.get(name.rpartition(".")[2].partition("_")[0], h) for name in names]


def attention_bytes(shape: Any, size: int) -> int:
    """Bytes per token of the output of one layer's attention, with its float32 logsumexp."""
    return shape.num_attention_heads * (size * head_size(shape) + 4)


def autocast_bytes(cfg: OnlineConfig, trained: float, base: torch.nn.Module) -> float:
    """Bytes of weights rounded to bfloat16, which autocast keeps for backward; with checkpointing those of a layer only.

    The adapter's always, since it is in float32; of a base in float32 its own beside them.
    """
    if not cfg.lora_rank or cfg.compute_dtype != "bfloat16":
        return 0.0
    adapter = 0.0 if cfg.checkpointing else trained / 2
    if cfg.dtype != "float32" or cfg.quantize != "none":
        return adapter
    layers = sum(m.weight.numel() for m in linear_layers(base)) / (len(base.model.layers) if cfg.checkpointing else 1)
    return adapter + 2.0 * (layers + base.config.vocab_size * base.config.hidden_size)


def n_weights(module: torch.nn.Module) -> int:
    """Number of weights; a tied head counts once."""
    return sum(p.numel() for p in module.parameters())


def gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"
