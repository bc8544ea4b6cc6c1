"""The processes of a run: torch.distributed under torchrun, or one process that is its own world."""

import os
import signal
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Sum of each value over the ranks (float64). Collective."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def largest(self, value: float) -> float:
        """Maximum over the ranks. Collective."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def gather(self, items: list) -> list:
        """On rank 0 all ranks' items, elsewhere []. Collective.

        Undoes a split by [rank::size]: item k of rank r comes back at place k * size + r, whatever the world's size.
        """
        boxes = [None] * self.size if self.is_main else None
        dist.gather_object(items, boxes, dst=0)
        return [item for items_k in zip(*boxes, strict=True) for item in items_k] if boxes else []

    def gather_in_rank_order(self, item: Any) -> list[Any]:
        """On every rank, one item per rank. Collective."""
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, item)
        return boxes

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum .grad over the ranks in place, as one flat tensor. Collective."""
        if self.size == 1:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(part.view_as(p))


def join_world() -> World:
    """Join the torchrun world, or make a world of one; a second call returns the same. NCCL beside gloo on GPUs."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:  # vLLM reads these too, so they must be there without a launcher
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // local_size)
        )  # torchrun's default of 1 wastes cores
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def leave_world() -> None:
    """Leave in order: everybody arrives, then the groups go down."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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
