"""PPO's critic: before each token of a response, the return that it expects from there on; and its loss, term by term.

The critic is a language model with one number per token instead of a vocabulary. By default it has only an adapter and a
head of its own: the base model, in memory once, is the policy's. It runs on the same packed rows as the policy, where the
responses to a prompt share one copy of it.

Axes: N rows (responses), T tokens of the longest response, M response tokens side by side, H hidden size.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from data.errors import UserError
from rollout import stable_seed
from trainer.metrics import TokenSums
from trainer.model.loading import seeded
from trainer.objective import aggregation_weights, clipped_value_error
from trainer.packing import Denominators, MicroBatch, PackedBatch
from trainer.policy import Policy, matrix_products
from trainer.ppo.settings import PpoConfig
from trainer.ranks.world import World, load_moments, moments_of
from trainer.start.parts import load_policy, make_optimizer
from trainer.start.preflight import context_of, steady_positions

ADAPTER = "critic"
"""PEFT's name of the critic's adapter on the policy's base model; the policy's is "default"."""


class KlControl:
    """beta, the weight of the KL in the reward.

    "fixed" leaves it as it is, as InstructGPT has it (arXiv:2203.02155). "adaptive" is verl's controller, of Ziegler et al.
    (arXiv:1909.08593, section 2.2): beta grows by at most 20 % per `horizon` responses while the KL is above its target.
    """

    def __init__(self, cfg: PpoConfig) -> None:
        self.beta, self.adaptive = cfg.reward_beta, cfg.kl_control == "adaptive"
        self.target, self.horizon = cfg.kl_target, cfg.kl_horizon

    def steer(self, kl: float, responses: int) -> None:
        """After a batch. kl: its mean, in nats per token."""
        if self.adaptive:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * responses / self.horizon


class Critic:
    """The critic with its optimizer. Saved in the run's checkpoints (runfolder.Companion), with beta, which is steered."""

    def __init__(self, policy: Policy, cfg: PpoConfig, world: World | None = None) -> None:
        """world: of the run; a replay needs none, since it saves nothing."""
        self.world, self.cfg, self.kl = world, cfg, KlControl(cfg)
        # where every weight of the policy is trained there is no frozen base to share
        own = cfg.critic or (None if cfg.lora_rank else cfg.model)
        self.shares_base = own is None
        self.backbone = policy if own is None else load_critic(own, policy, cfg)
        if self.shares_base:
            add_critic_adapter(policy, cfg.seed)
        dtype = torch.promote_types(self.backbone.causal_lm.lm_head.weight.dtype, torch.float32)
        width = self.backbone.causal_lm.lm_head.weight.shape[1]
        # at 0 every value is 0, and the first advantages are the returns: a random head would add noise to them
        self.weight = torch.nn.Parameter(torch.zeros(width, dtype=dtype, device=policy.device))  # [H]
        self.bias = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=policy.device))
        self.parameters = {**self._adapter(), "value_head.weight": self.weight, "value_head.bias": self.bias}
        self.optimizer = make_optimizer(cfg, list(self.parameters.values()))

    def _adapter(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters of the backbone, by name."""
        if self.shares_base:
            return {name: p for name, p in self.backbone.model.named_parameters() if f".{ADAPTER}." in name}
        # the language model's own head has no part in a value
        return {name: p for name, p in self.backbone.trainable().items() if not name.startswith("lm_head.")}

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the base runs with the critic's adapter. Forward and backward belong inside: with
        --checkpointing the backward pass runs the layers again."""
        if self.shares_base:
            self.backbone.model.set_adapter(ADAPTER)
        try:
            yield
        finally:
            if self.shares_base:
                self.backbone.model.set_adapter("default")

    def values(self, batch: PackedBatch) -> Tensor:
        """[N,T] value before each response token, read where the token is predicted; 0 where there is none. In active()."""
        with matrix_products(self.backbone.device, self.backbone.autocast):
            hidden = self.backbone.predicting(self.backbone.causal_lm, batch)  # [M,H]
        return batch.unpack(hidden.to(self.weight.dtype) @ self.weight + self.bias)

    def terms(self, micro: MicroBatch, denominators: Denominators) -> "ValueTerms":
        """Forward one micro-batch and name every term of its value loss. In active()."""
        return value_terms(self.values(micro.packed), micro, denominators, self.cfg.value_clip)

    def weights(self) -> dict[str, Tensor]:
        """The trained values by name."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy in trained values of the same names and shapes. In place: the optimizer holds these parameters."""
        for name, p in self.parameters.items():
            p.detach().copy_(weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps of the critic, on rank 0. Collective."""
        assert self.world is not None
        moments = moments_of(self.optimizer, list(self.parameters), self.world)
        weights = {f"weight/{name}": value for name, value in self.weights().items()}
        return {**weights, **moments, "kl_beta": torch.tensor(self.kl.beta, dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what tensors() gave."""
        weights = {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")}
        self.load_weights(weights)
        load_moments(self.optimizer, self.parameters, {n: t for n, t in tensors.items() if not n.startswith("weight/")})
        self.kl.beta = tensors["kl_beta"].item()


def add_critic_adapter(policy: Policy, seed: int) -> None:
    """A second LoRA adapter on the policy's base model, with the settings of the first; not active."""
    with seeded(stable_seed(seed, ADAPTER) % 2**63):  # PEFT draws from torch's global generator
        policy.model.add_adapter(ADAPTER, copy.deepcopy(policy.model.peft_config["default"]))
    policy.model.set_adapter("default")
    policy.model.eval()


def load_critic(folder: str, policy: Policy, cfg: PpoConfig) -> Policy:
    """The checkpoint of a critic with weights of its own.

    Raises UserError when it reads other tokens than the policy, or fewer of them.
    """
    try:
        # beta 0: no frozen copy beside it
        backbone = load_policy(replace(cfg, model=folder, beta=0.0, kl_control="fixed"), policy.device)
    except UserError as error:
        raise UserError(str(error).replace(f"--model {folder}", f"--critic {folder}")) from error
    if backbone.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(
            f"--critic {folder}: its tokenizer has another vocabulary than that of --model {cfg.model}; name a checkpoint of "
            "the same model family"
        )
    shape, longest = backbone.causal_lm.config.to_dict(), cfg.max_prompt_tokens + cfg.max_response_tokens
    if longest > (most := min(context_of(shape) or math.inf, steady_positions(shape))):
        raise UserError(
            f"--critic {folder}: has positions for {most} tokens, and --max-prompt-tokens {cfg.max_prompt_tokens} + "
            f"--max-response-tokens {cfg.max_response_tokens} need {longest}; give fewer, or another critic"
        )
    return backbone


@dataclass(frozen=True, kw_only=True)
class ValueTerms:
    """Every per-token number of one micro-batch's value loss, [N,T] each; 0 where masked out."""

    mask: Tensor
    """[N,T] bool, True = trained."""
    values: Tensor
    """[N,T] with gradient."""
    old_values: Tensor
    """[N,T] before the batch's first update."""
    returns: Tensor
    """[N,T] what the values should have been."""
    error: Tensor
    """[N,T] clipped squared error (objective.clipped_value_error), to minimise."""
    clipped: Tensor
    """[N,T] bool: the clip decided, and the token has no gradient."""
    weight: Tensor
    """[N,T] aggregation weight."""

    @property
    def contribution(self) -> Tensor:
        """[N,T] each token's share of the step's value loss."""
        return self.weight * self.error

    @property
    def loss(self) -> Tensor:
        """Scalar; its sum over micro-batches and ranks is the step's value loss: the mean over its tokens, as in verl."""
        return self.contribution.sum()


def value_terms(values: Tensor, micro: MicroBatch, denominators: Denominators, clip: float) -> ValueTerms:
    """All terms of a micro-batch's value loss. values: [N,T], anything where masked out. clip: --value-clip."""
    mask, zero = micro.mask, torch.zeros_like(values)
    assert micro.old_values is not None and micro.returns is not None
    # before any arithmetic: a NaN under the mask would reach the gradient through a product with 0
    values, old, returns = (torch.where(mask, x, zero) for x in (values, micro.old_values, micro.returns))
    error = clipped_value_error(values, old, returns, clip)
    return ValueTerms(
        mask=mask,
        values=values,
        old_values=old,
        returns=returns,
        error=error,
        clipped=(error > 0.5 * (values - returns).square()).detach(),
        weight=aggregation_weights(mask, "token-mean", denominators.n_rows, denominators.n_tokens, dtype=values.dtype),
    )


class ValueSums(TokenSums):
    """Sums of ValueTerms over the trained tokens of a step."""

    names: ClassVar[tuple[str, ...]] = ("loss", "clipped", "tokens")

    def add(self, terms: ValueTerms, loss: Tensor) -> None:
        """Add one micro-batch."""
        self.unread.append({"loss": loss, "clipped": terms.clipped.sum(), "tokens": terms.mask.sum()})
