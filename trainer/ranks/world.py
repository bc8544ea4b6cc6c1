"""The processes of a run: torch.distributed under torchrun, or one process that is its own world.

Under --placement split the launch's last ranks sample: they are no part of the world of those that train, and only share its
store and its watch.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.errors import UserError
from trainer.ranks.watch import RankLost, Watch, first_line

HANG_SECONDS = 1800.0
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    """Among the ranks that train."""
    size: int
    device: torch.device
    store: dist.Store | None = None
    """Shared by all ranks of the launch, those that sample included."""
    watch: Watch | None = None
    sampler: int | None = None
    """Number of this rank among those that sample; None where it trains."""
    held: list = field(default_factory=list)
    """What must live until every rank is done: a store that others still read."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0 and self.sampler is None

    def waiting(self, what: str):
        """A context in which this rank waits for the others."""
        return self.watch.waiting(what) if self.watch else nullcontext()

    def enter(self, phase: str, step: int) -> None:
        """Tell the watch where this rank is. step: 1-based."""
        if self.watch:
            self.watch.enter(phase, step)

    def advance(self) -> None:
        """Tell the watch that a piece of the phase is done."""
        if self.watch:
            self.watch.advance()

    def paced(self, items: list[T]) -> Iterator[T]:
        """The items, one after another; the watch is told after each that this rank goes on."""
        for item in items:
            yield item
            self.advance()

    def meet(self, what: str) -> None:
        """Wait until every rank of the launch, those that sample included, has come here. what: it waits for."""
        if self.watch is not None:
            with self.waiting(what):
                self.watch.meet(what)

    def total(self, *values: float) -> list[float]:
        """Sum of each value over the ranks (float64). Collective."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.waiting("a sum over the ranks"):
            dist.all_reduce(tensor)
        return tensor.tolist()

    def largest(self, value: float) -> float:
        """Maximum over the ranks. Collective."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        with self.waiting("a maximum over the ranks"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def gather(self, items: list) -> list:
        """On every rank, all ranks' items. Collective.

        Undoes a split by [rank::size], even or not: item k of rank r comes back at place k * size + r.
        """
        if self.size == 1:
            return items
        boxes: list[list] = [[]] * self.size
        with self.waiting("the rollouts of all ranks"):
            dist.all_gather_object(boxes, items)
        nothing = object()  # the last ranks may have an item less
        return [item for items_k in zip_longest(*boxes, fillvalue=nothing) for item in items_k if item is not nothing]

    def gather_in_rank_order(self, item: Any) -> list[Any]:
        """On every rank, one item per rank. Collective."""
        boxes: list[Any] = [None] * self.size
        with self.waiting("a word of every rank"):
            dist.all_gather_object(boxes, item)
        return boxes

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum .grad over the ranks in place, as one flat tensor; sharded ones are summed already. Collective."""
        replicated = [p for p in parameters if not isinstance(p, DTensor)]
        if self.size == 1 or not replicated:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in replicated])
        with self.waiting("the sum of gradients"):
            dist.all_reduce(flat)
        for p, part in zip(replicated, flat.split([p.numel() for p in replicated]), strict=True):
            p.grad.copy_(part.view_as(p))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one. Collective for those; any other comes back as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds, sharing its storage; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(param: Tensor) -> slice:
    """The rows (first dimension) of a parameter that this rank holds; all of them unless it is sharded."""
    if not isinstance(param, DTensor):
        return slice(None)
    share = -(-len(param) // param.device_mesh.size())
    start = min(param.device_mesh.get_local_rank() * share, len(param))
    return slice(start, start + len(local(param)))


def share_of(tensor: Tensor, param: Tensor) -> Tensor:
    """A full tensor sharded as `param` is; scalars and tensors for unsharded parameters as they are."""
    if not isinstance(param, DTensor) or tensor.ndim == 0:
        return tensor
    return as_shard(tensor[rows_of(param)].to(param.device).contiguous(), param)


def as_shard(rows: Tensor, param: DTensor) -> DTensor:
    """This rank's rows as a sharded tensor like `param`."""
    return DTensor.from_local(
        rows, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def own_device(local_rank: int, local_size: int) -> torch.device:
    """This rank's GPU, made the current one; or the CPU, with this rank's share of its cores as threads."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))  # torchrun's default of one wastes cores
    return torch.device("cpu")


_joined: World | None = None


def join_world(samplers: int = 0, hang_seconds: float = HANG_SECONDS) -> World:
    """Join the torchrun world, or make a world of one; a second call returns the same. NCCL beside gloo on GPUs.

    samplers: the last so many ranks of the launch sample and do not train. Raises UserError when none would be left.
    """
    global _joined
    if _joined is not None:
        return _joined
    if "RANK" not in os.environ:
        with socket.socket() as probe:  # vLLM reads these too, so they must be there without a launcher
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    device = own_device(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    # on a lost peer NCCL would end the process before the watch can say which it was; the watch ends it too
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if samplers >= size:
        raise UserError(f"--sampler-ranks {samplers}: the launch has {size} ranks, and at least one must train")
    store, _, _ = next(dist.rendezvous("env://", rank, size))
    watch = Watch(dist.PrefixStore("cellpuzzles", store), rank, size, hang_seconds) if size > 1 else None
    trainers = size - samplers
    if rank < trainers:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("trainers", store),
            rank=rank,
            world_size=trainers,
            # the watch ends a run long before; a single process still needs some bound
            timeout=timedelta(seconds=2 * hang_seconds),
        )
    _joined = World(
        rank=min(rank, trainers - 1),
        size=trainers,
        device=device,
        store=dist.PrefixStore("cellpuzzles", store),
        watch=watch,
        sampler=None if rank < trainers else rank - trainers,
    )
    return _joined


def leave_world() -> None:
    """Leave in order: everybody arrives, those that sample too, then the groups go down, then the watch."""
    global _joined
    if _joined is not None:
        _joined.meet("the end of the run")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if _joined is not None and _joined.watch is not None:
        _joined.watch.close()
    _joined = None


@contextmanager
def guarded(world: World) -> Iterator[None]:
    """Around the whole of a rank's work: what goes wrong here is told to the other ranks, and what they did is told here.

    Raises RankLost, with the sentence of the watch, when a collective failed because of another rank.
    """
    try:
        yield
    except BaseException as error:
        if world.watch is None:
            raise
        verdict = world.watch.explain(error) if is_collective_failure(error) else ""
        world.watch.close(failed=verdict or f"{type(error).__name__}: {first_line(error)}")
        if verdict:
            raise RankLost(f"{world.watch.me} stops in {world.watch.me.place()}: {verdict}") from None
        raise


def is_collective_failure(error: BaseException) -> bool:
    """Did torch.distributed raise it, rather than code of ours? It has types of its own for some, RuntimeError for gloo."""
    words = ("gloo", "nccl", "connection", "store", "timed out", "socket")
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error).lower() for word in words)
    )


class StopRequest:
    """SIGTERM asks for a stop; the step is finished and saved, and the process exits 0."""

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def requested(self) -> bool:
        """True on every rank as soon as one rank was asked. Collective."""
        return self.world.largest(float(self.asked)) > 0
