"""Sampling: the `Rollout` noun, the engine protocol, engines in the trainer's process or apart from it, the LoRA sync."""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from rollout.sync import Canary, Manifest, Parcel, RunError, broadcast_adapter

__all__ = ["Ahead", "Canary", "Engine", "LocalEngine", "Rollout", "RunError", "Sampling", "stable_seed"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. Example: Sampling(n=8, max_tokens=192, temperature=1.0, top_p=1.0, seed=7)"""

    n: int
    """Responses per prompt (G)."""
    max_tokens: int
    """Longest response, its end-of-turn token included."""
    temperature: float
    """0 is greedy."""
    top_p: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response: token-in, token-out. Text is decoded for the reward and never encoded again."""

    puzzle_id: str
    prompt_ids: list[int]
    """[P] prompt tokens as they were sampled from."""
    response_ids: list[int]
    """[T] sampled tokens, the end-of-turn token included when it was reached."""
    sampler_logprobs: list[float]
    """[T] log-prob of each sampled token under the sampler, at its temperature."""
    finish_reason: str
    """"stop" (end of turn) or "length" (cut at max_tokens)."""
    adapter_version: int
    """Optimizer steps behind the sampler's adapter; 0 = none loaded yet."""
    adapter_hash: str
    """Hash (16 hex digits) of the adapter the sampler held; "" = adapter off."""


class Engine(Protocol):
    """Where a rank's rollouts come from. A step's prompts are asked for by all ranks, the same list; each collects its share."""

    hash: str
    """Hash (16 hex digits) of the adapter last handed over; "" before the first."""
    seconds: float
    """Seconds the sampler took for the groups collected last."""

    def deliver(self, tensors: dict[str, Tensor], version: int, canary: Canary) -> None:
        """Hand over the policy's adapter (PEFT names, or every weight), with proof. Collective over the ranks that train.

        Raises SyncError naming a tensor that arrived damaged or unbound, or when the canary shows another adapter.
        """

    def ask(self, step: int, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling) -> None:
        """Ask for `sampling.n` responses to each prompt of a step, under the adapter last delivered."""

    def collect(self, step: int) -> list[list[Rollout]]:
        """Groups of this rank's prompts, `prompts[rank :: size]`, in order."""

    def close(self) -> None:
        """Free what the engine holds."""


class LocalEngine(ABC):
    """An engine inside the rank's own process: it samples when the rollouts are collected.

    `tensor_parallel` neighbouring ranks may form one sampler; then they sample for the prompts of all of them together.
    """

    def __init__(self, rank: int = 0, size: int = 1, tensor_parallel: int = 1) -> None:
        self.rank, self.size, self.tensor_parallel = rank, size, tensor_parallel
        self.version, self.hash, self.seconds = 0, "", 0.0
        self.asked: dict[int, tuple] = {}
        self.parcel: Parcel | None = None
        self.off: list[float] | None = None

    @abstractmethod
    def generate(self, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling) -> list[list[Rollout]]:
        """Sample `sampling.n` responses per prompt; the outer list is in prompt order."""

    @abstractmethod
    def load_adapter(self, parcel: Parcel, manifest: Manifest, version: int) -> None:
        """Replace the adapter by the parcel's tensors, verified against the manifest; they are the engine's to change."""

    @abstractmethod
    def prompt_logprobs(self, ids: list[int], adapter: bool = True) -> list[float]:
        """[T-1] log-probs of ids[1:], each given what stands before it; adapter False: as if there were none."""

    def wake(self) -> None:  # noqa: B027 (most engines never sleep)
        """Before sampling: take back what sleep gave away."""

    def sleep(self) -> None:  # noqa: B027
        """After sampling: leave memory to the trainer."""

    def deliver(self, tensors: dict[str, Tensor], version: int, canary: Canary) -> None:
        """See Engine."""
        self.parcel, manifest = broadcast_adapter(tensors, self.parcel)
        self.wake()
        self.load_adapter(self.parcel, manifest, version)
        self.prove(canary)

    def prove(self, canary: Canary) -> tuple[list[float], list[float] | None]:
        """The sampler's log-probs of the canary with and without the adapter, checked; the second never change."""
        if self.off is None and canary.reference is not None:
            self.off = self.prompt_logprobs(canary.ids, adapter=False)
        on = self.prompt_logprobs(canary.ids)
        canary.check(on, self.off)
        return on, self.off

    def ask(self, step: int, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling) -> None:
        """See Engine."""
        self.asked[step] = (puzzle_ids, prompts, sampling)

    def collect(self, step: int) -> list[list[Rollout]]:
        """See Engine."""
        start = time.perf_counter()
        puzzle_ids, prompts, sampling = self.asked.pop(step)
        first = self.rank // self.tensor_parallel * self.tensor_parallel
        team = range(first, first + self.tensor_parallel)
        ours = [i for i in range(len(prompts)) if i % self.size in team]
        groups = self.generate([puzzle_ids[i] for i in ours], [prompts[i] for i in ours], sampling)
        self.seconds = time.perf_counter() - start
        self.sleep()
        return [group for i, group in zip(ours, groups, strict=True) if i % self.size == self.rank]

    def close(self) -> None:  # noqa: B027 (the model may be the trainer's)
        """See Engine."""


class Ahead:
    """A step's rollouts, asked for `staleness` steps before they are trained on (0: when they are needed).

    Those of step s are sampled under the adapter of step s - staleness: always the oldest allowed, so that a run with the
    same seed is the same run, however fast its samplers are. The first steps of a run take the first adapter; so do those of one
    that is resumed for more steps than it was to have, since nothing was asked beyond its end.
    """

    def __init__(self, engine: Engine, ask: Callable[[int], None], staleness: int, first: int, end: int) -> None:
        """ask(step) asks the engine. first, end: the run's steps."""
        self.engine, self.ask, self.staleness, self.next, self.end = engine, ask, staleness, first, end
        self.held: dict[int, list[list[Rollout]]] = {}
        self.coming: list[int] = []

    def restore(self, pending: dict[str, list], rank: int, size: int) -> None:
        """Begin, with the unused rollouts of a checkpoint (as unused() gives them); a rank takes its share."""
        for step, groups in pending.items():
            self.held[int(step)] = [[Rollout(**r) for r in group] for group in groups[rank::size]]
        self._ask_until(self.next + self.staleness)

    def groups(self, step: int) -> list[list[Rollout]]:
        """This rank's groups of a step; those of step + staleness are asked for, under the adapter at hand."""
        self._ask_until(step + self.staleness + 1)
        if step in self.held:
            return self.held.pop(step)
        self.coming.remove(step)
        return self.engine.collect(step)

    def unused(self, gather: Callable[[list], list]) -> dict[str, list]:
        """Rollouts asked for and not yet trained on, for a checkpoint; waits for them. gather: as World.gather. Collective."""
        for step in self.coming:
            self.held[step] = self.engine.collect(step)
        self.coming = []
        return {
            str(step): gather([[asdict(r) for r in group] for group in groups])
            for step, groups in sorted(self.held.items())
        }

    def _ask_until(self, end: int) -> None:
        for step in range(self.next, min(end, self.end)):
            if step not in self.held:
                self.ask(step)
                self.coming.append(step)
        self.next = max(self.next, min(end, self.end))


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
