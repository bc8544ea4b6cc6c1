"""Step bundles: one optimizer step on disk, with everything that is needed to compute its loss and gradient again.

OUT/steps/step-000010/ has `bundle.json` (settings, responses, how they were packed, the recorded results) and
`tensors.safetensors` (the adapter before the step; per micro-batch the advantages and the sampler's, old, reference and
teacher's log-probs). The base checkpoint is named but not copied. The recorded reference log-probs show in a replay whether it
has changed since.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.errors import UserError
from data.files import crc32_of, parse_json, replacing_folder
from data.processes import provenance
from trainer.config import GrpoConfig, OnlineConfig
from trainer.packing import Denominators, Group, MicroBatch, make_micro_batch
from trainer.ranks.world import World
from trainer.record.runfolder import save_tensors, write_json

FORMAT = 1
"""Raise it when an older version of the trainer could misread a bundle."""
OPTIONAL = {
    "reference": "ref_logprobs",
    "old": "old_logprobs",
    "old_values": "old_values",
    "returns": "returns",
    "teacher": "teacher_logprobs",
    "teacher_weight": "teacher_weight",
}
"""Name in a bundle -> field of MicroBatch, of the passes that not every step makes."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One rank's inputs of an optimizer step."""

    update: int
    """Number of the optimizer step within the sampled batch, from 1."""
    micro_batches: list[MicroBatch]
    denominators: Denominators
    """Of the whole optimizer step, over all ranks."""
    responses: list[dict[str, Any]]
    """The row of rollouts.jsonl of each response of this rank."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The part of a bundle that is the same on every rank."""

    step: int
    """From 1."""
    config: OnlineConfig
    adapter: dict[str, Tensor]
    """Its values before the step."""
    critic: dict[str, Tensor]
    """The critic's weights before the step; empty in GRPO."""
    recorded: dict[str, Any]
    """loss, pg_loss, grad_norm, gradient_hash; in PPO also value_... of them; empty if the step was refused."""
    problem: str | None
    """Why the step was refused; None if it was made."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle read from disk."""

    path: Path
    step: int
    """From 1."""
    update: int
    """Number of the optimizer step within the sampled batch, from 1."""
    config: OnlineConfig
    threads: int
    """Threads per rank of the run: a sum over another number of threads rounds differently."""
    denominators: Denominators
    """Of the whole optimizer step, over all ranks."""
    adapter: dict[str, Tensor]
    """Its values before the step."""
    critic: dict[str, Tensor]
    """The critic's weights before the step; empty in GRPO."""
    ranks: list[StepInputs]
    """ranks[r] is the part of rank r."""
    recorded: dict[str, Any]
    """loss, pg_loss, grad_norm, gradient_hash; empty if the step was refused."""
    problem: str | None
    """Why the step was refused; None if it was made."""
    versions: dict[str, str]
    """Of the packages that the run used."""

    @property
    def responses(self) -> list[dict[str, Any]]:
        """The responses of all ranks, rank after rank: launch/replay.py --row counts in this order."""
        return [response for inputs in self.ranks for response in inputs.responses]


def bundle_folder(out: Path, step: int, update: int, updates: int) -> Path:
    """steps/step-000010, or step-000010-update-2 if a batch gets several updates. step and update count from 1."""
    return out / "steps" / (f"step-{step:06d}" + (f"-update-{update}" if updates > 1 else ""))


def write_bundle(out: Path, record: StepRecord, inputs: StepInputs, world: World) -> Path:
    """Write the bundle of an optimizer step before the weights change. Returns its folder. Collective."""
    final = bundle_folder(out, record.step, inputs.update, record.config.updates_per_batch)
    # sync point: rank 0 writes what all ranks trained on
    ranks = world.gather_in_rank_order(_portable(inputs))
    if world.is_main:
        _write(final, record, inputs, ranks, world)
    # a barrier: after a refused step every rank raises, and torchrun would end rank 0 while it still writes
    world.total(0)
    return final


def _write(final: Path, record: StepRecord, inputs: StepInputs, ranks: list, world: World) -> None:
    """Rank 0's part. Files are written to a temporary folder and flushed to disk; the rename comes last."""
    tensors = {f"adapter.{name}": tensor for name, tensor in record.adapter.items()}
    tensors |= {f"critic.{name}": tensor for name, tensor in record.critic.items()}
    layout = []  # per rank, for bundle.json: groups and rows; every tensor goes to tensors.safetensors
    for rank, (plan, responses) in enumerate(ranks):
        # a tensor's name is RANK.MICRO-BATCH.NAME, such as 3.0.advantages
        for number, micro in enumerate(plan):
            tensors |= {f"{rank}.{number}.{name}": tensor for name, tensor in micro.pop("tensors").items()}
        layout.append({"micro_batches": plan, "responses": responses})
    with replacing_folder(final) as partial:
        save_tensors(tensors, partial / "tensors.safetensors")
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
            "crc32": crc32_of(partial / "tensors.safetensors"),  # of the file as a reader will find it
            "ranks": layout,
            **provenance(),  # a later version that cannot read it names the commit
        }
        write_json(partial / "bundle.json", content)


def _portable(inputs: StepInputs) -> tuple[list[dict], list[dict]]:
    """A rank's part as plain lists and CPU tensors: (micro-batches, responses)."""
    plan = []
    for micro in inputs.micro_batches:
        if micro.is_filler:
            continue  # it adds nothing to the loss, and a replay needs none: it runs in one process
        optional = {name: getattr(micro, of_micro) for name, of_micro in OPTIONAL.items()}
        tensors = {
            "advantages": micro.advantages,
            "trained": micro.mask.any(-1),  # [N]: a response is trained whole or not at all
            "sampler": micro.sampler_logprobs[micro.packed.rows, micro.packed.cols],  # [M], without the padding
            # safetensors knows no None, so a pass that was not made leaves no tensor
            **{name: numbers for name, numbers in optional.items() if numbers is not None},
        }
        plan.append(
            {"groups": micro.groups, "rows": micro.rows, "tensors": {k: v.detach().cpu() for k, v in tensors.items()}}
        )
    return plan, inputs.responses


def read_bundle(path: str | Path, kinds: tuple[type[OnlineConfig], ...] = (GrpoConfig,)) -> Bundle:
    """Read a bundle onto the CPU. Raises UserError that names what is missing, damaged or of another format.

    kinds: settings that the run may have had; those of the first that has every recorded setting are taken.
    """
    path = Path(path)
    if not (path / "bundle.json").is_file():
        raise UserError(
            f"{path}: no step bundle there (bundle.json is missing); grpo.py --save-steps every:10 writes some"
        )
    try:
        content = parse_json((path / "bundle.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'bundle.json'}: damaged ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path / 'bundle.json'}: damaged (it holds no JSON object)")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: bundle format {content.get('format')}, this version reads {FORMAT}")
    try:
        return _bundle_of(path, content, kinds)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path / 'bundle.json'}: damaged, or no bundle of this trainer ({what})") from None


def _bundle_of(path: Path, content: dict[str, Any], kinds: tuple[type[OnlineConfig], ...]) -> Bundle:
    """read_bundle of a bundle.json that is JSON. What other values raise, read_bundle explains."""
    for name in ("step", "update", "threads", "n_rows", "n_tokens"):
        if not isinstance(content[name], int | float):
            raise TypeError(f"{name} is no number")
    file = path / "tensors.safetensors"
    # safetensors checks its header only: a flipped bit in a weight would load, and show as a gradient that differs
    if not file.is_file() or crc32_of(file) != content["crc32"]:
        raise UserError(f"{file}: damaged or missing")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error})") from None
    # the other way round is fine: a setting that is newer than the bundle had its default behaviour then
    unknown = {kind: sorted(set(content["settings"]) - {f.name for f in dataclasses.fields(kind)}) for kind in kinds}
    kind = min(kinds, key=lambda kind: len(unknown[kind]))
    if unknown[kind]:
        raise UserError(
            f"{path}: written by another version of the trainer (setting '{unknown[kind][0]}'); replay it with commit "
            f"{content['git_commit']}"
        )
    # the packages of these two may be missing here, and a replay neither writes for TensorBoard nor steps an optimizer
    try:
        config = kind(**{**content["settings"], "tensorboard": False, "log": "", "optimizer": "adamw"})
    except UserError as error:  # such as --quantize nf4 without bitsandbytes
        raise UserError(f"{path}: cannot be replayed here: {error}") from None
    adapter, critic = (
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in ("adapter.", "critic.")
    )
    return Bundle(
        path=path,
        step=content["step"],
        update=content["update"],
        config=config,
        threads=content["threads"],
        denominators=Denominators(content["n_rows"], content["n_tokens"]),
        adapter=adapter,
        critic=critic,
        ranks=[_rank_inputs(rank, content, tensors) for rank in range(len(content["ranks"]))],
        recorded=content["recorded"],
        problem=content["problem"],
        versions=content["versions"],
    )


def _rank_inputs(rank: int, content: dict, tensors: dict[str, Tensor]) -> StepInputs:
    """Pack a rank's groups again; packing is a function of the recorded groups and rows only."""
    part, micros = content["ranks"][rank], []
    for number, micro in enumerate(part["micro_batches"]):
        own = {
            name: tensors.get(f"{rank}.{number}.{name}")  # None: no such pass was made
            for name in ("advantages", "trained", "sampler", *OPTIONAL)
        }
        groups: list[Group] = [(prompt, responses) for prompt, responses in micro["groups"]]  # JSON has no tuples
        made = make_micro_batch(
            groups, micro["rows"], own["advantages"], own["trained"], own["sampler"], torch.device("cpu")
        )
        micros.append(dataclasses.replace(made, **{of_micro: own[name] for name, of_micro in OPTIONAL.items()}))
    return StepInputs(
        update=content["update"],
        micro_batches=micros,
        denominators=Denominators(content["n_rows"], content["n_tokens"]),
        responses=part["responses"],
    )
