"""Write one Hugging Face checkpoint from a base and an adapter: merged in float32, one file at a time, without a model.

LoRA (arXiv:2106.09685): W + s B A with s = alpha / r. DoRA (arXiv:2402.09353): each row of W + s B A, scaled to length
m. If the base was held in 4 bits in training (QLoRA, arXiv:2305.14314), W is the weight after the rounding to 4 bits.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import UserError
from data.files import (
    INDEX,
    files_beside_weights,
    model_hashes,
    naming_what_cannot_be_written,
    read_settings,
    replacing_folder,
    wait_for_lock,
    weight_files,
)
from trainer.model.loading import linear_weights, quantised_kind, through_nf4
from trainer.record.runfolder import MAGNITUDE

SAMPLER_BASE = "sampler_base"
MADE_OF = "made_of.json"
"""In it: the dtype, and what the files of the base hash to."""
SETTINGS = ("config.json", "generation_config.json", INDEX, "README.md", "state.json")
"""Files that are not copied from the base: they are written anew, or belong to a run."""
MERGED = ("lora_A.weight", "lora_B.weight", MAGNITUDE, f"{MAGNITUDE}.weight")
"""Names of an adapter's tensors of one linear layer, that can be merged."""
UNSUPPORTED = ("alpha_pattern", "rank_pattern", "modules_to_save", "fan_in_fan_out", "alora_invocation_tokens")
"""Settings of PEFT adapters that cannot be merged here."""


def merged_weight(weight: Tensor, name: str, adapter: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """[out,in] float32 weight `name` of the checkpoint, with its part of the adapter if there is one.

    adapter, config: an adapter in PEFT's format. Raises UserError if their shapes do not fit the weight.
    """
    module = "base_model.model." + name.removesuffix(".weight")  # PEFT's name of it
    lora_a, lora_b = (adapter.get(f"{module}.lora_{side}.weight") for side in "AB")
    weight = weight.float()  # in bfloat16 a small update would be rounded away
    there = [part for part in MERGED if f"{module}.{part}" in adapter]
    if not there:  # a norm, the embedding, the head
        return weight
    if lora_a is None or lora_b is None:
        missing = "lora_A.weight" if lora_a is None else "lora_B.weight"
        raise UserError(f"the adapter has {module}.{there[0]} but no {module}.{missing}; copy the adapter again")
    if (lora_b.shape[0], lora_a.shape[1]) != tuple(weight.shape) or lora_b.shape[1] != lora_a.shape[0]:
        raise UserError(
            f"the adapter's {module} is {lora_b.shape[0]} x {lora_a.shape[1]}, the base's {name} "
            f"{tuple(weight.shape)}; is it the base this adapter was trained on?"
        )
    # rsLoRA (arXiv:2312.03732) divides by sqrt(r)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    weight = weight + (lora_b.float() @ lora_a.float()) * scale
    # its name ends in .weight in a policy's memory and checkpoints, but not in PEFT's files
    magnitude = adapter.get(f"{module}.{MAGNITUDE}.weight", adapter.get(f"{module}.{MAGNITUDE}"))
    if magnitude is not None:  # DoRA: m (W + s B A) / ||W + s B A||, one norm per row (output channel)
        weight = weight * (magnitude.float() / weight.norm(dim=1))[:, None]
    return weight


def write_checkpoint(
    base: str | Path,
    folder: Path,
    dtype: torch.dtype,
    *,
    adapter: dict[str, Tensor] | None = None,
    config: dict[str, Any] | None = None,
    quantize: str = "none",
    base_dtype: torch.dtype | None = None,
    extra: dict[str, str] | None = None,
) -> None:
    """Write the checkpoint `base`, with the adapter (PEFT's names and config) merged in, to a new folder.

    Tokenizer, chat template and other files are copied. config.json gets the new dtype. generation_config.json is made
    if the base has none. quantize "nf4": linear weights are first rounded to 4 bits and back. base_dtype: the dtype of
    the base in training; default the file's. extra: {file name: text} of more files to write. The folder appears
    complete or not at all. Raises UserError if the base has no safetensors file or a damaged one, if the adapter does
    not fit it or has settings that cannot be merged here, or if the folder cannot be written.
    """
    base = Path(base)
    files = weight_files(base)
    if (base / "config.json").is_file() and (quantised := quantised_kind(read_settings(base / "config.json"))):
        raise UserError(f"{base}: {quantised}")
    if unknown := [key for key in UNSUPPORTED if (config or {}).get(key)]:
        raise UserError(f"the adapter's {unknown[0]} cannot be merged here; merge it with PEFT (merge_and_unload)")
    four_bit = linear_weights(str(base)) if quantize == "nf4" else set()
    with replacing_folder(folder) as partial:
        used: set[str] = set()  # names of adapter tensors that found their weight
        size = 0
        for path in files:
            tensors = {}
            for name, weight in _read(path):
                # the order of training: convert to the base's dtype, round to 4 bits, then add the adapter in float32
                weight = weight.to(base_dtype) if base_dtype and weight.is_floating_point() else weight
                weight = through_nf4(weight) if name in four_bit else weight
                if adapter:
                    weight = merged_weight(weight, name, adapter, config or {})
                    used |= {f"base_model.model.{name.removesuffix('.weight')}.{part}" for part in MERGED}
                tensors[name] = weight.to(dtype) if weight.is_floating_point() else weight  # rounded once, at the end
            size += sum(t.numel() * t.element_size() for t in tensors.values())  # bytes
            _save(tensors, partial / path.name, folder)  # under the base's file names, so that its index stays true
        # an adapter of another model would otherwise be dropped silently
        if unused := sorted(set(adapter or {}) - used):
            if not unused[0].endswith((".lora_A.weight", ".lora_B.weight")):
                raise UserError(
                    f"the adapter's {unused[0]} cannot be merged here; merge it with PEFT (merge_and_unload)"
                )
            raise UserError(
                f"{base}: has no weight for the adapter's {unused[0]}; is it the base this adapter was trained on?"
            )
        _write_settings(base, partial, dtype, size)
        for name, text in (extra or {}).items():
            (partial / name).write_text(text, encoding="utf-8")


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, so that memory holds one file of the checkpoint and not the model."""
    try:
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                yield name, handle.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); download or export it again") from None


def _save(tensors: dict[str, Tensor], path: Path, folder: Path) -> None:
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:  # safetensors raises its own error, and not OSError, if the disk is full
        raise UserError(f"{folder}: cannot be written ({error}); make room, or name another folder") from None


def sampler_model(model_dir: str, quantize: str, dtype: str, out: str | Path) -> str:
    """The checkpoint that vLLM samples from: the policy's own base weights.

    With quantize "nf4": a copy in OUT/sampler_base whose linear weights were rounded to 4 bits and back. So sampler and
    trainer have the same weights, and the canary proves it. The first process that calls this writes the copy; one that
    a start with another model or dtype left there is made anew.
    """
    if quantize == "none":
        return model_dir
    folder = Path(out) / SAMPLER_BASE
    made_of = json.dumps({"dtype": dtype, **model_hashes(model_dir)})

    def is_there() -> bool:  # so whole: see the rename in write_checkpoint
        return (folder / MADE_OF).is_file() and (folder / MADE_OF).read_text(encoding="utf-8") == made_of

    if is_there():  # perhaps in a folder of somebody else's
        return str(folder)
    place = folder.with_name(SAMPLER_BASE + ".lock")
    with naming_what_cannot_be_written(place):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(place, "w")  # noqa: SIM115 (closed below)
    with lock:
        wait_for_lock(lock.fileno(), folder)  # sync point: the other ranks of the node wait here for the copy
        if not is_there():
            base_dtype = getattr(torch, dtype)
            write_checkpoint(
                model_dir, folder, base_dtype, quantize=quantize, base_dtype=base_dtype, extra={MADE_OF: made_of}
            )
    return str(folder)


def _write_settings(base: Path, folder: Path, dtype: torch.dtype, size: int) -> None:
    """Copy or rewrite every file that holds no weights. size: bytes of all weights, for the index."""
    for path in files_beside_weights(base):
        if path.name not in SETTINGS:
            shutil.copy(path, folder)
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)  # the older name of dtype
    settings.pop("quantization_config", None)  # the written weights are plain numbers
    settings["dtype"] = str(dtype).removeprefix("torch.")
    _write(folder / "config.json", settings)
    if (base / INDEX).is_file():
        # files keep their names and tensors, so only the size changes
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        _write(folder / INDEX, index)
    if (base / "generation_config.json").is_file():
        shutil.copy(base / "generation_config.json", folder)
    else:
        tokens = {key: settings[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in settings}
        _write(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
