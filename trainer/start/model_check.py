"""Is a checkpoint one that this trainer can train and ask? Checked before its weights are loaded (launch/check_model.py).

Reads config.json, the tokenizer and the names of the tensors: seconds, whatever the size of the model.
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from data.errors import UserError, first_sentence
from data.files import INDEX, how_to_convert, refuse_pointer, weight_files
from data.prompts import PROBE, PROBE_ANSWER, PROBE_RESPONSE, PROBE_USER, RESPONSE_TAGS, ChatFormat
from data.puzzles import Puzzle
from rollout import Sampling
from rollout.torch_engine import TorchEngine
from trainer.model.loading import (
    RUNS_TOO,
    SHARES_PROMPTS,
    VOCABULARIES,
    Head,
    add_adapter,
    empty_model,
    head_of,
    load_tokenizer,
    load_weights,
    read_config,
    why_not_shared,
)
from trainer.model.opening import run_of
from trainer.policy import Policy
from trainer.start.preflight import Row, model_config, unread_scaling

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Settings that a mixture of experts has, each named by some model."""


def check_model(
    model_dir: str, vllm: bool = True, lora: bool = True, begun: bool = False, dry_run: bool = False
) -> list[Row]:
    """The table of a checkpoint, each row with its problem.

    vllm: it will also be sampled by vLLM. lora: it will get an adapter. begun: by a run that goes on with it as it is.
    dry_run: the folder may hold no more than a config.json.
    """
    shape_only = dry_run and not any(
        found
        for name in ("tokenizer*", *VOCABULARIES, "*.safetensors", "*.bin")
        for found in Path(model_dir).glob(name)
    )
    settings = model_config(model_dir)
    try:
        trained = begun or run_of(Path(model_dir))  # with that attention, and to mend it now would be another model
        if (problem := unread_scaling(settings)) and not trained:
            raise UserError(f"--model {model_dir}: {problem}")
        refuse_unservable(model_dir, read_config(model_dir), vllm)
        base = empty_model(model_dir, torch.float32, "sdpa")  # the structure alone, without weights
        head = head_of(base, model_dir)
        files = [] if shape_only else readable_files(Path(model_dir))
        rows = [architecture_row(base), head_row(model_dir, base, head)]
        if files and not rows[-1].problem:  # it would be said twice
            rows += weights_rows(model_dir, files)
        why = why_not_shared(base.config)
        value = f"one row per response, since {why}" if why else "responses share a prompt"
        rows += [Row(what="packing", value=value), adapter_row(base, lora)]
    except UserError as error:
        rows = [Row(what="architecture", value=str(settings.get("model_type")), problem=str(error))]
    if shape_only:
        return rows
    try:
        return rows + chat_rows(ChatFormat(load_tokenizer(model_dir), model_dir), settings)
    except UserError as error:
        return [*rows, Row(what="chat", value="", problem=str(error))]


def refuse_unservable(model_dir: str, shape: PretrainedConfig, vllm: bool) -> None:
    """Raises UserError for a mixture of experts, and for what vLLM is known to refuse."""
    windowed = {kind == "sliding_attention" for kind in getattr(shape, "layer_types", None) or []}
    if experts := next((name for name in EXPERTS if getattr(shape, name, None)), None):
        raise UserError(
            f"--model {model_dir}: a mixture of experts ({experts} {getattr(shape, experts)}), whose experts an adapter "
            "does not reach; use a dense model"
        )
    if vllm and len(windowed) == 2 and getattr(shape, "use_sliding_window", False):
        raise UserError(
            f"--model {model_dir}: only some layers attend in a sliding window (use_sliding_window, max_window_layers "
            f"{shape.max_window_layers}), which vLLM refuses; where prompt and response fit the window of "
            f"{shape.sliding_window} tokens set use_sliding_window to false in its config.json, else use --engine torch"
        )


def architecture_row(base: PreTrainedModel) -> Row:
    kind = base.config.model_type
    value = f"{type(base).__name__}, {sum(p.numel() for p in base.parameters()):,} weights"
    if kind not in (*SHARES_PROMPTS, *RUNS_TOO):
        value += (
            f" ({kind} is none of the types that our tests run, and vLLM may not load it; log-probs are compared with "
            "those of its own class before it is trained, but not under --shard fsdp)"
        )
    return Row(what="architecture", value=value)


def head_row(model_dir: str, base: PreTrainedModel, head: Head) -> Row:
    """Does config.json say the truth about the head? A wrong one would be trained and served as two different models."""
    tied, problem = base.config.tie_word_embeddings, ""
    stored, embedding = (find_tensor(Path(model_dir), name) for name in ("lm_head.weight", "embed_tokens.weight"))
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


def readable_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint. Raises UserError for one that is missing, cut, or a pointer of Git LFS."""
    pickled = not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file()
    files = sorted(folder.glob("pytorch_model*.bin")) if pickled else weight_files(folder)
    if not files:
        raise UserError(
            f"--model {folder}: no weights there (model.safetensors is missing); copy all files of the model"
        )
    for path in files:
        refuse_pointer(path)
        try:
            if pickled and not zipfile.is_zipfile(path):  # PyTorch's files have been zip archives since 2020
                raise UserError(
                    f"--model {folder}: a weight file is damaged ({path.name}: it has no end); copy it again"
                )
            if not pickled:
                with safe_open(path, "pt"):
                    pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"--model {folder}: a weight file is damaged ({path.name}: {first_sentence(error)}); copy it again"
            ) from None
    return files


def weights_rows(model_dir: str, files: list[Path]) -> list[Row]:
    """Do the files hold the weights that config.json asks for? Compares names and shapes as transformers will load them."""
    value, unexpected, problem = f"in {len(files)} file(s), {files[0].name}", [], ""
    try:
        _, unexpected = load_weights(model_dir, device_map="meta")
    except UserError as error:
        problem = str(error)
    pickled, names = files[0].suffix == ".bin", set()
    if not pickled:
        for path in files:
            with safe_open(path, "pt") as handle:
                names |= set(handle.keys())
    # transformers finds the weights under these names too; vLLM and the merge of an adapter do not
    if not problem and "embed_tokens.weight" in names:
        problem = (
            f"--model {model_dir}: its weights were saved without their head, as embed_tokens.weight and not "
            f"model.embed_tokens.weight, which vLLM and the export cannot use; {how_to_convert(model_dir)}"
        )
    rows = [Row(what="weights", value=value, problem=problem)]
    if pickled:
        rows.append(
            Row(what="note", value=f"the cold start and the export need safetensors; {how_to_convert(model_dir)}")
        )
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        rows.append(
            Row(what="note", value=f"the weight files hold {unexpected[0]}{more}, which the model has no place for")
        )
    return rows


def adapter_row(base: PreTrainedModel, lora: bool) -> Row:
    """The linear layers that get an adapter. Changes base: it then has one."""
    layers = base.model.layers
    linear = [name for name, module in layers[0].named_modules() if isinstance(module, torch.nn.Linear)]
    value = f"on {', '.join(name.rpartition('.')[2] for name in linear)} of {len(layers)} layers"
    try:
        if lora:
            add_adapter(base, rank=1, alpha=1.0, seed=0, sharded=True)  # sharded: without values
    except UserError as error:
        return Row(what="LoRA", value=value, problem=str(error))
    return Row(what="LoRA", value=value)


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
    greedy = Sampling.greedy(tokens, policy.chat.stop_ids)
    engine = TorchEngine(policy.model, policy.decoding)
    try:
        ((rollout,),) = engine.generate([puzzle.id], [policy.chat.prompt_ids(puzzle.chat())], greedy)
    except RuntimeError as error:  # shapes that do not fit each other: of the model's own code, given its config.json
        raise UserError(
            f"--model {model_dir}: the model cannot be run as its config.json has it ({first_sentence(error)}); take the "
            "config.json that belongs to it"
        ) from error
    if not all(map(math.isfinite, rollout.sampler_logprobs)):
        raise UserError(
            f"--model {model_dir}: its answer has log-probs that are no finite numbers, although every weight is one; a "
            "weight is far too large, or config.json is of another model"
        )
    return policy.chat.response_text(rollout.response_ids)
