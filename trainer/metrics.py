"""Numbers of a step: sums over tokens while training, rows of rollouts.jsonl, and the line of metrics.jsonl."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reward import Reward
from rollout import Rollout
from trainer.objective import LossTerms
from trainer.world import World

SUMMED = ("loss", "pg_loss", "kl", "clip_low", "clip_high", "mismatch", "mismatch_kl", "tokens")


@dataclass
class TokenSums:
    """Running sums over a step's trained tokens (over its last pass's micro-batches and, after over_ranks, all ranks)."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    mismatch_max: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0

    def add(self, terms: LossTerms, loss: Tensor) -> None:
        """Add one micro-batch. `.item()` waits for the device, once per micro-batch."""
        with torch.no_grad():
            low = terms.mask & (terms.surrogate > -terms.ratio * terms.advantages) & (terms.advantages < 0)
            high = terms.mask & (terms.surrogate > -terms.ratio * terms.advantages) & (terms.advantages > 0)
            difference = torch.where(
                terms.mask, terms.old_logprobs - terms.sampler_logprobs, torch.zeros_like(terms.kl)
            )
            values = {
                "loss": loss, "pg_loss": (terms.weight * terms.surrogate * terms.correction).sum(), "kl": terms.kl.sum(),
                "clip_low": low.sum(), "clip_high": high.sum(), "mismatch": difference.abs().sum(),
                # k3 of the sampler against the trainer
                "mismatch_kl": (difference.exp() - difference - 1).sum(), "tokens": terms.mask.sum(),
            }  # fmt: skip
            for name, value in values.items():
                self.sums[name] += float(value)
            self.mismatch_max = max(self.mismatch_max, float(difference.abs().max()))

    def over_ranks(self, world: World) -> "TokenSums":
        """Sums and maximum over all ranks. Collective."""
        totals = world.total(*(self.sums[name] for name in SUMMED))
        return TokenSums(
            sums=dict(zip(SUMMED, totals, strict=True)), mismatch_max=world.largest(self.mismatch_max),
            grad_norm=self.grad_norm, lr=self.lr,
        )  # fmt: skip


def rollout_rows(
    step: int, tokenizer, rollouts: list[Rollout], rewards: list[Reward], advantages: Tensor
) -> list[dict]:
    """Rows of rollouts.jsonl: one sampled response each, with everything to read it, rescore it, or sample it again."""
    return [
        {
            "step": step, "puzzle_id": rollout.puzzle_id,
            "completion": tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
            "reward": reward.total, "parts": reward.parts, "status": str(reward.status), "advantage": advantage,
            "finish_reason": rollout.finish_reason, "prompt_tokens": len(rollout.prompt_ids),
            "response_ids": rollout.response_ids, "sampler_logprobs": rollout.sampler_logprobs,
            "adapter_version": rollout.adapter_version, "adapter_hash": rollout.adapter_hash,
        }
        for rollout, reward, advantage in zip(rollouts, rewards, advantages.tolist(), strict=True)
    ]  # fmt: skip


def step_metrics(step: int, rows: list[dict], sums: TokenSums, group_size: int, adapter_hash: str) -> dict:
    """The line of metrics.jsonl; every key is explained in the README's glossary."""
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    groups = rewards.view(-1, group_size)
    equal = (groups == groups[:, :1]).all(-1)
    best = groups.max(-1).values >= 1.0
    lengths = torch.tensor([len(row["response_ids"]) for row in rows], dtype=torch.float32)
    totals, tokens = sums.sums, max(sums.sums["tokens"], 1)
    parts: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row["parts"].items():
            parts[name].append(value)
    status = Counter(row["status"] for row in rows)
    return {
        "step": step,
        "reward": rewards.mean().item(),
        "reward_std": groups.std(-1).mean().item() if group_size > 1 else 0.0,
        "frac_reward_zero_std": equal.float().mean().item(),
        **{f"rewards/{name}": sum(values) / len(values) for name, values in sorted(parts.items())},
        **{f"status/{name}": count / len(rows) for name, count in sorted(status.items())},
        "groups/all_right": (equal & best).float().mean().item(),
        "groups/all_wrong": (equal & ~best).float().mean().item(),
        "groups/mixed": (~equal).float().mean().item(),
        "loss": totals["loss"],
        "pg_loss": totals["pg_loss"],
        "kl": totals["kl"] / tokens,
        "clip_ratio/low_mean": totals["clip_low"] / tokens,
        "clip_ratio/high_mean": totals["clip_high"] / tokens,
        "sampling/logp_difference/mean": totals["mismatch"] / tokens,
        "sampling/logp_difference/max": sums.mismatch_max,
        "sampling/kl": totals["mismatch_kl"] / tokens,
        "grad_norm": sums.grad_norm,
        "lr": sums.lr,
        "completions/mean_length": lengths.mean().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "num_tokens": int(lengths.sum()) + sum(row["prompt_tokens"] for row in rows) // group_size,
        "adapter_hash": adapter_hash,
    }
