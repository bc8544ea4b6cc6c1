"""Sampling in separate processes: orders and rollouts go through a TCPStore, the adapter through a broadcast.

Each sampler has a queue of orders on rank 0 of the trainers, and a thread there that works through the queue: load an
adapter, generate, stop. A sampler that died and was restarted gets the last adapter and the unfinished order again.

Keys in the store: e0/g1/... belong to the first restart (generation 1) of sampler 0; rollouts/STEP/PROMPT to all
samplers, and rollouts/STEP.PART/PROMPT what is asked beside a step's own batch.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError
from rollout import Finished, Rollout, Sampling, count_repeats
from rollout.link import (
    Address,
    address_facing,
    all_gather_bytes,
    drop,
    join_store,
    make_group,
    post_notice,
    put_signed,
    read_notice,
    take_signed,
)
from rollout.sync import Canary, Manifest, Parcel, RunError, SyncError, manifest_hash

ABANDON_SECONDS = 2.0
"""How long a rank that failed waits for its threads to leave the store."""
REFUSED = "refused"
"""Key of the notice of a sampler that cannot start for a reason that the user must mend."""


def over_key(engine: int) -> str:
    """The key of the notice that a sampler has done its last order: from then on its death is no loss."""
    return f"e{engine}/over"


class AbandonedError(Exception):
    """This rank has failed, so its threads stop where they are."""


class SamplerLost(RunError):
    """A sampler died and was not restarted, or it failed; the message names it."""


@dataclass(frozen=True, kw_only=True)
class SamplerProcess:
    """Identifies one process of one sampler."""

    engine: int
    """Number of the sampler."""
    member: int
    """Number of the process within the sampler: its tensor-parallel rank."""
    members: int
    """Processes of the sampler."""
    generation: int
    """How often the sampler was restarted before this process started."""

    @property
    def prefix(self) -> str:
        """Of the keys in the store that belong to this life of the sampler."""
        return f"e{self.engine}/g{self.generation}"


def rollouts_key(step: int, part: str, place: int) -> str:
    """The key in the store of the rollouts of one prompt."""
    return f"rollouts/{step}{'.' if part else ''}{part}/{place}"


@dataclass(frozen=True, kw_only=True)
class Load:
    """The order to load an adapter. The parcel is a snapshot, so the trainer can change its weights meanwhile."""

    version: int
    manifest: Manifest
    parcel: Parcel
    canary: Canary
    lora: dict | None


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The order to sample one sampler's share of a step."""

    step: int
    """From 0."""
    part: str
    """See Engine.ask."""
    places: list[int]
    """Position of each prompt in the step's list of prompts."""
    puzzle_ids: list[str]
    repeats: list[int]
    """See LocalEngine.generate."""
    prompts: list[list[int]]
    sampling: Sampling


class SplitEngine:
    """The trainers' side. Every rank reads its own rollouts; rank 0 also sends the orders.

    samplers: number of samplers, of `members` processes each. restarts: how often each may be restarted. synchronous:
    deliver() waits until the adapter is proven; otherwise the proof still comes before the first rollout under that
    adapter. waiting(what): a context that tells the watch that this rank waits.
    """

    def __init__(
        self,
        address: Address,
        store: dist.TCPStore,
        *,
        rank: int,
        size: int,
        samplers: int,
        members: int,
        lora: dict | None,
        device: torch.device,
        restarts: int = 0,
        synchronous: bool = True,
        waiting: Callable[[str], AbstractContextManager] = lambda what: nullcontext(),
    ) -> None:
        self.address, self.store, self.rank, self.size, self.members = address, store, rank, size, members
        self.lora, self.device, self.synchronous, self.waiting = lora, device, synchronous, waiting
        self.version, self.hash, self.seconds = 0, "", 0.0
        self.asked: dict[tuple[int, str], tuple] = {}
        self.off: dict[int, list[float]] = {}
        """Per sampler, its log-probs of the canary with the adapter off."""
        self.restarts_left = [restarts] * samplers
        self.abandoned = threading.Event()
        self.queues: list[queue.Queue] = [queue.Queue() for _ in range(samplers if rank == 0 else 0)]
        self.threads = [
            threading.Thread(target=self._drive, args=(e,), name=f"sampler {e}", daemon=True)
            for e in range(len(self.queues))
        ]
        for thread in self.threads:
            thread.start()

    # ---- the Engine protocol

    def deliver(self, tensors: dict[str, Tensor], version: int, canary: Canary) -> None:
        """See Engine."""
        # a new parcel each time: with staleness the last one may still be on its way to a sampler
        parcel = Parcel.of(tensors)
        manifest = parcel.manifest()
        # hashes travel, not tensors: rank 0 alone sends the adapter, and the others only have to hold the same
        with self.waiting("the adapter hashes of all ranks"):
            hashes = [found.decode() for found in all_gather_bytes(manifest_hash(manifest).encode())]
        if len(set(hashes)) > 1:
            raise SyncError(f"LoRA sync: the training ranks hold different adapters ({', '.join(hashes)})")
        self.version, self.hash = version, hashes[0]
        if self.rank == 0:
            # the same queue as for ask(): a sampler loads an adapter before the first order that needs it
            item = Load(version=version, manifest=manifest, parcel=parcel, canary=canary, lora=self.lora)
            for orders in self.queues:
                orders.put(item)
            # around the whole loop, here and below: the watch looks at any moment
            with self.waiting("the samplers to take the adapter"):
                while self.synchronous and any(orders.unfinished_tasks for orders in self.queues):
                    self._pause()

    def ask(
        self, step: int, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling, part: str = ""
    ) -> None:
        """See Engine. Sampler e of E gets prompts[e :: E]."""
        self.asked[step, part] = (puzzle_ids, prompts, self.version, self.hash)  # what collect() will insist on
        repeats = count_repeats(puzzle_ids)  # over the whole batch, whoever samples it
        for e, orders in enumerate(self.queues):  # none on ranks above 0, which only collect
            places = list(range(e, len(prompts), len(self.queues)))
            orders.put(
                Generate(
                    step=step,
                    part=part,
                    places=places,
                    puzzle_ids=[puzzle_ids[i] for i in places],
                    repeats=[repeats[i] for i in places],
                    prompts=[prompts[i] for i in places],
                    sampling=sampling,
                )
            )

    def collect(self, step: int, part: str = "", finished: Finished | None = None) -> list[list[Rollout]]:
        """See Engine. Raises SyncError if rollouts were sampled under another adapter than requested."""
        puzzle_ids, prompts, version, identity = self.asked.pop((step, part))
        left = list(range(self.rank, len(prompts), self.size))  # this rank's share, in any order
        groups: dict[int, list[Rollout]] = {}
        slowest = 0.0
        while left:
            with self.waiting(f"the rollouts of step {step + 1}"):
                while (came := self._take_one(step, part, left)) is None:
                    for _ in range(1 + len(left) // 16):  # each look asks rank 0's store once per place
                        self._pause()
            place, sampled, seconds = came
            if (sampled["version"], sampled["hash"]) != (version, identity):
                raise SyncError(
                    f"puzzle {puzzle_ids[place]}: sampled under adapter {sampled['version']} ({sampled['hash']}), "
                    f"asked for under {version} ({identity})"
                )
            slowest = max(slowest, seconds or 0.0)  # until the last of these groups had ended
            groups[place] = [
                Rollout(
                    puzzle_id=puzzle_ids[place],
                    prompt_ids=prompts[place],
                    response_ids=ids,
                    sampler_logprobs=logprobs,
                    finish_reason=reason,
                    adapter_version=version,
                    adapter_hash=identity,
                )
                for ids, logprobs, reason in sampled["responses"]
            ]
            left.remove(place)
            if finished is not None:
                finished(place // self.size, groups[place])
        self.seconds = slowest
        return [groups[place] for place in sorted(groups)]

    def _take_one(self, step: int, part: str, places: list[int]) -> tuple[int, dict, float | None] | None:
        """(place, what was sampled, seconds) of a group that has come; None if there is none.

        Taken, not read: rollouts of past steps would fill rank 0's memory.
        """
        for place in places:
            key = rollouts_key(step, part, place)
            if (sampled := take_signed(self.store, key, self.address.token)) is not None:
                return place, sampled, take_signed(self.store, f"{key}/seconds", self.address.token)
        return None

    def close(self) -> None:
        """See Engine. Stops the samplers after their last order."""
        for orders in self.queues:
            orders.put(None)  # ends the thread's loop, after all earlier orders
        with self.waiting("the samplers' last orders"):
            # as long as it takes: a sampler that was restarted loads its model first, and one that was not told to stop
            # would wait for ever. The watch ends a wait for a sampler that does nothing
            while any(thread.is_alive() for thread in self.threads):
                self._pause()
        self.abandon()
        self._raise_failure()  # the last adapter was not sampled from, but its hand-over is proven too

    def abandon(self) -> None:
        """End the threads where they are. After a failure the samplers are not told: they end with the trainers' store."""
        # Python ends a daemon thread inside a call of the store by unwinding through C++, which then aborts the process:
        # exit code -6 and "terminate called" in place of the error
        self.abandoned.set()
        for orders in self.queues:
            orders.put(None)
        deadline = time.monotonic() + ABANDON_SECONDS
        for thread in self.threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _pause(self) -> None:
        """Sleep briefly. Raises as `_raise_failure`."""
        time.sleep(0.01)
        self._raise_failure()

    def _raise_failure(self) -> None:
        """Raises SamplerLost if a sampler is gone, UserError if one was refused; every rank that polls sees the same."""
        if (refused := read_notice(self.store, REFUSED, self.address.token)) is not None:
            raise UserError(refused)
        if (failure := read_notice(self.store, "failure", self.address.token)) is not None:
            raise SamplerLost(failure)

    # ---- a thread per sampler, on rank 0

    def _drive(self, engine: int) -> None:
        """Work through a sampler's orders, across restarts. On failure, leave a sentence for all ranks in the store."""
        store = self.store.clone()  # a client serves one thread at a time
        try:
            self._work(engine, store)
        except (UserError, AbandonedError):
            pass  # the sampler has left its sentence for all ranks; or this rank says why it failed
        except RunError as error:
            post_notice(store, "failure", str(error), self.address.token)
        finally:
            # any other error is a bug: Python prints its traceback, and no rank may wait for this thread for ever
            if (error := sys.exception()) is not None:
                post_notice(store, "failure", f"sampler {engine}: {type(error).__name__}: {error}", self.address.token)

    def _work(self, engine: int, store: dist.Store) -> None:
        last_load: Load | None = None
        session = None
        repeated: list[Generate] = []
        for item in iter(self.queues[engine].get, None):  # None comes from close()
            if isinstance(item, Load):
                last_load = item
                repeated = self._drop_repeats(repeated, item.version, store)
            for attempt in count():
                try:
                    if session is None:
                        session = Session(store, engine, self._generation(engine), self)
                        if item is not last_load and last_load is not None:  # a restarted sampler has no adapter
                            session.load(last_load)
                    # after a restart the whole order is repeated; its rollouts are the same, since its seed is
                    if attempt and isinstance(item, Generate):
                        repeated.append(item)
                    session.load(item) if isinstance(item, Load) else session.generate(item)
                    break
                except SamplerLost as lost:
                    if session is not None:
                        session.forget()
                    session = None  # the next try makes a new group with the new process
                    if self.restarts_left[engine] == 0:
                        raise
                    self.restarts_left[engine] -= 1
                    print(f"{lost}; it is started again (attempt {attempt + 2})", file=sys.stderr, flush=True)
            self.queues[engine].task_done()  # deliver() waits for this if it is synchronous
        if self.abandoned.is_set():
            return
        post_notice(store, over_key(engine), "nothing is left to sample", self.address.token)
        if session is not None:
            try:
                session.stop()
            except SamplerLost as lost:  # all that it sampled is here, and trained on
                print(f"{lost}, after its last order: nothing is lost", file=sys.stderr, flush=True)

    def _drop_repeats(self, repeated: list[Generate], version: int, store: dist.Store) -> list[Generate]:
        """Remove what was put again for ranks that had taken it already. version: of the adapter that is to be loaded.

        Returns the orders that ranks may still collect from.
        """
        # an adapter of `version` is delivered once all ranks have collected, and trained on, all steps before it
        for item in repeated:
            for place in item.places if item.step < version else []:
                key = rollouts_key(item.step, item.part, place)
                drop(store, key)
                drop(store, f"{key}/seconds")
        return [item for item in repeated if item.step >= version]

    def _generation(self, engine: int) -> int:
        """How often a sampler was restarted so far."""
        token = self.address.token
        return next(g for g in count() if read_notice(self.store, f"e{engine}/g{g}/lost", token) is None)


class Session:
    """One life of one sampler, seen from the trainer: one order at a time, answered by all processes of the sampler."""

    def __init__(self, store: dist.Store, engine: int, generation: int, owner: SplitEngine) -> None:
        """Wait until the sampler's processes have loaded their model and proven their token, then make the group."""
        self.store, self.engine, self.owner, self.token = store, engine, owner, owner.address.token
        self.prefix, self.orders = f"e{engine}/g{generation}", 0
        for member in range(owner.members):
            self._await(f"{self.prefix}/hello/{member}")
        # only now: making the group blocks until all are there, and a process that died while loading would never come
        post_notice(store, f"{self.prefix}/group", "come", self.token)
        try:
            self.group = make_group(
                dist.PrefixStore(self.prefix, store), 0, 1 + owner.members, owner.address.host, owner.device
            )
        except RuntimeError as error:  # a process of the sampler may have died since its hello
            self._lost_or(error)

    def load(self, item: Load) -> None:
        """Broadcast an adapter, and check the answers of the sampler's processes: checksums and canary."""
        # asked for once: the base does not change, and a restarted sampler has the same
        want_off = self.engine not in self.owner.off and item.canary.reference is not None
        self._order(
            {
                "do": "load",
                "version": item.version,
                "manifest": item.manifest,
                "lora": item.lora,
                "step": item.version,  # only shown: in its status line
                "canary": item.canary.ids,
                "want_off": want_off,
            }
        )
        work = self.group.broadcast(item.parcel.buffer, 0)
        while not work.is_completed():  # poll: wait() would block for minutes if the sampler died
            self._check_alive()
            self._sleep(0.0005)
        try:
            work.wait()
        except RuntimeError as error:
            self._lost_or(error)
        answer = self._answers()
        if want_off:
            self.owner.off[self.engine] = answer["off"]
        item.canary.check(answer["on"], self.owner.off.get(self.engine))

    def generate(self, item: Generate) -> None:
        """Have a share of a step sampled. The sampler puts the rollouts into the store; each rank takes its own."""
        self._order(
            {
                "do": "generate",
                "step": item.step,
                "part": item.part,
                "places": item.places,
                "puzzle_ids": item.puzzle_ids,
                "repeats": item.repeats,
                "prompts": item.prompts,
                "sampling": vars(item.sampling),
            }
        )
        self._answers()

    def stop(self) -> None:
        """Send the last order."""
        self._order({"do": "stop"})
        self._answers()

    def forget(self) -> None:
        """After the sampler's death: remove the order that it did not take, and the answers to it."""
        for member in range(self.owner.members):
            drop(self.store, f"{self.prefix}/order/{self.orders}/{member}")
            drop(self.store, f"{self.prefix}/answer/{self.orders}/{member}")

    def _order(self, order: dict) -> None:
        self.orders += 1  # counted on both sides, so an order is never carried out twice
        for member in range(self.owner.members):
            put_signed(self.store, f"{self.prefix}/order/{self.orders}/{member}", order, self.token)

    def _answers(self) -> dict:
        """The first process's answer, once all have answered. Raises SyncError or RunError if one answers an error."""
        answers: dict[int, dict] = {}
        for waited in count():
            for member in set(range(self.owner.members)) - set(answers):
                answer = take_signed(self.store, f"{self.prefix}/answer/{self.orders}/{member}", self.token)
                if answer is not None:
                    answers[member] = answer
                    if "error" in answer:  # raise before the others answer: they may wait for this one for ever
                        kind = SyncError if answer["sync"] else RunError
                        raise kind(f"sampler {self.engine}: {answer['error']}")
            if len(answers) == self.owner.members:
                return answers[0]
            self._pause(waited)
        raise AssertionError  # count() does not end

    def _await(self, key: str) -> dict:
        for waited in count():
            value = take_signed(self.store, key, self.token)
            if value is not None:
                return value
            self._pause(waited)
        raise AssertionError

    def _pause(self, waited: int) -> None:
        """Sleep between two looks into the store; check now and then that the sampler is alive."""
        self._sleep(0.001 if waited < 100 else 0.02)
        if waited % 25 == 0:
            self._check_alive()

    def _sleep(self, seconds: float) -> None:
        """Raises AbandonedError when this rank has failed."""
        if self.owner.abandoned.wait(seconds):
            raise AbandonedError

    def _check_alive(self) -> None:
        if (refused := read_notice(self.store, REFUSED, self.token)) is not None:
            raise UserError(refused)
        if (lost := read_notice(self.store, f"{self.prefix}/lost", self.token)) is not None:
            raise SamplerLost(lost)

    def _lost_or(self, error: RuntimeError) -> None:
        """After a failure of the group. Raises SamplerLost if the keeper reports a death within 10 s, else SyncError."""
        for _ in range(100):
            self._check_alive()
            self._sleep(0.1)
        raise SyncError(f"LoRA sync to sampler {self.engine} failed: {error}") from error


class SamplerEnd:
    """The same session seen from one process of a sampler."""

    def __init__(self, address: Address, process: SamplerProcess, device: torch.device) -> None:
        self.address, self.device, self.prefix = address, device, process.prefix
        self.member, self.members = process.member, process.members
        self.store = join_store(address, f"sampler {process.engine}")
        self.orders = 0
        self.parcel: Parcel | None = None

    def hello(self) -> None:
        """Report, signed with the token, that the model is loaded, and join the group."""
        put_signed(self.store, f"{self.prefix}/hello/{self.member}", {"pid": os.getpid()}, self.address.token)
        while read_notice(self.store, f"{self.prefix}/group", self.address.token) is None:
            time.sleep(0.02)
        self.group = make_group(
            dist.PrefixStore(self.prefix, self.store),
            1 + self.member,
            1 + self.members,
            address_facing(self.address),
            self.device,
        )

    def next_order(self) -> dict:
        """Wait for an order. Raises DistError if the trainers' store is gone."""
        self.orders += 1
        key = f"{self.prefix}/order/{self.orders}/{self.member}"
        while (order := take_signed(self.store, key, self.address.token)) is None:
            time.sleep(0.002)
        return order

    def receive(self, manifest: Manifest) -> Parcel:
        """The adapter that the trainer broadcasts; its checksums are not verified yet. Collective with Session.load."""
        layout = tuple(row[:-1] for row in manifest)  # without the checksums
        # keep the buffer as long as the layout is the same: vLLM's SlotPlan has views into it
        if self.parcel is None or self.parcel.layout != layout:
            self.parcel = Parcel(layout, self.device)
        self.group.broadcast(self.parcel.buffer, 0).wait()  # sync point: the trainer sends
        return self.parcel

    def answer(self, **values: Any) -> None:
        """Answer the current order."""
        put_signed(self.store, f"{self.prefix}/answer/{self.orders}/{self.member}", values, self.address.token)

    def deliver_group(self, step: int, place: int, group: list[Rollout], seconds: float, part: str = "") -> None:
        """Put a prompt's rollouts into the store, for the rank that collects them. seconds: of sampling until then."""
        responses = [(r.response_ids, r.sampler_logprobs, r.finish_reason) for r in group]
        sampled = {"version": group[0].adapter_version, "hash": group[0].adapter_hash, "responses": responses}
        key = rollouts_key(step, part, place)
        # apart: an order that is repeated after a restart may meet its reader, and then puts the very same bytes
        put_signed(self.store, f"{key}/seconds", seconds, self.address.token)
        put_signed(self.store, key, sampled, self.address.token)
