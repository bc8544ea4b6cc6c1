"""Before a model is loaded: do settings and launch fit together, and does a rank have the memory?

Memory is an estimate: exact for weights, adapter, gradients and AdamW; for activations a count of what autograd keeps of one
packed row at its longest (tests/test_preflight.py compares it with what autograd does keep).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from data.errors import UserError
from rollout.vllm_engine import vllm_rank
from trainer.config import GrpoConfig
from trainer.model.cost import head_size

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes there are, or will be."""

    nodes: int
    ranks_per_node: int
    rank_bytes: float
    """Memory a rank may use: of its GPU, or its share of what is free here."""
    device: str

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    what: str
    value: str
    problem: str = ""
    """One sentence with the remedy; "" when all is well."""


def launch_of(cfg: GrpoConfig) -> Launch:
    """From torchrun's variables; --nodes, --ranks-per-node and --rank-gib describe a machine that is not this one."""
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
    """The checkpoint's config.json. Raises UserError when there is none."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"--model {model_dir}: no Hugging Face checkpoint there (config.json is missing); to check the paper's "
            "shape without one, name launch/recipes/qwen2.5-7b"
        )
    return json.loads(path.read_text())


def check(cfg: GrpoConfig, launch: Launch) -> list[Row]:
    """World, placement, lengths and ranks; nothing is loaded."""
    model = model_config(str(cfg.model))
    split = cfg.placement == "split"
    trainers = launch.ranks - cfg.ranks_apart
    tp, longest = cfg.tensor_parallel, cfg.max_prompt_tokens + cfg.max_response_tokens
    scaling = (model.get("rope_scaling") or {}).get("factor", 1)
    context = int(model.get("max_position_embeddings", longest) * scaling)
    heads = model.get("num_attention_heads", tp)
    kv_heads = model.get("num_key_value_heads", heads)
    share = max(trainers, 1) * cfg.updates_per_batch
    samplers = (cfg.sampler_ranks if split else launch.ranks) // tp

    rows: list[Row] = []

    def row(what: str, value: str, *demands: tuple[bool, str]) -> None:
        rows.append(Row(what=what, value=value, problem=next((problem for good, problem in demands if not good), "")))

    who = f"{max(trainers, 0)} train, {samplers} samplers of {tp}" + ("" if split else " (the same ranks)")
    row(
        "world",
        f"{launch.nodes} nodes x {launch.ranks_per_node} ranks on {launch.device}; {who}",
        (
            trainers > 0,
            f"--sampler-ranks {cfg.sampler_ranks}: the launch has {launch.ranks} ranks, and at least one must train",
        ),
    )
    row(
        "tensor parallel",
        f"{tp} of {heads} heads",
        (split or launch.ranks % tp == 0, f"--tensor-parallel {tp}: must divide the {launch.ranks} ranks"),
        (heads % tp == 0, f"--tensor-parallel {tp}: must divide the model's {heads} attention heads"),
        (
            kv_heads % tp == 0 or tp % kv_heads == 0,
            f"--tensor-parallel {tp}: must divide the model's {kv_heads} key-value heads, or be a multiple of them",
        ),
        (
            launch.ranks_per_node % tp == 0,
            f"--tensor-parallel {tp}: must divide the {launch.ranks_per_node} ranks of a node",
        ),
    )
    row(
        "batch",
        f"{cfg.prompts_per_step} prompts x {cfg.group_size} responses, {cfg.updates_per_batch} update(s)",
        (
            cfg.prompts_per_step % share == 0,
            f"--prompts-per-step {cfg.prompts_per_step}: must be a multiple of ranks that train "
            f"x --updates-per-batch ({trainers} x {cfg.updates_per_batch})",
        ),
    )
    row(
        "tokens",
        f"{cfg.max_prompt_tokens} + {cfg.max_response_tokens} of {context}",
        (
            longest <= context,
            f"--max-prompt-tokens {cfg.max_prompt_tokens} + --max-response-tokens {cfg.max_response_tokens}: "
            f"more than the model's {context} positions",
        ),
    )
    adapter = f"rank {cfg.lora_rank}" if cfg.lora_rank else "none: every weight is trained and shipped"
    problem = ""
    if cfg.engine == "vllm" and cfg.lora_rank:
        try:
            adapter += f", in vLLM's slot of {vllm_rank(cfg.lora_rank)}"
        except ValueError as error:
            problem = str(error)
    rows.append(Row(what="LoRA", value=adapter, problem=problem))
    return rows


def refuse_problems(rows: list[Row]) -> None:
    """Raises UserError with the first problem."""
    for row in rows:
        if row.problem:
            raise UserError(row.problem)


def memory(cfg: GrpoConfig, launch: Launch) -> list[Row]:
    """What a rank needs, in GiB: while it trains and while it samples; the larger must fit."""
    from trainer.logprobs import CHUNK_LOGITS
    from trainer.model.sharding import empty_model  # it loads transformers, and check() should answer at once

    base = empty_model(str(cfg.model), getattr(torch, cfg.dtype), "sdpa")
    size = getattr(torch, cfg.dtype).itemsize
    split = cfg.placement == "split"
    shards = launch.ranks - cfg.ranks_apart if cfg.shard == "fsdp" else 1
    n_base, n_layer = count(base), count(base.model.layers[0])
    linears = [m for layer in base.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    n_trained = sum(cfg.lora_rank * (m.in_features + m.out_features) for m in linears) if cfg.lora_rank else n_base
    trained_size = 4 if cfg.lora_rank else size
    copies = 1 if cfg.lora_rank or not cfg.beta else 2  # a frozen reference beside
    weights = float(n_base * size)
    if cfg.quantize == "nf4":  # half a byte, and a float32 scale per 64
        weights -= sum(m.weight.numel() for m in linears) * (size - 0.5 - 4 / 64)
    moment_size = 1 if cfg.optimizer == "adamw8bit" else trained_size
    parts = {
        "weights": copies * weights / shards,
        "gathered layers": 0.0 if shards == 1 else (2 * n_layer + (n_base - n_layer * len(base.model.layers))) * size,
        "adapter": n_trained * 4 / shards if cfg.lora_rank else 0.0,
        "gradients": n_trained * trained_size / shards,
        "AdamW moments": 2 * n_trained * moment_size / shards,
        "activations": activation_bytes(cfg, base.config),
        "logits": min(CHUNK_LOGITS, 1024 * base.config.vocab_size) * 4.0,
    }
    training = sum(parts.values())
    per_rank = n_base * size / cfg.tensor_parallel
    if launch.device == "cuda":
        sampler = cfg.memory_fraction * launch.rank_bytes
        cache = sampler - per_rank
    else:
        cache = float(GIB)
        sampler = per_rank + cache
    one = 2 * base.config.num_hidden_layers * base.config.num_key_value_heads * head_size(base.config) * size
    one *= (cfg.max_prompt_tokens + cfg.max_response_tokens) / cfg.tensor_parallel
    here = 0.0 if split or cfg.engine == "torch" else sampler
    kept = parts["weights"] + parts["adapter"] + parts["gradients"] + parts["AdamW moments"]
    handed_over = 2 * n_trained * trained_size  # gathered, and side by side in a parcel
    peak = max(training, kept + handed_over + here) if launch.device == "cuda" else training + handed_over + here
    rows = [Row(what=f"  {name}", value=gib(value)) for name, value in parts.items() if value]
    rows.append(Row(what="while training", value=gib(training)))
    rows.append(Row(what="kept while sampling", value=f"{gib(kept)}, and {gib(handed_over)} at a hand-over"))
    if cfg.engine == "vllm":
        holds = (
            f"{gib(sampler)}: weights {gib(per_rank)}, KV cache for {max(cache, 0) / one:.1f} responses at full length"
        )
        too_small = "the KV cache holds no response of full length: raise --memory-fraction or --tensor-parallel"
        what = "sampler" + (" (its own ranks)" if split else "")
        rows.append(Row(what=what, value=holds, problem="" if cache > one else too_small))
    too_much = peak > launch.rank_bytes or (split and sampler > launch.rank_bytes)
    rows.append(
        Row(
            what="a rank's peak",
            value=f"{gib(peak)} of {gib(launch.rank_bytes)}",
            problem="a rank needs more memory than there is: --shard fsdp, --checkpointing, a smaller --micro-tokens or "
            "--lora-rank, or --dtype bfloat16"
            if too_much
            else "",
        )
    )
    return rows


def activation_bytes(cfg: GrpoConfig, shape: Any) -> float:
    """What autograd keeps of the longest packed row."""
    tokens = max(cfg.micro_tokens, cfg.max_prompt_tokens + cfg.max_response_tokens)
    size = getattr(torch, cfg.dtype).itemsize
    layer = layer_bytes_per_token(cfg, shape, size)
    if cfg.checkpointing:
        return tokens * ((shape.num_hidden_layers + 3) * shape.hidden_size * size + layer)
    return tokens * (shape.num_hidden_layers * layer + 3 * shape.hidden_size * size)


def layer_bytes_per_token(cfg: GrpoConfig, shape: Any, size: int) -> float:
    """Of one decoder layer. A norm keeps its input twice in float32 and once scaled; a LoRA layer its input and x A."""
    h, i = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * head_size(shape), shape.num_key_value_heads * head_size(shape)
    norms = 2 * (2 * 4 * h + size * h)
    attention = size * (q + 2 * kv + q)
    mlp = size * 4 * i
    linear_inputs = size * (h + q + h + i)
    lora = 7 * size * cfg.lora_rank
    return norms + attention + mlp + linear_inputs + lora


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def table(rows: list[Row]) -> str:
    """The rows as text; a problem stands under its row."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.what:<{width}}  {row.value}")
        if row.problem:
            lines.append(f"{'':<{width}}  PROBLEM: {row.problem}")
    return "\n".join(lines)
