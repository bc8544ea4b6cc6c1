"""The LoRA hand-over: adapter tensors by torch.distributed broadcast, with a manifest that both ends check.

Nothing goes through a file and nothing is merged. All tensors travel as one buffer of bytes; the manifest beside it has a row
(name, shape, dtype, CRC-32 of the bytes) for each. A canary text shows that the sampler uses what it got.
"""

import hashlib
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import RunError

Layout = tuple[tuple[str, tuple[int, ...], str], ...]
"""(name, shape, dtype) of each tensor, in name order."""
Manifest = list[tuple[str, tuple[int, ...], str, int]]
"""The layout with the CRC-32 of each tensor's bytes."""
ALIGNMENT = 16
"""Every tensor begins at a multiple of so many bytes of the buffer."""


class SyncError(RunError):
    """An adapter did not arrive as it was sent, or is not what the sampler samples from."""


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """The layout of tensors by name."""
    return tuple(
        (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in sorted(tensors.items())
    )


class Parcel:
    """Tensors side by side in one buffer of bytes, made once per layout and filled again for every version.

    buffer: [bytes] uint8. tensors: views into it, by name.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        self.layout, self.tensors, self.spans = layout, {}, []
        start = 0
        for _, shape, dtype in layout:
            end = start + math.prod(shape) * getattr(torch, dtype).itemsize
            self.spans.append((start, end))
            start = -(-end // ALIGNMENT) * ALIGNMENT
        self.buffer = torch.zeros(start, dtype=torch.uint8, device=device)
        for (name, shape, dtype), (start, end) in zip(layout, self.spans, strict=True):
            self.tensors[name] = self.buffer[start:end].view(getattr(torch, dtype)).view(shape)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], reuse: "Parcel | None" = None) -> "Parcel":
        """Filled with a copy of `tensors`. reuse: a parcel that is filled instead where the layout is the same."""
        layout, device = layout_of(tensors), next(iter(tensors.values())).device
        fits = reuse is not None and reuse.layout == layout and reuse.buffer.device == device
        parcel = reuse if reuse is not None and fits else cls(layout, device)
        with torch.no_grad():
            torch._foreach_copy_(
                [parcel.tensors[name] for name, _, _ in layout], [tensors[name] for name, _, _ in layout]
            )
        return parcel

    def manifest(self) -> Manifest:
        """Names, shapes, dtypes and the checksums of the bytes as they are now."""
        data = memoryview(self.buffer.cpu().numpy())
        crcs = _checksums([data[start:end] for start, end in self.spans])
        return [(*row, crc) for row, crc in zip(self.layout, crcs, strict=True)]

    def verify(self, manifest: Manifest) -> None:
        """Raises SyncError that names the first tensor which is not what the manifest says."""
        own = self.manifest()
        if own == manifest:
            return
        odd = sorted({row[0] for row in own} ^ {row[0] for row in manifest})
        if odd:
            raise SyncError(f"LoRA sync: tensor {odd[0]} is on one side only")
        expected, got = next((a, b) for a, b in zip(manifest, own, strict=True) if a != b)
        raise SyncError(f"LoRA sync: {expected[0]} arrived as {got[1:]}, sent as {expected[1:]}")


_helper = ThreadPoolExecutor(1, thread_name_prefix="checksums")


def _checksums(parts: list[memoryview]) -> list[int]:
    """CRC-32 of each part; many bytes in threads, since zlib lets others run meanwhile."""
    if sum(map(len, parts)) < 1 << 21:
        return [zlib.crc32(part) for part in parts]
    middle = len(parts) // 2
    first = _helper.submit(lambda: [zlib.crc32(part) for part in parts[:middle]])
    second = [zlib.crc32(part) for part in parts[middle:]]
    return first.result() + second


def manifest_of(tensors: dict[str, Tensor]) -> Manifest:
    """The manifest of tensors that are not in a parcel."""
    return Parcel.of(tensors).manifest()


def manifest_hash(manifest: Manifest) -> str:
    """SHA-256 over the manifest: 16 hex digits that stand for names, shapes, dtypes and bytes."""
    return hashlib.sha256(repr(manifest).encode()).hexdigest()[:16]


def adapter_hash(tensors: dict[str, Tensor]) -> str:
    """The hash of the tensors' manifest."""
    return manifest_hash(manifest_of(tensors))


def broadcast_adapter(tensors: dict[str, Tensor], reuse: Parcel | None = None) -> tuple[Parcel, Manifest]:
    """Rank 0's adapter as a parcel on every rank, and its manifest. Collective: all ranks of the world call it.

    Raises SyncError naming the tensor when a rank's own adapter is not rank 0's: they hold the same, or the run is wrong.
    """
    parcel = Parcel.of(tensors, reuse)
    manifest = parcel.manifest()
    if dist.get_world_size() == 1:
        return parcel, manifest
    crcs = torch.tensor([row[-1] for row in manifest], device=parcel.buffer.device)
    dist.broadcast(crcs, src=0)
    firsts: Manifest = [(*row[:-1], crc) for row, crc in zip(manifest, crcs.tolist(), strict=True)]
    for mine, first in zip(manifest, firsts, strict=True):
        if mine != first:
            raise SyncError(f"LoRA sync: rank {dist.get_rank()} holds {mine[0]} as {mine[1:]}, rank 0 as {first[1:]}")
    dist.broadcast(parcel.buffer, src=0)
    return parcel, firsts


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A fixed text, and what the trainer gives for it: the sampler must give the same once it has the adapter."""

    ids: list[int]
    policy: list[float]
    """[T-1] the trainer's log-probs of ids[1:]."""
    reference: list[float] | None
    """The same without its adapter; None where there is none (every weight is trained)."""
    tolerance: float
    """Largest mean |difference| in nats."""

    def check(self, on: list[float], off: list[float] | None) -> float:
        """Mean |difference| of sampler and trainer in nats.

        on, off: [T-1] the sampler's log-probs with and without the adapter. Raises SyncError when `on` is farther from the
        policy than the tolerance (or three times what the two differ by without an adapter), or is, number by number, what it
        gives without an adapter although the policy has one. A policy that is not finite itself is no failure of the hand-over:
        nan comes back, and the next update names the token.
        """
        if not all(math.isfinite(value) for value in self.policy):
            return math.nan
        distance = _mean_difference(on, self.policy)
        # without an adapter the two differ by rounding alone: in bfloat16 that may be more than the tolerance
        rounding = 0.0 if off is None or self.reference is None else _mean_difference(off, self.reference)
        limit = max(self.tolerance, min(3 * rounding, 10 * self.tolerance))
        if not distance <= limit:  # nan is a failure too
            to_reference = math.nan if self.reference is None else _mean_difference(on, self.reference)
            nearer = "; it is nearer to the policy without its adapter" if to_reference < distance else ""
            raise SyncError(
                f"LoRA sync: the sampler is not the policy: on the canary text their log-probs differ by {distance:.3g} nats "
                f"on average, more than {limit:g} ({to_reference:.3g} from the reference){nearer}"
            )
        if off is not None and self.reference is not None and on == off:
            effect = _mean_difference(self.policy, self.reference)
            if effect > self.tolerance / 100:  # below, rounding may hide the adapter
                raise SyncError(
                    f"LoRA sync: the sampler answers the canary text exactly as without an adapter, though the "
                    f"policy's moves its log-probs by {effect:.3g} nats on average"
                )
        return distance


def _mean_difference(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
