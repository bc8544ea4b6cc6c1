"""The LoRA hand-over: a torch.distributed broadcast of the adapter's tensors, with a manifest that both ends check.

No file is written and nothing is merged into the base weights. All tensors travel as one buffer of bytes. The manifest
has one row per tensor: (name, shape, dtype, CRC-32 of its bytes). A canary text then shows that the sampler uses the
new adapter. In a world of one process the buffer does not travel: it must have had no write, and have the same checksum.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import RunError
from rollout.crc import checksums, sum_of_words

Layout = tuple[tuple[str, tuple[int, ...], str], ...]
"""(name, shape, dtype) of each tensor, in name order."""
Manifest = list[tuple[str, tuple[int, ...], str, int]]
"""The layout with the CRC-32 of each tensor's bytes added."""
ALIGNMENT = 16
"""Bytes. Every tensor starts at a multiple of it, since a view as float64 needs an aligned start."""


class SyncError(RunError):
    """An adapter arrived changed, or the sampler does not sample from it."""


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """The layout of named tensors."""
    return tuple(
        (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in sorted(tensors.items())
    )


class Parcel:
    """Tensors side by side in one buffer of bytes, allocated once per layout and filled again for every version.

    buffer: [bytes] uint8. tensors: views into the buffer, by name. spans: (first byte, end) of each tensor.
    kept: of a parcel that stays in this process, the count of writes, a checksum of the whole, and its manifest.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        self.kept: tuple[int, Tensor, Manifest] | None = None
        self.layout, self.tensors, self.spans = layout, {}, []
        start = 0
        for _, shape, dtype in layout:
            end = start + math.prod(shape) * getattr(torch, dtype).itemsize
            self.spans.append((start, end))
            start = -(-end // ALIGNMENT) * ALIGNMENT  # rounded up
        self.buffer = torch.zeros(start, dtype=torch.uint8, device=device)
        for (name, shape, dtype), (start, end) in zip(layout, self.spans, strict=True):
            self.tensors[name] = self.buffer[start:end].view(getattr(torch, dtype)).view(shape)

    @classmethod
    def of(cls, tensors: dict[str, Tensor], reuse: "Parcel | None" = None) -> "Parcel":
        """A parcel with a copy of `tensors`. reuse: a parcel to fill again if its layout and device are the same."""
        layout, device = layout_of(tensors), next(iter(tensors.values())).device
        fits = reuse is not None and reuse.layout == layout and reuse.buffer.device == device
        parcel = reuse if reuse is not None and fits else cls(layout, device)
        with torch.no_grad():
            torch._foreach_copy_(  # one call: an adapter has hundreds of small tensors
                [parcel.tensors[name] for name, _, _ in layout], [tensors[name] for name, _, _ in layout]
            )
        return parcel

    def manifest(self) -> Manifest:
        """Names, shapes, dtypes, and checksums of the bytes as they are now."""
        crcs = checksums(self.buffer, self.spans)
        return [(*row, crc) for row, crc in zip(self.layout, crcs, strict=True)]

    def keep(self) -> Manifest:
        """The manifest of a parcel that stays in this process: verify() then compares one checksum, and not all."""
        # PyTorch counts writes in place; one past autograd (`.data`, a kernel) changes the checksum. Both before the manifest
        self.kept = self.buffer._version, self.checksum(), self.manifest()
        return self.kept[2]

    def checksum(self) -> Tensor:
        """One of the whole buffer, which stays on the device."""
        return sum_of_words(self.buffer)

    def verify(self, manifest: Manifest) -> None:
        """Raises SyncError that names the first tensor whose shape, dtype or bytes differ from the manifest."""
        version, checksum, known = self.kept or (0, None, None)
        if known == manifest and version == self.buffer._version and torch.equal(checksum, self.checksum()):
            return
        own = self.manifest()
        if own == manifest:
            return
        odd = sorted({row[0] for row in own} ^ {row[0] for row in manifest})
        if odd:
            raise SyncError(f"LoRA sync: tensor {odd[0]} is on one side only")
        expected, got = next((a, b) for a, b in zip(manifest, own, strict=True) if a != b)
        raise SyncError(f"LoRA sync: {expected[0]} arrived as {got[1:]}, sent as {expected[1:]}")


def manifest_of(tensors: dict[str, Tensor]) -> Manifest:
    """The manifest of tensors that are not in a parcel yet."""
    return Parcel.of(tensors).manifest()


def manifest_hash(manifest: Manifest) -> str:
    """The first 16 hex digits of the SHA-256 of the manifest: they identify names, shapes, dtypes and bytes."""
    return hashlib.sha256(repr(manifest).encode()).hexdigest()[:16]


def adapter_hash(tensors: dict[str, Tensor]) -> str:
    """The hash of the tensors' manifest."""
    return manifest_hash(manifest_of(tensors))


def broadcast_adapter(tensors: dict[str, Tensor], reuse: Parcel | None = None) -> tuple[Parcel, Manifest]:
    """Rank 0's adapter as a parcel on every rank, and its manifest. Collective: all ranks of the world call it.

    Raises SyncError that names the tensor if a rank's adapter differs from rank 0's: after the same updates all are
    equal.
    """
    parcel = Parcel.of(tensors, reuse)
    if dist.get_world_size() == 1:
        return parcel, parcel.keep()
    manifest, parcel.kept = parcel.manifest(), None
    # every rank compares its checksums with rank 0's: one that drifted is named before its weights are replaced
    crcs = torch.tensor([row[-1] for row in manifest], device=parcel.buffer.device)
    dist.broadcast(crcs, src=0)  # sync point: all ranks wait for rank 0
    firsts: Manifest = [(*row[:-1], crc) for row, crc in zip(manifest, crcs.tolist(), strict=True)]
    for mine, first in zip(manifest, firsts, strict=True):
        if mine != first:
            raise SyncError(f"LoRA sync: rank {dist.get_rank()} holds {mine[0]} as {mine[1:]}, rank 0 as {first[1:]}")
    dist.broadcast(parcel.buffer, src=0)  # a failed check above raises on one rank only: the watch ends the others here
    return parcel, firsts


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A fixed text with the trainer's log-probs. With the new adapter the sampler must give the same log-probs."""

    ids: list[int]
    policy: list[float]
    """[T-1] the trainer's log-probs of ids[1:]."""
    reference: list[float] | None
    """[T-1] the same with the adapter off; None if there is no adapter (every weight is trained)."""
    tolerance: float
    """Largest allowed mean |difference| in nats."""

    def check(self, on: list[float], off: list[float] | None) -> float:
        """Returns the mean |difference| between sampler and trainer in nats.

        on, off: [T-1] the sampler's log-probs with and without the adapter. Raises SyncError if `on` differs from the policy
        by more than the tolerance (or what is larger of three times the difference without an adapter and, in 16 bits, a third
        of the adapter's effect, but ten times the tolerance at most), or equals `off` in every number although the policy has
        an adapter. Returns nan if the policy's log-probs are not finite: the next update names the token.
        """
        if not all(math.isfinite(value) for value in self.policy):
            return math.nan
        distance = _mean_difference(on, self.policy)
        # without an adapter sampler and trainer differ by rounding only; in bfloat16 that can exceed the tolerance
        rounding = 0.0 if off is None or self.reference is None else _mean_difference(off, self.reference)
        effect = 0.0 if self.reference is None else _mean_difference(self.policy, self.reference)
        share = effect / 3 if self.tolerance > 0.01 else 0.0  # in 16 bits rounding grows with it (LOG.md, 2026-11-29)
        # at most ten times: a sampler with a wrong base must not raise its own limit
        limit = max(self.tolerance, min(max(3 * rounding, share), 10 * self.tolerance))
        if not distance <= limit:  # nan is a failure too
            to_reference = math.nan if self.reference is None else _mean_difference(on, self.reference)
            nearer = "; it is nearer to the policy without its adapter" if to_reference < distance else ""
            raise SyncError(
                f"LoRA sync: the sampler is not the policy: on the canary text their log-probs differ by "
                f"{distance:.3g} nats on average, more than {limit:g} ({to_reference:.3g} from the reference){nearer}"
            )
        # the sign of a sampler that ignores its adapter: every number is bit for bit the one without it
        if off is not None and self.reference is not None and on == off:
            if effect > self.tolerance / 100:  # below this, rounding can hide the adapter
                raise SyncError(
                    f"LoRA sync: the sampler answers the canary text exactly as without an adapter, though the "
                    f"policy's moves its log-probs by {effect:.3g} nats on average"
                )
        return distance


def _mean_difference(a: list[float], b: list[float]) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
