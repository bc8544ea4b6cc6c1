"""The LoRA hand-over: adapter tensors by torch.distributed broadcast, with a manifest that both ends check.

Nothing goes through a file and nothing is merged. A manifest row is (name, shape, dtype, CRC-32 of the bytes).
"""

import hashlib
import math
import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from rollout import Engine

Manifest = list[tuple[str, tuple, str, int]]


def manifest_of(tensors: dict[str, Tensor]) -> Manifest:
    """[(name, shape, dtype, crc32)] in name order."""
    return [
        (name, tuple(tensor.shape), str(tensor.dtype), zlib.crc32(_bytes(tensor)))
        for name, tensor in sorted(tensors.items())
    ]


def adapter_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def verify(tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """Raises RuntimeError that names the first tensor which is not what the manifest says."""
    if sorted(tensors) != [row[0] for row in manifest]:
        odd = sorted(set(tensors) ^ {row[0] for row in manifest})
        raise RuntimeError(f"LoRA sync: tensor {odd[0]} is on one side only")
    for expected, got in zip(manifest, manifest_of(tensors), strict=True):
        if expected != got:
            raise RuntimeError(f"LoRA sync: {expected[0]} arrived as {got[1:]}, sent as {expected[1:]}")


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().cpu()
    return (
        memoryview(flat.view(torch.uint8).numpy())
        if flat.dtype == torch.bfloat16
        else memoryview(flat.numpy()).cast("B")
    )


def broadcast_adapter(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Manifest]:
    """Every rank gets rank 0's adapter tensors (fresh copies) and rank 0's manifest. Collective: all ranks call it.

    One flat buffer, one broadcast; the manifest travels beside it as an object.
    """
    names = sorted(tensors)
    box: list = [manifest_of(tensors) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    flat = torch.cat([tensors[name].detach().reshape(-1) for name in names])
    dist.broadcast(flat, src=0)
    sizes = [tensors[name].numel() for name in names]
    parts = flat.split(sizes)
    return {name: part.view(tensors[name].shape).clone() for name, part in zip(names, parts, strict=True)}, box[0]


def sync_adapter(engine: Engine, tensors: dict[str, Tensor], version: int) -> str:
    """Hand the trainer's adapter to this rank's sampler; returns its hash. Collective: all ranks call it.

    Raises RuntimeError naming the tensor when a rank's own adapter, or what arrived, differs from rank 0's.
    """
    received, manifest = broadcast_adapter(tensors)
    verify(tensors, manifest)  # data-parallel ranks hold the same weights, or the run is wrong
    engine.load_adapter(received, manifest, version)
    return engine.hash


def check_canary(
    engine: Engine, ids: list[int], policy: list[float], reference: Callable[[], list[float]], tolerance: float
) -> float:
    """The sampler's log-probs of a fixed text must be the trainer's; returns their mean |difference| in nats.

    policy: [T-1] the trainer's log-probs of ids[1:]; reference(): the same without its adapter. Raises RuntimeError when the
    sampler is farther from the policy than `tolerance`, and says whether it then samples from the base model. A policy that
    is not finite itself is no failure of the hand-over: nan comes back, and the next update names the token.
    """
    if not all(math.isfinite(value) for value in policy):
        return math.nan
    sampler = engine.prompt_logprobs(ids)
    to_policy = _mean_difference(sampler, policy)
    if not to_policy <= tolerance:  # nan is a failure too
        to_reference = _mean_difference(sampler, reference())
        nearer = "; it is nearer to the policy without its adapter" if to_reference < to_policy else ""
        raise RuntimeError(
            f"LoRA sync: the sampler is not the policy: on the canary text their log-probs differ by {to_policy:.3g} nats on "
            f"average, more than {tolerance:g} ({to_reference:.3g} from the reference){nearer}"
        )
    return to_policy


def _mean_difference(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
