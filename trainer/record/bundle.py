"""Step bundles: one optimizer step on disk, with all it takes to compute its loss and gradient again.

OUT/steps/step-000010/ holds `bundle.json` (settings, responses, how they were packed, what was recorded) and
`tensors.safetensors` (the adapter before the step; per micro-batch the advantages and the sampler's, old and reference
log-probs). The base checkpoint is named, not copied: its reference log-probs show on replay whether it is still the same.
"""

import dataclasses
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UserError
from trainer.config import GrpoConfig
from trainer.packing import Denominators, Group, MicroBatch, make_micro_batch
from trainer.ranks.world import World
from trainer.record.runfolder import provenance, write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What one rank brings to an optimizer step."""

    update: int
    """Which optimizer step of the sampled batch, from 1."""
    micro_batches: list[MicroBatch]
    denominators: Denominators
    """Of the whole optimizer step, all ranks."""
    responses: list[dict[str, Any]]
    """Per row of this rank, its row of rollouts.jsonl."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a bundle says of an optimizer step that is the same on every rank."""

    step: int
    """From 1."""
    config: GrpoConfig
    adapter: dict[str, Tensor]
    """As it was before the step."""
    recorded: dict[str, Any]
    """loss, pg_loss, grad_norm, gradient_hash; empty when the step was refused."""
    problem: str | None
    """Why the step was refused; None when it was made."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle read back. ranks[r] is rank r's part; `responses` rows are numbered rank after rank."""

    path: Path
    step: int
    update: int
    config: GrpoConfig
    threads: int
    denominators: Denominators
    """Of the whole optimizer step, all ranks."""
    adapter: dict[str, Tensor]
    ranks: list[StepInputs]
    recorded: dict[str, Any]
    """loss, pg_loss, grad_norm, gradient_hash."""
    problem: str | None
    versions: dict[str, str]

    @property
    def responses(self) -> list[dict[str, Any]]:
        """The responses of all ranks, in row order."""
        return [response for inputs in self.ranks for response in inputs.responses]


def bundle_folder(out: Path, step: int, update: int, updates: int) -> Path:
    """steps/step-000010, or step-000010-update-2 where a batch gets several updates. step and update from 1."""
    return out / "steps" / (f"step-{step:06d}" + (f"-update-{update}" if updates > 1 else ""))


def write_bundle(out: Path, record: StepRecord, inputs: StepInputs, world: World) -> Path:
    """Write the bundle of an optimizer step that has not been made yet; returns its folder. Collective."""
    final = bundle_folder(out, record.step, inputs.update, record.config.updates_per_batch)
    ranks = world.gather_in_rank_order(_portable(inputs))
    if world.is_main:
        _write(final, record, inputs, ranks, world)
    world.total(0)  # a barrier: no rank goes on, or gives up, before the bundle is written
    return final


def _write(final: Path, record: StepRecord, inputs: StepInputs, ranks: list, world: World) -> None:
    """Rank 0's part: everything under a temporary name, flushed, renamed."""
    tensors = {f"adapter.{name}": tensor for name, tensor in record.adapter.items()}
    layout = []
    for rank, (plan, responses) in enumerate(ranks):
        for number, micro in enumerate(plan):
            tensors |= {f"{rank}.{number}.{name}": tensor for name, tensor in micro.pop("tensors").items()}
        layout.append({"micro_batches": plan, "responses": responses})
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, partial / "tensors.safetensors"
    )
    with open(partial / "tensors.safetensors", "rb") as handle:
        crc = zlib.crc32(handle.read())
        os.fsync(handle.fileno())
    content = {
        "format": FORMAT,
        "step": record.step,
        "update": inputs.update,
        "settings": dataclasses.asdict(record.config),
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "device": world.device.type,
        "n_rows": inputs.denominators.n_rows,
        "n_tokens": inputs.denominators.n_tokens,
        "recorded": record.recorded,
        "problem": record.problem,
        "crc32": crc,
        "ranks": layout,
        **provenance(),
    }
    write_json(partial / "bundle.json", content)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def _portable(inputs: StepInputs) -> tuple[list[dict], list[dict]]:
    """A rank's part as plain lists and CPU tensors."""
    plan = []
    for micro in inputs.micro_batches:
        if micro.is_filler:
            continue  # it adds nothing to the loss, and a replay runs in one process
        reference, old = micro.ref_logprobs, micro.old_logprobs
        tensors = {
            "advantages": micro.advantages,
            "trained": micro.mask.any(-1),
            "sampler": micro.sampler_logprobs[micro.packed.rows, micro.packed.cols],
            **({} if reference is None else {"reference": reference}),
            **({} if old is None else {"old": old}),
        }
        plan.append(
            {"groups": micro.groups, "rows": micro.rows, "tensors": {k: v.detach().cpu() for k, v in tensors.items()}}
        )
    return plan, inputs.responses


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle onto the CPU. Raises UserError naming what is missing, damaged or of another format."""
    path = Path(path)
    if not (path / "bundle.json").is_file():
        raise UserError(
            f"{path}: no step bundle there (bundle.json is missing); grpo.py --save-steps every:10 writes some"
        )
    try:
        content = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path / 'bundle.json'}: damaged ({error.msg}, line {error.lineno})") from None
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: bundle format {content.get('format')}, this version reads {FORMAT}")
    file = path / "tensors.safetensors"
    if not file.is_file() or zlib.crc32(file.read_bytes()) != content["crc32"]:
        raise UserError(f"{file}: damaged or missing")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error})") from None
    known = {field.name for field in dataclasses.fields(GrpoConfig)}
    unknown = sorted(
        set(content["settings"]) - known
    )  # a setting that came later has its default: that was the behaviour
    if unknown:
        raise UserError(
            f"{path}: written by another version of the trainer (setting '{unknown[0]}'); replay it with commit "
            f"{content['git_commit']}"
        )
    config = GrpoConfig(**{**content["settings"], "tensorboard": False})
    adapter = {name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")}
    return Bundle(
        path=path,
        step=content["step"],
        update=content["update"],
        config=config,
        threads=content["threads"],
        denominators=Denominators(content["n_rows"], content["n_tokens"]),
        adapter=adapter,
        ranks=[_rank_inputs(rank, content, tensors) for rank in range(len(content["ranks"]))],
        recorded=content["recorded"],
        problem=content["problem"],
        versions=content["versions"],
    )


def _rank_inputs(rank: int, content: dict, tensors: dict[str, Tensor]) -> StepInputs:
    part, micros = content["ranks"][rank], []
    for number, micro in enumerate(part["micro_batches"]):
        own = {
            name: tensors.get(f"{rank}.{number}.{name}")
            for name in ("advantages", "trained", "sampler", "reference", "old")
        }
        groups: list[Group] = [(prompt, responses) for prompt, responses in micro["groups"]]
        made = make_micro_batch(
            groups, micro["rows"], own["advantages"], own["trained"], own["sampler"], torch.device("cpu")
        )
        micros.append(dataclasses.replace(made, ref_logprobs=own["reference"], old_logprobs=own["old"]))
    return StepInputs(
        update=content["update"],
        micro_batches=micros,
        denominators=Denominators(content["n_rows"], content["n_tokens"]),
        responses=part["responses"],
    )
