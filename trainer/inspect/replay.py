"""Compute one optimizer step again from its bundle, in one process on the CPU, with the run's own functions."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from rollout.sync import adapter_hash
from trainer.config import OnlineConfig
from trainer.grpo import logprobs_before_update, loss_terms, reference_logprobs
from trainer.metrics import TokenSums
from trainer.model.attention import why_no_flash
from trainer.model.shared import has_bfloat16_products
from trainer.packing import Denominators, MicroBatch
from trainer.policy import Policy
from trainer.ppo.critic import Critic, ValueSums
from trainer.ppo.settings import PpoConfig
from trainer.record.bundle import Bundle
from trainer.record.nonfinite import BadToken, bad_term_of, find_bad_gradient
from trainer.start.parts import load_policy

DEVICE = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """A loss of the step and its gradient, summed over the ranks."""

    loss: float
    grad_norm: float
    """Before clipping."""
    gradient_hash: str
    """Hash of the bytes of all gradients, as recorded by the run."""
    terms: list[list]
    """terms[rank][micro-batch]"""
    bad: tuple[int, MicroBatch, BadToken] | None
    """(rank, micro-batch, token) of the first term that is not finite."""
    bad_gradient: tuple[int, MicroBatch, BadToken] | None
    """The same of the first token whose share of the gradient is not finite, where all terms are finite."""

    def found(self, prefix: str = "") -> dict[str, float | str]:
        """What a run records of it. prefix: of the names."""
        numbers = {"loss": self.loss, "grad_norm": self.grad_norm, "gradient_hash": self.gradient_hash}
        return {prefix + name: value for name, value in numbers.items()}


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The results of a replay."""

    policy: Policy
    """With the adapter before the step."""
    of_policy: Gradient
    of_critic: Gradient | None
    """None in GRPO."""
    reference_difference: float | None
    """Largest |recorded - recomputed| of the reference log-probs in nats; more than rounding means that the base
    checkpoint has changed. None if beta is 0."""
    old_difference: float | None
    """The same for the old log-probs; None unless the batch's first update of several is replayed."""
    value_difference: float | None
    """The same for the critic's old values."""
    unlike: list[str]
    """Where the replay cannot compute as the run did, so that equal bytes are not promised: sentences."""

    def found(self) -> dict[str, float | str]:
        """{name of a recorded number: what the replay found}, of both losses."""
        return self.of_policy.found() | (self.of_critic.found("value_") if self.of_critic else {})

    def first(self, what: str) -> tuple[int, MicroBatch, BadToken] | None:
        """Of the critic, which the run computes first, else of the policy. what: "bad" or "bad_gradient"."""
        return (self.of_critic and getattr(self.of_critic, what)) or getattr(self.of_policy, what)

    def equals(self, bundle: Bundle) -> bool:
        """Are the losses and the gradients bit for bit those recorded?"""
        exact = {name: value for name, value in self.found().items() if not name.endswith("norm")}
        # while PPO's critic warms up there is none of the policy
        return all(bundle.recorded[name] == value for name, value in exact.items() if name in bundle.recorded)


def replay(bundle: Bundle, model: str | None = None) -> Replayed:
    """Loss and gradient of the bundle's step. model: the base checkpoint, if it has moved since the run.

    The ranks are replayed one after another with the recorded number of threads, and their gradients are added in rank
    order. The results equal the run's own bit for bit if the run used a CPU, one or two ranks and the same version of
    torch; a sum over more ranks may be rounded differently. Raises UserError if the checkpoint is missing or the
    adapter does not fit it.
    """
    torch.set_num_threads(bundle.threads)
    config, unlike = settings_here(bundle, model)
    policy = policy_of(bundle, config)
    of_critic, value_difference = None, None
    if isinstance(config, PpoConfig):
        critic = critic_of(bundle, config, policy)
        with critic.active():  # also while it looks for a bad token
            of_critic = gradient_of(bundle, critic.terms, critic.parameters, ValueSums)
            value_difference = _difference(bundle, "old_values", lambda micro: critic.values(micro.packed).detach())
    return Replayed(
        policy=policy,
        of_policy=gradient_of(bundle, partial(loss_terms, policy, cfg=bundle.config), policy.trainable(), TokenSums),
        of_critic=of_critic,
        reference_difference=_difference(
            bundle, "ref_logprobs", lambda micro: reference_logprobs(policy, micro, bundle.config)
        ),
        old_difference=_difference(
            bundle, "old_logprobs", lambda micro: logprobs_before_update(policy, micro, bundle.config)
        ),
        value_difference=value_difference,
        unlike=unlike,
    )


def gradient_of(
    bundle: Bundle,
    terms_of: Callable[[MicroBatch, Denominators], Any],
    parameters: dict[str, torch.nn.Parameter],
    sums_of: type[TokenSums],
) -> Gradient:
    """A loss of the step and its gradient. terms_of and parameters: as a grpo.Learner has them; sums_of: of its terms."""
    trained = list(parameters.values())
    sums = [sums_of() for _ in bundle.ranks]
    terms: list[list] = [[] for _ in bundle.ranks]
    gradients = [torch.zeros_like(p) for p in trained]
    bad = None
    for rank, inputs in enumerate(bundle.ranks):
        for p in trained:
            p.grad = None  # every rank of the run began with none
        found = None
        for micro in inputs.micro_batches:
            of_micro = terms_of(micro, inputs.denominators)
            loss = of_micro.loss
            loss.backward()
            # the run's own summing, rank by rank and micro-batch by micro-batch: another order would round differently
            sums[rank].add(of_micro, loss)
            found = found or bad_term_of(micro, of_micro)
            terms[rank].append(of_micro)
        sums[rank].read()
        if found is not None:
            bad = bad or (rank, *found)
            continue  # its gradient is not finite; the others' still say whether theirs are
        # rank 0 is copied, not added to 0: 0 + -0.0 is 0.0, and the hash of the bytes would differ
        gradients = [
            p.grad.clone() if rank == 0 else total + p.grad for total, p in zip(gradients, trained, strict=True)
        ]
    norm = torch.nn.utils.get_total_norm(gradients)  # of the sum over ranks, as in grpo.sum_gradients
    return Gradient(
        loss=sum(s.sums["loss"] for s in sums),  # in float64, as World.total
        grad_norm=float(norm),
        gradient_hash=adapter_hash(dict(zip(parameters, gradients, strict=True))),
        terms=terms,
        bad=bad,
        bad_gradient=None if bad or torch.isfinite(norm) else first_bad_share(bundle, terms_of, trained),
    )


def first_bad_share(
    bundle: Bundle, terms_of: Callable[[MicroBatch, Denominators], Any], parameters: list[torch.nn.Parameter]
) -> tuple[int, MicroBatch, BadToken] | None:
    """(rank, micro-batch, token) of the first token with a gradient that is not finite; None if only sums overflow."""
    for rank, inputs in enumerate(bundle.ranks):
        of_rank = partial(terms_of, denominators=inputs.denominators)
        if found := find_bad_gradient(inputs.micro_batches, of_rank, parameters):
            return rank, *found
    return None


def settings_here(bundle: Bundle, model: str | None) -> tuple[OnlineConfig, list[str]]:
    """(the run's settings as this machine can follow them, sentences on what differs). model: as for replay()."""
    config, unlike = bundle.config, []
    if model is not None:
        config = dataclasses.replace(config, model=model)
    # not kernels_for(): its refusal is for a run, whose user can leave the option out
    if config.attn == "flash" and why_no_flash(DEVICE):
        config = dataclasses.replace(config, attn="sdpa")
        unlike.append("the run used --attn flash, the replay uses PyTorch's kernels: equal bytes are not promised")
    if config.autocast and config.dtype == "float32" and not has_bfloat16_products(DEVICE):
        unlike.append("no --autocast on this CPU: equal bytes are promised only if the run left it out, too")
    return config, unlike


def policy_of(bundle: Bundle, config: OnlineConfig) -> Policy:
    """The policy as it was before the step, unsharded. config: of settings_here()."""
    policy = load_policy(config, DEVICE)  # unsharded, whatever the run was
    shapes = {name: tuple(t.shape) for name, t in policy.adapter_tensors().items()}
    if shapes != {name: tuple(t.shape) for name, t in bundle.adapter.items()}:
        raise UserError(f"{bundle.path}: its adapter does not fit the checkpoint {config.model}; name another --model")
    largest = max(
        max(*prompt, *(token for response in responses for token in response))
        for inputs in bundle.ranks
        for micro in inputs.micro_batches
        for prompt, responses in micro.groups
    )
    if largest >= policy.chat.vocabulary:
        raise UserError(
            f"{bundle.path}: holds token {largest}, and {config.model} has {policy.chat.vocabulary}: it is another checkpoint "
            "than the step's; name that with --model"
        )
    policy.load_adapter(bundle.adapter)
    return policy


def critic_of(bundle: Bundle, config: PpoConfig, policy: Policy) -> Critic:
    """The critic as it was before the step."""
    critic = Critic(policy, config)
    shapes = {name: tuple(t.shape) for name, t in critic.weights().items()}
    if shapes != {name: tuple(t.shape) for name, t in bundle.critic.items()}:
        raise UserError(f"{bundle.path}: its critic does not fit the checkpoint {config.critic or config.model}")
    critic.load_weights(bundle.critic)
    return critic


def _difference(bundle: Bundle, which: str, compute: Callable[[MicroBatch], Tensor]) -> float | None:
    """Largest |difference| between recorded and recomputed numbers of a micro-batch's field; None if there are none."""
    largest = None
    for inputs in bundle.ranks:
        if which.startswith("old") and inputs.update > 1:
            continue  # old numbers are from before the batch's first update, whose weights this bundle does not have
        for micro in inputs.micro_batches:
            recorded = getattr(micro, which)
            if recorded is not None:
                # packed.mask, not mask: responses that were left out of the update have log-probs too
                difference = (compute(micro) - recorded).abs()[micro.packed.mask]
                largest = max(largest or 0.0, float(difference.max()))
    return largest
