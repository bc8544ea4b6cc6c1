"""The processes of a run: torch.distributed under torchrun, or a single process that forms a world of one.

Under --placement split the last ranks of the launch only sample. They are not part of the training ranks' process
group, and share only its store and its watch with it.

A method or function marked "Collective" is a sync point: it returns only once every training rank has called it. If one
rank skips it, the others hang in it until the watch ends the run; if ranks make their collective calls in different
orders, they read each other's data.
"""

import base64
import faulthandler
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.errors import UserError, first_line
from data.files import unlock_folders
from data.processes import Heap, usable_cores
from data.status.status import NOTIFY_SECONDS, RunStatus
from rollout import Rollout, RunError
from rollout.link import all_gather_bytes
from trainer.ranks.watch import JOIN_SECONDS, RankLost, Watch

HANG_SECONDS = 1800.0
NOTIFY_FAILED_SECONDS = 3.0
"""How long a rank that failed, among others, waits for the command of --notify before it says why."""
TENSOR, KIND = "\0tensor", "\0kind"
"""Keys that stand for a tensor and a dataclass in JSON. No text of a user begins with a zero byte."""
EIGHT_BIT = "__bnb_optimizer_quant_state__"
"""Key under which bitsandbytes nests the tensors of an 8-bit optimizer state."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks that train, seen from one rank of the launch."""

    rank: int
    """Number of this rank among those that train."""
    size: int
    """Number of ranks that train."""
    device: torch.device
    store: dist.Store | None = None
    """Shared by all ranks of the launch, including those that sample."""
    watch: Watch | None = None
    """None in a world of one: there is nobody to watch."""
    sampler: int | None = None
    """Number of this rank among those that only sample; None if it trains."""
    keep_alive: list = field(default_factory=list)
    """Objects that must exist until every rank is done: a store that others still read."""
    at_failure: list[Callable[[], None]] = field(default_factory=list)
    """Called when this rank's work has failed: ends threads that use a store."""
    listeners: list[RunStatus] = field(default_factory=list)
    """On rank 0: what is told of every step, of a request to stop and of the end."""
    heap: Heap = field(default_factory=Heap)
    """Of this process, where it computes on a CPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0 and self.sampler is None

    def waiting(self, what: str):
        """A context in which the watch knows that this rank waits for others. what: named in the verdict of a hang."""
        return self.watch.waiting(what) if self.watch else nullcontext()

    def enter(self, phase: str, step: int) -> None:
        """Tell the watch that this rank begins a phase of a step. step: 1-based."""
        if self.device.type == "cpu":
            self.heap.enter(step)
        if self.watch:
            self.watch.enter(phase, step)

    def advance(self) -> None:
        """Tell the watch that a part of the phase is done: this rank does not hang."""
        if self.device.type == "cpu":  # between two micro-batches little of the heap is in use
            self.heap.look()
        if self.watch:
            self.watch.advance()

    def paced(self, items: list[T]) -> Iterator[T]:
        """The items, one after another; advance() after each."""
        for item in items:
            yield item
            self.advance()

    def step_made(self, step: int, steps: int, seconds: float) -> None:
        """Tell the run's owner that step `step` of `steps` (from 1) took so long."""
        for listener in self.listeners:
            listener.step(step, steps, seconds)

    def ended(self, error: BaseException | None) -> None:
        """Tell the run's owner that it is over, and why. Once."""
        # the launcher ends all ranks soon after the first: an error must be printed before that
        wait = NOTIFY_SECONDS if self.watch is None or error is None else NOTIFY_FAILED_SECONDS
        while self.listeners:
            self.listeners.pop().end(error, wait=wait)

    def meet(self, what: str) -> None:
        """A barrier over all ranks of the launch, including those that sample. what: what this rank waits for."""
        if self.watch is not None:
            with self.waiting(what):
                self.watch.meet(what)

    def total(self, *values: float) -> list[float]:
        """Sum of each value over the ranks. Collective."""
        if self.size == 1:
            return [float(value) for value in values]  # on a GPU the way through a tensor would wait for it twice
        # float64: counts stay exact, and the number of ranks changes a sum of losses by rounding only
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.waiting("a sum over the ranks"):
            dist.all_reduce(tensor)
            return tensor.tolist()  # NCCL only asks for the sum: here is where a rank waits for it

    def largest(self, value: float) -> float:
        """Maximum over the ranks. Collective."""
        if self.size == 1:
            return float(value)
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        with self.waiting("a maximum over the ranks"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return tensor.item()

    def gather(self, items: list) -> list:
        """The items of all ranks, on every rank. Collective.

        Undoes a split by [rank::size], even or uneven: item k of rank r comes back at place k * size + r. The items are what
        JSON can hold, tensors, and dataclasses that are marked with `travels`. Tuples come back as lists.
        """
        if self.size == 1:
            return items
        with self.waiting("the rollouts of all ranks"):
            per_rank = [from_bytes(data) for data in all_gather_bytes(to_bytes(items))]
        nothing = object()  # fills up the last ranks, which have an item less after an uneven split
        return [
            item for items_k in zip_longest(*per_rank, fillvalue=nothing) for item in items_k if item is not nothing
        ]

    def gather_in_rank_order(self, item: Any) -> list[Any]:
        """[item of rank 0, item of rank 1, ...] on every rank; what an item may be is said in `gather`. Collective."""
        if self.size == 1:
            return [item]
        with self.waiting("a message of every rank"):
            return [from_bytes(data) for data in all_gather_bytes(to_bytes(item))]

    def sum_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Sum .grad over the ranks, in place. Sharded gradients are already summed (sharding.shard). Collective."""
        # summed, not averaged: every loss is already divided by counts over all ranks (packing.Denominators)
        replicated = [p for p in parameters if not isinstance(p, DTensor)]
        if self.size == 1 or not replicated:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in replicated])  # one all-reduce instead of one per tensor
        with self.waiting("the sum of gradients"):
            dist.all_reduce(flat)  # sync point of every optimizer step
        for p, part in zip(replicated, flat.split([p.numel() for p in replicated]), strict=True):
            p.grad.copy_(part.view_as(p))


KINDS: dict[str, type] = {Rollout.__name__: Rollout}
"""The dataclasses that ranks may send one another, by name."""


def travels(kind: type[T]) -> type[T]:
    """Decorates a dataclass that ranks may send one another."""
    KINDS[kind.__name__] = kind
    return kind


def to_bytes(value: Any) -> bytes:
    """JSON of a value; a tensor in it is written as its dtype, shape and bytes, a dataclass as its name and fields.

    Not a pickle, which can run code where it is read: the ranks' network has no authentication.
    """

    def special(part: Any) -> dict[str, Any]:
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            dtype = str(part.dtype).removeprefix("torch.")
            return {TENSOR: [dtype, list(part.shape), base64.b64encode(content).decode()]}
        assert type(part) in KINDS.values(), type(part)
        return {KIND: [type(part).__name__, {name: getattr(part, name) for name in part.__dataclass_fields__}]}

    return json.dumps(value, default=special).encode()


def from_bytes(data: bytes) -> Any:
    """The value of to_bytes. Nothing in the data decides what code runs: other kinds than those of KINDS are a KeyError."""

    def special(part: dict[str, Any]) -> Any:
        if part.keys() == {TENSOR}:
            dtype, shape, content = part[TENSOR]
            raw = bytearray(base64.b64decode(content))  # a tensor may be written to, and so must its bytes
            empty = torch.zeros(shape, dtype=getattr(torch, dtype))
            return torch.frombuffer(raw, dtype=empty.dtype).view(shape) if raw else empty
        if part.keys() == {KIND}:
            name, fields = part[KIND]
            return KINDS[name](**fields)
        return part

    return json.loads(data, object_hook=special)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded tensor; an ordinary tensor is returned unchanged. Collective for sharded tensors."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """A view of this rank's shard of a sharded tensor; an ordinary tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(param: Tensor) -> slice:
    """The rows (first dimension) of a parameter that this rank has: all rows unless the parameter is sharded."""
    if not isinstance(param, DTensor):
        return slice(None)
    # FSDP2 splits as torch.chunk does: equal shares rounded up, so the last ranks can have fewer rows or none
    share = -(-len(param) // param.device_mesh.size())
    start = min(param.device_mesh.get_local_rank() * share, len(param))
    return slice(start, start + len(local_shard(param)))


def shard_like(tensor: Tensor, param: Tensor) -> Tensor:
    """A full tensor, sharded like `param`. Scalars, and tensors of unsharded parameters, are returned unchanged."""
    if not isinstance(param, DTensor) or tensor.ndim == 0:
        return tensor
    return shard_from_rows(tensor[rows_of(param)].to(param.device).contiguous(), param)


def shard_from_rows(rows: Tensor, param: DTensor) -> DTensor:
    """This rank's rows as a sharded tensor like `param`."""
    # shape and stride are given, since an uneven split does not show them; run_check would be a collective
    return DTensor.from_local(
        rows, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def moments_of(optimizer: torch.optim.Optimizer, names: list[str], world: World) -> dict[str, Tensor]:
    """The optimizer's state as Checkpoint.moments, on rank 0. names: of its parameters, in its order. Collective."""
    moments: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        inner = state.pop(EIGHT_BIT, {})  # bitsandbytes returns its tensors nested, but loads them flat
        state = {**state, **inner}
        # gathered one at a time and moved to main memory: all moments together may not fit beside the model.
        # every rank takes part in every gather, also the ranks that do not write
        for key, value in state.items():
            gathered = full_tensor(value) if isinstance(value, Tensor) else torch.tensor(value)
            if world.is_main:
                # clone: bitsandbytes gives all parameters one table of code values, and safetensors refuses tensors
                # that share memory
                moments[f"{key}/{names[index]}"] = gathered.cpu().clone() if key in inner else gathered.cpu()
    return moments


def own_copy(value: Tensor, param: Tensor) -> Tensor:
    """A value that was read from a file, in memory of its own. What goes to a GPU is copied there.

    Safetensors maps files, and on NFS a file that is mapped cannot be removed: no checkpoint from which a run went on could.
    """
    return value.clone() if param.device.type == "cpu" or value.ndim == 0 else value


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], moments: dict[str, Tensor]
) -> None:
    """Give the optimizer the state that moments_of() gave. parameters: by name, in the optimizer's order."""
    of_name: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition("/")
        of_name.setdefault(name, {})[kind] = value
    # torch numbers the parameters in the order they were given to the optimizer, which is that of trainable()
    state = {
        index: {
            # "step" is a float tensor in torch's AdamW and a plain integer in bitsandbytes'
            kind: own_copy(shard_like(value, p), p) if value.is_floating_point() or value.ndim else int(value)
            for kind, value in of_name.get(name, {}).items()
        }
        for index, (name, p) in enumerate(parameters.items())
    }
    # groups of this run: lr is set before every step, and check_run has refused any other change
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def own_device(local_rank: int, local_size: int) -> torch.device:
    """This rank's GPU, made the current device; or the CPU, with this rank's share of the cores as its threads.

    Raises UserError where there is a GPU that torch cannot use, or one too few.
    """
    if torch.cuda.is_available():
        if local_size > (there := torch.cuda.device_count()):
            alone = "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ  # srun --gpus-per-task=1
            raise UserError(
                f"{local_size} processes on this machine see {there} GPU{'s' * (there > 1)}, and each needs its own: start fewer "
                f"(torchrun --nproc-per-node {there}), {'let each see all GPUs of its node (srun --gpu-bind=none), ' * alone}"
                "or set CUDA_VISIBLE_DEVICES= (empty) to use the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # NCCL and vLLM work on the current device
        return device
    if problem := gpu_problem():
        raise UserError(problem)
    # torchrun sets OMP_NUM_THREADS to 1, which would leave cores idle
    torch.set_num_threads(max(1, usable_cores() // local_size))
    return torch.device("cpu")


def gpu_problem() -> str:
    """Why torch does not use the GPU of this machine, and what to do, in one sentence; "" if it does, or there is none.

    Without this a run would go on for days on the CPU. CUDA_VISIBLE_DEVICES= (empty) says that this is meant.
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return ""
    listed = ""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    if not listed.startswith("GPU "):
        return ""
    remedy = "or set CUDA_VISIBLE_DEVICES= (empty) to use the CPU"
    if torch.version.cuda is None:
        ours = (Path(sys.prefix) / "pins.txt").is_file()  # by launch/setup.sh, which alone would find that all is there
        mend = f"rm -r {sys.prefix}, then EXTRA=cuda make setup" if ours else "install a CUDA build of it"
        return f"nvidia-smi lists a GPU, but this torch {torch.__version__} is a build for CPUs: {mend}, {remedy}"
    try:
        torch.cuda.init()
        why = "it says nothing more"
    except RuntimeError as error:  # "The NVIDIA driver on your system is too old (found version 12020). Please ..."
        why = first_line(error).partition(". ")[0]
    built = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
    return f"nvidia-smi lists a GPU that {built} cannot use: {why}; update the driver, {remedy}"


_joined: World | None = None


def join_world(samplers: int = 0, hang_seconds: float = HANG_SECONDS) -> World:
    """Join the world that torchrun started, or make a world of one. A second call returns the same world.

    samplers: this many ranks, the last of the launch, sample and do not train. Raises UserError if no rank would train.
    """
    global _joined
    if _joined is not None:
        return _joined
    # kill -USR1 prints where a process is, even while it runs native code
    with suppress(OSError, ValueError, RuntimeError):  # there is no standard error to print them on
        faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
    if "RANK" not in os.environ:
        with socket.socket() as probe:  # a free port
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        # in the environment, because vLLM reads these variables too
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    needed = ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    needed += [] if os.environ.get("WORLD_SIZE") == "1" else ["MASTER_ADDR", "MASTER_PORT"]
    if missing := [name for name in needed if name not in os.environ]:  # some schedulers set RANK for one process too
        raise UserError(
            f"RANK is set and {' and '.join(missing)} not: start with torchrun, or unset RANK for a process alone"
        )
    device = own_device(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    # when a peer is lost, NCCL would end this process before the watch can name the peer; the watch ends it as well
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1 and os.path.exists("/sys/class/net/lo"):  # else gloo listens where this machine's name points to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if samplers >= size:
        raise UserError(f"--sampler-ranks {samplers}: the launch has {size} ranks, and at least one must train")
    # torch's store listens on every interface of the machine: a world of one needs no port
    store = dist.HashStore() if size == 1 else store_of_launch(rank, size, hang_seconds)
    # prefixes keep our keys apart from those of torch.distributed in the same store
    watch = Watch(dist.PrefixStore("cellpuzzles", store), rank, size, hang_seconds) if size > 1 else None
    trainers = size - samplers
    if rank < trainers:
        # gloo beside NCCL: it carries CPU tensors, such as the bytes of all_gather_bytes
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=dist.PrefixStore("trainers", store),
                rank=rank,
                world_size=trainers,
                # the watch ends a hanging run, and knows one that waits for a slow rank from it; a world of one has no watch
                timeout=timedelta(seconds=2 * hang_seconds) if size == 1 else timedelta(days=7),
            )
        except RuntimeError as error:  # another rank died or never came: the watch knows which
            verdict = watch.explain(error) if watch is not None and is_collective_failure(error) else ""
            if not verdict:
                raise
            watch.close(failed=verdict)
            raise RankLost(f"{watch.me} stops in {watch.me.place()}: {verdict}") from None
    _joined = World(
        rank=min(rank, trainers - 1),
        size=trainers,
        device=device,
        store=dist.PrefixStore("cellpuzzles", store),
        watch=watch,
        sampler=None if rank < trainers else rank - trainers,
    )
    return _joined


def store_of_launch(rank: int, size: int, hang_seconds: float) -> dist.Store:
    """The one store of the whole launch: torchrun's, or where no launcher has one (Slurm's srun), the one that rank 0 opens.

    Raises UserError when rank 0 cannot open it, RunError when another rank does not find it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(dist.rendezvous("env://", rank, size))[0]
    host, port, seconds = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), min(JOIN_SECONDS, hang_seconds)
    try:
        # torch's own rendezvous waits half an hour for the other ranks, in rank 0 and in native code, and names none of them
        store = dist.TCPStore(
            host, port, size, rank == 0, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        where = f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"
        if rank == 0:
            raise UserError(f"{where}: cannot be opened ({first_line(error)}); name another port") from None
        raise RunError(
            f"rank {rank}: nobody answered in {seconds:.0f} s at {where}, where rank 0 holds the store of the launch: look at "
            "what its launcher printed"
        ) from None
    store.set_timeout(dist.default_pg_timeout)
    return store


def leave_world() -> None:
    """Leave in order: wait for all ranks of the launch, then destroy the process groups, then end the watch.

    A rank that destroyed its groups early would abort the others in gloo or NCCL, which then report a lost peer. Rank 0
    returns last: without a launcher, the store that the others still read is in its process.
    """
    global _joined
    if _joined is not None:
        try:
            _joined.meet("the end of the run")
        except RankLost as error:
            _joined.ended(error)
            raise
    if dist.is_initialized():
        try:
            dist.barrier()  # every rank has finished its last collective
            dist.destroy_process_group()
        except RuntimeError as error:
            if not is_collective_failure(error):
                raise
            # all ranks have met: their work is done and saved, and one that died since then took nothing with it
            print(f"note: a rank was lost when the run was over: {first_line(error)}", file=sys.stderr, flush=True)
    if _joined is not None and _joined.watch is not None:
        _joined.watch.close()
        _joined.watch.leave_store()
    if _joined is not None:
        _joined.ended(None)
    _joined = None


@contextmanager
def guarded(world: World) -> Iterator[None]:
    """Wraps all of a rank's work: reports an error to the other ranks, and explains an error that another rank caused.

    Raises RankLost with the verdict of the watch if a collective failed because of another rank.
    """
    try:
        yield
    except BaseException as error:  # also an exit or Ctrl-C: the others must not wait for this rank
        lost = None
        if world.watch is not None:
            # an error of our own code needs no waiting for a verdict: this rank is the one to blame
            verdict = world.watch.explain(error) if is_collective_failure(error) else ""
            world.watch.close(failed=verdict or f"{type(error).__name__}: {first_line(error)}")
            lost = RankLost(f"{world.watch.me} stops in {world.watch.me.place()}: {verdict}") if verdict else None
        while world.at_failure:
            world.at_failure.pop()()
        world.ended(lost or error)
        unlock_folders()  # of a process that goes on, such as a notebook
        if lost:
            raise lost from None
        raise


def is_collective_failure(error: BaseException) -> bool:
    """Did torch.distributed raise the error? It has its own types for some errors; gloo raises a plain RuntimeError."""
    words = ("gloo", "nccl", "connection", "store", "timed out", "socket")
    # `type is`: a subclass, such as CUDA's out-of-memory error, is this rank's own fault whatever it says
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error).lower() for word in words)
    )


class StopRequest:
    """Handles SIGTERM: the current step is finished and saved, and the process exits with code 0."""

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True  # nothing else: a collective in a handler would meet another collective of the other ranks

    def requested(self) -> bool:
        """True on every rank if any rank has received SIGTERM. Collective."""
        # a rank that stopped alone would leave the others hanging in their next collective
        found = self.world.largest(float(self.asked)) > 0
        for listener in self.world.listeners:
            listener.stopping = found
        return found
