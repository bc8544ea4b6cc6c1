"""Is a checkpoint one that this trainer can train and ask? Checked before its weights are loaded (launch/check_model.py).

Reads config.json, the tokenizer and the names of the tensors: seconds, whatever the size of the model.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from data.errors import UserError
from data.prompts import PROBE, PROBE_ANSWER, PROBE_RESPONSE, PROBE_USER, RESPONSE_TAGS, ChatFormat
from data.puzzles import Puzzle
from rollout import Sampling
from rollout.torch_engine import TorchEngine
from trainer.model.loading import RUNS_TOO, SHARES_PROMPTS, Head, head_of, load_tokenizer, why_not_shared
from trainer.model.sharding import empty_model
from trainer.policy import Policy
from trainer.start.preflight import Row, model_config

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Settings that a mixture of experts has, each named by some model."""


def check_model(model_dir: str, vllm: bool = True) -> list[Row]:
    """The table of a checkpoint, each row with its problem. vllm: it will also be sampled by vLLM."""
    config = model_config(model_dir)
    try:
        base = empty_model(model_dir, torch.float32, "sdpa")  # the structure alone, without weights
        head = head_of(base, model_dir)
        rows = [architecture_row(model_dir, base, vllm), head_row(model_dir, base, head), adapter_row(base)]
        why = why_not_shared(base.config)
        rows.append(
            Row(what="packing", value=f"one row per response, since {why}" if why else "responses share a prompt")
        )
    except UserError as error:
        rows = [Row(what="architecture", value=str(config.get("model_type")), problem=str(error))]
    try:
        return rows + chat_rows(ChatFormat(load_tokenizer(model_dir), model_dir), config)
    except UserError as error:
        return [*rows, Row(what="chat", value="", problem=str(error))]


def architecture_row(model_dir: str, base: PreTrainedModel, vllm: bool) -> Row:
    shape, problem = base.config, ""
    value = f"{type(base).__name__}, {sum(p.numel() for p in base.parameters()):,} weights"
    if shape.model_type not in (*SHARES_PROMPTS, *RUNS_TOO):
        value += (
            f" ({shape.model_type} is none of the types that our tests run; the canary proves it, or stops the run)"
        )
    windowed = {kind == "sliding_attention" for kind in getattr(shape, "layer_types", None) or []}
    if experts := next((name for name in EXPERTS if getattr(shape, name, None)), None):
        problem = (
            f"--model {model_dir}: a mixture of experts ({experts} {getattr(shape, experts)}), whose experts an adapter "
            "does not reach; use a dense model"
        )
    elif vllm and len(windowed) == 2 and getattr(shape, "use_sliding_window", False):
        problem = (
            f"--model {model_dir}: only some layers attend in a sliding window (use_sliding_window, max_window_layers "
            f"{shape.max_window_layers}), which vLLM refuses; where prompt and response fit the window of "
            f"{shape.sliding_window} tokens set use_sliding_window to false in its config.json, else use --engine torch"
        )
    return Row(what="architecture", value=value, problem=problem)


def head_row(model_dir: str, base: PreTrainedModel, head: Head) -> Row:
    """Does config.json say the truth about the head? A wrong one would be trained and served as two different models."""
    tied, problem = base.config.tie_word_embeddings, ""
    try:
        stored, embedding = (find_tensor(Path(model_dir), name) for name in ("lm_head.weight", "embed_tokens.weight"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"--model {model_dir}: a weight file is damaged ({error}); copy it again") from None
    if embedding is not None and not tied and stored is None:
        problem = (
            f"--model {model_dir}: config.json says that the head is a weight of its own (tie_word_embeddings false), but "
            "the weight files hold no lm_head.weight: set it to true, or copy the files again"
        )
    elif embedding is not None and tied and stored is not None and not torch.equal(stored, embedding):
        problem = (
            f"--model {model_dir}: config.json ties the head to the embedding (tie_word_embeddings true), but the weight "
            "files hold another lm_head.weight, which would be ignored: set it to false"
        )
    value = "tied to the embedding" if tied else "a weight of its own"
    value += f", logits capped at {head.softcap:g}" if head.softcap else ""
    value += f", logits divided by {head.divisor:g}" if head.divisor != 1 else ""
    return Row(what="head", value=value, problem=problem)


def adapter_row(base: PreTrainedModel) -> Row:
    """The linear layers that get an adapter."""
    layers = base.model.layers
    linear = [name for name, module in layers[0].named_modules() if isinstance(module, torch.nn.Linear)]
    return Row(what="LoRA", value=f"on {', '.join(name.rpartition('.')[2] for name in linear)} of {len(layers)} layers")


def find_tensor(folder: Path, ending: str) -> torch.Tensor | None:
    """The first rows of the tensor whose name ends so; None if no safetensors file has it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                if name.endswith(ending):
                    return handle.get_slice(name)[:256]
    return None


def chat_rows(asked: ChatFormat, config: dict[str, Any]) -> list[Row]:
    """How the model is asked, as its tokenizer and its chat template have it."""
    tokenizer = asked.tokenizer
    prompt = asked.prompt_text(PROBE)
    tags = [f"{tag} {len(tokenizer.encode(tag, add_special_tokens=False))}" for tag in RESPONSE_TAGS]
    ends = [f"{token} {tokenizer.decode([token])!r} ({', '.join(named)})" for token, named in asked.ends.items()]
    answer = asked.response_ids(PROBE_RESPONSE)
    asked.refuse_unwritable(PROBE_ANSWER.split(" | "))
    return [
        Row(what="vocabulary", value=f"{len(tokenizer):,} tokens, embedding of {config.get('vocab_size', 0):,}"),
        Row(what="prompt ends in", value=repr(prompt.rpartition(PROBE_USER)[2])),
        Row(what="tokens per tag", value=", ".join(tags)),
        Row(what="an answer ends at", value="; ".join(ends)),
        Row(what="the cold start trains", value=f"{answer[-1]} {tokenizer.decode([answer[-1]])!r} as the end of turn"),
        Row(what="read back", value=repr(asked.response_text(answer))),
        *(Row(what="note", value=note) for note in asked.notes),
    ]


def greedy_answer(model_dir: str, puzzle: Puzzle, tokens: int) -> str:
    """What the model says to a puzzle, cut after `tokens` tokens. Loads the weights, in float32."""
    policy = Policy(model_dir, lora_rank=0, lora_alpha=0.0, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    greedy = Sampling(n=1, max_tokens=tokens, temperature=0.0, top_p=1.0, seed=0, stop_ids=policy.chat.stop_ids)
    engine = TorchEngine(policy.model, policy.decoding)
    ((rollout,),) = engine.generate([puzzle.id], [policy.chat.prompt_ids(puzzle.chat())], greedy)
    return policy.chat.response_text(rollout.response_ids)
