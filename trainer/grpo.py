"""GRPO (Group Relative Policy Optimization, arXiv:2402.03300) as Cell-o1 uses it (arXiv:2506.02911, Eq. 1).

    torchrun --nproc-per-node 2 launch/grpo.py --recipe demo
    python -m pdb launch/grpo.py --recipe demo             # one process, stops anywhere

Read `train_rank` first: its loop is the algorithm. Then `update`: one optimizer step. There is no critic, no
replay of old batches, no callback.

Axes: P prompts of a step, G responses per prompt, N = P * G rows (one per response), T tokens of the longest response.
Every rank samples whole groups, so advantages need no communication between ranks; gradients are summed over the ranks.
"Collective" in a docstring means that all ranks must make the call, in the same order, or the others wait for ever.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.errors import UserError
from data.prompts import RESPONSE_LAYOUT
from data.puzzles import Puzzle
from reward import Reward
from reward.result import nothing_usable
from reward.scoring import Scorer
from rollout import Ahead, Engine, Rollout, Sampling, stable_seed
from rollout.sync import Canary, adapter_hash
from trainer.advantages import group_advantages
from trainer.config import GrpoConfig
from trainer.metrics import Clock, StepLog, TokenSums, rollout_rows, step_metrics
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
from trainer.policy import Policy, Prompt, prompts_of_step
from trainer.ranks.world import StopRequest, World, full_tensor, guarded, join_world, leave_world, local_shard
from trainer.record.bundle import StepInputs, StepRecord, write_bundle
from trainer.record.nonfinite import Found, bad_term_of, describe_bad_token, find_bad_gradient
from trainer.record.runfolder import (
    check_run,
    open_run,
    restore_training,
    save_training,
    steps_saved,
    with_date,
    write_json,
)
from trainer.start.parts import encode_prompts, load_policy, make_engine, make_optimizer
from trainer.start.sampler import keep_sampler

CANARY_TOKENS = 16  # of the run's first prompt
CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest accepted mean |log-prob difference|, in nats per token, between sampler and trainer on the canary text."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the functions of an optimizer step share. Nothing here is replaced while it runs."""

    step: int
    """From 0; files, messages and metrics count from 1."""
    cfg: GrpoConfig
    policy: Policy
    optimizer: torch.optim.Optimizer
    world: World
    out: Path
    """The run folder."""


def train(cfg: GrpoConfig, puzzles: list[Puzzle]) -> Path:
    """Train a LoRA adapter with GRPO; returns the run folder. Every rank of the launch calls this.

    Raises UserError for settings or data that the user must change, and when the reward function fails under
    --on-reward-error stop; FloatingPointError before an optimizer step that would not be finite; RunError when a rank, a
    sampler or a hand-over of the adapter fails.
    """
    world = join_world(cfg.ranks_apart, cfg.hang_seconds)
    with guarded(world):
        if world.sampler is not None:
            keep_sampler(cfg, world)
        else:
            train_rank(cfg, puzzles, world)
    leave_world()  # not in a finally: after an error the ranks cannot meet any more
    return Path(cfg.out)


def train_rank(cfg: GrpoConfig, puzzles: list[Puzzle], world: World) -> None:
    """All the work of a rank that trains: prepare, then the loop over steps."""
    check_run(cfg)  # before a model is loaded
    cfg = with_date(cfg, world)
    stop = StopRequest(world)  # SIGTERM from now on means: finish the step, save, exit 0
    policy = load_policy(cfg, world.device, cfg.shard == "fsdp")
    prompts = encode_prompts(policy, puzzles, cfg, world)
    scorer = Scorer(cfg.reward, cfg.reward_workers, cfg.reward_seconds, on_reply=world.advance)
    out = open_run(cfg, world)  # only now: settings and data are checked
    parameters = list(policy.trainable().values())
    optimizer = make_optimizer(cfg, parameters)
    first_step, pending = restore_training(out, policy, optimizer, world) if cfg.resume else (0, {})
    engine = make_engine(cfg, policy, world)
    canary = make_canary(policy, prompts[0].ids[:CANARY_TOKENS], cfg)
    hand_over(engine, policy, canary, version=first_step)  # the sampler starts from the trainer's adapter, proven
    ahead = Ahead(
        engine, lambda step: ask(engine, policy, prompts, cfg, step), cfg.max_staleness, first_step, cfg.steps
    )
    ahead.restore(pending, world.rank, world.size)
    log = StepLog(out, cfg, first_step) if world.is_main else None

    for step in range(first_step, cfg.steps):
        clock = Clock(world, step + 1)
        now = Step(step=step, cfg=cfg, policy=policy, optimizer=optimizer, world=world, out=out)
        # ---- sample G responses to each of this rank's prompts (they were requested --max-staleness steps ago)
        clock.enter("sample")
        batch = prompts_of_step(prompts, cfg.prompts_per_step, step, cfg.seed)[world.rank :: world.size]
        groups = ahead.groups(step)
        rollouts = [rollout for group in groups for rollout in group]
        # ---- score each response, and compare it with the others of its group
        clock.enter("score")
        rewards = score(now, scorer, batch, rollouts)
        advantages, trained = compare(rewards, cfg)  # [N], [N]
        # ---- update the policy: one optimizer step on everything just sampled (--updates-per-batch: several)
        clock.enter("update")
        rows = rollout_rows(step + 1, policy.chat, rollouts, rewards, advantages, cfg.group_size)
        # every rank sees all groups, in prompt order, so that update() can deal them out evenly by cost
        sampled = world.gather(scored_groups(groups, rows, advantages, trained))
        sums, figures = update(now, sampled)
        # ---- hand the new adapter to the sampler, in memory, with proof that it samples from it
        clock.enter("sync")
        identity = hand_over(engine, policy, canary, version=step + 1)
        # ---- record: metrics.jsonl, rollouts.jsonl, timing.jsonl, and a checkpoint every --save-every steps
        clock.enter("record")
        if log is not None:
            all_rows = [row for group in sampled for row in group.rows]
            metrics = step_metrics(step + 1, all_rows, sums, cfg, identity)
            log.write(metrics, all_rows, clock, engine.seconds, figures)
        if step == 0 and not cfg.insist:  # a wrong chat template, or no cold start, must not cost days
            refuse_a_useless_start(now, sampled)
        # requested() is collective: the left side is the same on all ranks, so all of them call it or none does
        last = step + 1 == cfg.steps or stop.requested()
        if last or (step + 1) % cfg.save_every == 0:
            # unused() waits for what was already asked for: a resumed run then trains on the very same rollouts
            save_training(now, step + 1, ahead.unused(world.gather))
        if last:
            break

    if log is not None:
        log.close()
        if steps_saved(out) == cfg.steps:  # else SIGTERM ended it early
            write_json(out / "finished.json", {"steps": cfg.steps})
    scorer.close()
    engine.close()


def ask(engine: Engine, policy: Policy, prompts: list[Prompt], cfg: GrpoConfig, step: int) -> None:
    """Request G responses to each prompt of a step. Every rank requests all of them, and later collects its own share."""
    batch = prompts_of_step(prompts, cfg.prompts_per_step, step, cfg.seed)
    sampling = Sampling(
        n=cfg.group_size,
        max_tokens=cfg.max_response_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=stable_seed(cfg.seed, "sample", step),
        stop_ids=policy.chat.stop_ids,
    )
    engine.ask(step, [p.puzzle.id for p in batch], [p.ids for p in batch], sampling)


def make_canary(policy: Policy, text: list[int], cfg: GrpoConfig) -> Canary:
    """A fixed text with its log-probs under the reference policy, which never change.

    hand_over fills in the log-probs under the policy, which change with every step. text: token ids.
    """
    reference = canary_logprobs(policy, text, reference=True) if policy.lora else None
    return Canary(ids=text, policy=[], reference=reference, tolerance=CANARY_TOLERANCE[cfg.compute_dtype])


@torch.no_grad()
def canary_logprobs(policy: Policy, text: list[int], reference: bool = False) -> list[float]:
    """[T-1] log-probs of text[1:], each given the tokens before it."""
    # at temperature 1, since vLLM's log-probs of a prompt know no temperature
    return policy.response_logprobs(pack([(text[:1], [text[1:]])], policy.device), reference=reference)[0].tolist()


def hand_over(engine: Engine, policy: Policy, canary: Canary, version: int) -> str:
    """Give the sampler the policy's adapter; returns the adapter's hash. Collective.

    The trainer's log-probs of the canary text go with it: the sampler must give the same. Raises SyncError if it does not.
    """
    canary = replace(canary, policy=canary_logprobs(policy, canary.ids))
    engine.deliver(policy.adapter_tensors(), version, canary)
    return engine.hash


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
        return rewards
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


def refuse_a_useless_start(now: Step, sampled: list[ScoredGroup]) -> None:
    """Raises UserError, with the reasons, when no response of the first step, on any rank, can be learned from. Collective.

    A reward of the user's own may know no layout: that no response has the puzzle's is then said, and the run goes on.
    """
    rows = [row for group in sampled for row in group.rows]  # every rank has all rows
    problem, chat = nothing_usable(rows), now.policy.chat
    prompt = now.policy.tokenizer.decode(sampled[0].rollouts[0].prompt_ids[-16:])
    asked = f"The prompt ends in {prompt[-40:]!r}" + "".join(f", and {note}" for note in chat.notes)
    now.world.largest(0.0)  # rank 0 has written them before any rank ends the run
    if problem:
        scored = any(row["reward"] is not None for row in rows)
        hint = "Is the cold start missing (launch/sft.py), or is --max-response-tokens too small?"
        raise UserError(
            f"step 1: {problem}; all are in {now.out / 'rollouts.jsonl'}. {asked}. "
            f"{hint if scored else f'Does --reward {now.cfg.reward} score such responses?'} To go on all the same: "
            "--resume --insist"
        )
    if now.world.is_main and not any(RESPONSE_LAYOUT.fullmatch(row["completion"]) for row in rows):
        print(
            f"note: none of the {len(rows)} responses of step 1 has the layout <think>...</think> <answer>...</answer> that "
            f"the prompt asks for and launch/evaluate.py reads, although --reward {now.cfg.reward} scored them. {asked}",
            flush=True,
        )


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
    cfg, policy, world = now.cfg, now.policy, now.world
    parameters = list(policy.trainable().values())
    share = len(sampled) // cfg.updates_per_batch
    parts = [sampled[i * share : (i + 1) * share] for i in range(cfg.updates_per_batch)]  # whole groups
    # all reference and old log-probs, before the first optimizer step changes the policy
    batches = [prepare_batch(now, part, number) for number, part in enumerate(parts, start=1)]
    totals = TokenSums()
    for batch in batches:
        now.optimizer.zero_grad(set_to_none=True)  # None frees the memory until the first backward pass
        sums, found = TokenSums(), None
        for micro in world.paced(batch.micro_batches):
            terms = loss_terms(policy, micro, batch.denominators, cfg)  # every term of Eq. (1), for every token
            loss = terms.loss  # this micro-batch's share of the step's loss
            loss.backward()  # gradients add up in .grad
            sums.add(terms, loss)  # its numbers are read here: waits for the GPU
            found = found or bad_term_of(micro, terms)  # keeps the first
        norm = sum_gradients(parameters, world)
        refuse_what_is_not_finite(now, batch, found, norm)
        sums.grad_norm = float(norm)  # before clipping
        if cfg.keeps_step(now.step + 1):
            keep_bundle(now, batch, sums)
        clip_gradients(parameters, norm, cfg.grad_clip)
        if batch.denominators.n_tokens:  # 0: no response of the batch was scored, so there is nothing to learn
            sums.lr = optimizer_step(now)
        totals.take_in(sums)
    plans = [batch.micro_batches for batch in batches]
    return totals.over_ranks(world), packing_figures(plans, parts, policy.cost, cfg.micro_tokens, world)


def prepare_batch(now: Step, groups: list[ScoredGroup], number: int) -> StepInputs:
    """This rank's micro-batches of an optimizer step, with their reference and old log-probs. number: from 1. Collective.

    Groups are dealt to ranks by what they cost to train on, whoever sampled them.
    """
    cfg, policy, world = now.cfg, now.policy, now.world
    dealt = balance([policy.cost.of(*group.size) for group in groups], world.size)
    ours = [groups[i] for i in dealt[world.rank]]
    sharing = cfg.packing == "shared" and not policy.cannot_share
    micros = micro_batches(
        ours, cfg.micro_tokens, world.device, sharing, in_step_with=world if policy.sharded else None
    )
    micros = [
        replace(
            micro,
            ref_logprobs=reference_logprobs(policy, micro, cfg),
            old_logprobs=logprobs_before_update(policy, micro, cfg),
        )
        for micro in world.paced(micros)
    ]
    return StepInputs(
        update=number,
        micro_batches=micros,
        denominators=count_trained(micros, world),
        responses=[row for group in ours for row in group.rows],
    )


def loss_terms(policy: Policy, micro: MicroBatch, denominators: Denominators, cfg: GrpoConfig) -> LossTerms:
    """Forward one micro-batch and name every term of its loss, [N,T] each. A breakpoint here sees everything."""
    logprobs, entropy = policy.logprobs_and_entropy(micro.packed, cfg.temperature, cfg.entropy)
    return replace(terms_of(logprobs, micro, denominators, cfg), entropy=entropy)


def terms_of(logprobs: Tensor, micro: MicroBatch, denominators: Denominators, cfg: GrpoConfig) -> LossTerms:
    """The objective that the settings ask for, applied to the policy's log-probs [N,T]."""
    weight = aggregation_weights(
        micro.mask,
        cfg.aggregation,
        n_rows=denominators.n_rows,
        n_tokens=denominators.n_tokens,
        norm=cfg.max_response_tokens,  # constant over the run
        dtype=logprobs.dtype,  # float64 in the ledger
    )
    return grpo_terms(
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
        beta=cfg.beta,
        kl_kind=cfg.kl_kind,
        ratio_level=cfg.ratio_level,
        correction=cfg.correction,
        correction_cap=cfg.correction_cap,
        correction_floor=cfg.correction_floor,
    )


def reference_logprobs(policy: Policy, micro: MicroBatch, cfg: GrpoConfig) -> Tensor | None:
    """[N,T] log-probs of the reference policy (adapter off). None when beta is 0: then no pass is made."""
    return policy.response_logprobs(micro.packed, cfg.temperature, reference=True) if cfg.beta else None


@torch.no_grad()
def logprobs_before_update(policy: Policy, micro: MicroBatch, cfg: GrpoConfig) -> Tensor | None:
    """[N,T] log-probs of the policy as it is now, before the batch's first optimizer step.

    None when a batch gets one step only: then old = stop_gradient(new), the ratio is exactly 1, and no extra pass is made.
    """
    return None if cfg.updates_per_batch == 1 else policy.response_logprobs(micro.packed, cfg.temperature)


def sum_gradients(parameters: list[torch.nn.Parameter], world: World) -> Tensor:
    """Sum .grad over the ranks; returns the norm of the whole gradient (a scalar tensor). Collective."""
    world.sum_gradients(parameters)
    # a sharded gradient has the norm of this rank's rows only; full_tensor makes it that of all ranks' rows
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters]))


def refuse_what_is_not_finite(now: Step, batch: StepInputs, found: Found | None, norm: Tensor) -> None:
    """Raises FloatingPointError, leaving a bundle, when a term or the gradient is not finite on any rank. Collective.

    found: this rank's first bad term. norm: of the gradient over all ranks.
    """
    cfg, policy, world = now.cfg, now.policy, now.world
    bad_term = world.largest(float(found is not None)) > 0  # sync point: all ranks raise, or none
    if not bad_term and torch.isfinite(norm):  # norm is of the sum: the same on all ranks
        return
    if not bad_term and not policy.sharded:  # one rank alone cannot run sharded layers
        parameters = list(policy.trainable().values())
        found = find_bad_gradient(
            batch.micro_batches, lambda micro: loss_terms(policy, micro, batch.denominators, cfg), parameters
        )
    sentences = world.gather_in_rank_order(describe_bad_token(found, batch.responses, world.rank))
    what_else = (
        "; under --shard fsdp the replay looks for the token"
        if policy.sharded
        else ", although each token's own share of it is"
    )
    sentence = next((text for text in sentences if text), f"the gradient or its norm is not finite{what_else}")
    record = StepRecord(step=now.step + 1, config=cfg, adapter=policy.adapter_tensors(), recorded={}, problem=sentence)
    bundle = write_bundle(now.out, record, batch, world)
    raise FloatingPointError(
        f"step {now.step + 1}, update {batch.update}: {sentence}. This update was not made; look with "
        f"python launch/replay.py {bundle}"
    )


def keep_bundle(now: Step, batch: StepInputs, sums: TokenSums) -> None:
    """Write the step to OUT/steps, with what a replay must find again. sums: this rank's. Collective."""
    policy, world = now.policy, now.world
    loss, pg_loss = world.total(sums.sums["loss"], sums.sums["pg_loss"])
    gradient_hash = adapter_hash({name: full_tensor(p.grad) for name, p in policy.trainable().items()})
    recorded = {"loss": loss, "pg_loss": pg_loss, "grad_norm": sums.grad_norm, "gradient_hash": gradient_hash}
    record = StepRecord(
        step=now.step + 1, config=now.cfg, adapter=policy.adapter_tensors(), recorded=recorded, problem=None
    )
    write_bundle(now.out, record, batch, world)


def clip_gradients(parameters: list[torch.nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scale .grad in place so that its norm is at most `largest`. norm: what sum_gradients gave."""
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)  # 1e-6: a gradient of 0 is no division by 0
    torch._foreach_mul_([local_shard(p.grad) for p in parameters], scale)


def optimizer_step(now: Step) -> float:
    """AdamW at the step's learning rate, which is returned: linear warm-up, then constant."""
    # warm-up counts sampled batches: all updates of a batch (--updates-per-batch) have the same rate
    lr = now.cfg.lr * min(1.0, (now.step + 1) / max(now.cfg.warmup_steps, 1))
    for group in now.optimizer.param_groups:
        group["lr"] = lr
    now.optimizer.step()
    return lr
