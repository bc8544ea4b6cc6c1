"""How often the host reads a number of the device in an update: each read would stop a GPU until its queue is empty."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout import Rollout
from trainer.config import GrpoConfig
from trainer.grpo import update
from trainer.packing import ScoredGroup
from trainer.policy import Policy
from trainer.ranks.world import World
from trainer.start.parts import Step, make_optimizer

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2")
"""Operations of PyTorch whose result, or its size, the host must know before it goes on: .item(), bool(), x[mask], ..."""


class Reads(TorchDispatchMode):
    """Counts them, forward and backward. On a CPU they are as many as on a GPU, but for tolist(), which is not seen there."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        indexed = name in ("index", "index_put", "index_put_")
        if name in READS or (indexed and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.count(name)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> None:
        self.counts[name] += 1


def sampled(prompts: int) -> list[ScoredGroup]:
    """Two responses of 20 tokens to each prompt of 30."""
    groups = []
    for p in range(prompts):
        rollouts = [
            Rollout(
                puzzle_id=f"p{p}",
                prompt_ids=[5 + (p + i) % 50 for i in range(30)],
                response_ids=[7 + (p + r + i) % 60 for i in range(20)],
                sampler_logprobs=[-3.0] * 20,
                finish_reason="length",
                adapter_version=0,
                adapter_hash="",
            )
            for r in range(2)
        ]
        rows = [{"puzzle_id": f"p{p}", "response": r + 1, "response_ids": [0] * 20} for r in range(2)]
        groups.append(
            ScoredGroup(
                rollouts=rollouts, rows=rows, advantages=torch.tensor([0.7, -0.7]), trained=torch.ones(2).bool()
            )
        )
    return groups


def reads_of_an_update(model: Path, micro_batches: int, checkpointing: bool) -> Counter[str]:
    """Each micro-batch has one prompt with its responses: 70 tokens."""
    cfg = GrpoConfig(model=str(model), lora_rank=4, lora_alpha=8, prompts_per_step=micro_batches, micro_tokens=70)
    cpu = torch.device("cpu")
    settings = {"seed": 0, "device": cpu, "dtype": torch.float32, "checkpointing": checkpointing}
    policy = Policy(str(model), lora_rank=4, lora_alpha=8, **settings)
    optimizer = make_optimizer(cfg, list(policy.trainable().values()))
    world = World(rank=0, size=1, device=cpu)
    now = Step(step=0, cfg=cfg, policy=policy, optimizer=optimizer, world=world, out=model)
    with Reads() as reads:
        sums, figures = update(now, sampled(micro_batches))
    assert sums.sums["tokens"] == 40 * micro_batches and figures["packing/fill"] == 1
    return reads.counts


@pytest.mark.slow(2)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_number_is_read_between_micro_batches(pipeline, checkpointing):
    """Two in all, with tolist() left out: is the norm of the gradient finite, and what is it."""
    for micro_batches in (1, 5):
        reads = reads_of_an_update(pipeline / "base", micro_batches, checkpointing)
        # AdamW has a count of steps for each of the 2 x 7 x 2 tensors of the adapter, which is on the host in any case
        assert reads == {"_local_scalar_dense": 2 + 28}
