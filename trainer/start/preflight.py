"""Checks before a model is loaded: do settings and launch fit together, and does a rank have enough memory?

The memory is exact for weights, adapter, gradients and AdamW. For activations it is a count of the tensors that autograd
keeps of one packed row at its longest. tests/trainer/test_preflight.py holds it to what autograd keeps, and to what runs
of the 7B shape took on a GPU (within 15 %).
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
from rollout.vllm_versions import MOST_SEQUENCES, prompt_batch
from trainer.config import OnlineConfig
from trainer.model.cost import head_size
from trainer.ranks.world import gpu_problem

GIB = 1 << 30
CONTEXT = 0.7 * GIB
"""Of a process on a GPU beside torch's tensors: CUDA's context and libraries (a common value; not measured apart)."""
ASLEEP = 0.5 * GIB
"""What vLLM keeps on a GPU while it sleeps: CUDA graphs and workspaces (an upper estimate; not measured apart)."""
GAPS = 0.03
"""Memory that torch's allocator holds beyond the tensors, as a share of them: blocks are rounded up, and have gaps."""


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
    """The launch, from torchrun's variables; or the machine of --nodes, --ranks-per-node and --rank-gib.

    Raises UserError where this machine has a GPU that torch cannot use.
    """
    per_node = cfg.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = cfg.nodes or max(1, int(os.environ.get("WORLD_SIZE", 1)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    elsewhere = bool(cfg.nodes or cfg.ranks_per_node or cfg.rank_gib)
    device = "cuda" if torch.cuda.is_available() or (elsewhere and cfg.rank_gib) else "cpu"
    if device == "cpu" and not elsewhere and (problem := gpu_problem()):
        raise UserError(problem)
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
    parts, by = batch_parts(cfg)
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


def batch_parts(cfg: OnlineConfig) -> tuple[int, str]:
    """(Parts into which a sampled batch is cut, one for each optimizer step; the option that says so)."""
    return (cfg.minibatches, "minibatches") if cfg.algorithm == "PPO" else (cfg.updates_per_batch, "updates-per-batch")


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
    """{what: bytes} that is there all the time, also while the sampler works."""
    gathered: float
    """Whole tensors that a hand-over makes of sharded ones."""
    backward: dict[str, float]
    """{what: bytes} of the largest packed row, when its backward pass begins."""
    one_row: bool
    """Does an optimizer step have a single packed row? Then there are no gradients yet when its backward begins."""
    optimizer: float
    """What the optimizer step holds besides."""

    @property
    def peak(self) -> float:
        """Of a training step. This is what torch.cuda.max_memory_allocated() reports."""
        backward = sum(self.backward.values()) - (self.kept["gradients"] if self.one_row else 0.0)
        return sum(self.kept.values()) + max(backward, self.optimizer)


def estimate_memory(cfg: OnlineConfig, launch: Launch) -> list[Row]:
    """Estimate the memory of a rank while it trains and while it samples; the larger of both must fit.

    On a GPU a rank takes more than what torch has allocated: CONTEXT, ASLEEP, and the gaps between blocks (GAPS).
    """
    from trainer.model.loading import empty_model  # loads transformers, and check_launch() must answer at once

    base = empty_model(str(cfg.model), getattr(torch, cfg.dtype), "sdpa")
    split, on_gpu = cfg.placement == "split", launch.device == "cuda"
    memory = training_memory(cfg, launch, base)
    sampler = sampler_memory(cfg, launch, base)
    here = 0.0 if split or cfg.engine == "torch" else sampler.total
    kept = sum(memory.kept.values())
    beside = CONTEXT + GAPS * memory.peak + (ASLEEP if here else 0.0) if on_gpu else 0.0
    training = memory.peak + beside
    # on a GPU vLLM sleeps while the trainer runs, so the two peaks do not add up; on a CPU it keeps its memory
    sampling = kept + memory.gathered + here + (CONTEXT + GAPS * kept if on_gpu else 0.0)
    peak = max(training, sampling) if on_gpu else training + memory.gathered + here
    rows = [
        Row(what=f"  {name}", value=gib(value)) for name, value in {**memory.kept, **memory.backward}.items() if value
    ]
    if on_gpu:
        rows.append(
            Row(what="  CUDA and gaps", value=f"{gib(beside)} (context, libraries, graphs, unused parts of blocks)")
        )
    rows.append(Row(what="while training", value=gib(training)))
    rows.append(Row(what="while sampling", value=f"{gib(sampling)}, of which the trainer keeps {gib(kept)}"))
    if cfg.engine == "vllm":
        rows.append(
            _row(
                "sampler" + (" (its own ranks)" if split else ""),
                f"{gib(sampler.total)}: weights {gib(sampler.weights)}, batches {gib(sampler.work)}, KV cache for "
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
                "--lora-rank, or --dtype bfloat16"
                if training >= sampling or not on_gpu
                else "a rank needs more memory than it has for trainer and sampler together: use a smaller "
                "--memory-fraction, --quantize nf4, --optimizer adamw8bit or --shard fsdp",
            ),
        )
    )
    return rows


def training_memory(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> TrainingMemory:
    """The memory of a rank while it trains. base: the model without its weights."""
    from trainer.logprobs import CHUNK_LOGITS

    size = getattr(torch, cfg.dtype).itemsize
    trainers = max(1, launch.ranks - cfg.ranks_apart)
    shards = trainers if cfg.shard == "fsdp" else 1
    n_base, n_layer, n_layers = n_weights(base), n_weights(base.model.layers[0]), len(base.model.layers)
    copies = 1 if cfg.lora_rank or not cfg.beta else 2  # without an adapter the reference is a second, frozen copy
    weights = float(n_base * size)
    if cfg.quantize == "nf4":  # 4 bits per weight, and a float32 scale per block of 64 (QLoRA, arXiv:2305.14314)
        weights -= sum(m.weight.numel() for m in linear_layers(base)) * (size - 0.5 - 4 / 64)
    trained = trained_bytes(cfg, base)
    eight_bits = cfg.optimizer == "adamw8bit"
    moment = 1 / trained_itemsize(cfg) if eight_bits else 1  # 8 bits: one byte per moment
    of_step = cfg.prompts_per_step / (trainers * batch_parts(cfg)[0])
    of_step *= cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    tokens = max(min(cfg.micro_tokens, of_step), cfg.max_prompt_tokens + cfg.max_response_tokens)
    return TrainingMemory(
        kept={
            "weights": copies * weights / shards,
            "adapter": trained / shards if cfg.lora_rank else 0.0,  # else it is part of the weights
            "gradients": trained / shards,
            "AdamW moments": 2 * trained * moment / shards,
            "critic": critic_bytes(cfg, weights, trained, moment),
            "copy to hand over": float(trained),  # rollout/sync.py, Parcel: made once and filled again
        },
        gathered=float(trained) if shards > 1 else 0.0,
        backward={
            # FSDP prefetches: two layers are whole at a time, beside embedding, norm and head
            "gathered layers": 0.0 if shards == 1 else (2 * n_layer + (n_base - n_layer * n_layers)) * size,
            "activations": activation_bytes(cfg, base.config, tokens) + autocast_bytes(cfg, trained),
            # of a chunk of at most 1024 tokens: in float32, and rounded for the product with the head
            "logits": min(CHUNK_LOGITS, 1024 * base.config.vocab_size) * (4.0 + (size if size < 4 else 0)),
        },
        one_row=of_step <= cfg.micro_tokens,
        # the roots of the second moments, of all weights at once on a GPU
        optimizer=trained / shards if launch.device == "cuda" and not eight_bits else 0.0,
    )


def sampler_memory(cfg: OnlineConfig, launch: Launch, base: torch.nn.Module) -> SamplerMemory:
    """What vLLM takes of a rank: --memory-fraction of a GPU; on a CPU its weights and 1 GiB of KV cache."""

    size, shape, on_gpu = getattr(torch, cfg.dtype).itemsize, base.config, launch.device == "cuda"
    tp = cfg.tensor_parallel
    weights = n_weights(base) * size / tp  # vLLM's copy; nf4 is written out in full
    work = 0.0
    if on_gpu:
        weights += trained_bytes(cfg, base) / trained_itemsize(cfg) * size / tp if cfg.lora_rank else 0.0
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


def trained_itemsize(cfg: OnlineConfig) -> int:
    """Bytes of one trained weight: LoRA weights are float32 whatever the base is."""
    return 4 if cfg.lora_rank else getattr(torch, cfg.dtype).itemsize


def trained_bytes(cfg: OnlineConfig, base: torch.nn.Module) -> int:
    """Bytes of all trained weights, unsharded: the adapter, or every weight."""
    n_adapter = sum(cfg.lora_rank * (m.in_features + m.out_features) for m in linear_layers(base))
    return (n_adapter if cfg.lora_rank else n_weights(base)) * trained_itemsize(cfg)


def critic_bytes(cfg: OnlineConfig, weights: float, trained: float, moment: float) -> float:
    """Bytes of PPO's critic: what it trains, its gradients and moments, and its base where it shares none.

    weights, trained, moment: the policy's; a critic is taken to have its shape. Its activations are gone before the policy's.
    """
    if cfg.algorithm != "PPO":
        return 0.0
    own_base = cfg.critic or not cfg.lora_rank
    return (weights if own_base else 0.0) + trained * ((1 if cfg.lora_rank else 0) + 1 + 2 * moment)


def activation_bytes(cfg: OnlineConfig, shape: Any, tokens: float) -> float:
    """Bytes that a packed row of `tokens` tokens takes when its backward pass begins. shape: the model's configuration."""
    h, size = shape.hidden_size, getattr(torch, cfg.dtype).itemsize
    # with --checkpointing the input of every layer, and all of the one layer that is computed again
    layer, n_layers = layer_bytes_per_token(cfg, shape, size), shape.num_hidden_layers
    kept = n_layers * h * size + layer if cfg.checkpointing else n_layers * layer
    # gradients of the three large tensors of the last MLP; what the last norm and the head keep, and two gradients
    return tokens * (kept + 3 * size * shape.intermediate_size + 5 * size * h)


def layer_bytes_per_token(cfg: OnlineConfig, shape: Any, size: int) -> float:
    """Bytes that autograd keeps per token of one decoder layer. size: bytes of an activation."""

    h, i = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_attention_heads * head_size(shape), shape.num_key_value_heads * head_size(shape)
    norms = 2 * (4 * h + size * h)  # two norms: the input in float32, and the output, which is the linear layers' input
    attention = size * (q + 2 * kv + q) + 4 * shape.num_attention_heads  # q, k, v, output; float32 logsumexp
    mlp = size * 4 * i  # gate, its activation, up, and their product
    lora = 7 * size * cfg.lora_rank  # x A of each of the 7 linear layers
    weights_of_norms = 0 if cfg.lora_rank else 2 * size * h  # trained too: the normalised input
    return norms + attention + mlp + lora + weights_of_norms


def autocast_bytes(cfg: OnlineConfig, trained: float) -> float:
    """Bytes of the adapter rounded to bfloat16, which autocast keeps for backward; with checkpointing for a layer only."""
    rounded = cfg.lora_rank and cfg.compute_dtype == "bfloat16" and not cfg.checkpointing
    return trained / 2 if rounded else 0.0


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
