"""PPO (arXiv:1707.06347) on the cell-type task, as in verl: a critic's values take the place of GRPO's groups.

    torchrun --nproc-per-node 2 launch/ppo.py --recipe ppo_demo

Read `train_rank` first: its loop is the algorithm. Sampling, scoring, packing, the policy's loss, the optimizer step and
the hand-over are GRPO's own functions (trainer/grpo.py); here is what a critic adds.

    reward of a token   r = score at the response's last token, 0 elsewhere;  - beta (log policy - log reference)
    advantage           A = sum over later tokens of (gamma lambda)^k (r + gamma V(next) - V), whitened over the step
    return              R = A before whitening + V: what the critic learns

Axes: P prompts of a step, G responses per prompt, N = P * G rows (one per response), T tokens of the longest response.
"Collective" in a docstring means that all ranks must make the call, in the same order, or the others wait for ever.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.puzzles import Puzzle
from rollout import stable_seed
from trainer import grpo
from trainer.advantages import gae, whiten
from trainer.grpo import (
    Learner,
    add_up_gradients,
    begin,
    begin_to_score,
    hand_over,
    is_last,
    keep_bundle,
    optimizer_step,
    pack_our_share,
    policy_learner,
    reference_logprobs,
    score,
    step_inputs,
    validate,
    what_to_find_again,
)
from trainer.metrics import Clock, TokenSums, rollout_rows, step_metrics
from trainer.packing import ScoredGroup, packing_figures, scored_groups
from trainer.ppo.critic import Critic, ValueSums
from trainer.ppo.settings import PpoConfig
from trainer.prompts.choice import prompts_of_step
from trainer.prompts.validation import HeldOut
from trainer.ranks.world import World
from trainer.start.parts import Step, finish, prepare


def train(cfg: PpoConfig, puzzles: list[Puzzle], held_out: HeldOut | None = None) -> Path:
    """Train a LoRA adapter with PPO; returns the run folder. Every rank of the launch calls this. Raises as grpo.train."""
    return grpo.train(cfg, puzzles, held_out, train_rank)


def train_rank(cfg: PpoConfig, puzzles: list[Puzzle], world: World, held_out: HeldOut | None = None) -> None:
    """All the work of a rank that trains: prepare, then the loop over steps."""
    run = prepare(cfg, puzzles, world, held_out, partial(Critic, world=world))
    canary, ahead = begin(run)
    policy, engine, log = run.start.policy, run.engine, run.log
    if world.is_main and cfg.critic_warmup >= cfg.steps:
        print(
            f"note: --critic-warmup {cfg.critic_warmup}: {cfg.steps} steps end before the policy is trained", flush=True
        )

    for step in range(run.start.step, cfg.steps):
        clock = Clock(world, step + 1)
        now = replace(run.start, step=step)
        # ---- sample G responses to each of this rank's prompts (they were requested --max-staleness steps ago)
        clock.enter("sample")
        batch = prompts_of_step(run.prompts, cfg.prompts_per_step, step, cfg.seed)[world.rank :: world.size]
        groups = ahead.groups(step, partial(begin_to_score, now, run.scorer, batch))
        rollouts = [rollout for group in groups for rollout in group]
        # ---- score each response
        clock.enter("score")
        rewards = score(now, run.scorer, batch, rollouts)
        # ---- value each token: log-probs and values before the update, the KL into the rewards, GAE, whitening
        clock.enter("value")
        trained = torch.tensor([reward.scored for reward in rewards])  # [N]
        unknown = torch.zeros(len(rewards))  # advantages come per token, from the values
        rows = rollout_rows(step + 1, policy.chat, rollouts, rewards, unknown, cfg.group_size)
        # every rank sees all groups, in prompt order, so that the passes below can deal them out evenly by cost
        sampled = world.gather(scored_groups(groups, rows, unknown, trained))
        measured = measure(now, sampled)
        estimated, estimates = estimate(now, measured)
        # ---- update critic and policy: --epochs passes over the batch, --minibatches optimizer steps in each
        clock.enter("update")
        policy_sums, value_sums, figures = update(now, estimated)
        # ---- hand the new adapter to the sampler, in memory, with proof that it samples from it
        clock.enter("sync")
        identity = hand_over(engine, policy, canary, version=step + 1)
        # ---- validate, every --validate-every steps: greedy answers to held-out puzzles from the same sampler
        validation = validate(run, canary, clock, step)
        # ---- record: metrics.jsonl, rollouts.jsonl, timing.jsonl, and a checkpoint every --save-every steps
        clock.enter("record")
        seconds = world.largest(engine.seconds)
        if log is not None:
            all_rows = [row for group in estimated for row in group.rows]
            metrics = step_metrics(step + 1, all_rows, policy_sums, run.start.cfg, identity)
            metrics |= critic_metrics(value_sums, cfg) | estimates | validation
            log.write(metrics, all_rows, clock, seconds, figures)
        if is_last(run, ahead, now, sampled):
            break
    finish(run)


@torch.no_grad()
def measure(now: Step, groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """The groups of all ranks with numbers per response token from before the update, in `tokens`. Collective.

    old_values: of the critic. ref_logprobs, with a beta above 0. old_logprobs, where the KL or several updates need them.
    """
    cfg, policy, critic, world = now.cfg, now.policy, now.critic, now.world
    ours, micros = pack_our_share(now, groups)
    passes: dict[str, list[Tensor]] = {}  # name -> [N,T] per micro-batch
    if cfg.beta:
        passes["ref_logprobs"] = [reference_logprobs(policy, micro, cfg) for micro in world.paced(micros)]
    if cfg.reward_beta or cfg.updates_per_batch > 1:
        passes["old_logprobs"] = [
            policy.response_logprobs(micro.packed, cfg.temperature) for micro in world.paced(micros)
        ]
    with critic.active():
        passes["old_values"] = [critic.values(micro.packed) for micro in world.paced(micros)]
    # each number back to its response: packing has put the rows of the micro-batches in an order of its own
    of_row: dict[str, dict[int, Tensor]] = {name: {} for name in passes}
    for name, tensors in passes.items():
        for micro, values in zip(micros, tensors, strict=True):
            for row, numbers, kept in zip(micro.rows, values.cpu(), micro.packed.mask.cpu(), strict=True):
                of_row[name][row] = numbers[kept]
    found, first = [], 0
    for place in ours:
        rows = range(first, first + len(groups[place].rollouts))
        found.append([place, {name: [numbers[row] for row in rows] for name, numbers in of_row.items()}])
        first = rows.stop
    tokens = dict(world.gather(found))
    return [replace(group, tokens=tokens[place]) for place, group in enumerate(groups)]


def estimate(now: Step, groups: list[ScoredGroup]) -> tuple[list[ScoredGroup], dict[str, float]]:
    """(the groups with advantages and returns per token, in `tokens` and in their rows; numbers for metrics.jsonl).

    Every rank has the tokens of all ranks and computes the same, so that the whitening is over the whole step. It then
    steers beta, which counts for the next step.
    """
    cfg, kl_control = now.cfg, now.critic.kl
    padded = {
        name: pad_sequence([numbers for group in groups for numbers in group.tokens[name]], batch_first=True)
        for name in groups[0].tokens
    }  # [N,T] each
    values = padded["old_values"]
    lengths = torch.tensor([len(rollout.response_ids) for group in groups for rollout in group.rollouts])
    trained = torch.cat([group.trained for group in groups])
    mask = (torch.arange(values.shape[1]) < lengths[:, None]) & trained[:, None]  # [N,T]
    kl = torch.zeros_like(values)
    if cfg.reward_beta:  # k1, whose mean over the policy's own samples is the KL
        kl = torch.where(mask, padded["old_logprobs"] - padded["ref_logprobs"], kl)
    scores = [row["reward"] or 0.0 for group in groups for row in group.rows]  # None: not trained
    rewards = token_rewards(torch.tensor(scores, dtype=values.dtype), kl, mask, kl_control.beta)
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)
    left = (returns - values)[mask]
    numbers = {
        "critic/values/mean": values[mask].mean().item() if mask.any() else 0.0,
        "critic/returns/mean": returns[mask].mean().item() if mask.any() else 0.0,
        # 1: the values say all that can be known; 0: no more than a constant; below: they mislead
        "critic/vf_explained_var": 1 - (left.var() / (returns[mask].var() + 1e-5)).item() if len(left) > 1 else 0.0,
        # a mean over responses of means over tokens, as verl's
        "actor/reward_kl_penalty": (kl.sum(1) / mask.sum(1))[mask.any(1)].mean().item() if mask.any() else 0.0,
        "actor/reward_kl_penalty_coeff": kl_control.beta,
    }
    kl_control.steer(numbers["actor/reward_kl_penalty"], int(mask.any(1).sum()))
    if len(left) > 1:
        advantages = whiten(advantages, mask)
    made = []
    for group, of_group, to_learn in zip(groups, by_group(advantages, groups), by_group(returns, groups), strict=True):
        tokens = {**group.tokens, "advantages": of_group, "returns": to_learn}
        if cfg.updates_per_batch == 1:  # then old = stop_gradient(new), and the ratio is exactly 1
            tokens.pop("old_logprobs", None)
        rows = [{**row, "advantage": float(own.mean())} for row, own in zip(group.rows, of_group, strict=True)]
        made.append(replace(group, rows=rows, tokens=tokens))
    return made, numbers


def by_group(values: Tensor, groups: list[ScoredGroup]) -> list[list[Tensor]]:
    """[N,T] -> per group the numbers of each response, without padding."""
    rows = iter(values)
    return [[next(rows)[: len(rollout.response_ids)] for rollout in group.rollouts] for group in groups]


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """[N,T] rewards of tokens: -beta * kl, and the response's score at its last trained token; 0 where masked out.

    scores: [N]; kl: [N,T]; mask: [N,T] bool, True from the first token to the last.

    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> kl = torch.tensor([[0.5, -0.5, 1.0], [2.0, 9.0, 9.0]])
    >>> token_rewards(torch.tensor([1.0, -1.0]), kl, mask, beta=0.1).tolist()
    [[-0.05000000074505806, 0.05000000074505806, 0.8999999761581421], [-1.2000000476837158, 0.0, 0.0]]
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    last = mask & (place == mask.sum(1, keepdim=True) - 1)
    zero = torch.zeros_like(kl)
    return torch.where(last, scores[:, None], zero) - torch.where(mask, beta * kl, zero)


def minibatches(groups: list[ScoredGroup], cfg: PpoConfig, step: int) -> Iterator[list[ScoredGroup]]:
    """The groups of each optimizer step: --epochs passes, each in an order of its own, cut into --minibatches parts."""
    for epoch in range(cfg.epochs):
        order = list(range(len(groups)))
        random.Random(stable_seed(cfg.seed, "minibatches", step, epoch)).shuffle(order)
        share = len(groups) // cfg.minibatches
        for part in range(cfg.minibatches):
            # in prompt order again: with one minibatch an epoch is then the whole step as it was sampled
            yield [groups[i] for i in sorted(order[part * share : (part + 1) * share])]


def update(now: Step, groups: list[ScoredGroup]) -> tuple[TokenSums, ValueSums, dict[str, float]]:
    """All optimizer steps over what all ranks sampled; in the first --critic-warmup steps of the critic alone. Collective.

    Returns (sums of the policy's terms and of the critic's over all trained tokens, for metrics.jsonl; how well packing did).
    """
    cfg, critic, world = now.cfg, now.critic, now.world
    policy, warming_up = policy_learner(now), now.step < cfg.critic_warmup
    policy_totals, value_totals, plans, parts = TokenSums(), ValueSums(), [], []
    for number, part in enumerate(minibatches(groups, cfg, now.step), start=1):
        batch = step_inputs(now, part, number)
        plans, parts = [*plans, batch.micro_batches], [*parts, part]
        values, sums = ValueSums(), TokenSums()
        # ---- both gradients, each of its own weights, before either optimizer step: a bundle then has all of them
        value_learner = critic_learner(critic)
        with critic.active():
            value_norm = add_up_gradients(now, value_learner, batch, values)
        recorded = {f"value_{name}": x for name, x in what_to_find_again(now, value_learner, values).items()}
        if not warming_up:
            norm = add_up_gradients(now, policy, batch, sums)
        if cfg.keeps_step(now.step + 1):
            keep_bundle(now, batch, recorded if warming_up else recorded | what_to_find_again(now, policy, sums))
        values.lr = optimizer_step(now, value_learner, batch, value_norm)
        if not warming_up:
            sums.lr = optimizer_step(now, policy, batch, norm)
        value_totals.take_in(values)
        policy_totals.take_in(sums)
    packing = packing_figures(plans, parts, now.policy.cost, cfg.micro_tokens, world)
    return policy_totals.over_ranks(world), value_totals.over_ranks(world), packing


def critic_learner(critic: Critic) -> Learner:
    """The critic as what an optimizer step changes."""
    return Learner(
        optimizer=critic.optimizer, parameters=critic.parameters, lr=critic.cfg.critic_lr, terms=critic.terms
    )


def critic_metrics(sums: ValueSums, cfg: PpoConfig) -> dict[str, float]:
    """Keys of metrics.jsonl, under verl's names. sums: over all ranks and updates."""
    return {
        "critic/vf_loss": sums.sums["loss"] / cfg.updates_per_batch,  # mean over the batch's updates
        "critic/vf_clipfrac": sums.sums["clipped"] / max(sums.sums["tokens"], 1),
        "critic/grad_norm": sums.grad_norm,  # of the last update, before clipping
        "critic/lr": sums.lr,
    }
