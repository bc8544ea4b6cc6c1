"""The numbers of a step: sums over tokens while training, rows of rollouts.jsonl, the line of metrics.jsonl.

metrics.jsonl holds only what the seed determines, so that equal runs write equal bytes; seconds go to timing.jsonl.
The glossary of all keys is in trainer/README.md.
"""

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from data.prompts import ChatFormat
from reward import Reward
from rollout import Rollout
from trainer.advantages import differ
from trainer.config import OnlineConfig
from trainer.objective import CLIPS, LOG_RATIO_LIMIT, LossTerms
from trainer.ranks.world import World

SUMMED = (
    *("loss", "pg_loss", "kl", "clip_low", "clip_high", "clip_dual", "mismatch", "mismatch_kl"),
    *("is_weight", "is_weight_squared", "tokens", "entropy", "distill_loss", "dropped"),
)


@dataclass
class TokenSums:
    """Sums over the trained tokens of a step: of this rank's micro-batches, and after over_ranks of all ranks."""

    names: ClassVar[tuple[str, ...]] = SUMMED
    unread: list[dict[str, Tensor]] = field(default_factory=list)
    """Per micro-batch {name: sum}, where they were computed; read() adds them to `sums`."""
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    mismatch_max: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0

    def add(self, terms: LossTerms, loss: Tensor) -> None:
        """Add one micro-batch. Nothing is read here: on a GPU that would wait for the device to finish."""
        with torch.no_grad():
            # trainer minus sampler, in nats; 0 where masked out, since both log-probs are 0 there
            difference = (terms.old_logprobs - terms.sampler_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            weight = torch.where(terms.mask, difference.exp(), torch.zeros_like(difference))
            values = {
                "loss": loss,  # of all terms
                "pg_loss": (terms.weight * terms.surrogate * terms.correction).sum(),  # without KL and distillation
                "kl": terms.kl.sum(),  # before the factor beta
                **{
                    f"clip_{name}": (terms.mask & (terms.clip == code)).sum() for code, name in enumerate(CLIPS) if name
                },
                "mismatch": difference.abs().sum(),
                # the k3 estimate of KL(sampler || trainer) from the sampler's own tokens
                "mismatch_kl": (difference.exp() - difference - 1).sum(),
                "is_weight": weight.sum(),
                "is_weight_squared": weight.square().sum(),
                "tokens": terms.mask.sum(),
                "dropped": (terms.mask & (terms.correction == 0)).sum(),  # by --correction mis or seq-mis
            }
            if terms.entropy is not None:
                values["entropy"] = terms.entropy.masked_fill(~terms.mask, 0.0).sum()  # entropy[mask] would wait
            if terms.distillation is not None:
                values["distill_loss"] = (terms.weight * terms.distillation).sum()
            self.unread.append({**values, "mismatch_max": difference.abs().max()})

    def read(self) -> None:
        """Add what is unread to the sums, in float64 and in the order of the micro-batches."""
        if not self.unread:
            return
        # one copy from the device, which waits for it
        numbers = torch.stack([v.detach().double() for row in self.unread for v in row.values()]).tolist()
        left = iter(numbers)
        for row in self.unread:
            found = {name: next(left) for name in row}
            self.mismatch_max = max(self.mismatch_max, found.pop("mismatch_max", 0.0))
            for name, number in found.items():
                self.sums[name] += number
        self.unread = []

    def take_in(self, later: "TokenSums") -> None:
        """Add the sums of a later update of the same batch; gradient norm and rate are those of the last that was made."""
        for name, value in later.sums.items():
            self.sums[name] += value
        self.mismatch_max = max(self.mismatch_max, later.mismatch_max)
        if later.lr:  # else no optimizer step was made, on any rank
            self.grad_norm, self.lr = later.grad_norm, later.lr

    def over_ranks(self, world: World) -> "TokenSums":
        """Sums and maximum over all ranks. Collective."""
        # `names` fixes the order: the values of all ranks are added by place, not by name
        totals = world.total(*(self.sums[name] for name in self.names))
        return type(self)(
            sums=defaultdict(float, zip(self.names, totals, strict=True)),
            mismatch_max=world.largest(self.mismatch_max),
            grad_norm=self.grad_norm,  # of the summed gradient, so the same on every rank
            lr=self.lr,
        )


def rollout_rows(
    step: int, chat: ChatFormat, rollouts: list[Rollout], rewards: list[Reward], advantages: Tensor, group_size: int
) -> list[dict]:
    """Rows of rollouts.jsonl, one per sampled response, with all that is needed to read, rescore or train on it again."""
    return [
        {
            "step": step,
            "puzzle_id": rollout.puzzle_id,
            "response": place % group_size + 1,  # within its group
            "completion": chat.response_text(rollout.response_ids),
            "reward": reward.total if reward.scored else None,  # JSON has no nan
            "parts": reward.parts,
            "status": str(reward.status),
            **({"message": reward.message} if reward.message else {}),
            "advantage": advantage,
            "finish_reason": rollout.finish_reason,
            "prompt_tokens": len(rollout.prompt_ids),
            "response_ids": rollout.response_ids,
            "sampler_logprobs": rollout.sampler_logprobs,
            "adapter_version": rollout.adapter_version,
            "adapter_hash": rollout.adapter_hash,
        }
        for place, (rollout, reward, advantage) in enumerate(zip(rollouts, rewards, advantages.tolist(), strict=True))
    ]


def step_metrics(step: int, rows: list[dict], sums: TokenSums, cfg: OnlineConfig, adapter_hash: str) -> dict:
    """The line of metrics.jsonl. rows: of rollouts.jsonl, all ranks. sums: over all ranks."""
    totals, tokens = sums.sums, max(sums.sums["tokens"], 1)  # 1: a step in which no response was scored
    lengths = [len(row["response_ids"]) for row in rows]
    status = Counter(row["status"] for row in rows)
    line = {
        "step": step,
        **reward_metrics(rows, cfg.group_size),
        **{f"status/{name}": count / len(rows) for name, count in sorted(status.items())},
        "loss": totals["loss"] / cfg.updates_per_batch,  # mean over the batch's updates
        "pg_loss": totals["pg_loss"] / cfg.updates_per_batch,
        "kl": totals["kl"] / tokens,
        **({"entropy": totals["entropy"] / tokens} if cfg.entropy else {}),
        "clip_ratio/low_mean": totals["clip_low"] / tokens,
        "clip_ratio/high_mean": totals["clip_high"] / tokens,
        "clip_ratio/dual_mean": totals["clip_dual"] / tokens,
        "sampling/logp_difference/mean": totals["mismatch"] / tokens,
        "sampling/logp_difference/max": sums.mismatch_max,
        "sampling/kl": totals["mismatch_kl"] / tokens,
        **({"sampling/dropped_tokens": totals["dropped"] / tokens} if cfg.correction.endswith("mis") else {}),
        # (sum of w)^2 / sum of w^2 / tokens: 1 where all weights are equal, 1 / tokens where one dominates
        "sampling/effective_sample_size": totals["is_weight"] ** 2 / max(totals["is_weight_squared"], 1e-30) / tokens,
        "grad_norm": sums.grad_norm,  # of the last update, before clipping
        "lr": sums.lr,
        "completions/mean_length": sum(lengths) / len(rows),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "num_tokens": sum(lengths) + sum(row["prompt_tokens"] for row in rows) // cfg.group_size,  # a prompt once
        "adapter_hash": adapter_hash,
    }
    # where nothing was trained on, nothing was measured
    return line if totals["tokens"] else {k: v for k, v in line.items() if not k.startswith(("sampling/", "entropy"))}


def reward_metrics(rows: list[dict], group_size: int) -> dict[str, float]:
    """Rewards, their parts, and how many groups have a learning signal. Rows without a reward (failed, declined) do not count."""
    groups = [rows[i : i + group_size] for i in range(0, len(rows), group_size)]
    scored = [[row["reward"] for row in group if row["reward"] is not None] for group in groups]
    all_rewards = torch.tensor([reward for group in scored for reward in group], dtype=torch.float64)
    deviations = [torch.tensor(group, dtype=torch.float64).std().item() if len(group) > 1 else 0.0 for group in scored]
    kinds = Counter(_group_kind(group) for group in scored)
    shares = {kind: kinds[kind] / len(groups) for kind in ("all_right", "all_wrong", "mixed", "unscored")}
    if kinds["all_equal"]:  # a reward of 1, 0 and -1 has none
        shares["all_equal"] = kinds["all_equal"] / len(groups)
    parts: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row["parts"].items() if row["reward"] is not None else ():
            parts[name].append(value)
    return {
        "reward": all_rewards.mean().item() if len(all_rewards) else None,
        "reward_std": sum(deviations) / len(groups),  # within groups: what advantages are made of
        "frac_reward_zero_std": (kinds["all_right"] + kinds["all_wrong"] + kinds["all_equal"]) / len(groups),
        **{f"rewards/{name}": sum(values) / len(values) for name, values in sorted(parts.items())},
        **{f"groups/{kind}": share for kind, share in shares.items()},
        "groups/dropped_responses": (len(rows) - len(all_rewards)) / len(rows),
    }


def _group_kind(rewards: list[float]) -> str:
    """rewards: of a group's scored responses."""
    if not rewards:
        return "unscored"
    if differ(rewards):
        return "mixed"
    # of any other value nobody here knows whether it is the best or the worst that the reward function gives
    return {1: "all_right", 0: "all_wrong", -1: "all_wrong"}.get(rewards[0], "all_equal")


class Clock:
    """Seconds per phase of a step. It also tells the watch which phase this rank is in, for the message if it hangs."""

    def __init__(self, world: World, step: int) -> None:
        self.world, self.step = world, step
        self.start = self.last = time.perf_counter()
        self.phase = ""
        self.laps: dict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """End the phase before, and begin this one. A phase that comes twice in a step counts with both."""
        now = time.perf_counter()
        if self.phase:
            self.laps[f"timing_s/{self.phase}"] += now - self.last
        self.last, self.phase = now, phase
        self.world.enter(phase, self.step)

    def total(self) -> float:
        return time.perf_counter() - self.start
