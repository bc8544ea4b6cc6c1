"""The GRPO objective, term by term. Pure functions of tensors and floats; every loss here is to be minimised.

Axes: N rows (responses), T response tokens, padded on the right. mask: [N,T] bool, True = trained. A function that takes
the mask replaces what is under False, NaN included, before it multiplies (0 * NaN is NaN); give the others clean values.

Cell-o1 (arXiv:2506.02911) Eq. (1), per response, averaged over the responses, to be maximised:
    min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) - beta * KL(policy || reference)
Not in that equation: one ratio per token (it has one per response; the authors' code has one per token), the mean over a
response's tokens that follows from it, dual clip, CISPO, and the corrections for the sampler.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CLIPS = ("", "low", "high", "dual")
"""Meaning of the codes of clip_fired; "" = no clip."""
CORRECTIONS = ("none", "tis", "mis", "seq-tis", "seq-mis")
SURROGATES = ("clip", "cispo")
AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8 is finite in every dtype we train in


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """New / old probability of each token. All [N,T] -> [N,T]; 1 where masked out.

    old: the policy before the batch's first update. That is the trainer's own number, not the sampler's.

    level "token": exp(new - old), the log clamped to +-20. "sequence" (GSPO, arXiv:2507.18071): every token has the value of its
    row's exp(mean log-ratio), while the gradient reaches each token's own log-prob (as in verl), and the log is capped at 10.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))  # exp(0) = 1 where masked out
    if level == "token":
        return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()  # outside the bounds no gradient passes
    if level == "sequence":
        # GSPO's token form: stop_gradient(s) * p / stop_gradient(p). Here [N,1] the log of s
        mean = log_ratio.detach().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)  # [N,1]
        # own - own.detach() is 0 in value, but carries the gradient of each token's own log-prob
        own = torch.where(mask, logprobs, torch.zeros_like(logprobs))
        return torch.where(mask, (own - own.detach() + mean).clamp(max=10.0).exp(), torch.ones_like(own))
    raise ValueError(f"ratio level {level!r} is not one of token, sequence")


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """Per-token loss max(-ratio A, -clip(ratio, 1 - clip_low, 1 + clip_high) A). ratio [N,T]; advantages [N,T], [N,1] or [N].

    dual_clip c > 1 (arXiv:1912.09729) bounds the loss of a negative advantage by -c A.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages  # [N] -> [N,1], to broadcast over tokens
    unclipped = -ratio * advantages  # minus: Eq. (1) is to be maximised, a loss minimised
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    # the larger loss is the pessimistic one: clipping only ever takes the gradient away from a ratio that went too far in
    # the direction its advantage asks for; in the other direction the unclipped loss, and its gradient, stay
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is None:
        return loss
    # the clip above never bounds this side: a ratio of 1000 where A < 0 would give a loss of 1000 |A|
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def cispo_surrogate(ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """CISPO's per-token loss (arXiv:2506.13585, Eq. 4), shapes as above: the clip bounds a weight, and stops no gradient."""
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantages * logprobs


def clip_fired(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """[N,T] int8 codes into CLIPS: which bound stops the gradient of clipped_surrogate. advantages [N,T], [N,1] or [N].

    "low": a token of a worse-than-average response whose ratio is already below 1 - clip_low; "high": of a better one, above
    1 + clip_high; "dual": of a worse one, above dual_clip.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    # strict comparisons: at a tie, maximum and clamp still pass a gradient
    codes = torch.zeros_like(ratio, dtype=torch.int8)  # 0: CLIPS[0], no clip
    codes = codes.masked_fill((ratio < 1 - clip_low) & (advantages < 0), CLIPS.index("low"))
    codes = codes.masked_fill((ratio > 1 + clip_high) & (advantages > 0), CLIPS.index("high"))
    if dual_clip is None:
        return codes
    return codes.masked_fill((ratio > dual_clip) & (advantages < 0), CLIPS.index("dual"))


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "low_var") -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own samples, [N,T] -> [N,T].

    With d = ref - new: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (http://joschu.net/blog/kl-approx.html),
    low_var = k3 with d clamped to +-20 and the value to +-10 (so a saturated token has no gradient).
    """
    log_ratio = ref_logprobs - logprobs
    # as a loss k1 holds nothing back: its gradient is that of log p, whose mean over the policy's own samples is 0
    if kind == "k1":
        return -log_ratio
    # biased as an estimate, but on fresh samples its gradient is, on average, that of KL(policy || reference)
    if kind == "k2":
        return 0.5 * log_ratio.square()
    # unbiased and never negative; exp(d) explodes where the reference finds a token far likelier than the policy does
    if kind == "k3":
        return log_ratio.exp() - log_ratio - 1
    if kind == "low_var":
        log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return (log_ratio.exp() - log_ratio - 1).clamp(-10.0, 10.0)  # only 10 is ever reached, since k3 >= 0
    raise ValueError(f"KL kind {kind!r} is not one of k1, k2, k3, low_var")


def rollout_correction(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, kind: str, cap: float = 2.0, floor: float = 0.0
) -> Tensor:
    """Detached [N,T] weights that correct for the sampler being another program than the trainer.

    With w = exp(old - sampler): kind "none" 1; "tis" min(w, cap); "mis" w where floor <= w <= cap, else 0 (the token is
    dropped). "seq-tis" and "seq-mis" do so with the row's product of w, which shrinks or explodes with length (TRL's
    default is seq-mis with cap 3). 1 where masked out. Log-weights are clamped to +-20.
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"correction {kind!r} is not one of {', '.join(CORRECTIONS)}")
    if kind == "none":
        return torch.ones_like(old_logprobs)
    # detached: the weight says how much to trust a token, it is not something to optimise
    log_weight = torch.where(mask, old_logprobs - sampler_logprobs, torch.zeros_like(old_logprobs)).detach()
    if kind.startswith("seq-"):
        log_weight = log_weight.sum(-1, keepdim=True).expand_as(log_weight)  # [N,T], one value per row
    weight = log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind.endswith("tis"):
        weight = weight.clamp(max=cap)  # truncated: some bias, bounded variance
    else:
        weight = torch.where((weight >= floor) & (weight <= cap), weight, torch.zeros_like(weight))
    return torch.where(mask, weight, torch.ones_like(weight))


def aggregation_weights(
    mask: Tensor,
    mode: str,
    n_rows: float,
    n_tokens: float,
    norm: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[N,T] weights such that (weights * per_token).sum(), added up over all micro-batches and ranks, is the step's loss.

    n_rows, n_tokens: rows with at least one trained token, and trained tokens, of the WHOLE optimizer step over all ranks.
    They are counted once, before the first micro-batch; that makes the loss independent of how the batch is cut up.
    norm: divisor of "seq-mean-token-sum-norm" (default T). Raises ValueError for an unknown mode.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregation {mode!r} is not one of {', '.join(AGGREGATIONS)}")
    weights = mask.to(dtype)  # [N,T] of 0 and 1
    if mode == "token-mean":  # every token counts the same, so long responses count more
        return weights / max(n_tokens, 1)
    if mode == "seq-mean-token-mean":  # every response counts the same, so a token of a long one counts less
        return weights / mask.sum(-1, keepdim=True).clamp(min=1) / max(n_rows, 1)
    if mode == "seq-mean-token-sum":  # a response counts by its length, and every token the same
        return weights / max(n_rows, 1)
    # Dr.GRPO (arXiv:2503.20783): a constant instead of the length. T is of this micro-batch only: a cut-up batch needs norm
    return weights / max(n_rows, 1) / (mask.shape[-1] if norm is None else norm)


def aggregate(per_token: Tensor, mask: Tensor, mode: str = "seq-mean-token-mean", norm: float | None = None) -> Tensor:
    """Scalar loss of per-token losses [N,T] that are the whole optimizer step. Rows without a trained token do not count."""
    weights = aggregation_weights(mask, mode, int(mask.any(-1).sum()), int(mask.sum()), norm, per_token.dtype)
    return (weights * torch.where(mask, per_token, torch.zeros_like(per_token))).sum()


def clipped_value_error(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """PPO's per-token value loss 0.5 * max((v - R)^2, (clip(v, old +- clip) - R)^2), all [N,T]; the larger, as in verl."""
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float, mode: str = "token-mean"
) -> Tensor:
    """clipped_value_error of all tokens, aggregated. All [N,T] -> scalar. For PPO; GRPO has no critic."""
    values, old_values, returns = (torch.where(mask, x, torch.zeros_like(x)) for x in (values, old_values, returns))
    return aggregate(clipped_value_error(values, old_values, returns, clip), mask, mode)


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Every per-token number of one micro-batch, [N,T] each; those of masked-out tokens are fillers, never garbage."""

    mask: Tensor
    """[N,T] bool, True = trained."""
    logprobs: Tensor
    """[N,T] policy log-probs, with gradient; 0 where masked out, as the three below."""
    old_logprobs: Tensor
    ref_logprobs: Tensor
    """[N,T] adapter-off log-probs; equal to `logprobs` (detached) when beta is 0 and no reference pass was made."""
    sampler_logprobs: Tensor
    ratio: Tensor
    clip: Tensor
    """[N,T] int8 codes into CLIPS."""
    advantages: Tensor
    """[N,1] one advantage per response; [N,T] in PPO."""
    surrogate: Tensor
    """[N,T] clipped surrogate, or CISPO's, to minimise."""
    correction: Tensor
    """[N,T] detached sampler-mismatch weight; it multiplies the surrogate, not the KL."""
    kl: Tensor
    weight: Tensor
    """[N,T] aggregation weight; 0 where masked out."""
    beta: float
    entropy: Tensor | None = None
    """[N,T] nats, with --entropy; no part of the loss."""
    distillation: Tensor | None = None
    """[N,T] with --distill-failures: its weight times the KL to the policy that is shown a right answer, else 0."""

    @property
    def contribution(self) -> Tensor:
        """[N,T] each token's share of the step's loss; a response's, or a group's, share is the sum over its tokens."""
        of_token = self.surrogate * self.correction + self.beta * self.kl
        return self.weight * (of_token if self.distillation is None else of_token + self.distillation)

    @property
    def loss(self) -> Tensor:
        """Scalar; its sum over micro-batches and ranks is the step's loss."""
        return self.contribution.sum()


def grpo_terms(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weight: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    beta: float,
    kl_kind: str,
    ratio_level: str,
    correction: str,
    correction_cap: float,
    correction_floor: float = 0.0,
    surrogate: str = "clip",
) -> LossTerms:
    """All terms of a micro-batch's loss. Every tensor is [N,T], but advantages is [N] ([N,T] in PPO).

    old_logprobs None: this is the batch's only optimizer step, so old = stop_gradient(new) and the ratio is exactly 1.
    ref_logprobs None (beta 0): the KL is reported as 0. weight: from aggregation_weights.
    """
    zero = torch.zeros_like(logprobs)
    # before any arithmetic: a NaN under the mask would reach the gradient through a product with 0
    logprobs = torch.where(mask, logprobs, zero)
    # new - stop_gradient(new) is 0 in value, but has the gradient of new: at ratio 1 this is the plain policy gradient
    old = logprobs.detach() if old_logprobs is None else torch.where(mask, old_logprobs, zero)
    ref = logprobs.detach() if ref_logprobs is None else torch.where(mask, ref_logprobs, zero)
    sampler = torch.where(mask, sampler_logprobs, zero)
    ratio = importance_ratio(logprobs, old, mask, ratio_level)
    kl = zero if ref_logprobs is None else kl_estimate(logprobs, ref, kl_kind)  # KL enters the loss in `contribution`
    if surrogate == "cispo":
        per_token = cispo_surrogate(ratio, logprobs, advantages, clip_low, clip_high)
        side = (ratio.detach() - 1).sign()  # its clip bounds the weight, whatever the advantage is
        fired = clip_fired(ratio.detach(), side, clip_low, clip_high)
    else:
        per_token = clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
        fired = clip_fired(ratio.detach(), advantages, clip_low, clip_high, dual_clip)
    return LossTerms(
        mask=mask,
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=ref,
        sampler_logprobs=sampler,
        ratio=ratio,
        clip=fired,
        advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
        surrogate=per_token,
        # old / sampler, since ratio already is new / old
        correction=rollout_correction(old, sampler, mask, correction, correction_cap, correction_floor),
        kl=kl,
        weight=weight,
        beta=beta,
    )
