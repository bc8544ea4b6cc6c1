"""What runs inside vLLM's worker: the trainer's tensors, put where vLLM's kernels read them.

vLLM finds the class by its name (`worker_extension_cls`); rollout/vllm_engine.py calls it through `collective_rpc`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data.files import weight_files
from rollout.sync import Manifest, Parcel, SyncError


class SyncWorker:
    """A mixin for vLLM's worker class (`worker_extension_cls`); `self` is the worker. Puts tensors where vLLM reads."""

    def set_adapter(self, parcel: Parcel, manifest: Manifest, config: dict, adapter_id: int) -> tuple[int, int]:
        """Replace the loaded adapter by the parcel's. Returns (PEFT modules given, vLLM modules bound).

        vLLM packs q/k/v and gate/up into one module each, so "bound" counts vLLM's modules, not PEFT's. config: PEFT's
        r, lora_alpha, target_modules. Raises SyncError that names a damaged tensor, a module that vLLM does not have,
        or a slot whose content differs from the parcel.
        """
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        parcel.verify(manifest)  # the bytes as they arrived
        tensors = as_vllm_packs(parcel.tensors, self.model_runner.get_model().packed_modules_mapping)
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        plan: SlotPlan | None = getattr(self, "slot_plan", None)
        if plan is not None and plan.parcel is parcel and plan.config == config:
            plan.refill(adapters, adapter_id)
            return len(parcel.tensors) // 2, plan.bound
        lora = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper.from_dict({**config, "peft_type": "LORA"}),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
        )
        sources = _sources(lora.loras, tensors)
        given = len(lora.loras)
        if 2 * given != len(tensors):
            raise SyncError(
                f"LoRA sync: {len(tensors)} tensors made {given} adapter modules, expected {len(tensors) // 2}"
            )
        for loaded in list(manager.list_adapters()):  # first: there is one slot (max_loras)
            adapters.remove_adapter(loaded)
        adapters.add_adapter(lora)  # packs q/k/v and gate/up, and multiplies lora_B by alpha / r in place
        adapters.activate_adapter(adapter_id)
        bound = [name for name in adapters.modules if lora.get_lora(name) is not None]
        unbound = sorted(set(lora.loras) - set(bound) - _packed_away(adapters, lora))
        if unbound or not bound:
            raise SyncError(f"LoRA sync: vLLM has no module for {unbound[0] if unbound else 'any adapter tensor'}")
        slot = adapters.lora_index_to_id.index(adapter_id)
        pieces = [
            piece for name in bound for piece in _slot_pieces(name, adapters.modules[name], slot, lora.get_lora(name))
        ]
        _check_slots(pieces)
        pieces = [replace(piece, sent=sources.get(id(piece.sent), piece.sent)) for piece in pieces]
        plan = SlotPlan(parcel=parcel, config=dict(config), slot=slot, lora=lora, bound=len(bound), pieces=pieces)
        self.slot_plan = plan if plan.reads_the_parcel() else None
        return len(parcel.tensors) // 2, len(bound)

    def set_merged(self, parcel: Parcel | None, manifest: Manifest, scale: float, base: str) -> tuple[int, int]:
        """Replace the weights by the base's plus the parcel's adapter, W + scale B A. Returns (adapter modules, merged).

        The base is read from its files each time (they stay in the page cache), so nothing drifts over many versions.
        parcel None: the base alone. Raises SyncError for a damaged tensor, or one whose layer the base does not have.
        """
        pairs: dict[str, list[Tensor]] = {}
        if parcel is not None:
            parcel.verify(manifest)
            for name, tensor in parcel.tensors.items():  # A comes before B
                layer = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
                pairs.setdefault(f"{layer}.weight", []).append(tensor)
        used = []

        def each():
            for path in weight_files(Path(base)):
                with safe_open(path, "pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (no mapping)
                        weight = handle.get_tensor(name)
                        if name in pairs:
                            used.append(name)
                            lora_a, lora_b = (half.float().cpu() for half in pairs[name])
                            weight = torch.addmm(weight.float(), lora_b, lora_a, alpha=scale)
                        yield name, weight

        self.reload_weights(weights_iterator=each())
        self._repack_head()
        if missing := sorted(set(pairs) - set(used)):
            raise SyncError(f"LoRA sync: the base has no {missing[0]} for the adapter")
        return len(pairs), len(used)

    def _repack_head(self) -> None:
        """vLLM 0.32 on a CPU: a head tied to the embedding keeps its old packed copy unless it is packed again."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    def set_weights(self, parcel: Parcel, manifest: Manifest) -> int:
        """Replace every weight of the model by the parcel's (checkpoint names). Returns how many tensors vLLM read.

        vLLM packs the weights and, on a CPU, changes their memory layout, so they cannot be read back and compared.
        Only the canary proves which weights it samples from.
        """
        parcel.verify(manifest)
        taken = []

        def each():
            for name, tensor in parcel.tensors.items():
                taken.append(name)
                yield name, tensor

        self.reload_weights(weights_iterator=each())
        self._repack_head()
        if len(taken) != len(parcel.tensors):
            raise SyncError(f"weight sync: vLLM took {len(taken)} of {len(parcel.tensors)} tensors")
        return len(taken)


def as_vllm_packs(tensors: dict[str, Tensor], packs: dict[str, list[str]]) -> dict[str, Tensor]:
    """The adapter with gate_up_proj as two modules, where vLLM packs it from two but the checkpoint holds one (GLM-4).

    Both halves have the same A [r,in]; B [gate + up,r] is cut in the middle. The parts are views of the tensors.
    """
    whole, parts = "gate_up_proj", packs.get("gate_up_proj", [])
    if len(parts) < 2:
        return tensors
    split = {}
    for name, tensor in tensors.items():
        if f".{whole}." not in name:
            split[name] = tensor
            continue
        halves = tensor.chunk(2) if ".lora_B." in name else (tensor, tensor)
        for part, half in zip(parts, halves, strict=True):
            split[name.replace(whole, part)] = half
    return split


def _sources(loras: dict[str, Any], tensors: dict[str, Tensor]) -> dict[int, Tensor]:
    """{id of a tensor of vLLM's LoRAModel: the parcel's tensor that it was made of}: a copy, if of another dtype or place."""
    made = {}
    for name, tensor in tensors.items():
        module, half = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        if module in loras:
            made[id(getattr(loras[module], half.lower()))] = tensor
    return made


def _packed_away(adapters, lora) -> set[str]:
    """Names of adapter modules that are part of a packed vLLM module (q_proj in qkv_proj)."""
    return {
        part for name, parts in adapters.packed_modules.items() if lora.get_lora(name) is not None for part in parts
    }


@dataclass(frozen=True, kw_only=True)
class SlotPiece:
    """A part of a module's LoRA slot, which vLLM's kernels read, and the tensor that belongs there."""

    module: str
    half: str
    """lora_A or lora_B."""
    slot: Tensor
    """A view into the weights that vLLM's kernels read."""
    sent: Tensor


def _slot_pieces(name: str, module, slot: int, weights) -> list[SlotPiece]:
    """This rank's pieces of a module: three for q/k/v, two for gate/up, one for others; A and B each."""
    packed = isinstance(weights.lora_a, list)
    lora_a, lora_b = weights.lora_a, weights.lora_b
    if module.tp_size > 1:  # this rank's slots hold only its shard
        lora_a, lora_b = module.slice_lora_a(lora_a), module.slice_lora_b(lora_b)
    halves = (("lora_A", module.lora_a_stacked, lora_a), ("lora_B", module.lora_b_stacked, lora_b))
    return [
        SlotPiece(module=name, half=half, slot=place[slot, 0, : value.shape[0], : value.shape[1]], sent=value)
        for half, stacked, values in halves
        for place, value in zip(stacked, values if packed else [values], strict=True)
        if value is not None
    ]


def _check_slots(pieces: list[SlotPiece]) -> None:
    """Raises SyncError that names the first module whose slot differs from the tensor sent."""
    same = torch.stack([(piece.slot == piece.sent.to(piece.slot)).all() for piece in pieces]).tolist()  # one wait
    for piece, holds in zip(pieces, same, strict=True):
        if not holds:
            raise SyncError(f"LoRA sync: the slot of {piece.module} does not hold the {piece.half} that was sent")


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """Where each tensor of a parcel lies in vLLM's slots: recorded with the first version, used for later ones.

    This saves most of the time of a hand-over, which has many small tensors (LOG.md).
    """

    parcel: Parcel
    config: dict
    slot: int
    lora: Any
    """vLLM's LoRAModel."""
    bound: int
    pieces: list[SlotPiece]

    def reads_the_parcel(self) -> bool:
        """Are all tensors views into the parcel? Where vLLM cut them (tensor parallel) they are not, and every version goes
        through vLLM's own loading."""
        storage = self.parcel.buffer.untyped_storage().data_ptr()
        return all(piece.sent.untyped_storage().data_ptr() == storage for piece in self.pieces)

    def refill(self, adapters, adapter_id: int) -> None:
        """Copy the parcel's tensors into the slots, compare them there, and give the adapter its new id."""
        torch._foreach_copy_([piece.slot for piece in self.pieces], [piece.sent for piece in self.pieces])
        _check_slots(self.pieces)
        # s = alpha / r of W + s B A (LoRA, arXiv:2106.09685); after the comparison, since the parcel holds B unscaled
        scale = self.config["lora_alpha"] / self.config["r"]
        torch._foreach_mul_([piece.slot for piece in self.pieces if piece.half == "lora_B"], scale)
        for loaded in list(adapters.list_adapters()):
            adapters.remove_adapter(loaded)
        self.lora.id = adapter_id
        adapters._registered_adapters[adapter_id] = self.lora
        adapters._active_adapters[adapter_id] = None
        adapters.lora_index_to_id[self.slot] = adapter_id
