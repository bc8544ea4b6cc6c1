"""Checks before a model is loaded: do settings and launch fit together, and does a rank have enough memory?

The memory is exact for weights, adapter, gradients and AdamW. For activations it is an estimate: a count of the tensors
that autograd keeps of one packed row at its longest (tests/trainer/test_preflight.py compares it with what autograd
keeps).
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from data.errors import UserError
from data.files import read_settings
from rollout.vllm_engine import merges_adapter, vllm_rank
from trainer.config import OnlineConfig
from trainer.model.cost import head_size

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes of this launch, or of the machine that --dry-run checks for."""

    nodes: int
    ranks_per_node: int
    rank_bytes: float
    """Memory a rank can use: of its GPU, or its share of this machine's free memory."""
    device: str
    """"cuda" or "cpu"."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    what: str
    value: str
    problem: str = ""
    """One sentence with the remedy; "" if there is none."""


def launch_of(cfg: OnlineConfig) -> Launch:
    """The launch, from torchrun's variables; or the machine of --nodes, --ranks-per-node and --rank-gib."""
    per_node = cfg.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = cfg.nodes or max(1, int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    elsewhere = bool(cfg.nodes or cfg.ranks_per_node or cfg.rank_gib)
    device = "cuda" if torch.cuda.is_available() or (elsewhere and cfg.rank_gib) else "cpu"
    if cfg.rank_gib:
        available = cfg.rank_gib * GIB
    elif device == "cuda":
        available = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        available = psutil.virtual_memory().available / per_node
    return Launch(nodes=nodes, ranks_per_node=per_node, rank_bytes=available, device=device)


def model_config(model_dir: str) -> dict[str, Any]:
    """The checkpoint's config.json. Raises UserError if there is none, and for an adapter in place of a checkpoint."""
    folder = Path(model_dir)
    if (folder / "adapter_config.json").is_file():  # transformers would load it too, over whatever base it names
        raise UserError(
            f"--model {model_dir}: this is an adapter (adapter_config.json is there); merge it into its base with "
            f"launch/export.py --model {model_dir} --out MERGED, and name MERGED"
        )
    if folder.is_file():
        raise UserError(f"--model {model_dir}: is a file; name the folder of the checkpoint")
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model_dir):  # a name on a hub
            raise UserError(
                f"--model {model_dir}: no such folder, and nothing is downloaded from a hub; fetch the model (hf download "
                f"{model_dir} --local-dir FOLDER) and name its folder"
            )
        raise UserError(
            f"--model {model_dir}: no such folder; name the folder of a checkpoint, or, to check the paper's shape without "
            "one, name launch/recipes/qwen2.5-7b"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {model_dir}: no Hugging Face checkpoint there (config.json is missing); to check the paper's "
            "shape without one, name launch/recipes/qwen2.5-7b"
        )
    return read_settings(folder / "config.json")


SCALED = ("linear", "dynamic", "yarn")
"""Kinds of RoPE scaling whose factor is not yet in max_position_embeddings; in the others (llama3, longrope) it is."""


def context_of(model: dict[str, Any]) -> int | None:
    """Positions that a model has; None if its config.json names none. model: config.json, of any age of transformers."""
    positions = model.get("max_position_embeddings")
    # transformers 5 writes rope_parameters, earlier versions rope_scaling; some models have one per kind of layer
    scaling = model.get("rope_parameters") or model.get("rope_scaling") or {}
    scaling = scaling.get("full_attention") or scaling
    kind = scaling.get("rope_type") or scaling.get("type")
    if (
        not positions or kind not in SCALED or str(model.get("model_type")).startswith("gemma3")
    ):  # its 131,072 are scaled
        return positions
    factor = scaling.get("factor") or 1
    if kind == "yarn":  # some checkpoints give the scaled number of positions, some the one before
        return max(positions, int((scaling.get("original_max_position_embeddings") or positions) * factor))
    return int(positions * factor)


def check_launch(cfg: OnlineConfig, launch: Launch) -> list[Row]:
    """Check world, placement, lengths and LoRA rank against each other. Reads config.json only."""
    model = model_config(str(cfg.model))
    split = cfg.placement == "split"
    trainers = launch.ranks - cfg.ranks_apart
    tp, longest = cfg.tensor_parallel, cfg.max_prompt_tokens + cfg.max_response_tokens
    context = context_of(model) or longest
    told = model.get("max_position_embeddings") or longest
    heads = model.get("num_attention_heads", tp)
    kv_heads = model.get("num_key_value_heads", heads)
    # into how many parts a batch is cut, one for each optimizer step
    parts, by = (
        (cfg.minibatches, "minibatches") if cfg.algorithm == "PPO" else (cfg.updates_per_batch, "updates-per-batch")
    )
    share = max(trainers, 1) * parts
    samplers = (cfg.sampler_ranks if split else launch.ranks) // tp
    who = f"{max(trainers, 0)} train, {samplers} samplers of {tp}" + ("" if split else " (the same ranks)")
    return [
        _row(
            "world",
            f"{launch.nodes} nodes x {launch.ranks_per_node} ranks on {launch.device}; {who}",
            (
                trainers > 0,
                f"--sampler-ranks {cfg.sampler_ranks}: the launch has {launch.ranks} ranks, and at least one must "
                "train",
            ),
        ),
        _row(
            "tensor parallel",
            f"{tp} of {heads} heads",
            (split or launch.ranks % tp == 0, f"--tensor-parallel {tp}: must divide the {launch.ranks} ranks"),
            (heads % tp == 0, f"--tensor-parallel {tp}: must divide the model's {heads} attention heads"),
            (
                # vLLM splits the key-value heads over the ranks, or copies each to several ranks
                kv_heads % tp == 0 or tp % kv_heads == 0,
                f"--tensor-parallel {tp}: must divide the model's {kv_heads} key-value heads, or be a multiple of them",
            ),
            (
                # tensor-parallel ranks exchange activations in every layer: fast inside a node only
                launch.ranks_per_node % tp == 0,
                f"--tensor-parallel {tp}: must divide the {launch.ranks_per_node} ranks of a node",
            ),
        ),
        _row(
            "batch",
            f"{cfg.prompts_per_step} prompts x {cfg.group_size} responses, {cfg.updates_per_batch} update(s)",
            (
                # so that every rank scores as many groups, and gets at least one in every update
                cfg.prompts_per_step % share == 0,
                f"--prompts-per-step {cfg.prompts_per_step}: must be a multiple of ranks that train "
                f"x --{by} ({trainers} x {parts})",
            ),
        ),
        _row(
            "tokens",
            f"{cfg.max_prompt_tokens} + {cfg.max_response_tokens} of {context}",
            (
                longest <= context,
                f"--max-prompt-tokens {cfg.max_prompt_tokens} + --max-response-tokens {cfg.max_response_tokens}: "
                f"more than the model's {context} positions",
            ),
            (
                # of YaRN vLLM expects the scaled number in max_position_embeddings
                cfg.engine != "vllm" or longest <= told or not _is_yarn(model),
                f"--max-prompt-tokens {cfg.max_prompt_tokens} + --max-response-tokens {cfg.max_response_tokens}: vLLM takes "
                f"max_position_embeddings {told} of config.json as the end of YaRN's positions; set it to {context} there, "
                "or use --engine torch",
            ),
        ),
        _adapter_row(cfg, launch, model),
    ]


def _is_yarn(model: dict[str, Any]) -> bool:
    return '"yarn"' in json.dumps([model.get("rope_parameters"), model.get("rope_scaling")])


def _row(what: str, value: str, *conditions: tuple[bool, str]) -> Row:
    """conditions: (it holds, the problem if it does not); the first that does not hold is reported."""
    return Row(what=what, value=value, problem=next((problem for holds, problem in conditions if not holds), ""))


def rank_problem(lora_rank: int, model: dict[str, Any]) -> str:
    """What is wrong with a LoRA rank for a model (its config.json); "" if nothing is."""
    size = model.get("hidden_size") or lora_rank
    if lora_rank <= size:
        return ""
    return (
        f"--lora-rank {lora_rank}: more than the model's hidden size {size}, so the adapter would be larger than the weights "
        f"that it changes; use at most {size}, or 0 to train every weight"
    )


def _adapter_row(cfg: OnlineConfig, launch: Launch, model: dict[str, Any]) -> Row:
    if not cfg.lora_rank:
        return Row(what="LoRA", value="none: every weight is trained and sent to the sampler")
    value = f"rank {cfg.lora_rank}"
    if problem := rank_problem(cfg.lora_rank, model):
        return Row(what="LoRA", value=value, problem=problem)
    if cfg.engine != "vllm":
        return Row(what="LoRA", value=value)
    try:
        if merges_adapter(cfg.sampler_lora, str(cfg.model), cfg.dtype, launch.device == "cuda"):
            return Row(what="LoRA", value=f"{value}, added to the sampler's weights")
        return Row(what="LoRA", value=f"{value}, in vLLM's slot of {vllm_rank(cfg.lora_rank)}")
    except UserError as error:
        return Row(what="LoRA", value=value, problem=str(error))


def refuse_problems(rows: list[Row]) -> None:
    """Raises UserError with the first problem."""
    for row in rows:
        if row.problem:
            raise UserError(row.problem)


@dataclass(frozen=True, kw_only=True)
class SamplerMemory:
    """Bytes of one rank of a vLLM sampler."""

    weights: float
    cache: float
    """KV cache; not above 0 if the weights leave no room for it."""
    response: float
    """KV cache of one prompt and response of full length."""

    @property
    def total(self) -> float:
        return self.weights + self.cache


def estimate_memory(cfg: OnlineConfig, launch: Launch) -> list[Row]:
    """Estimate the memory of a rank while it trains and while it samples; the larger of both must fit."""
    from trainer.model.loading import empty_model  # loads transformers, and check_launch() must answer at once

    base = empty_model(str(cfg.model), getattr(torch, cfg.dtype), "sdpa")
    split = cfg.placement == "split"
    parts = training_bytes(cfg, launch, base)
    training = sum(parts.values())
    kept = parts["weights"] + parts["adapter"] + parts["gradients"] + parts["AdamW moments"]
    handed_over = 2.0 * trained_bytes(cfg, base)  # the gathered tensors, and their copy in a parcel
    sampler = sampler_bytes(cfg, launch, base)
    here = 0.0 if split or cfg.engine == "torch" else sampler.total
    # on a GPU vLLM sleeps while the trainer runs, so the two peaks do not add up; on a CPU it keeps its memory
    peak = max(training, kept + handed_over + here) if launch.device == "cuda" else training + handed_over + here
    rows = [Row(what=f"  {name}", value=gib(value)) for name, value in parts.items() if value]
    rows.append(Row(what="while training", value=gib(training)))
    rows.append(Row(what="kept while sampling", value=f"{gib(kept)}, and {gib(handed_over)} at a hand-over"))
    if cfg.engine == "vllm":
        rows.append(
            _row(
                "sampler" + (" (its own ranks)" if split else ""),
                f"{gib(sampler.total)}: weights {gib(sampler.weights)}, KV cache for "
                f"{max(sampler.cache, 0) / sampler.response:.1f} responses at full length",
                (
                    sampler.cache > sampler.response,
                    "the KV cache holds no response of full length: raise --memory-fraction or --tensor-parallel",
                ),
            )
        )
    rows.append(
        _row(
            "peak memory",
            f"{gib(peak)} of {gib(launch.rank_bytes)}",
            (
                peak <= launch.rank_bytes and not (split and sampler.total > launch.rank_bytes),
                "a rank needs more memory than it has: use --shard fsdp, --checkpointing, a smaller --micro-tokens or "
                "--lora-rank, or --dtype bfloat16",
            ),
        )
    )
    return rows


def training_bytes(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> dict[str, float]:
    """{what: bytes} of a rank while it trains. base: the model without its weights."""
    from trainer.logprobs import CHUNK_LOGITS

    size = getattr(torch, cfg.dtype).itemsize
    shards = launch.ranks - cfg.ranks_apart if cfg.shard == "fsdp" else 1
    n_base, n_layer, n_layers = n_weights(base), n_weights(base.model.layers[0]), len(base.model.layers)
    copies = 1 if cfg.lora_rank or not cfg.beta else 2  # without an adapter the reference is a second, frozen copy
    weights = float(n_base * size)
    if cfg.quantize == "nf4":  # 4 bits per weight, and a float32 scale per block of 64 (QLoRA, arXiv:2305.14314)
        weights -= sum(m.weight.numel() for m in linear_layers(base)) * (size - 0.5 - 4 / 64)
    trained = trained_bytes(cfg, base)
    moment = 1 / trained_itemsize(cfg) if cfg.optimizer == "adamw8bit" else 1  # 8 bits: one byte per moment
    return {
        "weights": copies * weights / shards,
        # FSDP prefetches: two layers are whole at a time, beside embedding, norm and head
        "gathered layers": 0.0 if shards == 1 else (2 * n_layer + (n_base - n_layer * n_layers)) * size,
        "adapter": trained / shards if cfg.lora_rank else 0.0,  # else it is part of the weights
        "gradients": trained / shards,
        "AdamW moments": 2 * trained * moment / shards,
        "activations": activation_bytes(cfg, base.config),
        "logits": min(CHUNK_LOGITS, 1024 * base.config.vocab_size) * 4.0,  # float32; 1024 tokens: a chunk of them
    }


def sampler_bytes(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> SamplerMemory:
    """What vLLM takes of a rank: --memory-fraction of a GPU; on a CPU its weights and 1 GiB of KV cache."""
    size, shape = getattr(torch, cfg.dtype).itemsize, base.config
    weights = n_weights(base) * size / cfg.tensor_parallel  # vLLM's copy; nf4 is written out in full
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size(shape) * size  # keys and values
    return SamplerMemory(
        weights=weights,
        cache=cfg.memory_fraction * launch.rank_bytes - weights if launch.device == "cuda" else float(GIB),
        response=token * ((cfg.max_prompt_tokens + cfg.max_response_tokens) / cfg.tensor_parallel),
    )


def linear_layers(base: torch.nn.Module) -> list[torch.nn.Linear]:
    return [m for layer in base.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]


def trained_itemsize(cfg: OnlineConfig) -> int:
    """Bytes of one trained weight: LoRA weights are float32 whatever the base is."""
    return 4 if cfg.lora_rank else getattr(torch, cfg.dtype).itemsize


def trained_bytes(cfg: OnlineConfig, base: torch.nn.Module) -> int:
    """Bytes of all trained weights, unsharded: the adapter, or every weight."""
    n_adapter = sum(cfg.lora_rank * (m.in_features + m.out_features) for m in linear_layers(base))
    return (n_adapter if cfg.lora_rank else n_weights(base)) * trained_itemsize(cfg)


def activation_bytes(cfg: OnlineConfig, shape: Any) -> float:
    """Bytes of the activations that autograd keeps of the longest packed row. shape: the model's configuration."""
    tokens = max(cfg.micro_tokens, cfg.max_prompt_tokens + cfg.max_response_tokens)
    size = getattr(torch, cfg.dtype).itemsize
    layer = layer_bytes_per_token(cfg, shape, size)
    if cfg.checkpointing:  # the input of every layer, and all of the one layer that is computed again
        return tokens * ((shape.num_hidden_layers + 3) * shape.hidden_size * size + layer)
    return tokens * (shape.num_hidden_layers * layer + 3 * shape.hidden_size * size)


def layer_bytes_per_token(cfg: OnlineConfig, shape: Any, size: int) -> float:
    """Bytes that autograd keeps per token of one decoder layer. size: bytes of an activation."""
    h, i = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * head_size(shape), shape.num_key_value_heads * head_size(shape)
    norms = 2 * (2 * 4 * h + size * h)  # two norms; each keeps its input twice in float32, and once scaled
    attention = size * (q + 2 * kv + q)  # q, k, v and the output
    mlp = size * 4 * i  # gate, its activation, up, and their product
    linear_inputs = size * (h + q + h + i)
    lora = 7 * size * cfg.lora_rank  # x A of each of the 7 linear layers
    return norms + attention + mlp + linear_inputs + lora


def n_weights(module: torch.nn.Module) -> int:
    """Number of weights; a tied head counts once."""
    return sum(p.numel() for p in module.parameters())


def gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def format_rows(rows: list[Row]) -> str:
    """The rows as text; each problem on the line below its row."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.what:<{width}}  {row.value}")
        if row.problem:
            lines.append(f"{'':<{width}}  PROBLEM: {row.problem}")
    return "\n".join(lines)
