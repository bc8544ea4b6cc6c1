"""One base in memory, two readers (--base shared): the policy's frozen weights are views into the sampler's.

In colocate placement trainer and vLLM need the same frozen numbers, 15 GB for 7B. vLLM reads the checkpoint; the trainer's
model is made without weights, and each of its parameters becomes a view into what vLLM holds. vLLM packs q, k and v into one
matrix, and gate and up into another, row under row, so a part is a slice of rows; everything else is the same tensor:

    qkv_proj [q rows + k rows + v rows, H]   ->   q_proj, k_proj, v_proj
    gate_up_proj [2 I, H]                    ->   gate_proj, up_proj
    embed_tokens [V padded, H]               ->   embed_tokens [V, H]

What makes it safe: at the start every view is compared, byte for byte, with the checkpoint's files; at every hand-over each
must have had no write since, and must have the same checksum. Only the KV cache sleeps: the weights stay where they are.
"""

import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import RunError
from data.files import weight_files
from rollout.crc import sum_of_words, words_of
from trainer.config import OnlineConfig

if TYPE_CHECKING:  # takes seconds to load, and the dry run asks here too
    from transformers import PreTrainedModel

COMPARED = 1 << 24
"""Numbers that are read and compared at a time, so that no second copy of a large matrix is made."""


def why_two_copies(cfg: OnlineConfig, on_gpu: bool) -> str:
    """Why trainer and sampler of a run cannot read one base, or do not by default (auto); "" if they do."""
    if cfg.engine != "vllm":
        return f"--engine {cfg.engine} samples with the trainer's own model"
    if cfg.placement != "colocate":
        return f"--placement {cfg.placement} samples in other processes"
    if cfg.tensor_parallel > 1:
        return f"--tensor-parallel {cfg.tensor_parallel}: a rank of vLLM holds only its part of every matrix"
    if cfg.shard != "none":
        return f"--shard {cfg.shard}: a rank of the trainer holds only its rows of every matrix"
    if not cfg.lora_rank:
        return "--lora-rank 0 trains every weight, so none is frozen"
    if cfg.quantize != "none":
        return f"--quantize {cfg.quantize} holds the trainer's in 4 bits, and the sampler's in {sampler_dtype(cfg, on_gpu)}"
    if cfg.sampler_lora == "merged":
        return "--sampler-lora merged writes the adapter into the sampler's weights"
    if (dtype := sampler_dtype(cfg, on_gpu)) != cfg.dtype:
        return f"the trainer's is in {cfg.dtype} (--dtype), and the sampler's in {dtype} (--sampler-dtype)"
    if cfg.base == "copies":
        return "--base copies"
    if cfg.base == "auto" and not on_gpu:
        # and in float32 it adds the adapter to its copy, which is several times as fast as its kernels
        return "on a CPU vLLM packs its own for speed (--base shared keeps them plain)"
    return ""


def sampler_dtype(cfg: OnlineConfig, on_gpu: bool) -> str:
    """Of vLLM's weights and products (--sampler-dtype).

    auto: the base's, but on a CPU bfloat16 where --autocast makes the trainer's products in it: most of the time of sampling
    is spent in them. The adapter is added to the base's weights in float32, and the sum is rounded once. Not where every
    weight is trained, nor where the checkpoint holds numbers of bfloat16: a small update would be rounded away from each of
    them, while of weights that lie anywhere between two such numbers it takes some to the next, and arrives in their mean.
    """
    if cfg.sampler_dtype != "auto":
        return cfg.sampler_dtype
    rounds = cfg.autocast and cfg.lora_rank and cfg.dtype == "float32" and not on_gpu and cfg.base != "shared"
    rounds = rounds and has_bfloat16_products(torch.device("cpu")) and _lies_between_bfloat16(Path(str(cfg.model)))
    return "bfloat16" if rounds else cfg.dtype


def with_sampler_dtype(cfg: OnlineConfig, on_gpu: bool, before: dict[str, Any]) -> OnlineConfig:
    """The settings with the dtype that vLLM computes in: --sampler-dtype, the resumed run's, or what auto is here.

    before: the settings that the resumed run began with (settings_of_run).
    """
    if cfg.engine != "vllm":
        return cfg
    if before and cfg.sampler_dtype == "auto":
        # an older version had no such setting, and sampled in --dtype
        cfg = replace(cfg, sampler_dtype=before.get("sampler_dtype", before["dtype"]))
    return replace(cfg, sampler_dtype=sampler_dtype(cfg, on_gpu))


def _lies_between_bfloat16(model: Path) -> bool:
    """Are the weights of a checkpoint other numbers than bfloat16 has, and not only stored in more bytes?"""
    if not any(model.glob("*.safetensors")):  # a shape for --dry-run, or other files, into which no adapter is merged
        return False
    try:
        with safe_open(weight_files(model)[0], "pt") as handle:
            slices = [handle.get_slice(name) for name in handle.keys() if "embed" not in name]  # noqa: SIM118 (no mapping)
            part = next((one[:64] for one in slices if len(one.get_shape()) == 2), torch.zeros(1))
    except (SafetensorError, OSError):  # check_model says what is wrong with the file
        return False
    return part.dtype == torch.float32 and not torch.equal(part, part.bfloat16().float())


def has_bfloat16_products(device: torch.device) -> bool:
    """Are products in bfloat16 faster than in float32 there? True for a processor that is not of the x86 family."""
    known = platform.machine().lower() in ("x86_64", "amd64") and hasattr(torch.cpu, "_is_avx512_bf16_supported")
    return device.type != "cpu" or not known or torch.cpu._is_avx512_bf16_supported()


def base_refused(why: str) -> str:
    """The sentence that refuses --base shared."""
    return f"--base shared: {why}; leave that out, or use --base copies"


class NotSharedError(ValueError):
    """vLLM does not hold the weights as the trainer needs them. The message is the reason, for one sentence."""


class SharedBase:
    """Frozen weights that belong to the sampler.

    held: {name in vLLM's model: tensor}, of rollout/vllm_versions.py. packs: {packed module: its parts, in order}.
    """

    def __init__(self, held: dict[str, Tensor], packs: dict[str, list[str]]) -> None:
        self.held, self.packs = held, packs
        self.views: dict[str, Tensor] = {}
        """{name in the checkpoint: view}, once they are put into a model."""
        self.versions: dict[str, int] = {}
        self.sums: list[int] = []

    def put_into(self, causal_lm: "PreTrainedModel", model_dir: str) -> None:
        """Make every parameter of a model without weights (empty_model) a view, and prove the views' bytes.

        Raises NotSharedError that names the first parameter which vLLM holds otherwise; UserError for a weight that is not
        finite.
        """
        from trainer.model.loading import refuse_not_finite

        self.views = views_of(dict(causal_lm.named_parameters()), self.held, self.packs)
        prove(self.views, Path(model_dir))
        for name, view in self.views.items():
            refuse_not_finite(view, name, model_dir)
            owner, _, leaf = name.rpartition(".")
            # a parameter made of a view has the view's storage and its count of writes
            setattr(causal_lm.get_submodule(owner), leaf, torch.nn.Parameter(view, requires_grad=False))
        causal_lm.tie_weights()  # a tied head has no parameter of its own: it was listed once
        self.versions = {name: view._version for name, view in self.views.items()}
        self.sums = sums_of(self.views)

    def refuse_writes(self) -> None:
        """Raises RunError that names the first weight that was written to since put_into()."""
        # a write in place counts up the version of its tensor and of all its views (q, k and v together); one past autograd
        # (`.data`, a kernel that lays a matrix out anew) does not, but changes the sum
        found = [name for name, was, now in zip(self.views, self.sums, sums_of(self.views), strict=True) if was != now]
        found += [name for name, view in self.views.items() if view._version != self.versions[name]]
        if found:
            raise RunError(
                f"--base shared: the frozen weight {found[0]}, which trainer and sampler read, was written to during the "
                "run; go on from the last checkpoint with --resume --base copies"
            )


def views_of(parameters: dict[str, Tensor], held: dict[str, Tensor], packs: dict[str, list[str]]) -> dict[str, Tensor]:
    """A view into `held` for each parameter. parameters: of which shape and dtype are read. Raises NotSharedError."""
    whole_of = {part: whole for whole, parts in packs.items() for part in parts}
    views = {}
    for name, wanted in parameters.items():
        module, _, leaf = name.rpartition(".")
        path, _, part = module.rpartition(".")
        source, first = held.get(name), 0
        if source is None and part in whole_of:
            parts = packs[whole_of[part]]
            source = held.get(f"{path}.{whole_of[part]}.{leaf}")
            before = [parameters.get(f"{path}.{other}.{leaf}") for other in parts[: parts.index(part)]]
            first = sum(len(rows) for rows in before if rows is not None)
        if source is None:
            raise NotSharedError(f"vLLM has no tensor for {name}")
        view = source[first : first + len(wanted)]
        if view.shape != wanted.shape or view.dtype != wanted.dtype or not view.is_contiguous():
            raise NotSharedError(
                f"vLLM holds {name} as {tuple(source.shape)} {source.dtype}, where the trainer needs {tuple(wanted.shape)} "
                f"{wanted.dtype}"
            )
        views[name] = view
    return views


def prove(views: dict[str, Tensor], model_dir: Path) -> None:
    """Compare the bytes of every view with the checkpoint's files. Raises NotSharedError that names the first that differs."""
    unseen = dict(views)
    for path in weight_files(model_dir):
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                view = unseen.pop(name, None)
                if view is not None and not _same_bytes(view, handle.get_slice(name)):
                    raise NotSharedError(f"vLLM's {name} is not what the checkpoint holds")
    if unseen:
        raise NotSharedError(f"the checkpoint's files name no tensor {min(unseen)}")


def _same_bytes(view: Tensor, stored) -> bool:
    """stored: safetensors' slice of a file."""
    if list(view.shape) != stored.get_shape():
        return False
    rows = max(1, COMPARED // max(1, view[0].numel()))
    for first in range(0, len(view), rows):
        read = stored[first : first + rows].to(view.dtype).to(view.device)  # rounded as vLLM rounds: to the nearest
        if not torch.equal(words_of(read), words_of(view[first : first + rows])):
            return False
    return True


def sums_of(views: dict[str, Tensor]) -> list[int]:
    """The checksum of each view."""
    return torch.stack([sum_of_words(view.flatten()) for view in views.values()]).tolist()
