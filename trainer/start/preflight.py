"""Checks before a model is loaded: do settings and launch fit together? Whether the memory does is in memory.py."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.clusters.known import learned_files_of
from data.errors import UserError
from data.files import read_settings
from data.processes import free_memory
from data.puzzles import Puzzle, read_puzzles, shared_puzzles
from rollout.vllm_versions import merges_adapter, refuse_kernels, vllm_rank
from trainer.config import OnlineConfig
from trainer.model.shared import base_refused, why_two_copies, with_sampler_dtype
from trainer.ranks.world import gpu_problem
from trainer.record.runfolder import settings_of_run

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
        available = free_memory() / per_node
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
    settings = read_settings(folder / "config.json")
    for name in SIZES:
        value = settings.get(name)
        if isinstance(value, list) and name == "intermediate_size":  # one for each layer
            continue
        if value is not None and not (isinstance(value, int) and value > 0):
            raise UserError(
                f"--model {model_dir}: config.json says {name} {value!r}, which must be a whole number of at least 1; take "
                "the config.json that belongs to the model"
            )
    return settings


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Settings of config.json that transformers takes as they are."""
SCALED = ("linear", "dynamic", "yarn")
"""Kinds of RoPE scaling whose factor is not yet in max_position_embeddings; in the others (llama3, longrope) it is."""


def context_of(model: dict[str, Any]) -> int | None:
    """Positions that a model has; None if its config.json names none. model: config.json, of any age of transformers."""
    positions = model.get("max_position_embeddings")
    kind, scaling = _rope_of(model)
    if (
        not positions or kind not in SCALED or str(model.get("model_type")).startswith("gemma3")
    ):  # its 131,072 are scaled
        return positions
    factor = scaling.get("factor") or 1
    if kind == "yarn":  # some checkpoints give the scaled number of positions, some the one before
        return max(positions, int((scaling.get("original_max_position_embeddings") or positions) * factor))
    return int(positions * factor)


def _rope_of(model: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(Kind of RoPE scaling, its settings) of the layers that attend to everything."""
    # transformers 5 writes rope_parameters, earlier versions rope_scaling; some models have one per kind of layer
    scaling = model.get("rope_parameters") or model.get("rope_scaling") or {}
    scaling = scaling.get("full_attention") or scaling
    return scaling.get("rope_type") or scaling.get("type"), scaling


def steady_positions(model: dict[str, Any]) -> float:
    """Tokens up to which a position is rotated alike whatever stands beside it; inf for most models.

    Beyond it transformers rotates by the longest sequence of the pass: to other frequencies (longrope), or ever slower
    (dynamic). A response's log-probs would depend on what it is packed with; vLLM goes by the longest it may get, or not at all.
    """
    kind, scaling = _rope_of(model)
    if kind in ("longrope", "su"):
        name = "original_max_position_embeddings"
        return scaling.get(name) or model.get(name) or math.inf
    return model.get("max_position_embeddings") or math.inf if kind == "dynamic" else math.inf


def unread_scaling(model: dict[str, Any]) -> str:
    """What to mend where config.json scales attention by a name that transformers does not read; "" if all is read.

    DeepSeek-R1-0528-Qwen3-8B names attn_factor, which some programs read as a factor of YaRN's own 0.1 ln(factor) + 1
    (arXiv:2309.00071, Eq. 22): without it the scores of attention are 1.3 times as large. vLLM reads it up to 0.29, and
    attention_factor from 0.30 on; transformers reads attention_factor only.
    """
    kind, scaling = _rope_of(model)
    if kind != "yarn" or (scaling.get("attn_factor") or 1) == 1 or scaling.get("attention_factor") is not None:
        return ""
    meant = float(scaling["attn_factor"]) * (0.1 * math.log(max(scaling.get("factor") or 1, 1)) + 1)
    return (
        "its config.json scales attention by attn_factor, which transformers does not read, so attention is another "
        f'than the authors\'; write "attention_factor": {round(meant, 6)} beside it'
    )


def served_positions(model: dict[str, Any]) -> float:
    """Longest sequence that vLLM may be told of and still rotates as in training; inf for most models.

    Beyond it vLLM takes longrope's long factors for every position, those of a short prompt too; we train with the short ones.
    """
    return steady_positions(model) if _rope_of(model)[0] in ("longrope", "su") else math.inf


def check_launch(cfg: OnlineConfig, launch: Launch) -> list[Row]:
    """Check world, placement, lengths and LoRA rank against each other. Reads config.json and a few weights only."""
    cfg = with_sampler_dtype(cfg, launch.device == "cuda", settings_of_run(cfg))
    model = model_config(str(cfg.model))
    split = cfg.placement == "split"
    trainers = launch.ranks - cfg.ranks_apart
    tp, longest = cfg.tensor_parallel, cfg.max_prompt_tokens + cfg.max_response_tokens
    context = context_of(model) or longest
    told = model.get("max_position_embeddings") or longest
    heads = model.get("num_attention_heads", tp)
    kv_heads = model.get("num_key_value_heads") or heads  # null: as many
    parts, by = batch_parts(cfg)
    share = max(trainers, 1) * parts
    samplers = (cfg.sampler_ranks if split else launch.ranks) // tp
    who = f"{max(trainers, 0)} train, {samplers} samplers of {tp}" + ("" if split else " (the same ranks)")
    return [
        row_of(
            "world",
            f"{launch.nodes} nodes x {launch.ranks_per_node} ranks on {launch.device}; {who}",
            (
                trainers > 0,
                f"--sampler-ranks {cfg.sampler_ranks}: the launch has {launch.ranks} ranks, and at least one must "
                "train",
            ),
        ),
        row_of(
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
        row_of(
            "batch",
            f"{cfg.prompts_per_step} prompts x {cfg.group_size} responses, {cfg.updates_per_batch} update(s)",
            (
                # so that every rank scores as many groups, and gets at least one in every update
                cfg.prompts_per_step % share == 0,
                f"--prompts-per-step {cfg.prompts_per_step}: must be a multiple of ranks that train "
                f"x --{by} ({trainers} x {parts})",
            ),
        ),
        row_of(
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
            (
                longest <= steady_positions(model),
                f"--max-prompt-tokens {cfg.max_prompt_tokens} + --max-response-tokens {cfg.max_response_tokens}: beyond "
                f"{steady_positions(model)} tokens this model turns every position by the longest sequence beside it, the "
                "sampler does not, and another model would be trained; give fewer",
            ),
        ),
        _adapter_row(cfg, launch, model),
        *_base_rows(cfg, launch),
    ]


def _base_rows(cfg: OnlineConfig, launch: Launch) -> list[Row]:
    """One row, or none with --engine torch, which has no base of its own."""
    why = why_two_copies(cfg, launch.device == "cuda")
    if cfg.engine != "vllm" and cfg.base != "shared":
        return []
    value = f"two copies, the trainer's and the sampler's: {why}" if why else "one copy, of trainer and sampler"
    return [row_of("frozen base", value, (not why or cfg.base != "shared", base_refused(why)))]


def batch_parts(cfg: OnlineConfig) -> tuple[int, str]:
    """(Parts into which a sampled batch is cut, one for each optimizer step; the option that says so)."""
    return (cfg.minibatches, "minibatches") if cfg.algorithm == "PPO" else (cfg.updates_per_batch, "updates-per-batch")


def _is_yarn(model: dict[str, Any]) -> bool:
    return '"yarn"' in json.dumps([model.get("rope_parameters"), model.get("rope_scaling")])


def row_of(what: str, value: str, *conditions: tuple[bool, str]) -> Row:
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
        plain = launch.device == "cuda" or not why_two_copies(cfg, on_gpu=False)
        if merges_adapter(cfg.sampler_lora, str(cfg.model), cfg.dtype, plain):
            return Row(what="LoRA", value=f"{value}, added to the sampler's weights")
        refuse_kernels(cfg.sampler_dtype, launch.device == "cuda", cfg.dtype)
        return Row(what="LoRA", value=f"{value}, in vLLM's slot of {vllm_rank(cfg.lora_rank)}")
    except UserError as error:
        return Row(what="LoRA", value=value, problem=str(error))


def refuse_learned(held_out: list[Puzzle], cfg: OnlineConfig) -> str:
    """Raises UserError for held-out puzzles on which --model was trained before, such as those of its cold start.

    Returns a sentence for the user where only donors are shared, or a file is gone, so that nobody can know; else "".
    """
    notes = []
    for file in dict.fromkeys(learned_files_of(str(cfg.model))):  # a cold start and GRPO may name the same
        if not file.is_file():
            notes.append(f"{file}, on which --model was trained, is gone, so a shared puzzle is not seen")
            continue
        learned, what = read_puzzles(file), f"{file}, on which --model was trained"
        shared = shared_puzzles(held_out, learned, by_donor=False)
        if shared and not cfg.resume:  # a run that was begun by an older version may end
            raise UserError(
                f"--validate {cfg.validate}: shares {shared} with {what}; hold out donors first (launch/hold_out.py), then "
                "distill and train on what is left"
            )
        if shared := shared or shared_puzzles(held_out, learned):
            notes.insert(0, f"shares {shared} with {what}, so validation/* will be too good")
    return f"--validate {cfg.validate}: {notes[0]}" if notes else ""


def refuse_problems(rows: list[Row]) -> None:
    """Raises UserError with the first problem."""
    for row in rows:
        if row.problem:
            raise UserError(row.problem)


def format_rows(rows: list[Row]) -> str:
    """The rows as text; each problem on the line below its row."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.what:<{width}}  {row.value}")
        if row.problem:
            lines.append(f"{'':<{width}}  PROBLEM: {row.problem}")
    return "\n".join(lines)
