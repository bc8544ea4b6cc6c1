"""GRPO, one step after another, read top to bottom in `train`.

    torchrun --nproc-per-node 2 launch/grpo.py --recipe demo
    python -m pdb launch/grpo.py --recipe demo             # one process, stops anywhere

What is not here: a critic, a replay of old batches, any callback. P prompts and G responses a step, N = P * G rows;
every rank trains and samples whole groups, so advantages need no communication; gradients are summed over ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.errors import UserError
from data.puzzles import Puzzle
from reward import Reward
from reward.scoring import Scorer
from rollout import Ahead, Engine, Rollout, Sampling, stable_seed
from rollout.sync import Canary, adapter_hash
from trainer.advantages import group_advantages
from trainer.config import GrpoConfig
from trainer.metrics import Clock, StepLog, TokenSums, rollout_rows, step_metrics
from trainer.objective import LossTerms, aggregation_weights, grpo_terms
from trainer.packing import MicroBatch, ScoredGroup, balance, micro_batches, pack, packing_figures, scored_groups
from trainer.policy import Policy, Prompt, prompts_of_step
from trainer.ranks.world import StopRequest, World, guarded, join_world, leave_world, local, whole
from trainer.record.bundle import StepInputs, write_bundle
from trainer.record.nonfinite import BadToken, describe, find_bad_gradient, first_bad_token
from trainer.record.runfolder import check_run, list_checkpoints, open_run, restore_training, save_training, write_json
from trainer.start.parts import encode_prompts, load_policy, make_engine, make_optimizer
from trainer.start.sampler import keep

CANARY_TOKENS = 16
CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest mean |log-prob difference| in nats between sampler and trainer on the canary text."""


def train(cfg: GrpoConfig, puzzles: list[Puzzle]) -> Path:
    """Train a LoRA adapter with GRPO; returns the run folder. Called by every rank of the launch.

    Raises UserError for settings or data the user must change and for a reward that fails under --on-reward-error stop,
    FloatingPointError before an optimizer step that would not be finite, RunError when a rank, a sampler or a hand-over fails.
    """
    world = join_world(cfg.ranks_apart, cfg.hang_seconds)
    with guarded(world):
        if world.sampler is not None:
            keep(cfg, world)
        else:
            train_rank(cfg, puzzles, world)
    leave_world()
    return Path(cfg.out)


def train_rank(cfg: GrpoConfig, puzzles: list[Puzzle], world: World) -> None:
    """The whole work of a rank that trains."""
    check_run(cfg)
    stop = StopRequest(world)
    policy = load_policy(cfg, world.device, cfg.shard == "fsdp")
    prompts = encode_prompts(policy, puzzles, cfg, world)
    scorer = Scorer(cfg.reward, cfg.reward_workers, cfg.reward_seconds, on_reply=world.advance)
    out = open_run(cfg, world)
    parameters = list(policy.trainable().values())
    optimizer = make_optimizer(cfg, parameters)
    first_step, pending = restore_training(out, policy, optimizer, world) if cfg.resume else (0, {})
    engine = make_engine(cfg, policy, world)
    canary = make_canary(policy, prompts[0].ids[:CANARY_TOKENS], cfg)
    hand_over(engine, policy, canary, version=first_step)
    ahead = Ahead(engine, lambda step: ask(engine, prompts, cfg, step), cfg.max_staleness, first_step, cfg.steps)
    ahead.restore(pending, world.rank, world.size)
    log = StepLog(out, cfg, first_step) if world.is_main else None

    for step in range(first_step, cfg.steps):
        clock = Clock(world, step + 1)
        # ---- sample: G responses to each of this rank's prompts (asked for --max-staleness steps ago)
        clock.enter("sample")
        batch = prompts_of_step(prompts, cfg.prompts_per_step, step, cfg.seed)[world.rank :: world.size]
        groups = ahead.groups(step)
        rollouts = [rollout for group in groups for rollout in group]
        # ---- score, and compare within each group
        clock.enter("score")
        rewards = score(scorer, policy, batch, rollouts, cfg, step, out, world)
        advantages, trained = compare(rewards, cfg)  # [N], [N]
        # ---- update: usually one optimizer step on everything just sampled
        clock.enter("update")
        rows = rollout_rows(step + 1, policy.tokenizer, rollouts, rewards, advantages, cfg.group_size)
        sampled = world.gather(scored_groups(groups, rows, advantages, trained))  # of all ranks, in prompt order
        sums, figures = update(policy, optimizer, sampled, cfg, step, out, world)
        # ---- hand the new adapter to the sampler
        clock.enter("sync")
        identity = hand_over(engine, policy, canary, version=step + 1)
        # ---- record
        clock.enter("record")
        if log is not None:
            rows = [row for group in sampled for row in group.rows]
            log.write(step_metrics(step + 1, rows, sums, cfg, identity), rows, clock, engine.seconds, figures)
        last = step + 1 == cfg.steps or stop.requested()
        if last or (step + 1) % cfg.save_every == 0:
            save_training(out, policy, optimizer, step + 1, cfg, world, ahead.unused(world.gather))
        if last:
            break

    if log is not None:
        log.close()
        if list_checkpoints(out)[-1].name == f"step-{cfg.steps:06d}":
            write_json(out / "finished.json", {"steps": cfg.steps})
    scorer.close()
    engine.close()


def ask(engine: Engine, prompts: list[Prompt], cfg: GrpoConfig, step: int) -> None:
    """Ask for G responses to each prompt of a step; every rank asks for all of them, and collects its own."""
    batch = prompts_of_step(prompts, cfg.prompts_per_step, step, cfg.seed)
    sampling = Sampling(
        n=cfg.group_size,
        max_tokens=cfg.max_response_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=stable_seed(cfg.seed, "sample", step),
    )
    engine.ask(step, [p.puzzle.id for p in batch], [p.ids for p in batch], sampling)


def make_canary(policy: Policy, text: list[int], cfg: GrpoConfig) -> Canary:
    """A fixed text with the reference's log-probs, which never change; the policy's are filled in at every hand-over."""
    reference = canary_logprobs(policy, text, reference=True) if policy.lora else None
    return Canary(ids=text, policy=[], reference=reference, tolerance=CANARY_TOLERANCE[cfg.compute_dtype])


@torch.no_grad()
def canary_logprobs(policy: Policy, text: list[int], reference: bool = False) -> list[float]:
    """[T-1] log-probs of text[1:]."""
    return policy.response_logprobs(pack([(text[:1], [text[1:]])], policy.device), reference=reference)[0].tolist()


def hand_over(engine: Engine, policy: Policy, canary: Canary, version: int) -> str:
    """Give the sampler the policy's adapter, with the trainer's log-probs of the canary as proof; returns its hash."""
    canary = replace(canary, policy=canary_logprobs(policy, canary.ids))
    engine.deliver(policy.adapter_tensors(), version, canary)
    return engine.hash


def score(
    scorer: Scorer,
    policy: Policy,
    batch: list[Prompt],
    rollouts: list[Rollout],
    cfg: GrpoConfig,
    step: int,
    out: Path,
    world: World,
) -> list[Reward]:
    """[N] rewards in row order. Special tokens (end of turn) are not part of the text. Collective.

    Under --on-reward-error stop the first response that could not be scored, on whatever rank, ends the run on every rank:
    ValueError that names it; its text stays in OUT/reward_failure.json.
    """
    texts = policy.tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    puzzles = [prompt.puzzle for prompt in batch for _ in range(cfg.group_size)]
    stop = cfg.on_reward_error == "stop"
    rewards = scorer.score(texts, puzzles, [r.finish_reason == "length" for r in rollouts], stop_at_failure=stop)
    failed = [i for i, reward in enumerate(rewards) if reward is not None and reward.failed]
    if not stop or world.largest(float(bool(failed))) == 0:
        return rewards
    case = (
        {}
        if not failed
        else {
            "step": step + 1,
            "rank": world.rank,
            "puzzle_id": puzzles[failed[0]].id,
            "response": failed[0] % cfg.group_size + 1,
            "message": rewards[failed[0]].message,
            "completion": texts[failed[0]],
        }
    )
    first = next(case for case in world.gather_in_rank_order(case) if case)
    if world.is_main:
        write_json(out / "reward_failure.json", first)
    raise UserError(
        f"step {step + 1}: --reward {cfg.reward} failed for puzzle {first['puzzle_id']}, response {first['response']} of "
        f"{cfg.group_size} (rank {first['rank']}; its text is in {out / 'reward_failure.json'}): {first['message']}. "
        "Mend the function and --resume, or leave such responses out: --resume --on-reward-error drop"
    )


def compare(rewards: list[Reward], cfg: GrpoConfig) -> tuple[Tensor, Tensor]:
    """([N] advantages within each group, [N] bool: is the response trained on). One that was not scored takes no part."""
    trained = torch.tensor([reward.scored for reward in rewards])
    totals = torch.tensor([reward.total for reward in rewards])
    group = torch.arange(len(rewards)) // cfg.group_size
    advantages = torch.zeros_like(totals)
    if trained.any():
        advantages[trained] = group_advantages(totals[trained], group[trained], cfg.advantage, cfg.advantage_eps)
    return advantages, trained


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    sampled: list[ScoredGroup],
    cfg: GrpoConfig,
    step: int,
    out: Path,
    world: World,
) -> tuple[TokenSums, dict[str, float]]:
    """--updates-per-batch optimizer steps over what all ranks sampled; returns what the step's metrics are made of.

    Groups are dealt to ranks by what they cost to train on, whoever sampled them.
    """
    share = len(sampled) // cfg.updates_per_batch
    parts = [sampled[i * share : (i + 1) * share] for i in range(cfg.updates_per_batch)]
    dealt = [balance([policy.cost.of(*group.size) for group in part], world.size) for part in parts]
    ours = [[part[i] for i in ranks[world.rank]] for part, ranks in zip(parts, dealt, strict=True)]
    sharing = cfg.packing == "shared" and not policy.cannot_share
    plans = [micro_batches(groups, cfg.micro_tokens, world.device, sharing) for groups in ours]
    passes = [int(world.largest(len(plan))) if policy.sharded else len(plan) for plan in plans]
    missing = sum(passes) - sum(map(len, plans))
    references = [[reference_logprobs(policy, micro, cfg) for micro in plan] for plan in plans]
    keep_pace(policy, missing if cfg.beta else 0, reference=True)
    world.advance()
    # one step per batch: old = stop_gradient(new), and no extra pass; else before the first step changes the weights
    on_policy = cfg.updates_per_batch == 1
    olds = [[None if on_policy else no_grad_logprobs(policy, micro, cfg) for micro in plan] for plan in plans]
    keep_pace(policy, 0 if on_policy else missing)
    world.advance()
    sums = TokenSums()
    for number, groups in enumerate(ours):
        inputs = StepInputs(
            plan=plans[number],
            references=references[number],
            olds=olds[number],
            responses=[row for group in groups for row in group.rows],
        )
        # the denominators, over all ranks, before the first micro-batch
        counts = count_trained(inputs.plan, world)
        optimizer.zero_grad(set_to_none=True)
        own = TokenSums()
        problem = accumulate(policy, inputs, counts, cfg, own, passes=passes[number], advance=world.advance)
        finish_gradient(policy, inputs, counts, problem, cfg, own, step, number, out, world)
        if counts[1]:
            optimizer_step(optimizer, cfg, step, own)
        sums.take_in(own)
    return sums.over_ranks(world), packing_figures(plans, parts, policy.cost, cfg.micro_tokens, world)


def count_trained(plan: list[MicroBatch], world: World) -> tuple[float, float]:
    """(rows with a trained token, trained tokens) of the whole optimizer step. Collective."""
    n_rows, n_tokens = world.total(sum(int(m.mask.any(-1).sum()) for m in plan), sum(int(m.mask.sum()) for m in plan))
    return n_rows, n_tokens


def accumulate(
    policy: Policy,
    inputs: StepInputs,
    counts: tuple[float, float],
    cfg: GrpoConfig,
    sums: TokenSums,
    keep: list[LossTerms] | None = None,
    passes: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> tuple[int, BadToken] | None:
    """Forward and backward over a rank's micro-batches; gradients add up in .grad, numbers in `sums`.

    Stops at the first term that is not finite and returns (micro-batch, token). keep: a list that collects the terms.
    passes: the most micro-batches of any rank, where the layers are sharded; then nothing stops early.
    """
    found = None
    for number in range(len(inputs.plan)):
        terms = loss_terms(policy, *inputs.of(number), counts, cfg)
        bad = first_bad_token(terms)
        if bad is not None:
            found = found or (number, bad)
            if not policy.sharded:
                return found
        loss = terms.loss
        loss.backward()
        sums.add(terms, loss)
        advance()
        if keep is not None:
            keep.append(terms)
    for _ in range(passes - len(inputs.plan)):
        policy.idle_pass()
    return found


@torch.no_grad()
def keep_pace(policy: Policy, missing: int, reference: bool = False) -> None:
    """The passes without gradient that a rank with more micro-batches makes and this one does not need."""
    for _ in range(missing):
        policy.idle_pass(reference)


def loss_terms(
    policy: Policy,
    micro: MicroBatch,
    ref_logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    counts: tuple[float, float],
    cfg: GrpoConfig,
) -> LossTerms:
    """Forward one micro-batch and name every term of its loss. A breakpoint here sees everything."""
    found = policy.response_logprobs(micro.packed, cfg.temperature, entropy=cfg.entropy)
    logprobs, entropy = found if cfg.entropy else (found, None)  # [N,T]
    return replace(terms_of(logprobs, micro, ref_logprobs, old_logprobs, counts, cfg), entropy=entropy)


def terms_of(
    logprobs: Tensor,
    micro: MicroBatch,
    ref_logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    counts: tuple[float, float],
    cfg: GrpoConfig,
) -> LossTerms:
    """The settings, applied to log-probs [N,T]."""
    weight = aggregation_weights(
        micro.mask, cfg.aggregation, *counts, norm=cfg.max_response_tokens, dtype=logprobs.dtype
    )
    return grpo_terms(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
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


@torch.no_grad()
def no_grad_logprobs(policy: Policy, micro: MicroBatch, cfg: GrpoConfig) -> Tensor:
    """[N,T] log-probs of the policy as it is now."""
    return policy.response_logprobs(micro.packed, cfg.temperature)


def reference_logprobs(policy: Policy, micro: MicroBatch, cfg: GrpoConfig) -> Tensor | None:
    """[N,T] log-probs of the reference (adapter off); no pass is made when beta is 0."""
    return policy.response_logprobs(micro.packed, cfg.temperature, reference=True) if cfg.beta else None


def finish_gradient(
    policy: Policy,
    inputs: StepInputs,
    counts: tuple[float, float],
    problem: tuple[int, BadToken] | None,
    cfg: GrpoConfig,
    sums: TokenSums,
    step: int,
    number: int,
    out: Path,
    world: World,
) -> None:
    """Sum gradients over ranks, write the step's bundle when asked for, clip. Collective.

    Raises FloatingPointError, leaving a bundle, when a term or the gradient is not finite on any rank.
    """
    parameters = list(policy.trainable().values())
    recorded: dict = {}
    failed = world.largest(float(problem is not None)) > 0
    if not failed:
        world.sum_gradients(parameters)
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        sums.grad_norm = float(norm)
        failed = not torch.isfinite(norm)
        if failed and not policy.sharded:  # one rank alone cannot run sharded layers: the replay finds the token
            problem = find_bad_gradient(
                lambda n: loss_terms(policy, *inputs.of(n), counts, cfg), len(inputs.plan), parameters
            )
    if failed or cfg.keeps_step(step + 1):
        if not failed:
            loss, pg_loss = world.total(sums.sums["loss"], sums.sums["pg_loss"])
            gradients = {name: whole(p.grad) for name, p in policy.trainable().items()}
            recorded = {
                "loss": loss,
                "pg_loss": pg_loss,
                "grad_norm": sums.grad_norm,
                "gradient_hash": adapter_hash(gradients),
            }
        found = [text for text in world.gather_in_rank_order(describe(problem, inputs, world.rank)) if text]
        in_sum = "the gradient or its norm is not finite, although each token's own share of it is"
        sentence = (found or [in_sum])[0] if failed else None
        bundle = write_bundle(
            out,
            step=step + 1,
            update=number + 1,
            config=cfg,
            inputs=inputs,
            adapter=policy.adapter_tensors(),
            counts=counts,
            recorded=recorded,
            problem=sentence,
            world=world,
        )
        if failed:
            raise FloatingPointError(
                f"step {step + 1}, update {number + 1}: {sentence}. This update was not made; look with "
                f"python launch/replay.py {bundle}"
            )
    scale = torch.clamp(cfg.grad_clip / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(p.grad) for p in parameters], scale)


def optimizer_step(optimizer: torch.optim.Optimizer, cfg: GrpoConfig, step: int, sums: TokenSums) -> None:
    """Warm-up, then AdamW."""
    sums.lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = sums.lr
    optimizer.step()
