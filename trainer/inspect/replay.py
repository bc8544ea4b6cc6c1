"""Compute one optimizer step again from its bundle, in one process on the CPU, with the run's own functions."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch

from data.errors import UserError
from rollout.sync import adapter_hash
from trainer.config import GrpoConfig
from trainer.grpo import logprobs_before_update, loss_terms, reference_logprobs
from trainer.metrics import TokenSums
from trainer.model.attention import why_no_flash
from trainer.objective import LossTerms
from trainer.packing import MicroBatch
from trainer.policy import Policy
from trainer.record.bundle import Bundle, StepInputs
from trainer.record.nonfinite import BadToken, bad_term_of, find_bad_gradient
from trainer.start.parts import load_policy

DEVICE = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The results of a replay."""

    policy: Policy
    """With the adapter before the step."""
    loss: float
    grad_norm: float
    """Before clipping."""
    gradient_hash: str
    """Hash of the bytes of all gradients, as recorded by the run."""
    terms: list[list[LossTerms]]
    """terms[rank][micro-batch]"""
    bad: tuple[int, MicroBatch, BadToken] | None
    """(rank, micro-batch, token) of the first term that is not finite."""
    bad_gradient: tuple[int, MicroBatch, BadToken] | None
    """The same of the first token whose share of the gradient is not finite, where all terms are finite."""
    reference_difference: float | None
    """Largest |recorded - recomputed| of the reference log-probs in nats; more than rounding means that the base
    checkpoint has changed. None if beta is 0."""
    old_difference: float | None
    """The same for the old log-probs; None unless the batch's first update of several is replayed."""
    unlike: list[str]
    """Where the replay cannot compute as the run did, so that equal bytes are not promised: sentences."""

    def equals(self, bundle: Bundle) -> bool:
        """Are loss and gradient bit for bit those recorded?"""
        return self.loss == bundle.recorded["loss"] and self.gradient_hash == bundle.recorded["gradient_hash"]


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
    parameters = list(policy.trainable().values())
    sums = [TokenSums() for _ in bundle.ranks]
    terms: list[list[LossTerms]] = [[] for _ in bundle.ranks]
    gradients = [torch.zeros_like(p) for p in parameters]
    bad = None
    for rank, inputs in enumerate(bundle.ranks):
        for p in parameters:
            p.grad = None  # every rank of the run began with none
        found = None
        for micro in inputs.micro_batches:
            of_micro = loss_terms(policy, micro, inputs.denominators, bundle.config)
            loss = of_micro.loss
            loss.backward()
            # the run's own summing, rank by rank and micro-batch by micro-batch: another order would round differently
            sums[rank].add(of_micro, loss)
            found = found or bad_term_of(micro, of_micro)
            terms[rank].append(of_micro)
        if found is not None:
            bad = bad or (rank, *found)
            continue  # its gradient is not finite; the others' still say whether theirs are
        # rank 0 is copied, not added to 0: 0 + -0.0 is 0.0, and the hash of the bytes would differ
        gradients = [
            p.grad.clone() if rank == 0 else total + p.grad for total, p in zip(gradients, parameters, strict=True)
        ]
    norm = torch.nn.utils.get_total_norm(gradients)  # of the sum over ranks, as in grpo.sum_gradients
    bad_gradient = None if bad or torch.isfinite(norm) else first_bad_share(bundle, policy)
    return Replayed(
        policy=policy,
        loss=sum(s.sums["loss"] for s in sums),  # in float64, as World.total
        grad_norm=float(norm),
        gradient_hash=adapter_hash(dict(zip(policy.trainable(), gradients, strict=True))),
        terms=terms,
        bad=bad,
        bad_gradient=bad_gradient,
        reference_difference=_difference(policy, bundle, "ref_logprobs"),
        old_difference=_difference(policy, bundle, "old_logprobs"),
        unlike=unlike,
    )


def first_bad_share(bundle: Bundle, policy: Policy) -> tuple[int, MicroBatch, BadToken] | None:
    """(rank, micro-batch, token) of the first token with a gradient that is not finite; None if only sums overflow."""
    parameters = list(policy.trainable().values())
    for rank, inputs in enumerate(bundle.ranks):
        terms_of = partial(_terms, policy, inputs, bundle)
        if found := find_bad_gradient(inputs.micro_batches, terms_of, parameters):
            return rank, *found
    return None


def _terms(policy: Policy, inputs: StepInputs, bundle: Bundle, micro: MicroBatch) -> LossTerms:
    return loss_terms(policy, micro, inputs.denominators, bundle.config)


def settings_here(bundle: Bundle, model: str | None) -> tuple[GrpoConfig, list[str]]:
    """(the run's settings as this machine can follow them, sentences on what differs). model: as for replay()."""
    config, unlike = bundle.config, []
    if model is not None:
        config = dataclasses.replace(config, model=model)
    # not attention_name(): its refusal is for a run, whose user can leave the option out
    if config.attn == "flash" and why_no_flash(DEVICE):
        config = dataclasses.replace(config, attn="sdpa")
        unlike.append("the run used --attn flash, the replay uses PyTorch's kernels: equal bytes are not promised")
    return config, unlike


def policy_of(bundle: Bundle, config: GrpoConfig) -> Policy:
    """The policy as it was before the step, unsharded. config: of settings_here()."""
    policy = load_policy(config, DEVICE)  # unsharded, whatever the run was
    shapes = {name: tuple(t.shape) for name, t in policy.adapter_tensors().items()}
    if shapes != {name: tuple(t.shape) for name, t in bundle.adapter.items()}:
        raise UserError(f"{bundle.path}: its adapter does not fit the checkpoint {config.model}; name another --model")
    policy.load_adapter(bundle.adapter)
    return policy


def _difference(policy: Policy, bundle: Bundle, which: str) -> float | None:
    """Largest |difference| between recorded and recomputed log-probs; None if there are none.

    which: "ref_logprobs" or "old_logprobs".
    """
    compute = reference_logprobs if which == "ref_logprobs" else logprobs_before_update
    largest = None
    for inputs in bundle.ranks:
        if which == "old_logprobs" and inputs.update > 1:
            continue  # old log-probs are of the policy before the batch's first update, which this bundle does not have
        for micro in inputs.micro_batches:
            recorded = getattr(micro, which)
            if recorded is not None:
                # packed.mask, not mask: responses that were left out of the update have log-probs too
                difference = (compute(policy, micro, bundle.config) - recorded).abs()[micro.packed.mask]
                largest = max(largest or 0.0, float(difference.max()))
    return largest
