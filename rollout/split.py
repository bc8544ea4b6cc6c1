"""Sampling in processes of their own: orders and rollouts over a TCPStore, the adapter by broadcast in a group of its own.

Each sampler has a queue of orders and, on rank 0 of the trainers, a thread that works through it: load an adapter, generate,
stop. A sampler that died and was started again gets the last adapter and the unfinished order once more.

Keys: e0/g1/... belong to the first restart (generation 1) of sampler 0; rollouts/STEP/PROMPT to any of them.
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

from rollout import Rollout, Sampling
from rollout.link import JOIN_SECONDS, Address, facing, join, make_group, put, take
from rollout.sync import Canary, Manifest, Parcel, RunError, SyncError, manifest_hash


class SamplerLost(RunError):
    """A sampler died and was not started again, or failed; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """An adapter on its way: a snapshot, so that the trainer may go on."""

    version: int
    manifest: Manifest
    parcel: Parcel
    canary: Canary
    lora: dict | None


@dataclass(frozen=True, kw_only=True)
class Generate:
    """One sampler's share of a step: prompts[i] for i in places."""

    step: int
    places: list[int]
    puzzle_ids: list[str]
    prompts: list[list[int]]
    sampling: Sampling


class SplitEngine:
    """The trainers' end. Every rank reads its own rollouts; rank 0 also gives the orders.

    samplers: how many there are, of `members` processes each. restarts: how often one may die. synchronous: a delivery waits
    until it is proven (else the proof comes before the first rollout under that adapter is accepted).
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
        self.asked: dict[int, tuple] = {}
        self.off: dict[int, list[float]] = {}
        """Per sampler, its log-probs of the canary without an adapter."""
        self.restarts_left = [restarts] * samplers
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
        parcel = Parcel.of(tensors)
        manifest = parcel.manifest()
        hashes: list[str] = [""] * self.size
        with self.waiting("the adapter hashes of all ranks"):
            dist.all_gather_object(hashes, manifest_hash(manifest))
        if len(set(hashes)) > 1:
            raise SyncError(f"LoRA sync: the training ranks hold different adapters ({', '.join(hashes)})")
        self.version, self.hash = version, hashes[0]
        if self.rank == 0:
            item = Load(version=version, manifest=manifest, parcel=parcel, canary=canary, lora=self.lora)
            for orders in self.queues:
                orders.put(item)
            while self.synchronous and any(orders.unfinished_tasks for orders in self.queues):
                self._check_failure("the samplers to take the adapter")

    def ask(self, step: int, puzzle_ids: list[str], prompts: list[list[int]], sampling: Sampling) -> None:
        """See Engine. Sampler e of E gets prompts[e :: E]."""
        self.asked[step] = (puzzle_ids, prompts, self.version, self.hash)
        for e, orders in enumerate(self.queues):
            places = list(range(e, len(prompts), len(self.queues)))
            orders.put(
                Generate(
                    step=step,
                    places=places,
                    puzzle_ids=[puzzle_ids[i] for i in places],
                    prompts=[prompts[i] for i in places],
                    sampling=sampling,
                )
            )

    def collect(self, step: int) -> list[list[Rollout]]:
        """See Engine. Raises SyncError for rollouts of another adapter than was asked for."""
        puzzle_ids, prompts, version, identity = self.asked.pop(step)
        groups = []
        for place in range(self.rank, len(prompts), self.size):
            while (sampled := take(self.store, f"rollouts/{step}/{place}", self.address.token)) is None:
                self._check_failure(f"the rollouts of step {step + 1}")
            if (sampled["version"], sampled["hash"]) != (version, identity):
                raise SyncError(
                    f"puzzle {puzzle_ids[place]}: sampled under adapter {sampled['version']} ({sampled['hash']}), "
                    f"asked for under {version} ({identity})"
                )
            self.seconds = sampled["seconds"]
            groups.append(
                [
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
            )
        return groups

    def close(self) -> None:
        """See Engine: stop the samplers, in order."""
        for orders in self.queues:
            orders.put(None)
        for thread in self.threads:
            thread.join(timeout=JOIN_SECONDS)
        if self.store.check(["failure"]):  # the last hand-over is proven too
            raise SamplerLost(self.store.get("failure").decode())

    def _check_failure(self, what: str) -> None:
        """Wait a moment; raise SamplerLost, on every rank, when a sampler is gone."""
        with self.waiting(what):
            time.sleep(0.01)
        if self.store.check(["failure"]):
            raise SamplerLost(self.store.get("failure").decode())

    # ---- a thread per sampler, on rank 0

    def _drive(self, engine: int) -> None:
        """Work through a sampler's orders, over its restarts; leave a sentence for everyone when that fails."""
        store = self.store.clone()
        try:
            self._work(engine, store)
        except RunError as error:
            store.set("failure", str(error))
        finally:
            if (error := sys.exception()) is not None:  # a bug of ours: its traceback is printed, and nobody may wait
                store.set("failure", f"sampler {engine}: {type(error).__name__}: {error}")

    def _work(self, engine: int, store: dist.Store) -> None:
        last_load: Load | None = None
        session = None
        for item in iter(self.queues[engine].get, None):
            last_load = item if isinstance(item, Load) else last_load
            for attempt in count():
                try:
                    if session is None:
                        session = Session(store, engine, self._generation(engine), self)
                        if item is not last_load and last_load is not None:
                            session.load(last_load)
                    session.load(item) if isinstance(item, Load) else session.generate(item)
                    break
                except SamplerLost as lost:
                    session = None
                    if self.restarts_left[engine] == 0:
                        raise
                    self.restarts_left[engine] -= 1
                    print(f"{lost}; it is started again (attempt {attempt + 2})", file=sys.stderr, flush=True)
            self.queues[engine].task_done()
        if session is not None:
            session.stop()

    def _generation(self, engine: int) -> int:
        """Restarts of a sampler so far."""
        return next(g for g in count() if not self.store.check([f"e{engine}/g{g}/lost"]))


class Session:
    """One life of one sampler, seen from the trainer: orders one at a time, each answered by all its processes."""

    def __init__(self, store: dist.Store, engine: int, generation: int, owner: SplitEngine) -> None:
        """Wait until the sampler's processes have loaded their model and shown that they know the token; make the group."""
        self.store, self.engine, self.owner, self.token = store, engine, owner, owner.address.token
        self.prefix, self.orders = f"e{engine}/g{generation}", 0
        for member in range(owner.members):
            self._await(f"{self.prefix}/hello/{member}")
        store.set(f"{self.prefix}/group", "come")
        self.group = make_group(
            dist.PrefixStore(self.prefix, store), 0, 1 + owner.members, owner.address.host, owner.device
        )

    def load(self, item: Load) -> None:
        """Send an adapter, and check what every process of the sampler says of it."""
        want_off = self.engine not in self.owner.off and item.canary.reference is not None
        self._order(
            {
                "do": "load",
                "version": item.version,
                "manifest": item.manifest,
                "lora": item.lora,
                "step": item.version,
                "canary": item.canary.ids,
                "want_off": want_off,
            }
        )
        work = self.group.broadcast(item.parcel.buffer, 0)
        while not work.is_completed():
            self._check_alive()
            time.sleep(0.0005)
        try:
            work.wait()
        except RuntimeError as error:
            self._lost_or(error)
        answer = self._answers()
        if want_off:
            self.owner.off[self.engine] = answer["off"]
        item.canary.check(answer["on"], self.owner.off.get(self.engine))

    def generate(self, item: Generate) -> None:
        """Have a share of a step sampled; the rollouts wait in the store for the rank that needs them."""
        self._order(
            {
                "do": "generate",
                "step": item.step,
                "places": item.places,
                "puzzle_ids": item.puzzle_ids,
                "prompts": item.prompts,
                "sampling": vars(item.sampling),
            }
        )
        self._answers()

    def stop(self) -> None:
        """The last order."""
        self._order({"do": "stop"})
        self._answers()

    def _order(self, order: dict) -> None:
        self.orders += 1
        for member in range(self.owner.members):
            put(self.store, f"{self.prefix}/order/{self.orders}/{member}", order, self.token)

    def _answers(self) -> dict:
        """The first process's answer, once all have answered. Raises SyncError or SamplerLost with what one of them says."""
        answers: dict[int, dict] = {}
        for waited in count():
            for member in set(range(self.owner.members)) - set(answers):
                answer = take(self.store, f"{self.prefix}/answer/{self.orders}/{member}", self.token)
                if answer is not None:
                    answers[member] = answer
                    if "error" in answer:  # at once: the others may wait for this one for ever
                        kind = SyncError if answer["sync"] else RunError
                        raise kind(f"sampler {self.engine}: {answer['error']}")
            if len(answers) == self.owner.members:
                return answers[0]
            self._pause(waited)
        raise AssertionError

    def _await(self, key: str) -> dict:
        for waited in count():
            value = take(self.store, key, self.token)
            if value is not None:
                return value
            self._pause(waited)
        raise AssertionError

    def _pause(self, waited: int) -> None:
        """Between two looks into the store."""
        time.sleep(0.001 if waited < 100 else 0.02)
        if waited % 25 == 0:
            self._check_alive()

    def _check_alive(self) -> None:
        if self.store.check([f"{self.prefix}/lost"]):
            raise SamplerLost(self.store.get(f"{self.prefix}/lost").decode())

    def _lost_or(self, error: RuntimeError) -> None:
        """A broken broadcast: the sampler's keeper says within seconds how it died; else the error is the network's."""
        for _ in range(100):
            self._check_alive()
            time.sleep(0.1)
        raise SyncError(f"LoRA sync to sampler {self.engine} failed: {error}") from error


class SamplerEnd:
    """The same session seen from one process of a sampler."""

    def __init__(
        self, address: Address, engine: int, member: int, members: int, generation: int, device: torch.device
    ) -> None:
        self.address, self.member, self.members, self.device = address, member, members, device
        self.prefix = f"e{engine}/g{generation}"
        self.store = join(address, f"sampler {engine}")
        self.orders = 0
        self.parcel: Parcel | None = None

    def hello(self) -> None:
        """The model is loaded: say so, signed with the token, and join the group."""
        put(self.store, f"{self.prefix}/hello/{self.member}", {"pid": os.getpid()}, self.address.token)
        while not self.store.check([f"{self.prefix}/group"]):
            time.sleep(0.02)
        self.group = make_group(
            dist.PrefixStore(self.prefix, self.store),
            1 + self.member,
            1 + self.members,
            facing(self.address),
            self.device,
        )

    def next_order(self) -> dict:
        """Wait for an order; DistError when the trainers' store is gone."""
        self.orders += 1
        key = f"{self.prefix}/order/{self.orders}/{self.member}"
        while (order := take(self.store, key, self.address.token)) is None:
            time.sleep(0.002)
        return order

    def receive(self, manifest: Manifest) -> Parcel:
        """What the trainer broadcasts, as it came."""
        layout = tuple(row[:-1] for row in manifest)
        if self.parcel is None or self.parcel.layout != layout:
            self.parcel = Parcel(layout, self.device)
        self.group.broadcast(self.parcel.buffer, 0).wait()
        return self.parcel

    def answer(self, **values: Any) -> None:
        put(self.store, f"{self.prefix}/answer/{self.orders}/{self.member}", values, self.address.token)

    def deliver_rollouts(
        self, step: int, places: list[int], groups: list[list[Rollout]], version: int, identity: str, seconds: float
    ) -> None:
        """Leave each prompt's rollouts for the rank that trains on them."""
        for place, group in zip(places, groups, strict=True):
            responses = [(r.response_ids, r.sampler_logprobs, r.finish_reason) for r in group]
            put(
                self.store,
                f"rollouts/{step}/{place}",
                {"version": version, "hash": identity, "responses": responses, "seconds": seconds},
                self.address.token,
            )
