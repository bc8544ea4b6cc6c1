"""A model folder opened: a checkpoint, or an adapter in PEFT's format with the checkpoint that it was trained on.

The commands that take a trained model (evaluate, distill --teacher vllm, export) all open it here.
"""

import datetime
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from data.errors import UserError
from data.files import model_hashes, parse_json, read_sealed, read_settings, seen_from, weight_files
from data.prompts import ChatFormat
from trainer.record.runfolder import ADAPTER, refuse_damaged_files

if TYPE_CHECKING:  # takes seconds to load
    from transformers import PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER, ADAPTER_CONFIG)
"""What makes a folder an adapter."""
UNSERVED = tuple(
    """
    use_rslora rank_pattern alpha_pattern modules_to_save layer_replication lora_bias use_qalora use_bdlora
    alora_invocation_tokens target_parameters trainable_token_indices
    """.split()
)
"""PEFT settings that change what an adapter computes. The sampler does not get them: it gets r, alpha, modules."""
PLAIN_STARTS = ("none", "true", "false", "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is; the other values change the base's weights too."""


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, with the adapter over it where there is one."""

    folder: Path
    """The folder that was opened."""
    base: Path
    """Folder of the checkpoint: `folder` itself, or the one under the adapter."""
    adapter: dict[str, Tensor] | None
    """{PEFT's name: tensor}; None for a checkpoint without adapter."""
    settings: dict[str, Any] | None
    """The adapter's adapter_config.json; None without adapter."""

    @property
    def lora(self) -> dict[str, Any] | None:
        """The settings that the sampler needs: r, lora_alpha, target_modules."""
        return self.settings and {name: self.settings[name] for name in ("r", "lora_alpha", "target_modules")}

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the base."""
        from trainer.model.loading import load_tokenizer  # transformers takes seconds to load

        return load_tokenizer(str(self.base))

    @cached_property
    def chat(self) -> ChatFormat:
        """How to ask the model, with the date that its training showed it. Raises UserError where that cannot be known."""
        shown = run_of(self.folder).get("settings", {}).get("date")
        return ChatFormat(self.tokenizer, self.base, datetime.date.fromisoformat(shown) if shown else None)


def open_checkpoint(folder: str | Path, base: str | None = None, *, served: bool = True) -> OpenedModel:
    """Read a model folder. The tokenizer is loaded when it is first used; the base's weights are not read.

    base: the checkpoint under an adapter; default: the one that the adapter names. served: refuse an adapter that vLLM
    cannot serve. Raises UserError that names the file when an adapter is incomplete, damaged, or would be served
    wrongly, or when the checkpoint under it is not there.
    """
    folder = Path(folder)
    # before any tensor is read: a refusal names the setting, and is there at once
    settings = served_settings(folder) if served else None
    if not is_adapter(folder):
        if base:
            raise UserError(f"--base {base}: {folder} is a whole checkpoint and no adapter over one; leave --base out")
        refuse_run_folder(folder)
        return OpenedModel(folder, folder, None, None)
    adapter, settings = read_adapter(folder, for_vllm=served)
    if lacking := [name for name in ("r", "lora_alpha", "target_modules") if not settings.get(name)]:
        raise UserError(f"{folder / ADAPTER_CONFIG}: has no {lacking[0]}, so the adapter is not whole; copy it again")
    under = base_under(folder, settings, base)
    if (
        under != folder and not (under / "config.json").is_file()
    ):  # a run folder that was moved, or another working directory
        raise UserError(f"{folder}: an adapter on {under}, where no checkpoint is; name its checkpoint with --base")
    refuse_other_base(folder, under)
    if served:
        refuse_misfit(folder, adapter, under)
    return OpenedModel(folder, under, adapter, settings)


def read_adapter(path: Path, for_vllm: bool = True) -> tuple[dict[str, Tensor], dict]:
    """(tensors, PEFT config) of an adapter folder in PEFT's format.

    Raises UserError that names a missing or damaged file; with for_vllm also for an adapter that vLLM cannot serve.
    """
    for name in ADAPTER_FILES:
        if not (path / name).is_file():
            raise UserError(f"{path}: no adapter there ({name} is missing)")
    if (path / "state.json").is_file():  # a checkpoint of a run of ours, which knows the checksums of its files
        known = read_sealed(path / "state.json", "use another checkpoint").get("crc32")
        if isinstance(known, dict):  # training/ may have been removed to save space
            refuse_damaged_files(path, {name: known[name] for name in ADAPTER_FILES if name in known})
    try:
        config = parse_json((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / ADAPTER_CONFIG}: damaged, not JSON ({error})") from None
    refuse_other_kinds(path / ADAPTER_CONFIG, config)
    if for_vllm and config.get("use_dora"):
        raise UserError(
            f"{path}: a DoRA adapter (use_dora), which vLLM cannot serve; merge it (launch/export.py), or train plain "
            "LoRA"
        )
    try:
        return load_file(path / ADAPTER), config
    except SafetensorError as error:
        raise UserError(f"{path / ADAPTER}: damaged ({error})") from None


def base_under(folder: Path, settings: dict[str, Any], base: str | None = None) -> Path:
    """The checkpoint under an adapter. settings: its adapter_config.json. base: given in place of the one named there."""
    # without a recorded base the adapter's own folder is named: load_tokenizer then says that it holds no checkpoint
    return Path(base) if base else seen_from(folder, Path(settings.get("base_model_name_or_path") or folder))


def refuse_run_folder(folder: Path) -> None:
    """Raises UserError that names the model of a run, for the folder of the run itself."""
    made = [*sorted((folder / "checkpoints").glob("step-*"))[-1:], *[folder / "model"]]
    made = [place for place in made if place.is_dir()]
    if made and not (folder / "tokenizer.json").is_file():
        raise UserError(f"--model {folder}: is the folder of a run; name its model, {' or '.join(map(str, made))}")


def refuse_other_base(folder: Path, base: Path) -> None:
    """Raises UserError when an adapter of a run of ours would be put on another model than it was trained on.

    Weights, settings, tokenizer and chat template count, as for --resume.
    """
    trained_on = run_of(folder).get("model")
    if not isinstance(trained_on, dict):
        return
    there = model_hashes(base)
    for name in sorted(trained_on):
        if there.get(name, trained_on[name]) != trained_on[name]:
            raise UserError(
                f"{folder}: was trained on another {name} than {base} holds (other SHA-256), so its answers would be those of "
                "no model that was trained; name the checkpoint that it began from with --base"
            )


def refuse_misfit(folder: Path, adapter: dict[str, Tensor], base: Path) -> None:
    """Raises UserError when an adapter has parts that cannot be served, or is of another shape than the base's weights.

    vLLM itself fills up a smaller adapter with zeros. Headers are read, no weights.
    """
    shapes: dict[str, list[int]] = {}
    for path in weight_files(base):
        with safe_open(path, "pt") as handle:
            shapes |= {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118 (no mapping)
    for name, tensor in adapter.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise UserError(
                f"{folder}: the adapter's {name} is no part of an adapter of linear layers, and cannot be served; merge it into "
                "its base with PEFT (merge_and_unload)"
            )
        weight = shapes.get(f"{module}.weight")
        width = tensor.shape[1] if part == "A.weight" else tensor.shape[0]
        if weight is None or width != weight[1 if part == "A.weight" else 0]:
            held = "no such weight" if weight is None else f"a weight of {' x '.join(map(str, weight))}"
            raise UserError(
                f"{folder}: the adapter's {name} is {' x '.join(map(str, tensor.shape))}, and {base} has {held}; is it the base "
                "that this adapter was trained on?"
            )


def run_of(folder: Path) -> dict[str, Any]:
    """config.json of the run that a checkpoint belongs to: settings, versions, git commit. {} without a run."""
    place = run_folder_of(folder)
    return read_settings(place / "config.json") if place else {}


def run_folder_of(folder: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None without a run."""
    folder = folder.resolve()  # it may be named by a link, or from inside checkpoints/
    # config.json of the run is one level above OUT/model, and two above OUT/checkpoints/step-000010
    for place in (folder.parent, folder.parent.parent):
        if (place / "config.json").is_file() and "settings" in read_settings(place / "config.json"):
            return place  # else it is the config.json of a model
    return None


def is_adapter(folder: Path) -> bool:
    """Does the folder hold an adapter in PEFT's format?"""
    return (folder / ADAPTER_CONFIG).is_file()  # of PEFT; config.json is a checkpoint's


def served_settings(folder: Path) -> dict[str, Any] | None:
    """The adapter_config.json of an adapter folder; None for another folder.

    Raises UserError for a damaged file, and for an adapter that vLLM would scale wrongly or serve only in part.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the adapter again") from None
    refuse_other_kinds(path, settings)
    unserved = [name for name in UNSERVED if settings.get(name)]
    # these two have harmless values that are true in Python, such as "none", so UNSERVED cannot hold them
    unserved += ["bias"] if settings.get("bias", "none") != "none" else []
    unserved += ["init_lora_weights"] if changes_base(settings) else []
    if unserved:
        raise UserError(
            f"{path}: has {unserved[0]} {json.dumps(settings[unserved[0]])}, with which an adapter cannot be served: "
            "merge it into its base (PEFT's merge_and_unload) and name the merged checkpoint"
        )
    return settings


def changes_base(settings: dict[str, Any]) -> bool:
    """Did the adapter's start change the base's weights too (PiSSA, OLoRA, LoftQ)? settings: its adapter_config.json."""
    return str(settings.get("init_lora_weights")).lower() not in PLAIN_STARTS


def refuse_other_kinds(path: Path, settings: Any) -> None:
    """Raises UserError for an adapter that is no LoRA. path: of its adapter_config.json."""
    kind = settings.get("peft_type", "LORA") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise UserError(
            f"{path}: an adapter of type {kind}; only LoRA (peft_type LORA) is read here, merge it with PEFT"
        )


def files_fingerprint(folder: str | Path, base: str | None = None) -> str:
    """A short text that changes when a file of the model, or of the base under an adapter, is replaced.

    Files count by name, size and time of change. Raises UserError as `served_settings` does.
    """
    folder = Path(folder)
    settings = served_settings(folder)
    places = [folder] if settings is None else [folder, base_under(folder, settings, base)]
    # not by content: to read the 15 GB of a 7B model would take longer than the check is worth
    found = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for place in dict.fromkeys(places)
        for path in sorted(place.glob("*"))
        if path.is_file()
    ]
    return f"{len(found)} files, {hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]}"
