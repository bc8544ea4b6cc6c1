"""Which prompts a step uses, and how its rollouts become micro-batches."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rollout import Rollout, stable_seed
from trainer.packing import PackedBatch, pack, split_by_tokens

Item = TypeVar("Item")


def prompts_of_step(items: Sequence[Item], per_step: int, step: int, seed: int) -> list[Item]:
    """The `per_step` items of optimizer step `step` (0-based): epochs of a seeded shuffle, the ragged end dropped.

    A function of the arguments alone, so a resumed run needs no stored position.
    """
    steps_per_epoch = len(items) // per_step
    epoch, place = divmod(step, steps_per_epoch)
    order = list(range(len(items)))
    random.Random(stable_seed(seed, "epoch", epoch)).shuffle(order)
    return [items[i] for i in order[place * per_step : (place + 1) * per_step]]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass sees. N rows, T tokens of its longest response."""

    packed: PackedBatch
    advantages: Tensor
    """[N]"""
    sampler_logprobs: Tensor
    """[N,T], 0 where there is no token."""


def micro_batches(
    chosen: Sequence[int], prompt_ids: list[list[int]], groups: list[list[Rollout]], advantages: Tensor, budget: int,
    device: torch.device,
) -> list[MicroBatch]:  # fmt: skip
    """Pack the chosen groups into micro-batches of at most `budget` tokens. advantages: [rows of all groups]."""
    sizes = [(len(prompt_ids[g]), [len(r.response_ids) for r in groups[g]]) for g in chosen]
    group_size = len(groups[0])
    result = []
    for plan in split_by_tokens(sizes, budget):
        members = [(chosen[place], index) for place, indices in plan for index in indices]
        packed = pack(
            [
                (prompt_ids[chosen[place]], [groups[chosen[place]][i].response_ids for i in indices])
                for place, indices in plan
            ],
            device,
        )
        logprobs = [value for g, i in members for value in groups[g][i].sampler_logprobs]
        result.append(
            MicroBatch(
                packed=packed,
                advantages=advantages[[g * group_size + i for g, i in members]].to(device),
                sampler_logprobs=packed.unpack(torch.tensor(logprobs, device=device)),
            )
        )
    return result
