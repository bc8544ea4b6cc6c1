"""A run folder: config.json, status.json, metrics.jsonl, timing.jsonl, rollouts.jsonl, checkpoints/, steps/.

metrics.jsonl has only values that the seed determines, so two runs can be compared byte for byte; seconds go to
timing.jsonl.

One process writes it: rank 0, which holds OUT/.lock locked (data/files.py). No crash leaves a half-written checkpoint: a
folder is written as NAME.partial, its files are flushed to disk (fsync), state.json with their checksums comes last, and a
rename makes the folder visible. Readers ignore .partial folders and folders without state.json. On --resume a damaged one is
set aside and the one before it used; of the .jsonl files a torn last line, and rows after the checkpoint, are dropped (rewind).
"""

import dataclasses
import datetime
import json
import os
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UserError, disk_errors
from data.files import (
    appended_rows,
    crc32_of,
    files_beside_weights,
    flush,
    lock_folder,
    model_hashes,
    naming_what_cannot_be_written,
    read_sealed,
    refuse_folder_of_a_model,
    remove_folder,
    replacing,
    replacing_folder,
    sealed,
    sha256,
    write_whole,
)
from data.processes import file_of_function, provenance
from data.puzzles import step_alone
from data.status.status import RunStatus
from trainer.ranks.world import World, load_moments, moments_of

if TYPE_CHECKING:  # these import transformers, which eval/report does not need
    import torch

    from trainer.config import TrainingConfig
    from trainer.policy import Policy

C = TypeVar("C")
BESIDE = "beside/"
"""Begins the names of a companion's tensors in MOMENTS."""
KILLED = "the process of rank 0 was killed, or ended without a word; --resume goes on from the newest checkpoint"
"""The error in status.json of a run that was killed."""
FINISHED = "finished.json"
"""File of a run folder that is written last, when all steps are made."""
STREAMS = ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl")
# settings that may differ between a run and its continuation: its length, and how the machine is used; not its
# objective
FREE_ON_RESUME = {
    *("resume", "steps", "save_every", "keep_checkpoints", "save_steps", "tensorboard", "log", "out"),
    *("base", "memory_fraction", "decay_steps", "eager", "attn", "reward_workers", "reward_seconds"),
    *("on_reward_error", "insist", "placement", "sampler_ranks", "tensor_parallel", "restart_samplers"),
    *("sync_host", "sync_port", "shard", "checkpointing", "keep_attention", "hang_seconds", "dry_run"),
    *("nodes", "ranks_per_node", "rank_gib", "notify", "score_last"),
}
ADAPTER, WEIGHTS = "adapter_model.safetensors", "model.safetensors"
MOMENTS, PENDING = "training/optimizer.safetensors", "training/pending.json"
"""In a separate folder, because vLLM reads every .safetensors file beside config.json as weights."""
DATA = ("traces", "puzzles", "validate", "curriculum")
"""Settings that name a data file."""
MODELS = ("model", "critic")
"""Settings that name a checkpoint folder whose weights the run starts from."""
MAGNITUDE = "lora_magnitude_vector"
"""Part of the name of DoRA's magnitudes in an adapter file."""


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
    best: dict[str, Any] = field(default_factory=dict)
    """The step whose answers to held-out puzzles were best so far, with its score (prompts/validation.py)."""


def check_run(config: Any, allow_resume: bool = True) -> None:
    """Raises UserError if --out holds another run, if --resume finds no run or one with other settings, data or model, or
    if another process is writing there. Rank 0 then holds the folder's lock, if there is a folder.

    A folder in which no step was made (vLLM would not start, a bad reward) is no run: any settings may begin there.
    """
    out = Path(config.out)
    resume = allow_resume and config.resume
    if resume and not (out / "config.json").is_file():
        not_on_node_0 = int(os.environ.get("RANK", "0")) >= int(os.environ.get("LOCAL_WORLD_SIZE") or 1 << 30)
        where = f" on {socket.gethostname()}, and all nodes must see one folder; put it on a shared disk, or"
        where = where if not_on_node_0 else ";"
        raise UserError(f"--resume: {out} holds no run{where} leave --resume out to start one")
    if out.is_dir() and os.environ.get("RANK", "0") == "0":
        lock_folder(out)
    if not has_steps(out):
        return refuse_folder_of_a_model(out)
    if not resume:
        raise UserError(holds_a_run(out, allow_resume))
    # through JSON, so that both sides have JSON's types
    record = read_record(out)
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    if (was := algorithm_of(record["settings"])) != (ours := algorithm_of(now)):
        raise UserError(f"--resume: {out} holds a run of {was}, not of {ours}; use {was}'s command, or another --out")
    # a setting that an older version did not record had its default behaviour
    before = {field.name: field.default for field in dataclasses.fields(config)}
    before |= {"sampler_dtype": record["settings"].get("dtype")} | record["settings"]
    # what is not given stays the run's own: see with_date, with_sampler_dtype
    free = FREE_ON_RESUME | {key for key in ("date", "sampler_dtype") if now.get(key) in ("", "auto")}
    if key := next((key for key in now if key not in free and before[key] != now[key]), ""):
        was = f"{key} was {before[key]!r} in {out}, now {now[key]!r}"
        raise UserError(f"--resume: {was}; give the old value again, or name another --out")
    refuse_other_files(config, record)
    made = steps_saved(out)
    if not made:
        refuse_lost_checkpoints(out, before.get("save_every"), hasattr(config, "traces"))
    if made > now.get("steps", made):
        raise UserError(f"--steps {now['steps']}: {out} has made {made} steps already; give at least as many")


def refuse_lost_checkpoints(out: Path, every: int | None, is_sft: bool) -> None:
    """Raises UserError when the run had saved a checkpoint, and none is there: it would begin anew, and lose its rows.

    every: the run's --save-every; None or 0 for SFT: after each epoch.
    """
    rows = [row for _, row in appended_rows(out / "metrics.jsonl", lambda row: type(row.get("step")) is int)]
    saved = any(row["step"] > every if every else row.get("epoch", 1) > 1 for row in rows)
    if saved or (out / FINISHED).is_file() or (is_sft and (out / "model").is_dir()):
        why = f"--resume: {out} has made {len(rows)} steps and holds no checkpoint of them"
        raise UserError(f"{why}; put {out}/checkpoints back, or name another --out")


def holds_a_run(out: Path, allow_resume: bool = True) -> str:
    """The sentence that refuses to begin a run in this folder."""
    if not (out / "config.json").is_file():
        return f"--out {out}: holds the steps of a run, though not its config.json; name another folder"
    return f"--out {out}: already holds a run; {'add --resume to go on with it, or ' if allow_resume else ''}name another folder"


def refuse_other_files(config: Any, record: dict[str, Any]) -> None:
    """Raises UserError that names the first file of data or model that is not what the run began with.

    A record of an older version names fewer files, or none; those are not compared.
    """
    was, hashes = record.get("data", {}), data_hashes(config)
    if other := [key for key in hashes if was.get(key, hashes[key]) != hashes[key]]:
        raise UserError(
            f"--resume: {getattr(config, other[0])} is not the file that {config.out} began with (other SHA-256); "
            "put that one back, or name another --out"
        )
    for setting in MODELS:
        was = record.get(setting, {})
        now = model_hashes(str(getattr(config, setting))) if was else {}
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                path = Path(str(getattr(config, setting))) / name
                what = "is missing" if name not in now else "is new" if name not in was else "is another file"
                raise UserError(
                    f"--resume: {path} {what}: {config.out} began with other files of the {setting} (other SHA-256); put them "
                    "back, or name another --out"
                )


def has_steps(out: Path) -> bool:
    """Has a run in this folder made a step, or saved one?"""
    metrics = out / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(list_checkpoints(out))


def steps_saved(out: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max(map(step_of, list_checkpoints(out)), default=0)


def read_record(out: Path) -> dict[str, Any]:
    """The run's config.json. Raises UserError when it is damaged, or was changed after the run wrote it."""
    path = out / "config.json"
    found = read_sealed(path)
    if not isinstance(found.get("settings"), dict):
        raise UserError(f"{path}: is no record of a run (it has no settings); put a copy back, or name another --out")
    return found


def algorithm_of(settings: dict[str, Any]) -> str:
    """What a run with these settings does, by a setting that no other has."""
    return "PPO" if "critic_lr" in settings else "SFT" if "traces" in settings else "GRPO"


def settings_of_run(config: Any) -> dict[str, Any]:
    """What the run that --resume goes on with began with; {} for a new run, and for one that made no step."""
    out = Path(config.out)
    return read_record(out)["settings"] if config.resume and has_steps(out) else {}


def with_date(config: C, world: World) -> C:
    """The settings with the date that the run shows to chat templates: --date, the resumed run's, or today. Collective."""
    ours = config.date or settings_of_run(config).get("date") or datetime.date.today().isoformat()
    # rank 0 decides: another node may be in another time zone
    return dataclasses.replace(config, date=world.gather_in_rank_order(ours)[0])


def open_run(config: Any, world: World) -> Path:
    """Make the run folder, lock it and write config.json. Call it after every check of settings and data. Collective."""
    out = Path(config.out)
    # a barrier: check_run of a slower rank would find config.json, and refuse the folder as another run's
    world.total(0)
    if world.is_main:
        lock_folder(out)
        if not config.resume and has_steps(out):  # of a run that began and ended after check_run had looked
            raise UserError(holds_a_run(out))
        if config.resume and has_steps(out):
            say_what_changed(config, read_record(out), world)
        (out / FINISHED).unlink(missing_ok=True)  # --resume with more --steps
        remove_pruned(out)
        record = {"settings": dataclasses.asdict(config), "world_size": world.size, "data": data_hashes(config)}
        record |= {key: model_hashes(str(getattr(config, key))) for key in MODELS if getattr(config, key, None)}
        record |= {"reward": reward_hash(config), **provenance()}
        write_json(out / "config.json", sealed(record))
        status = RunStatus(out, config.notify, proof=out / "config.json", killed=KILLED)
        world.listeners.append(status)
        if world.watch is not None:
            world.watch.on_wait, world.watch.on_lost = status.waits, status.end
    return out


def say_what_changed(config: Any, record: dict[str, Any], world: World) -> None:
    """Print what is other than when the run was last begun, and is no reason to refuse it."""
    out, steps, notes = config.out, steps_saved(Path(config.out)), []
    ranks = record.get("world_size", world.size)
    if ranks != world.size:
        notes.append(
            f"{out} had {ranks} ranks that train and now has {world.size}: sums are rounded in another order, so the "
            "numbers can differ in their last digits from those of the unbroken run"
        )
    before, now = samplers_of(record["settings"], ranks), samplers_of(dataclasses.asdict(config), world.size)
    if before != now:
        notes.append(
            f"{out} had {before} vLLM that sampled and now has {now}: each draws its own random numbers, so the run goes "
            "on with other responses than the unbroken one"
        )
    if record.get("reward", hashed := reward_hash(config)) != hashed:
        notes.append(f"the file of --reward {config.reward} was changed since {out} was last begun")
    if steps and steps == getattr(config, "steps", None):
        notes.append(f"{out} has made all of its {steps} steps already; --steps with a larger number goes on")
    for note in notes:
        print(f"note: {note}", flush=True)


def samplers_of(settings: dict[str, Any], trainers: int) -> int:
    """How many vLLM share the prompts of a step; 0 with another engine, whose draws do not depend on it."""
    if settings.get("engine") != "vllm":
        return 0
    ranks = settings.get("sampler_ranks", 1) if settings.get("placement") == "split" else trainers
    return ranks // settings.get("tensor_parallel", 1)


def data_hashes(config: Any) -> dict[str, str]:
    """{setting of DATA: SHA-256 of the file that it names}."""
    paths = {key: Path(getattr(config, key)) for key in DATA if getattr(config, key, None)}
    return {key: sha256(path) for key, path in paths.items() if path.is_file()}


def reward_hash(config: Any) -> str:
    """SHA-256 of the file that holds the reward function; "" for the cold start, and where no file is found."""
    path = file_of_function(re.sub("^(trl|verl):", "", getattr(config, "reward", "")))
    return sha256(path) if path else ""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. It appears complete or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def rewind(out: Path, step: int, advance: Callable[[], None] = lambda: None) -> None:
    """Drop the rows of steps after `step`, which a run wrote that died before its next checkpoint, and a torn last line.

    A file is cut where it is if it can be: the rollouts of a long run leave no room for a copy. advance() is called after
    each row. A line that begins with its step is not parsed, which would take an hour of such a run. Says which of the steps
    up to `step` a file lacks or holds twice. Raises UserError that names another line, if it is damaged.
    """

    def rows_of(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
        return appended_rows(path, lambda row: type(row.get("step")) is int, step_alone)

    for name in STREAMS:
        path, seen, read, end = out / name, Counter(), 0, 0
        if not path.is_file():
            continue
        # copied where a row to drop comes before one to keep, or where a hard link is a backup
        gap = path.stat().st_nlink > 1
        for line, row in rows_of(path):
            advance()
            if row["step"] <= step:
                seen[row["step"]] += 1
                gap, end = gap or read > end, read + len(line)
            read += len(line)
        if gap:
            with replacing(path) as partial, open(partial, "wb") as kept:
                for line, row in rows_of(path):
                    advance()
                    kept.write(line * (row["step"] <= step))
        else:
            with open(path, "r+b") as file:
                file.truncate(min(end, path.stat().st_size))
                file.seek(max(0, end - 1))
                file.write(b"\n" * bool(end))  # a last line may lack its end
        lost = [number for number in range(1, step + 1) if not seen[number]]
        twice = [number for number in seen if name != "rollouts.jsonl" and seen[number] > 1]
        for steps, what in ((lost, "has no line of"), (twice, "has more than one line of")):
            if steps:
                several = f"{len(steps)} steps, the first is {min(steps)}" if len(steps) > 1 else f"step {steps[0]}"
                print(f"note: {path} {what} {several}; the run itself lacks nothing", file=sys.stderr, flush=True)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file. Raises OSError when it cannot be written."""
    with disk_errors(path):
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path, metadata)


def save_checkpoint(out: Path, saved: Checkpoint, newest_kept: int, model_dir: str = "") -> Path:
    """Write checkpoints/step-NNNNNN: the adapter in PEFT's format, training/, and state.json with all checksums.

    newest_kept: how many checkpoints stay on disk. model_dir: where every weight is trained, the folder whose other
    files make the checkpoint one that transformers loads. Raises UserError that names the folder when it cannot be written.
    """
    final = out / "checkpoints" / f"step-{saved.step:06d}"
    with replacing_folder(final) as partial:
        (partial / MOMENTS).parent.mkdir()
        save_tensors(saved.adapter, partial / (ADAPTER if saved.adapter_config else WEIGHTS), {"format": "pt"})
        save_tensors(saved.moments, partial / MOMENTS)
        write_json(partial / PENDING, saved.pending)
        if saved.adapter_config:
            write_json(partial / "adapter_config.json", saved.adapter_config)
        else:
            for path in files_beside_weights(model_dir):
                shutil.copy(path, partial)
        written = sorted(path for path in partial.rglob("*") if path.is_file())
        files = {str(path.relative_to(partial)): crc32_of(path) for path in written}
        best = {"best": saved.best} if saved.best else {}
        write_json(partial / "state.json", sealed({"step": saved.step, "crc32": files, **best}))
    pruned = list_checkpoints(out)[:-newest_kept]  # only after the new one is complete
    for old in (one for one in pruned if step_of(one) != saved.best.get("step")):
        with naming_what_cannot_be_written(old):
            os.replace(old, old.with_name(f".{old.name}.old"))
    remove_pruned(out)
    return final


def remove_pruned(out: Path) -> None:
    """Remove what saves have pruned. A folder of which a process has a file open stays on NFS, until the next call."""
    for gone in (out / "checkpoints").glob(".step-*.old"):
        remove_folder(gone)


def list_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Those that were set aside as damaged are left out."""
    there = [path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in there if (path / "state.json").is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps, by the name of the folder."""
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """(step, adapter or every weight, optimizer state). Raises UserError that names a damaged or missing file."""
    state = read_sealed(path / "state.json", "use another checkpoint")
    step, files = state.get("step"), state.get("crc32")
    if type(step) is not int or not isinstance(files, dict):
        raise UserError(f"{path / 'state.json'}: is no record of a checkpoint; use another one")
    if step != step_of(path):
        raise UserError(f"{path / 'state.json'}: is of step {step}, and so not of this folder; use another checkpoint")
    refuse_damaged_files(path, files)
    weights = path / (ADAPTER if (path / ADAPTER).is_file() else WEIGHTS)
    try:
        return step, load_file(weights), load_file(training_file(path, MOMENTS))
    except (SafetensorError, OSError, ValueError) as error:  # a file that state.json does not name
        raise UserError(f"{path}: its tensors cannot be read ({error}); use another checkpoint") from None


def refuse_damaged_files(path: Path, files: dict[str, int]) -> None:
    """Raises UserError for the first file of a checkpoint that is not as it was written. files: {name: CRC-32}."""
    for name, crc in files.items():
        if not (path / name).is_file() or crc32_of(path / name) != crc:
            raise UserError(f"{path / name}: missing, damaged or changed; use another checkpoint")


def load_newest(out: Path, world: World) -> tuple[Path, tuple[int, dict[str, Tensor], dict[str, Tensor]]] | None:
    """(folder, load_checkpoint of it) of the newest checkpoint that is whole on every rank; None without one. Collective.

    Newer ones are renamed to NAME.damaged, and a note says so. Raises UserError when there are some and none is whole.
    """
    there, found, problems = list_checkpoints(out), None, []
    for path in reversed(there):
        try:
            found = (path, load_checkpoint(path))
            break
        except UserError as error:
            problems.append(str(error))
    if there and found is None:
        raise UserError(f"{problems[0]}, of which {out} has none; put a copy of the file back, or name another --out")
    # of each node, which reads its own copy of the disk
    told = world.gather_in_rank_order([found[1][0] if found else 0, [text.partition(";")[0] for text in problems]])
    steps = [step for step, _ in told]
    if min(steps) == 0 < max(steps):
        lacks = f"--resume: rank {steps.index(0)} finds no checkpoint in {out}"
        raise UserError(f"{lacks}; all nodes must see the same folder")
    if found is None or min(steps) == max(steps) == steps_saved(out):
        return found
    if found[1][0] != min(steps):
        found = next((path, load_checkpoint(path)) for path in there if step_of(path) == min(steps))
    if world.is_main:
        least = f"rank {steps.index(min(steps))} does not see the checkpoint of step {max(steps)}"
        for problem in dict.fromkeys(problem for _, of_rank in told for problem in of_rank) or [least]:
            print(f"note: {problem}; --resume goes on from {found[0].name}", file=sys.stderr, flush=True)
        for path in there:
            if step_of(path) > min(steps):
                aside = path.with_name(f"{path.name}.damaged")
                remove_folder(aside)
                with naming_what_cannot_be_written(path):
                    os.replace(path, aside)
    return found


def training_file(checkpoint: Path, name: str) -> Path:
    """The path of MOMENTS or PENDING of a checkpoint; runs of older versions have these files beside the weights."""
    return checkpoint / name if (checkpoint / name).is_file() else checkpoint / Path(name).name


def save_training(
    now: TrainingState,
    step: int,
    pending: dict[str, Any],
    companion: Companion | None = None,
    best: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint after optimizer step `step` (from 1): adapter, AdamW moments, unused rollouts. Collective.

    Rank 0 writes it. pending: of all ranks (rollout.Ahead.unused; the cold start keeps BestEpoch.state there). companion:
    saved with it. best: of Checkpoint.
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
    for name in STREAMS:  # on disk before the checkpoint that stands behind these lines
        if (now.out / name).is_file():
            flush(now.out / name)
    saved = Checkpoint(
        step=step,
        adapter=adapter,
        adapter_config=adapter_config,
        moments=moments,
        pending=pending,
        best=best or {},
    )
    save_checkpoint(now.out, saved, cfg.keep_checkpoints, model_dir=str(cfg.model))


def restore_training(
    out: Path,
    policy: "Policy",
    optimizer: "torch.optim.Optimizer",
    world: World,
    companion: Companion | None = None,
) -> tuple[int, dict[str, Any]]:
    """Load the newest whole checkpoint into policy, optimizer and companion. Returns (its step, its unused rollouts). Collective.

    The step is 0 if the run died before its first checkpoint. Every rank reads the files and keeps its shard.
    """
    step, pending = 0, {}
    if (newest := load_newest(out, world)) is not None:
        path, (step, adapter, moments) = newest
        policy.load_adapter(adapter)
        if companion is not None:
            companion.load({name.removeprefix(BESIDE): t for name, t in moments.items() if name.startswith(BESIDE)})
        load_moments(optimizer, policy.trainable(), moments)
        pending = json.loads(training_file(path, PENDING).read_text())
    if world.is_main:  # the only rank that appends to these files
        rewind(out, step, world.advance)
    return step, pending
