"""From rewards to advantages: how much better a response is than the others to the same prompt. Pure functions of tensors.

Axes: N rows (one per response), T response tokens. `groups[i]` names the prompt that row i answers.
One departure from verl, on purpose: a group of one response gets advantage 0, while verl passes its raw score through.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def differ(rewards: Iterable[float]) -> bool:
    """Are the rewards of a group's scored responses not all equal? In float32, as in advantages: 0.1 + 0.2 is 0.3."""
    return len(torch.tensor(list(rewards)).unique()) > 1


def group_advantages(rewards: Tensor, groups: Tensor, kind: str = "grpo", eps: float = 1e-6) -> Tensor:
    """Advantage of each response relative to its group.

    rewards: [N] numbers; groups: [N] long, any labels. Returns [N].
    kind: "grpo" (r - mean) / (std + eps), with the unbiased std (DeepSeekMath, arXiv:2402.03300, section 4.1.2);
    "dr_grpo" r - mean (arXiv:2503.20783); "rloo" r - mean of the others (arXiv:2402.14740).
    A group of one, and a group of equal rewards, gives 0. Raises ValueError for another kind.

    >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])  # prompt 0: one right of four; prompt 1: all right
    >>> groups = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> group_advantages(rewards, groups)
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000,  0.0000,  0.0000])
    >>> group_advantages(rewards, groups, kind="dr_grpo")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500,  0.0000,  0.0000])
    """
    if kind not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"advantage kind {kind!r} is not one of grpo, dr_grpo, rloo")
    if not len(rewards):
        return rewards
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))  # a sum in bfloat16 stops growing
    _, index = torch.unique(groups, return_inverse=True)  # [N] in 0..P-1
    zeros = rewards.new_zeros(int(index.max()) + 1)  # [P] one slot per prompt
    size = zeros.index_add(0, index, torch.ones_like(rewards))[index]  # [N] size of the row's group
    mean = zeros.index_add(0, index, rewards)[index] / size  # [N]
    # the mean of equal floats can be off by one rounding unit, and (r - mean) / (std + eps) would blow that up to about 1:
    # so equality is decided by the extremes, not by r - mean == 0
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)[index]
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)[index]
    centred = torch.where(lowest == highest, torch.zeros_like(rewards), rewards - mean)
    # Dr.GRPO leaves the std out: dividing by it gives more weight to prompts almost always, or almost never, solved
    if kind == "dr_grpo":
        return centred
    others = (size - 1).clamp(min=1)  # a group of one: 0 / 1, not 0 / 0
    if kind == "rloo":
        return centred * size / others  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
    variance = zeros.index_add(0, index, centred.square())[index] / others
    return centred / (variance.sqrt() + eps)  # eps outside the root, as in verl and TRL


def overlong_penalty(length: int, longest: int, share: float) -> float:
    """DAPO's soft over-long penalty of a response of `length` tokens (arXiv:2503.14476, Eq. 13), to be added to its reward.

    longest: the limit in tokens. share: of the limit, over which the penalty grows evenly from 0 to -1; 0: no penalty.

    >>> [overlong_penalty(length, longest=100, share=0.2) for length in (80, 85, 100)]
    [0.0, -0.25, -1.0]
    """
    buffer = share * longest  # tokens
    return max(-1.0, min(0.0, (longest - buffer - length) / buffer)) if buffer else 0.0


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438), over masked-in tokens only.

    rewards, values: [N,T] float; mask: [N,T] bool, True = counts. Returns (advantages [N,T], not whitened; returns [N,T]
    = advantages + values); both are 0 where masked out. A masked-out token is skipped: the token before it bootstraps from
    the next one that counts. For PPO; GRPO has no critic and does not use it.
    """
    advantages = []
    running, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):  # backwards: a token needs the one after it
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages.append(running)
    zero = torch.zeros_like(values)
    advantages_NT = torch.where(mask, torch.stack(advantages[::-1], dim=1), zero)
    return advantages_NT, torch.where(mask, advantages_NT + values, zero)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the masked-in values; unbiased variance; 0 where masked out.

    x: [N,T] float; mask: [N,T] bool. Raises ValueError when fewer than two values are masked in.
    """
    kept = x[mask]
    if kept.numel() < 2:
        raise ValueError(f"whiten needs at least 2 masked-in values, got {kept.numel()}")
    scaled = (x - kept.mean()) * torch.rsqrt(kept.var(unbiased=True) + 1e-8)
    return torch.where(mask, scaled, torch.zeros_like(x))
