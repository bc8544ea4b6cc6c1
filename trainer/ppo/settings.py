"""Settings of PPO."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from data.errors import UserError
from data.options import check_numbers, option
from trainer.config import OnlineConfig, objective, optimizing, run, sampling
from trainer.objective import AGGREGATIONS

valuing = partial(option, section="Critic")


@dataclass(frozen=True, kw_only=True)
class PpoConfig(OnlineConfig):
    """Proximal policy optimisation (arXiv:1707.06347) with a critic. PPO's own settings have verl's defaults, but for three:
    verl has --dual-clip 3, no KL unless it is asked for, and four minibatches of a batch. Sizes and adapter are GRPO's.
    """

    algorithm: ClassVar[str] = "PPO"

    out: str = run("runs/ppo", "Run folder.")
    critic: str | None = valuing(
        None,
        "Checkpoint folder of the critic's own weights; default: an adapter of its own on the policy's base model, or a "
        "second copy of the checkpoint where --lora-rank is 0.",
    )
    critic_lr: float = valuing(1e-5, "Learning rate of the critic, with the same --warmup-steps and --decay-steps.")
    critic_warmup: int = valuing(0, "First steps in which only the critic learns; --warmup-steps counts them too.")
    value_clip: float = valuing(0.5, "A value counts as moved by at most this much from the one before the update.")
    gamma: float = objective(1.0, "Discount per token.")
    lam: float = objective(1.0, "Lambda of GAE; 1: the advantage is return minus value, without bootstrapping.")
    kl_in: str = objective(
        "reward",
        "Where beta x KL enters: the reward of every token (k1 = policy - reference log-prob), or the loss (--kl-kind).",
        ("reward", "loss"),
    )
    kl_control: str = objective(
        "fixed", "beta of --kl-in reward: constant, or steered towards --kl-target.", ("fixed", "adaptive")
    )
    kl_target: float = objective(
        0.1, "KL that --kl-control adaptive aims at, in nats: mean over responses of their mean per token."
    )
    kl_horizon: int = objective(10000, "Responses in which --kl-control adaptive corrects an error.")
    aggregation: str = objective(
        "token-mean",
        "How per-token policy losses become one number; values always use token-mean.",
        AGGREGATIONS,
    )
    group_size: int = sampling(1, "Responses per prompt (G).")
    epochs: int = optimizing(1, "Passes over a sampled batch.")
    minibatches: int = optimizing(1, "Optimizer steps per pass; each takes another part of the prompts.")

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps per sampled batch."""
        return self.epochs * self.minibatches

    @property
    def loss_beta(self) -> float:
        """Weight of the KL in the loss."""
        return self.beta if self.kl_in == "loss" else 0.0

    @property
    def reward_beta(self) -> float:
        """Weight of the KL in the reward, before any control."""
        return self.beta if self.kl_in == "reward" else 0.0

    def __post_init__(self) -> None:
        """Raises UserError for a setting out of range, or settings that exclude one another."""
        super().__post_init__()
        check_numbers(
            self,
            {
                "at least 0 and at most 1": ("gamma", "lam"),
                "at least 0": ("critic_warmup",),
                "above 0": ("critic_lr", "value_clip", "kl_target"),
                "at least 1": ("group_size", "epochs", "minibatches", "kl_horizon"),
            },
        )
        if self.prompts_per_step % self.minibatches:
            raise UserError(
                f"--prompts-per-step {self.prompts_per_step} and --minibatches {self.minibatches}: the second must divide "
                "the first"
            )
        if self.kl_control == "adaptive" and not self.reward_beta:
            raise UserError(
                "--kl-control adaptive: steers the KL in the reward; it needs --kl-in reward and --beta above 0"
            )
        responses = self.prompts_per_step * self.group_size
        if self.kl_control == "adaptive" and responses >= 5 * self.kl_horizon:
            # beta changes by up to 0.2 x responses / horizon of itself: a negative one would pay for leaving the reference
            raise UserError(
                f"--kl-horizon {self.kl_horizon}: a step of {responses} responses could make beta negative; give more than "
                f"{responses // 5}"
            )
        if self.shard == "fsdp":
            raise UserError("--shard fsdp: the critic is not sharded; use --shard none")
