"""How often a GPU would be waited for in an update and in a hand-over. Each wait stops it until its queue is empty.

There need be no GPU: a tensor that is made without a device stands for one in main memory, any other for one on the device.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import trainer.grpo
from rollout.crc import device_checksums
from rollout.sync import Parcel, SyncError, broadcast_adapter
from rollout.vllm_worker import SlotPiece, _check_slots
from tests.trainer.test_host_reads import Reads, sampled
from trainer.config import GrpoConfig
from trainer.policy import Policy, predicting_padded
from trainer.ranks.world import World
from trainer.start.parts import Step, make_optimizer

CPU = torch.device("cpu")
OUT = ("tolist", "numpy", "cpu", "__array__")
"""Methods of a tensor that copy it to main memory, and that no operation of PyTorch shows on a CPU."""
MADE = frozenset(_device_constructors())
"""Functions that make a tensor and take a device."""
FILLED = (torch.tensor, torch.as_tensor, torch.asarray)
"""Those of them that fill it with numbers of the host. torch.zeros and torch.arange run on the device."""


def tensors_in(values: object) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


class Waits(TorchFunctionMode):
    """Counts reads of the device and copies to it. A tensor of the host is marked, and what is made of such tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.reads, self.quiet = Reads(), 0
        self.reads.count = self.count  # in the code of PyTorch, and backward, too

    def count(self, what: str) -> None:
        if not self.quiet:
            self.counts[what] += 1

    def __enter__(self) -> "Waits":
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.reads.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
        on_host = bool(given) and all(hasattr(tensor, "of_host") for tensor in given)
        to_device = isinstance(kwargs.get("device"), torch.device) or (  # "cpu" as a text means main memory
            name == "to" and any(isinstance(arg, torch.device) for arg in args)
        )
        if name in OUT and not on_host:
            self.count(name)
        elif to_device and (on_host or (func in FILLED and not given)):
            self.count("copy to the device")
        elif name in ("copy_", "__getitem__", "__setitem__", "index_select") and not on_host:
            if any(hasattr(tensor, "of_host") and tensor.ndim for tensor in given):
                self.count("copy to the device")
        self.quiet += on_host  # what is read of the host's own tensors waits for nothing
        made = func(*args, **kwargs)
        self.quiet -= on_host
        if isinstance(made, Tensor) and not to_device and (on_host or (func in MADE and not given)):
            made.of_host = True
        return made


def waits_of_an_update(model: Path, micro_batches: int, monkeypatch, padded: bool, **settings: object) -> Counter[str]:
    """Each micro-batch has 70 tokens, or 100 where both responses have a prompt of their own."""
    cfg = GrpoConfig(
        model=str(model),
        lora_rank=4,
        lora_alpha=8,
        prompts_per_step=micro_batches,
        micro_tokens=100 if padded else 70,
        packing="plain" if padded else "shared",
        **settings,
    )
    policy = Policy(str(model), lora_rank=4, lora_alpha=8, seed=0, device=CPU, dtype=torch.float32)
    if padded:  # as for a model whose attention ours cannot replace
        policy.predicting, policy.causal_lm.config._attn_implementation = predicting_padded, "sdpa"
    optimizer = make_optimizer(cfg, list(policy.trainable().values()))
    world = World(rank=0, size=1, device=CPU)
    now = Step(step=0, cfg=cfg, policy=policy, optimizer=optimizer, world=world, out=model)
    waits, pack = Waits(), trainer.grpo.pack_our_share

    def packed(*args):
        waits.quiet += 1  # what is packed is copied to the device before anything is queued there
        share = pack(*args)
        waits.quiet -= 1
        return share

    monkeypatch.setattr(trainer.grpo, "pack_our_share", packed)
    groups = sampled(micro_batches)
    groups[0] = replace(groups[0], trained=torch.tensor([True, False]))  # a response that could not be scored
    with waits:
        sums, figures = trainer.grpo.update(now, groups)
    assert sums.sums["tokens"] == 40 * micro_batches - 20 and figures["packing/fill"] == 1
    return waits.counts


@pytest.mark.slow(4)
@pytest.mark.parametrize("padded", [False, True], ids=["shared", "padded"])
@pytest.mark.parametrize(
    "settings", [{}, {"entropy": True}, {"updates_per_batch": 2}], ids=["plain", "entropy", "twice"]
)
def test_an_update_waits_as_often_for_two_micro_batches_as_for_four(pipeline, monkeypatch, padded, settings):
    """Per optimizer step: the terms' sums and the flags of what is not finite; the gradient's norm, and whether it is."""
    steps = settings.get("updates_per_batch", 1)
    for micro_batches in (2, 4):
        with monkeypatch.context() as patch:
            found = waits_of_an_update(pipeline / "base", micro_batches, patch, padded, **settings)
        # transformers looks once per forward pass whether the rows it is given are packed (find_packed_sequence_indices);
        # passes: the reference's, the policy's, and with several steps the one before the first
        theirs = (2 if steps == 1 else 3) * micro_batches if padded else 0
        assert found == {"tolist": 2 * steps, "_local_scalar_dense": 2 * steps + theirs}, micro_batches


def test_the_count_sees_each_kind_of_wait():
    on_device = torch.zeros(3, device=CPU)
    for what, wait in {
        "tolist": on_device.tolist,
        "numpy": on_device.numpy,
        "cpu": on_device.cpu,
        "_local_scalar_dense": on_device.sum().item,
        "nonzero": on_device.nonzero,
        "index": lambda: on_device[on_device > 0],
        "equal": lambda: torch.equal(on_device, on_device),
        "copy to the device": lambda: torch.tensor([1, 2], device=CPU),
    }.items():
        with Waits() as waits:
            wait()
        assert waits.counts == {what: 1}
    with Waits() as waits:
        own = torch.tensor([1.0, 2.0])
        assert own.tolist() == [1, 2] and own.sum().item() == 3 and not (own[own > 1] == 1).any()
    assert not waits.counts
    with Waits() as waits:
        (own + 1).to(CPU)
        on_device[torch.tensor([0])] = 1
    assert waits.counts == {"copy to the device": 2}


def test_checksums_and_slots_are_read_once_for_all_tensors(monkeypatch):
    monkeypatch.setattr("rollout.crc.BATCH_WORDS", 40)
    tensors = {f"{i}.lora_{half}": torch.randn(4, 5 + i % 3) for i in range(12) for half in "AB"}
    parcel = Parcel.of(tensors)
    device_checksums(parcel.buffer, parcel.spans)  # the first one makes its tables
    with Waits() as waits:
        crcs = device_checksums(parcel.buffer, parcel.spans)
    assert waits.counts == {"tolist": 1}
    assert crcs == [row[-1] for row in parcel.manifest()]
    pieces = [
        SlotPiece(module=name.split(".")[0], half=name.split(".")[1], slot=sent.clone(), sent=sent)
        for name, sent in parcel.tensors.items()
    ]
    with Waits() as waits:
        _check_slots(pieces)
    assert waits.counts == {"tolist": 1}
    pieces[7].slot[1, 2] += 1e-3
    pieces[9].slot[1, 2] += 1e-3
    sentence = f"the slot of {pieces[7].module} does not hold the {pieces[7].half} that was sent"
    with pytest.raises(SyncError, match=sentence):
        _check_slots(pieces)
    pieces[7].slot[1, 2] = pieces[7].sent[1, 2] = float("nan")  # equal to nothing
    with pytest.raises(SyncError, match=sentence):
        _check_slots(pieces)


def test_a_parcel_that_stays_in_its_process_has_its_checksums_taken_once(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    taken, manifest_of = [], Parcel.manifest
    monkeypatch.setattr(Parcel, "manifest", lambda parcel: taken.append(parcel) or manifest_of(parcel))
    parcel, manifest = broadcast_adapter({"a": torch.ones(2, 3), "b": torch.zeros(3)})
    with Waits() as waits:
        parcel.verify(manifest)
    assert len(taken) == 1 and waits.counts == {"equal": 1}
