"""One Hugging Face checkpoint from a base and an adapter: merged in float32, one file at a time, no model in memory.

LoRA (arXiv:2106.09685): W + s B A with s = alpha / r. DoRA (arXiv:2402.09353): each row of that, scaled to the magnitude m.
With a base that was trained on in 4 bits (QLoRA, arXiv:2305.14314) W is what the 4-bit layers multiplied with.
"""

import fcntl
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
from trainer.model.loading import linear_weights, through_nf4
from trainer.record.runfolder import MAGNITUDE

SAMPLER_BASE = "sampler_base"
INDEX = "model.safetensors.index.json"
SETTINGS = ("config.json", "generation_config.json", INDEX, "README.md", "state.json")
"""Files that are written anew, or a run's own, not copied."""
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
"""Endings of files that hold weights in some format."""
MERGED = ("lora_A.weight", "lora_B.weight", MAGNITUDE, f"{MAGNITUDE}.weight")
"""What an adapter has of a linear layer."""
PLAIN = ("alpha_pattern", "rank_pattern", "modules_to_save", "fan_in_fan_out")
"""Settings of an adapter that are not merged here."""


def merged_weight(weight: Tensor, name: str, adapter: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """[out,in] float32 weight `name` of the checkpoint with its part of the adapter; as it is where there is none."""
    module = "base_model.model." + name.removesuffix(".weight")
    lora_a, lora_b = (adapter.get(f"{module}.lora_{side}.weight") for side in "AB")
    weight = weight.float()
    if lora_a is None or lora_b is None:
        return weight
    if (lora_b.shape[0], lora_a.shape[1]) != tuple(weight.shape) or lora_b.shape[1] != lora_a.shape[0]:
        raise UserError(
            f"the adapter's {module} is {lora_b.shape[0]} x {lora_a.shape[1]}, the base's {name} {tuple(weight.shape)}; is it "
            "the base this adapter was trained on?"
        )
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    weight = weight + (lora_b.float() @ lora_a.float()) * scale
    magnitude = adapter.get(f"{module}.{MAGNITUDE}.weight", adapter.get(f"{module}.{MAGNITUDE}"))
    if magnitude is not None:
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
    held: torch.dtype | None = None,
    extra: dict[str, str] | None = None,
) -> None:
    """Write the checkpoint `base`, with the adapter (PEFT's names and config) merged in, to a new folder.

    Tokenizer, chat template and other files are copied; config.json says the dtype; generation_config.json is made where the
    base has none. quantize "nf4": linear weights go through 4 bits and back first. held: the dtype in which the base was held
    in training; default the file's. extra: {file name: text} to put beside. Whole or not at all.
    Raises UserError when the base has no safetensors or a damaged one, the adapter does not go with it or has settings that
    cannot be merged here, or the folder cannot be written.
    """
    base, partial = Path(base), folder.with_name(folder.name + ".partial")
    files = weight_files(base)
    if unknown := [key for key in PLAIN if (config or {}).get(key)]:
        raise UserError(f"the adapter's {unknown[0]} cannot be merged here; merge it with PEFT (merge_and_unload)")
    four_bit = linear_weights(str(base)) if quantize == "nf4" else set()
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        used: set[str] = set()
        size = 0
        for path in files:
            tensors = {}
            for name, weight in _read(path):
                weight = weight.to(held) if held and weight.is_floating_point() else weight
                weight = through_nf4(weight) if name in four_bit else weight
                if adapter:
                    weight = merged_weight(weight, name, adapter, config or {})
                    used |= {f"base_model.model.{name.removesuffix('.weight')}.{part}" for part in MERGED}
                tensors[name] = weight.to(dtype) if weight.is_floating_point() else weight
            size += sum(t.numel() * t.element_size() for t in tensors.values())
            _save(tensors, partial / path.name, folder)
        if homeless := sorted(set(adapter or {}) - used):
            raise UserError(
                f"{base}: has no weight for the adapter's {homeless[0]}; is it the base this adapter was trained on?"
            )
        _write_settings(base, partial, dtype, size)
        for name, text in (extra or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def weight_files(base: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, else model.safetensors, else all.

    Raises UserError when there is none, or one is missing.
    """
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        files = sorted({base / name for name in index["weight_map"].values()})
    else:
        whole = base / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(base.glob("*.safetensors"))
    if not files:
        raise UserError(f"{base}: no .safetensors file there; name a Hugging Face checkpoint folder")
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{missing[0]}: is missing, though {INDEX} names it; download the checkpoint again")
    return files


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                yield name, handle.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); download or export it again") from None


def _save(tensors: dict[str, Tensor], path: Path, folder: Path) -> None:
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:  # its own error for a disk that is full
        raise UserError(f"{folder}: cannot be written ({error}); make room, or name another folder") from None


def sampler_model(model_dir: str, quantize: str, dtype: str, out: str | Path) -> str:
    """The checkpoint that vLLM samples from: the policy's own base weights.

    With quantize "nf4" a copy in OUT/sampler_base whose linear weights went through 4 bits and back, made by the first
    process of a node that asks; so sampler and trainer stay the same policy, and the canary proves it.
    """
    if quantize == "none":
        return model_dir
    folder = Path(out) / SAMPLER_BASE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(SAMPLER_BASE + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here
        if not (folder / "config.json").is_file():
            held = getattr(torch, dtype)
            write_checkpoint(model_dir, folder, held, quantize=quantize, held=held)
    return str(folder)


def _write_settings(base: Path, folder: Path, dtype: torch.dtype, size: int) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and path.suffix not in OTHER_WEIGHTS and path.name not in SETTINGS:
            shutil.copy(path, folder)
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)  # the older name
    settings.pop("quantization_config", None)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    _write(folder / "config.json", settings)
    if (base / INDEX).is_file():
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
