"""GRPO (Group Relative Policy Optimization, arXiv:2402.03300) as Cell-o1 uses it (arXiv:2506.02911, Eq. 1).

    torchrun --nproc-per-node 2 launch/grpo.py --recipe demo --out runs/two
    python -m pdb launch/grpo.py --recipe demo --out runs/debug     # one process, stops anywhere

Read `train_rank` first: its loop is the algorithm. Then `update`: one optimizer step. There is no critic, no
replay of old batches, no callback.

Axes: P prompts of a step, G responses per prompt, N = P * G rows (one per response), T tokens of the longest response.
Every rank samples whole groups, so advantages need no communication between ranks; gradients are summed over the ranks.
"Collective" in a docstring means that all ranks must make the call, in the same order, or the others wait for ever.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from data.puzzles import Puzzle
from reward import Reward
from reward.scoring import Scorer
from rollout import Ahead, Engine, Rollout, Sampling, stable_seed
from rollout.sync import Canary, adapter_hash
from trainer.advantages import group_advantages, overlong_penalty
from trainer.config import GrpoConfig, OnlineConfig, TrainingConfig
from trainer.metrics import Clock, TokenSums, rollout_rows, step_metrics
from trainer.objective import LossTerms, aggregation_weights, grpo_terms
from trainer.packing import (
    Denominators,
    MicroBatch,
    ScoredGroup,
    balance,
    count_trained,
    micro_batches,
    pack,
    packing_figures,
    scored_groups,
)
from trainer.policy import Policy, Prompt
from trainer.prompts.choice import prompts_of_step, replace_equal_groups
from trainer.prompts.failures import teach_failures, with_distillation
from trainer.prompts.validation import HeldOut, fill_ranks
from trainer.ranks.world import World, full_tensor, guarded, join_world, leave_world, local_shard
from trainer.record.bundle import StepInputs, StepRecord, write_bundle
from trainer.record.nonfinite import Found, describe_bad_token, find_bad_gradient, first_bad_of, without_graph
from trainer.record.runfolder import save_training, write_json
from trainer.start.parts import Run, Step, finish, prepare, refuse_a_useless_start
from trainer.start.sampler import keep_sampler

CANARY_TOKENS = 16  # of the run's first prompt
CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest accepted mean |log-prob difference|, in nats per token, between sampler and trainer on the canary text."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What an optimizer step changes and the loss that it lowers: the policy's; in PPO there is the critic's too."""

    optimizer: torch.optim.Optimizer
    parameters: dict[str, torch.nn.Parameter]
    lr: float
    """Its highest rate."""
    terms: Callable[[MicroBatch, Denominators], Any]
    """Forwards a micro-batch and names every term of its loss, [N,T] each (LossTerms)."""


def train(
    cfg: OnlineConfig, puzzles: list[Puzzle], held_out: HeldOut | None = None, rank_work: Callable | None = None
) -> Path:
    """Train a LoRA adapter with GRPO; returns the run folder. Every rank of the launch calls this.

    held_out: what --validate measures on. rank_work: another loop than train_rank (PPO's).

    Raises UserError for settings or data that the user must change, and when the reward function fails under
    --on-reward-error stop; FloatingPointError before an optimizer step that would not be finite; RunError when a rank, a
    sampler or a hand-over of the adapter fails.
    """
    world = join_world(cfg.ranks_apart, cfg.hang_seconds)
    with guarded(world):
        if world.sampler is not None:
            keep_sampler(cfg, world)
        else:
            (rank_work or train_rank)(cfg, puzzles, world, held_out)
    leave_world()  # not in a finally: after an error the ranks cannot meet any more
    return Path(cfg.out)


def train_rank(cfg: GrpoConfig, puzzles: list[Puzzle], world: World, held_out: HeldOut | None = None) -> None:
    """All the work of a rank that trains: prepare, then the loop over steps."""
    run = prepare(cfg, puzzles, world, held_out)
    canary, ahead = begin(run)
    cfg, policy, engine, log = run.start.cfg, run.start.policy, run.engine, run.log

    for step in range(run.start.step, cfg.steps):
        clock = Clock(world, step + 1)
        now = replace(run.start, step=step)
        # ---- sample G responses to each of this rank's prompts (they were requested --max-staleness steps ago)
        clock.enter("sample")
        batch = prompts_of_step(run.prompts, cfg.prompts_per_step, step, cfg.seed)[world.rank :: world.size]
        groups = ahead.groups(step, partial(begin_to_score, now, run.scorer, batch))
        # ---- score each response, and compare it with the others of its group
        clock.enter("score")
        sampled = score_and_compare(now, run.scorer, batch, groups)  # of all ranks
        # ---- under --oversample: groups of other prompts in place of those that teach nothing
        more = partial(more_groups, run, now, clock)
        sampled, oversampling = replace_equal_groups(sampled, more, run.prompts, cfg, step)
        # ---- with --distill-failures: what the policy, shown a right answer, makes of the wrong ones beside it
        clock.enter("update")
        taught = teach_failures(now, run.prompts, sampled)
        # ---- update the policy: one optimizer step on everything just sampled (--updates-per-batch: several)
        sums, figures = update(now, taught.groups)
        # ---- hand the new adapter to the sampler, in memory, with proof that it samples from it
        clock.enter("sync")
        identity = hand_over(engine, policy, canary, version=step + 1)
        # ---- validate, every --validate-every steps: greedy answers to held-out puzzles from the same sampler
        validation = validate(run, canary, clock, step)
        # ---- record: metrics.jsonl, rollouts.jsonl, timing.jsonl, and a checkpoint every --save-every steps
        clock.enter("record")
        seconds = world.largest(engine.seconds)
        if log is not None:
            all_rows = [row for group in taught.groups for row in group.rows]
            metrics = step_metrics(step + 1, all_rows, sums, cfg, identity) | oversampling
            metrics |= taught.metrics(sums, cfg) | validation
            log.write(metrics, all_rows, clock, seconds, figures)
        if is_last(run, ahead, now, sampled):
            break
    finish(run)


def begin(run: Run) -> tuple[Canary, Ahead]:
    """Give the sampler the trainer's adapter, with proof, and request the first rollouts. Collective.

    Returns (the text of every later proof; what gives the rollouts of a step).
    """
    first, engine, prompts = run.start, run.engine, run.prompts
    cfg, policy, world = first.cfg, first.policy, first.world
    canary = make_canary(policy, prompts[0].ids[:CANARY_TOKENS], cfg)
    hand_over(engine, policy, canary, version=first.step)

    def ask_batch(step: int) -> None:
        ask(engine, policy, prompts_of_step(prompts, cfg.prompts_per_step, step, cfg.seed), cfg, step)

    ahead = Ahead(engine, ask_batch, cfg.max_staleness, first.step, cfg.steps)
    ahead.restore(run.pending, world.rank, world.size)
    return canary, ahead


def is_last(run: Run, ahead: Ahead, now: Step, sampled: list[ScoredGroup]) -> bool:
    """The end of a step: save a checkpoint where one is due; was it the run's last step? Collective."""
    step, cfg, world = now.step, now.cfg, now.world
    if step == 0 and not cfg.insist:  # a wrong chat template, or no cold start, must not cost days
        refuse_a_useless_start(cfg, now.policy, world, now.out, sampled)
    # requested() is collective: the left side is the same on all ranks, so all of them call it or none does
    last = step + 1 == cfg.steps or run.stop.requested()
    best = run.validator.best
    if last or (step + 1) % cfg.save_every == 0 or best.get("step") == step + 1:
        # unused() waits for what was already asked for: a resumed run then trains on the very same rollouts
        save_training(now, step + 1, ahead.unused(world.gather), now.critic, best)
        run.validator.point_to_best()
    return last


def ask(engine: Engine, policy: Policy, batch: list[Prompt], cfg: OnlineConfig, step: int, part: str = "") -> None:
    """Request G responses to each prompt of a step. Every rank requests all of them, and later collects its own share.

    part: names what is asked beside the step's own batch.
    """
    sampling = Sampling(
        n=cfg.group_size,
        max_tokens=cfg.max_response_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=stable_seed(cfg.seed, "sample", step, *([part] if part else [])),
        stop_ids=policy.chat.stop_ids,
    )
    engine.ask(step, [p.puzzle.id for p in batch], [p.ids for p in batch], sampling, part)


def make_canary(policy: Policy, text: list[int], cfg: TrainingConfig) -> Canary:
    """A text (token ids) and its log-probs under the reference, which never change; hand_over adds the policy's."""
    reference = canary_logprobs(policy, text, reference=True) if policy.lora else None
    # the sampler of SFT has no dtype of its own
    rounds = policy.autocast or getattr(cfg, "sampler_dtype", "") == "bfloat16"
    tolerance = CANARY_TOLERANCE["bfloat16" if rounds else cfg.dtype]
    return Canary(ids=text, policy=[], reference=reference, tolerance=tolerance)


@torch.no_grad()
def canary_logprobs(policy: Policy, text: list[int], reference: bool = False) -> list[float]:
    """[T-1] log-probs of text[1:], each given the tokens before it."""
    # at temperature 1, since vLLM's log-probs of a prompt know no temperature
    return policy.response_logprobs(pack([(text[:1], [text[1:]])], policy.device), reference=reference)[0].tolist()


def hand_over(engine: Engine, policy: Policy, canary: Canary, version: int) -> str:
    """Give the sampler the policy's adapter; returns the adapter's hash. Collective.

    The trainer's log-probs of the canary text go with it: the sampler must give the same. Raises SyncError if it does not.
    """
    if policy.base is not None:
        policy.base.refuse_writes()  # RunError if the weights that both read have been written to
    canary = replace(canary, policy=canary_logprobs(policy, canary.ids))
    engine.deliver(policy.adapter_tensors(), version, canary)
    return engine.hash


def more_groups(run: Run, now: Step, clock: Clock, prompts: list[Prompt], part: str) -> list[ScoredGroup]:
    """Groups of all ranks, beside the step's own batch: sampled, scored and compared in the same way. Collective."""
    world, engine, before = now.world, run.engine, run.engine.seconds
    clock.enter("sample")
    padded = fill_ranks(prompts, world)
    ask(engine, now.policy, padded, now.cfg, now.step, part)
    ours = padded[world.rank :: world.size]
    groups = engine.collect(now.step, part, partial(begin_to_score, now, run.scorer, ours))
    engine.seconds += before  # of the whole step
    clock.enter("score")
    return score_and_compare(now, run.scorer, ours, groups)[: len(prompts)]


def validate(run: Run, canary: Canary, clock: Clock, step: int) -> dict[str, float]:
    """Keys of metrics.jsonl in a step after which --validate is due, else {}. step: from 0. Collective."""
    if not run.validator.is_due(step):
        return {}
    clock.enter("validate")
    found = run.validator.metrics(run.engine, step)
    # again, since it empties the sampler's prefix cache: a run that is resumed here has an empty one, and must go on alike
    hand_over(run.engine, run.start.policy, canary, version=step + 1)
    return found


def score_and_compare(now: Step, scorer: Scorer, batch: list[Prompt], groups: list[list[Rollout]]) -> list[ScoredGroup]:
    """The groups of all ranks with rewards and advantages, in prompt order, on every rank. Collective.

    Every rank sees all groups, so that update() can deal them out evenly by cost. batch, groups: this rank's.
    """
    cfg, rollouts = now.cfg, [rollout for group in groups for rollout in group]
    rewards = score(now, scorer, batch, rollouts)
    advantages, trained = compare(rewards, cfg)  # [N], [N]
    rows = rollout_rows(now.step + 1, now.policy.chat, rollouts, rewards, advantages, cfg.group_size)
    return now.world.gather(scored_groups(groups, rows, advantages, trained))


def begin_to_score(now: Step, scorer: Scorer, batch: list[Prompt], place: int, group: list[Rollout]) -> None:
    """Give the workers a group that is whole while others are sampled, unless --score-last. batch: this rank's."""
    for rollout in [] if now.cfg.score_last else group:
        scorer.begin(now.policy.chat.response_text(rollout.response_ids), batch[place].puzzle)


def score(now: Step, scorer: Scorer, batch: list[Prompt], rollouts: list[Rollout]) -> list[Reward]:
    """[N] rewards in row order. Collective.

    Under --on-reward-error stop, the first response that could not be scored, on whatever rank, ends the run on every rank:
    UserError that names it; its text is kept in OUT/reward_failure.json.
    """
    cfg, world = now.cfg, now.world
    texts = [now.policy.chat.response_text(rollout.response_ids) for rollout in rollouts]
    puzzles = [prompt.puzzle for prompt in batch for _ in range(cfg.group_size)]
    stop = cfg.on_reward_error == "stop"
    rewards = scorer.score(texts, puzzles, [r.finish_reason == "length" for r in rollouts], stop_at_failure=stop)
    failed = [i for i, reward in enumerate(rewards) if reward is not None and reward.failed]
    # every rank must learn of a failure on any rank, or the others would wait for it in the next collective
    if not stop or world.largest(float(bool(failed))) == 0:
        return [with_penalty(reward, rollout, cfg) for reward, rollout in zip(rewards, rollouts, strict=True)]
    case = {}
    if failed:
        case = {
            "step": now.step + 1,
            "rank": world.rank,
            "puzzle_id": puzzles[failed[0]].id,
            "response": failed[0] % cfg.group_size + 1,
            "message": rewards[failed[0]].message,
            "completion": texts[failed[0]],
        }
    first = next(case for case in world.gather_in_rank_order(case) if case)
    if world.is_main:
        write_json(now.out / "reward_failure.json", first)
    raise UserError(
        f"step {now.step + 1}: --reward {cfg.reward} failed for puzzle {first['puzzle_id']}, response {first['response']} of "
        f"{cfg.group_size} (rank {first['rank']}; its text is in {now.out / 'reward_failure.json'}): {first['message']}. "
        "Fix the function and --resume, or leave such responses out: --resume --on-reward-error drop"
    )


def with_penalty(reward: Reward, rollout: Rollout, cfg: OnlineConfig) -> Reward:
    """The reward with the soft over-long penalty of --overlong-buffer, which becomes a part of it."""
    if not cfg.overlong_buffer or not reward.scored:
        return reward
    penalty = overlong_penalty(len(rollout.response_ids), cfg.max_response_tokens, cfg.overlong_buffer)
    return replace(reward, total=reward.total + penalty, parts={**reward.parts, "overlong_penalty": penalty})


def compare(rewards: list[Reward], cfg: GrpoConfig) -> tuple[Tensor, Tensor]:
    """([N] advantages within each group, [N] bool: is the response trained on).

    A response that could not be scored takes no part: it is neither trained on nor counted in its group's mean.
    """
    trained = torch.tensor([reward.scored for reward in rewards])  # [N]
    totals = torch.tensor([reward.total for reward in rewards])  # [N], nan where not scored
    group = torch.arange(len(rewards)) // cfg.group_size  # [N]
    advantages = torch.zeros_like(totals)
    if trained.any():
        advantages[trained] = group_advantages(totals[trained], group[trained], cfg.advantage, cfg.advantage_eps)
    return advantages, trained


def update(now: Step, sampled: list[ScoredGroup]) -> tuple[TokenSums, dict[str, float]]:
    """--updates-per-batch optimizer steps over what all ranks sampled. Collective.

    Returns (sums over all trained tokens, for metrics.jsonl; how well packing did, for timing.jsonl).
    """
    cfg, world = now.cfg, now.world
    share = len(sampled) // cfg.updates_per_batch
    parts = [sampled[i * share : (i + 1) * share] for i in range(cfg.updates_per_batch)]  # whole groups
    packed = [step_inputs(now, part, number) for number, part in enumerate(parts, start=1)]
    # all reference and old log-probs, before the first optimizer step changes the policy
    batches = [with_logprobs(now, batch) for batch in packed]
    learner, totals = policy_learner(now), TokenSums()
    for batch in batches:
        sums = TokenSums()
        norm = add_up_gradients(now, learner, batch, sums)  # every term of Eq. (1), for every token
        if cfg.keeps_step(now.step + 1):
            keep_bundle(now, batch, what_to_find_again(now, learner, sums))
        sums.lr = optimizer_step(now, learner, batch, norm)
        totals.take_in(sums)
    plans = [batch.micro_batches for batch in batches]
    return totals.over_ranks(world), packing_figures(plans, parts, now.policy.cost, cfg.micro_tokens, world)


def policy_learner(now: Step) -> Learner:
    """The policy as what the optimizer steps of this step change."""
    # a partial makes no frame of its own: in a debugger `return` goes from loss_terms to the backward pass
    return Learner(
        optimizer=now.optimizer,
        parameters=now.policy.trainable(),
        lr=now.cfg.lr,
        terms=partial(loss_terms, now.policy, cfg=now.cfg),
    )


def add_up_gradients(now: Step, learner: Learner, batch: StepInputs, sums: TokenSums) -> Tensor:
    """The gradient of a batch's loss over all ranks, in .grad; its terms are added to sums. Returns its norm. Collective.

    Raises FloatingPointError, leaving a bundle, when a term or the gradient is not finite on any rank.
    """
    passes = []
    for micro in now.world.paced(batch.micro_batches):
        terms = learner.terms(micro, batch.denominators)
        loss = terms.loss  # this micro-batch's share of the step's loss
        loss.backward()  # gradients add up in .grad
        sums.add(terms, loss)
        passes.append((micro, without_graph(terms)))
    norm = sum_gradients(list(learner.parameters.values()), now.world)
    with now.world.waiting("the sum of gradients"):
        sums.read()  # only now is a number read, which waits for the GPU: it never idles between two micro-batches
    refuse_what_is_not_finite(now, learner, batch, first_bad_of(passes), norm)
    sums.grad_norm = float(norm)  # before clipping
    return norm


def step_inputs(now: Step, groups: list[ScoredGroup], number: int) -> StepInputs:
    """This rank's micro-batches of optimizer step `number` (from 1) of a batch, and what all ranks' are divided by. Collective.

    Groups are dealt to ranks by what they cost to train on, whoever sampled them.
    """
    ours, micros = pack_our_share(now, groups)
    return StepInputs(
        update=number,
        micro_batches=micros,
        denominators=count_trained(micros, now.world),
        responses=[row for i in ours for row in groups[i].rows],
    )


def pack_our_share(now: Step, groups: list[ScoredGroup]) -> tuple[list[int], list[MicroBatch]]:
    """(places in `groups` of those that this rank trains on, their micro-batches). Collective where the model is sharded."""
    cfg, policy, world = now.cfg, now.policy, now.world
    ours = balance([policy.cost.of(*group.size) for group in groups], world.size)[world.rank]
    sharing = cfg.packing == "shared" and not policy.cannot_share
    return ours, micro_batches(
        [groups[i] for i in ours],
        cfg.micro_tokens,
        world.device,
        sharing,
        in_step_with=world if policy.sharded else None,
    )


def with_logprobs(now: Step, batch: StepInputs) -> StepInputs:
    """The batch with reference and old log-probs. Collective where the model is sharded."""
    micros = [
        replace(
            micro,
            ref_logprobs=reference_logprobs(now.policy, micro, now.cfg),
            old_logprobs=logprobs_before_update(now.policy, micro, now.cfg),
        )
        for micro in now.world.paced(batch.micro_batches)
    ]
    return replace(batch, micro_batches=micros)


def loss_terms(policy: Policy, micro: MicroBatch, denominators: Denominators, cfg: OnlineConfig) -> LossTerms:
    """Forward one micro-batch and name every term of its loss, [N,T] each. A breakpoint here sees everything."""
    logprobs, entropy = policy.logprobs_and_entropy(micro.packed, cfg.temperature, cfg.entropy)
    return replace(terms_of(logprobs, micro, denominators, cfg), entropy=entropy)


def terms_of(logprobs: Tensor, micro: MicroBatch, denominators: Denominators, cfg: OnlineConfig) -> LossTerms:
    """The objective that the settings ask for, applied to the policy's log-probs [N,T]."""
    weight = aggregation_weights(
        micro.mask,
        cfg.aggregation,
        n_rows=denominators.n_rows,
        n_tokens=denominators.n_tokens,
        norm=cfg.max_response_tokens,  # constant over the run
        dtype=logprobs.dtype,  # float64 in the ledger
    )
    terms = grpo_terms(
        logprobs=logprobs,
        old_logprobs=micro.old_logprobs,
        ref_logprobs=micro.ref_logprobs,
        sampler_logprobs=micro.sampler_logprobs,
        mask=micro.mask,
        advantages=micro.advantages,
        weight=weight,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip,
        beta=cfg.loss_beta,
        kl_kind=cfg.kl_kind,
        ratio_level=cfg.ratio_level,
        correction=cfg.correction,
        correction_cap=cfg.correction_cap,
        correction_floor=cfg.correction_floor,
        surrogate=cfg.surrogate,
    )
    return with_distillation(terms, micro)


def reference_logprobs(policy: Policy, micro: MicroBatch, cfg: OnlineConfig) -> Tensor | None:
    """[N,T] log-probs of the reference policy (adapter off). None when beta is 0: then no pass is made."""
    return policy.response_logprobs(micro.packed, cfg.temperature, reference=True) if cfg.beta else None


@torch.no_grad()
def logprobs_before_update(policy: Policy, micro: MicroBatch, cfg: OnlineConfig) -> Tensor | None:
    """[N,T] log-probs of the policy as it is now, before the batch's first optimizer step.

    None when a batch gets one step only: then old = stop_gradient(new), the ratio is exactly 1, and no extra pass is made.
    """
    return None if cfg.updates_per_batch == 1 else policy.response_logprobs(micro.packed, cfg.temperature)


def sum_gradients(parameters: list[torch.nn.Parameter], world: World) -> Tensor:
    """Sum .grad over the ranks; returns the norm of the whole gradient (a scalar tensor). Collective."""
    world.sum_gradients(parameters)
    # a sharded gradient has the norm of this rank's rows only; full_tensor makes it that of all ranks' rows
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters]))


def refuse_what_is_not_finite(
    now: Step, learner: Learner, batch: StepInputs, found: Found | None, norm: Tensor
) -> None:
    """Raises FloatingPointError, leaving a bundle, when a term or the gradient is not finite on any rank. Collective.

    found: this rank's first bad term. norm: of the gradient over all ranks.
    """
    policy, world = now.policy, now.world
    bad_term = world.largest(float(found is not None)) > 0  # sync point: all ranks raise, or none
    if not bad_term and torch.isfinite(norm):  # norm is of the sum: the same on all ranks
        return
    if not bad_term and not policy.sharded:  # one rank alone cannot run sharded layers
        terms_of = partial(learner.terms, denominators=batch.denominators)
        found = find_bad_gradient(batch.micro_batches, terms_of, list(learner.parameters.values()))
    sentences = world.gather_in_rank_order(describe_bad_token(found, batch.responses, world.rank))
    what_else = (
        "; under --shard fsdp the replay looks for the token"
        if policy.sharded
        else ", although each token's own share of it is"
    )
    sentence = next((text for text in sentences if text), f"the gradient or its norm is not finite{what_else}")
    bundle = keep_bundle(now, batch, {}, sentence)
    raise FloatingPointError(
        f"step {now.step + 1}, update {batch.update}: {sentence}. This update was not made; look with "
        f"python launch/replay.py {bundle}"
    )


def keep_bundle(now: Step, batch: StepInputs, recorded: dict[str, Any], problem: str | None = None) -> Path:
    """Write the step to OUT/steps. Returns its folder. Collective.

    recorded: of what_to_find_again. problem: why the step was refused.
    """
    record = StepRecord(
        step=now.step + 1,
        config=now.cfg,
        adapter=now.policy.adapter_tensors(),
        critic=now.critic.weights() if now.critic else {},
        recorded=recorded,
        problem=problem,
    )
    return write_bundle(now.out, record, batch, now.world)


def what_to_find_again(now: Step, learner: Learner, sums: TokenSums) -> dict[str, Any]:
    """What a replay must find again, bit for bit, of the gradient in .grad. sums: this rank's. Collective."""
    loss, pg_loss = now.world.total(sums.sums["loss"], sums.sums["pg_loss"])
    gradient_hash = adapter_hash({name: full_tensor(p.grad) for name, p in learner.parameters.items()})
    return {"loss": loss, "pg_loss": pg_loss, "grad_norm": sums.grad_norm, "gradient_hash": gradient_hash}


def clip_gradients(parameters: list[torch.nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale .grad in place so that its norm is at most `largest`. norm: what sum_gradients gave."""
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)  # 1e-6: a gradient of 0 is no division by 0
    torch._foreach_mul_([local_shard(p.grad) for p in parameters], scale)


def optimizer_step(now: Step, learner: Learner, batch: StepInputs, norm: Tensor) -> float:
    """Clip the gradient, then AdamW at the step's learning rate, which is returned: linear warm-up, constant, decay."""
    clip_gradients(list(learner.parameters.values()), norm, now.cfg.grad_clip)
    lr = 0.0
    if batch.denominators.n_tokens:  # else no response of the batch was scored, so there is nothing to learn
        # both count sampled batches: all updates of a batch (--updates-per-batch) have the same rate
        warm = (now.step + 1) / max(now.cfg.warmup_steps, 1)
        cool = (now.cfg.steps - now.step) / max(min(now.cfg.decay_steps, now.cfg.steps), 1)
        lr = learner.lr * min(1.0, warm, cool)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)  # while the sampler works, their memory is its own
    return lr
