"""FSDP2 (arXiv:2304.11277): every rank holds its rows of every weight, and gathers one whole layer at a time.

A forward pass gathers the weights of a layer from all ranks, uses them, and frees them; backward gathers them again and
sums the gradients of the rows. So every forward and backward is a sync point: if one rank runs a pass that another does
not, both hang in the layer's all-gather (packing.micro_batches adds fillers for that reason). The model is made on the
meta device and each rank reads its own rows of the checkpoint, so no rank ever holds all of it.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from data.errors import UserError
from trainer.model.loading import refuse_not_finite, seeded
from trainer.ranks.world import rows_of, shard_from_rows


def shard(causal_lm: PreTrainedModel, model_dir: str, seed: int, device: torch.device, called_with: Callable) -> None:
    """Shard a model made by empty_model (with or without a PEFT adapter) over the world, and fill it. Collective.

    Every decoder layer is one FSDP unit. Embedding, last norm and head share the outermost unit. called_with(causal_lm,
    ...): the function that replaces the model's forward; it becomes causal_lm.fused(...). Gradients are summed over the
    ranks, not averaged. Raises UserError if the checkpoint lacks a weight.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in (*causal_lm.model.layers, causal_lm):  # inner units first: the outermost takes what is left
        fully_shard(unit, mesh=mesh)
        # sum, not mean: the loss is already divided by counts over all ranks (packing.Denominators)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no reduction with a factor
    # FSDP gathers the outermost unit's weights only around methods of the module, so the function has to become one
    causal_lm.fused = MethodType(called_with, causal_lm)
    register_fsdp_forward_method(causal_lm, "fused")
    _fill_base(causal_lm, Path(model_dir), device)
    _fill_adapter(causal_lm, seed, device)
    if causal_lm.config.tie_word_embeddings:  # filling replaced both parameters, which broke the tie
        causal_lm.lm_head.weight = causal_lm.model.embed_tokens.weight


def _fill_base(causal_lm: PreTrainedModel, model_dir: Path, device: torch.device) -> None:
    """Read this rank's rows of every base weight. Raises UserError that names a weight missing from the checkpoint."""
    index = model_dir / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    for name, param in list(causal_lm.named_parameters()):
        if ".lora_" in name:
            continue
        stored = name.replace(".base_layer", "")
        path = model_dir / files.get(stored, "model.safetensors")
        if not path.is_file():
            raise UserError(
                f"--model {model_dir}: {path.name} is missing; --shard fsdp reads safetensors checkpoints only"
            )
        with safe_open(path, "pt") as handle:
            if stored not in handle.keys():  # noqa: SIM118 (no mapping)
                raise UserError(f"--model {model_dir}: the checkpoint has no tensor {stored}")
            rows = handle.get_slice(stored)[rows_of(param)]
            refuse_not_finite(rows, stored, model_dir)
            _put(causal_lm, name, param, rows, device)


def _fill_adapter(causal_lm: PreTrainedModel, seed: int, device: torch.device) -> None:
    """Draw the adapter as PEFT does, module by module, so that its values equal those without sharding."""
    # every rank draws whole matrices from the same seed and keeps its rows: the random stream must not depend on the
    # rank
    with seeded(seed), torch.no_grad():
        for name, module in causal_lm.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            rank, width, height = module.r["default"], module.in_features, module.out_features
            # both constructors draw from the generator, as they do in PEFT, before the values are replaced
            lora_A = torch.nn.Linear(width, rank, bias=False).weight
            lora_B = torch.nn.Linear(rank, height, bias=False).weight.zero_()
            torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
            for leaf, value in (("lora_A", lora_A), ("lora_B", lora_B)):
                param = getattr(module, leaf)["default"].weight
                # PEFT creates the adapter in the base's dtype and then keeps it in float32
                rounded = value[rows_of(param)].to(module.get_base_layer().weight.dtype)
                _put(causal_lm, f"{name}.{leaf}.default.weight", param, rounded, device)


def _put(model: torch.nn.Module, name: str, param: DTensor, rows: Tensor, device: torch.device) -> None:
    """Replace a parameter on the meta device by this rank's rows of it."""
    # clone: a view of the adapter's rows would keep the whole matrix in memory
    rows = rows.detach().to(device=device, dtype=param.dtype).contiguous().clone()
    owner, _, leaf = name.rpartition(".")
    filled = torch.nn.Parameter(shard_from_rows(rows, param), requires_grad=param.requires_grad)
    setattr(model.get_submodule(owner), leaf, filled)
