"""Sampling: the `Rollout` noun, the engine protocol, engines inside or outside the trainer's process, the LoRA sync.

G: responses per prompt. T: tokens of one response.
"""

import hashlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from rollout.sync import Canary, Manifest, Parcel, RunError, broadcast_adapter

__all__ = [
    "Ahead",
    "Canary",
    "Engine",
    "Finished",
    "LocalEngine",
    "Rollout",
    "RunError",
    "Sampling",
    "group_numbers",
    "stable_seed",
]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. Example: Sampling(n=8, max_tokens=192, temperature=1.0, top_p=1.0, seed=7, stop_ids=(2,))"""

    n: int
    """Responses per prompt (G)."""
    max_tokens: int
    """Longest response, including its end-of-turn token."""
    temperature: float
    """0 is greedy decoding."""
    top_p: float
    """Probability mass of nucleus sampling; 1 samples from the whole vocabulary."""
    seed: int
    stop_ids: tuple[int, ...]
    """Tokens that end a response (ChatFormat.stop_ids). The one that was sampled is part of the response."""

    @classmethod
    def greedy(cls, max_tokens: int, stop_ids: tuple[int, ...]) -> "Sampling":
        """One response, the likeliest token each time. The seed is never used."""
        return cls(n=1, max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=0, stop_ids=stop_ids)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response: token-in, token-out. The text is decoded for the reward and never tokenized again."""

    puzzle_id: str
    prompt_ids: list[int]
    """[tokens of the prompt] the sampler's input."""
    response_ids: list[int]
    """[T] sampled tokens, including the end-of-turn token if the response reached it."""
    sampler_logprobs: list[float]
    """[T] log-prob of each sampled token under the sampler, at the sampling temperature, over the whole
    vocabulary: with top_p < 1 too, since the trainer's log-probs know no nucleus."""
    finish_reason: str
    """"stop" (end of turn) or "length" (cut at max_tokens)."""
    adapter_version: int
    """Number of optimizer steps the sampler's adapter has had; 0: the adapter the run began with."""
    adapter_hash: str
    """Hash (16 hex digits) of the adapter that sampled this response; "" = adapter off."""


Finished = Callable[[int, list[Rollout]], None]
"""(place among the prompts, its group): called when the last response of a prompt has ended; others may still be sampled."""


class Engine(Protocol):
    """Where a rank's rollouts come from. All ranks request the same list of prompts; each rank collects its share."""

    hash: str
    """Hash (16 hex digits) of the adapter delivered last; "" before the first delivery."""
    seconds: float
    """Seconds the sampler took for the groups collected last."""

    def deliver(self, tensors: dict[str, Tensor], version: int, canary: Canary) -> None:
        """Give the sampler the policy's adapter (PEFT names) or every weight, and prove that it arrived.

        Collective over the ranks that train. Raises SyncError that names a damaged or unbound tensor, or when the
        canary shows that the sampler does not use this adapter.
        """

    def ask(
        self, step: int, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling, part: str = ""
    ) -> None:
        """Request `sampling.n` responses to each prompt of a step, under the adapter delivered last.

        part: names what is asked beside the step's own batch, such as "validation".
        """

    def collect(self, step: int, part: str = "", finished: Finished | None = None) -> list[list[Rollout]]:
        """The groups of this rank's prompts, `prompts[rank :: size]`, in order. Waits until they are sampled.

        finished: told of each group at the latest when all are sampled; places are among this rank's prompts.
        """

    def close(self) -> None:
        """Free the engine's resources."""


class LocalEngine(ABC):
    """An engine inside the rank's own process. It samples when the rollouts are collected, not when they are requested.

    `tensor_parallel` neighbouring ranks can form one sampler; together they then sample for the prompts of all of them.
    """

    def __init__(self, rank: int = 0, size: int = 1, tensor_parallel: int = 1) -> None:
        self.rank, self.size, self.tensor_parallel = rank, size, tensor_parallel
        self.version, self.hash, self.seconds = 0, "", 0.0
        self.asked: dict[tuple[int, str], tuple] = {}  # (step, part) -> the arguments of ask()
        self.parcel: Parcel | None = None
        self.off: list[float] | None = None  # [T-1] canary log-probs without the adapter; they never change

    @abstractmethod
    def generate(
        self,
        puzzle_ids: list[str],
        prompts: list[list[int]],
        sampling: Sampling,
        repeats: Sequence[int] = (),
        finished: Finished | None = None,
    ) -> list[list[Rollout]]:
        """Sample `sampling.n` responses per prompt. Returns one group per prompt, in prompt order.

        repeats: how often the puzzle of each prompt stood in the batch before (count_repeats), so that a puzzle that
        stands there twice gets other draws the second time; () if none does.
        """

    @abstractmethod
    def load_adapter(self, parcel: Parcel, manifest: Manifest, version: int) -> None:
        """Verify the parcel against the manifest and replace the adapter by its tensors. May write into the parcel."""

    @abstractmethod
    def prompt_logprobs(self, ids: list[int], adapter: bool = True) -> list[float]:
        """[T-1] log-probs of ids[1:], each given the tokens before it. adapter False: with the adapter off."""

    def wake(self) -> None:  # noqa: B027 (most engines never sleep)
        """Called before sampling: take back the memory that sleep() released."""

    def sleep(self) -> None:  # noqa: B027
        """Called after sampling: release memory to the trainer."""

    def forget(self) -> None:  # noqa: B027 (most engines keep nothing)
        """Drop what is kept from prompts of before, so that what is sampled next depends on nothing else."""

    def deliver(self, tensors: dict[str, Tensor], version: int, canary: Canary) -> None:
        """See Engine."""
        self.parcel, manifest = broadcast_adapter(tensors, self.parcel)  # sync point
        self.wake()  # the adapter's slots are part of the memory that sleep() released
        self.load_adapter(self.parcel, manifest, version)
        self.prove(canary)

    def prove(self, canary: Canary) -> tuple[list[float], list[float] | None]:
        """Check the sampler's log-probs of the canary. Returns those with and without the adapter."""
        if self.off is None and canary.reference is not None:
            self.off = self.prompt_logprobs(canary.ids, adapter=False)
        on = self.prompt_logprobs(canary.ids)
        canary.check(on, self.off)
        return on, self.off

    def ask(
        self, step: int, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling, part: str = ""
    ) -> None:
        """See Engine."""
        self.asked[step, part] = (puzzle_ids, prompts, sampling)

    def collect(self, step: int, part: str = "", finished: Finished | None = None) -> list[list[Rollout]]:
        """See Engine."""

        def tell(place: int, group: list[Rollout]) -> None:
            if finished is not None and ours[place] % self.size == self.rank:
                finished(ours[place] // self.size, group)

        start = time.perf_counter()
        puzzle_ids, prompts, sampling = self.asked.pop((step, part))
        # the ranks of one tensor-parallel sampler must make the same calls: each samples the prompts of all of them
        first = self.rank // self.tensor_parallel * self.tensor_parallel
        team = range(first, first + self.tensor_parallel)
        ours = [i for i in range(len(prompts)) if i % self.size in team]
        repeats = count_repeats(puzzle_ids)  # over the whole batch, so that they do not depend on the number of ranks
        groups = self.generate(
            [puzzle_ids[i] for i in ours], [prompts[i] for i in ours], sampling, [repeats[i] for i in ours], tell
        )
        self.seconds = time.perf_counter() - start
        self.sleep()  # now the trainer can have the memory
        return [group for i, group in zip(ours, groups, strict=True) if i % self.size == self.rank]

    def close(self) -> None:  # noqa: B027 (the model may be the trainer's)
        """See Engine."""


class Ahead:
    """The rollouts of each step, requested `staleness` steps before they are trained on (0: when they are needed).

    The rollouts of step s are sampled under the adapter of step s - staleness. This is always the oldest adapter
    allowed, so two runs with the same seed are equal however fast their samplers are. The first steps use the first
    adapter. The same holds for the first steps after a resume with a larger --steps: nothing was requested beyond the
    old end of the run.
    """

    def __init__(self, engine: Engine, ask: Callable[[int], None], staleness: int, first: int, end: int) -> None:
        """ask(step) sends the request to the engine. first, end: the steps of the run, end excluded."""
        self.engine, self.ask, self.staleness, self.next, self.end = engine, ask, staleness, first, end
        self.sampled: dict[int, list[list[Rollout]]] = {}
        self.requested: list[int] = []

    def restore(self, pending: dict[str, list], rank: int, size: int) -> None:
        """Start from the unused rollouts of a checkpoint, in the format of unused(); each rank takes its share."""
        for step, groups in pending.items():
            self.sampled[int(step)] = [[Rollout(**r) for r in group] for group in groups[rank::size]]
        # a new run asks for its first steps here, under the first adapter; a resumed one has them in the checkpoint
        self._ask_until(self.next + self.staleness)

    def groups(self, step: int, finished: Finished | None = None) -> list[list[Rollout]]:
        """This rank's groups of a step. First requests the groups of step + staleness, under the current adapter.

        finished: of Engine.collect; not told of groups that a checkpoint kept.
        """
        self._ask_until(step + self.staleness + 1)
        if step in self.sampled:
            return self.sampled.pop(step)
        self.requested.remove(step)
        return self.engine.collect(step, finished=finished)

    def unused(self, gather: Callable[[list], list]) -> dict[str, list]:
        """Wait for all rollouts not yet trained on, for a checkpoint. gather: World.gather. Collective."""
        for step in self.requested:  # the same order on every rank
            self.sampled[step] = self.engine.collect(step)
        self.requested = []
        return {
            str(step): gather([[asdict(r) for r in group] for group in groups])
            for step, groups in sorted(self.sampled.items())
        }

    def _ask_until(self, end: int) -> None:
        for step in range(self.next, min(end, self.end)):
            if step not in self.sampled:
                self.ask(step)
                self.requested.append(step)
        self.next = max(self.next, min(end, self.end))


def count_repeats(puzzle_ids: Sequence[str]) -> list[int]:
    """For each place of a batch, how often its puzzle stood at an earlier place. ["a", "b", "a"] gives [0, 0, 1]."""
    seen: Counter[str] = Counter()
    repeats = []
    for name in puzzle_ids:
        repeats.append(seen[name])
        seen[name] += 1
    return repeats


def group_numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """[N] number of the group, from 0, of each response in rows of rollouts.jsonl. A puzzle may have several groups.

    Responses of a group count up from 1, so a response that does not count on begins another group. This also holds
    where some rows of a group were left out.
    """
    numbers, number, before = [], -1, None
    for row in rows:
        # a ledger's rows are of one step, and do not name it
        group = (row.get("step"), row["puzzle_id"])
        if before is None or group != before[0] or row["response"] <= before[1]:
            number += 1
        before = (group, row["response"])
        numbers.append(number)
    return numbers


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the text of the parts: the same on every machine and in every process."""
    # not hash(): Python salts it per process
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
