"""GRPO, one step after another, read top to bottom in `train`.

    torchrun --nproc-per-node 2 launch/grpo.py --recipe launch/recipes/demo.yaml
    python -m pdb launch/grpo.py --engine torch            # one process, stops anywhere

What is not here: a critic, a replay of old batches, any callback. P prompts and G responses a step, N = P * G rows;
every rank trains and samples whole groups, so advantages need no communication; gradients are summed over ranks.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.puzzles import Puzzle
from reward import Reward, RewardFn, score_completions
from rollout import Engine, Rollout, Sampling, stable_seed
from rollout.sync import sync_adapter
from trainer.advantages import group_advantages
from trainer.batching import MicroBatch, micro_batches, prompts_of_step
from trainer.config import GrpoConfig
from trainer.metrics import TokenSums, rollout_rows, step_metrics
from trainer.objective import LossTerms, aggregation_weights, grpo_terms
from trainer.policy import Policy, encode_prompt
from trainer.runfolder import (
    append_jsonl,
    check_run,
    list_checkpoints,
    load_checkpoint,
    open_run,
    rewind,
    save_checkpoint,
    write_json,
)
from trainer.world import World, join_world, leave_world


@dataclass(frozen=True, kw_only=True)
class Prompt:
    puzzle: Puzzle
    ids: list[int]
    """[P] prompt tokens."""


def train(cfg: GrpoConfig, puzzles: list[Puzzle], reward_fn: RewardFn) -> Path:
    """Train a LoRA adapter with GRPO; returns the run folder. Called by every rank.

    Raises ValueError for settings or data the user must change, FloatingPointError before a non-finite optimizer step.
    """
    assert cfg.model is not None
    check_run(cfg)
    world = join_world()
    policy = Policy(cfg.model, lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha, seed=cfg.seed,
                    device=world.device, dtype=getattr(torch, cfg.dtype))  # fmt: skip
    prompts = encode_prompts(policy, puzzles, cfg, world)
    out = open_run(cfg, world)
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.999))
    first_step = restore(out, policy, optimizer, world) if cfg.resume else 0
    engine = make_engine(cfg, policy, world)
    sync_adapter(engine, policy.adapter_tensors(), version=first_step)
    stop = StopRequest(world)
    bar = tqdm(total=cfg.steps, initial=first_step, desc="GRPO", unit="step", disable=None if world.is_main else True)

    for step in range(first_step, cfg.steps):
        clock = Clock()
        # ---- sample: this rank's share of the step's prompts, G responses each
        batch = prompts_of_step(prompts, cfg.prompts_per_step, step, cfg.seed)[world.rank :: world.size]
        groups = sample_groups(engine, batch, cfg, step)
        clock.lap("sample")
        # ---- score, and compare within each group
        rollouts = [rollout for group in groups for rollout in group]
        rewards = score(policy, batch, groups, reward_fn)
        group_of_row = torch.arange(len(batch)).repeat_interleave(cfg.group_size)  # [N]
        advantages = group_advantages(torch.tensor([r.total for r in rewards]), group_of_row, cfg.advantage)  # [N]
        clock.lap("score")
        # ---- update: usually one optimizer step on everything just sampled
        sums = update(policy, optimizer, batch, groups, advantages, cfg, step, world)
        clock.lap("update")
        # ---- hand the new adapter to the sampler
        adapter_hash = sync_adapter(engine, policy.adapter_tensors(), version=step + 1)
        clock.lap("sync")
        # ---- record
        rows = rollout_rows(step + 1, policy.tokenizer, rollouts, rewards, advantages)
        by_group = [rows[i : i + cfg.group_size] for i in range(0, len(rows), cfg.group_size)]
        rows = [row for group in world.gather(by_group) for row in group]  # in prompt order, whatever the world's size
        metrics = step_metrics(step + 1, rows, sums, cfg.group_size, adapter_hash) if world.is_main else {}
        if world.is_main:
            record(out, bar, metrics, rows, clock, step + 1, cfg)
        last = step + 1 == cfg.steps or stop.requested()
        if world.is_main and (last or (step + 1) % cfg.save_every == 0):
            save(out, policy, optimizer, step + 1, cfg)
        if last:
            break

    bar.close()
    if world.is_main and list_checkpoints(out)[-1].name == f"step-{cfg.steps:06d}":
        write_json(out / "finished.json", {"steps": cfg.steps})
    engine.close()
    leave_world()
    return out


def encode_prompts(policy: Policy, puzzles: list[Puzzle], cfg: GrpoConfig, world: World) -> list[Prompt]:
    """Prompts that fit --max-prompt-tokens. Raises ValueError when too few are left or the ranks cannot share them."""
    if cfg.prompts_per_step % (world.size * cfg.updates_per_batch):
        raise ValueError(
            f"--prompts-per-step {cfg.prompts_per_step}: must be a multiple of ranks x --updates-per-batch "
            f"({world.size} x {cfg.updates_per_batch})"
        )
    prompts = [Prompt(puzzle=puzzle, ids=encode_prompt(policy.tokenizer, puzzle.chat())) for puzzle in puzzles]
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= cfg.max_prompt_tokens]
    if len(fitting) < cfg.prompts_per_step:
        raise ValueError(
            f"{cfg.puzzles}: {len(fitting)} of {len(puzzles)} puzzles fit --max-prompt-tokens {cfg.max_prompt_tokens} "
            f"(longest {max(len(p.ids) for p in prompts)}), fewer than --prompts-per-step {cfg.prompts_per_step}"
        )
    if world.is_main and len(fitting) < len(prompts):
        print(f"left out {len(prompts) - len(fitting)} puzzles longer than {cfg.max_prompt_tokens} tokens", flush=True)
    return fitting


def make_engine(cfg: GrpoConfig, policy: Policy, world: World) -> Engine:
    """The sampler of this rank."""
    if cfg.engine == "torch":
        from rollout.torch_engine import TorchEngine

        return TorchEngine(policy.model, policy.eos_id, policy.decoding)
    from rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        str(cfg.model), lora=policy.lora, max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens,
        dtype=cfg.dtype, memory_fraction=cfg.memory_fraction, rank=world.rank,
    )  # fmt: skip


def sample_groups(engine: Engine, batch: list[Prompt], cfg: GrpoConfig, step: int) -> list[list[Rollout]]:
    """G rollouts per prompt, in prompt order."""
    sampling = Sampling(
        n=cfg.group_size, max_tokens=cfg.max_response_tokens, temperature=cfg.temperature, top_p=cfg.top_p,
        seed=stable_seed(cfg.seed, "sample", step),
    )  # fmt: skip
    return engine.generate([p.puzzle.id for p in batch], [p.ids for p in batch], sampling)


def score(policy: Policy, batch: list[Prompt], groups: list[list[Rollout]], reward_fn: RewardFn) -> list[Reward]:
    """[N] rewards in row order. Special tokens (end of turn) are not part of the text."""
    rollouts = [rollout for group in groups for rollout in group]
    texts = policy.tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    puzzles = [prompt.puzzle for prompt, group in zip(batch, groups, strict=True) for _ in group]
    return score_completions(reward_fn, texts, puzzles, [r.finish_reason == "length" for r in rollouts])


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: list[Prompt], groups: list[list[Rollout]],
    advantages: torch.Tensor, cfg: GrpoConfig, step: int, world: World,
) -> TokenSums:  # fmt: skip
    """--updates-per-batch optimizer steps over the rank's groups; returns the sums behind the step's metrics."""
    prompt_ids = [prompt.ids for prompt in batch]
    share = len(batch) // cfg.updates_per_batch
    parts = [range(i * share, (i + 1) * share) for i in range(cfg.updates_per_batch)]
    plans = [micro_batches(part, prompt_ids, groups, advantages, cfg.micro_tokens, world.device) for part in parts]
    references = [[fixed_logprobs(policy, micro, cfg) for micro in plan] for plan in plans]
    # one step per batch: old = stop_gradient(new), and no extra pass; else before the first step changes the weights
    on_policy = cfg.updates_per_batch == 1
    olds = [[None if on_policy else no_grad_logprobs(policy, micro, cfg) for micro in plan] for plan in plans]
    sums = TokenSums()
    for plan, reference, old in zip(plans, references, olds, strict=True):
        # the denominators, over all ranks, before the first micro-batch
        n_rows = sum(int(m.packed.mask.any(-1).sum()) for m in plan)
        n_tokens = sum(int(m.packed.mask.sum()) for m in plan)
        n_rows, n_tokens = world.total(n_rows, n_tokens)
        optimizer.zero_grad(set_to_none=True)
        for micro, ref_logprobs, old_logprobs in zip(plan, reference, old, strict=True):
            terms = loss_terms(policy, micro, ref_logprobs, old_logprobs, n_rows, n_tokens, cfg)
            loss = terms.loss
            loss.backward()
            sums.add(terms, loss)
        optimizer_step(policy, optimizer, cfg, step, sums, world)
    return sums.over_ranks(world)


def loss_terms(
    policy: Policy, micro: MicroBatch, ref_logprobs: torch.Tensor | None, old_logprobs: torch.Tensor | None,
    n_rows: float, n_tokens: float, cfg: GrpoConfig,
) -> LossTerms:  # fmt: skip
    """Forward one micro-batch and name every term of its loss. A breakpoint here sees everything."""
    logprobs = policy.response_logprobs(micro.packed, cfg.temperature)  # [N,T]
    mask = micro.packed.mask
    weight = aggregation_weights(mask, cfg.aggregation, n_rows, n_tokens, cfg.max_response_tokens, logprobs.dtype)
    return grpo_terms(
        logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        sampler_logprobs=micro.sampler_logprobs, mask=mask, advantages=micro.advantages, weight=weight,
        clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip, beta=cfg.beta, kl_kind=cfg.kl_kind,
        ratio_level=cfg.ratio_level, correction=cfg.correction, correction_cap=cfg.correction_cap,
    )  # fmt: skip


@torch.no_grad()
def no_grad_logprobs(policy: Policy, micro: MicroBatch, cfg: GrpoConfig) -> torch.Tensor:
    """[N,T] log-probs of the policy as it is now."""
    return policy.response_logprobs(micro.packed, cfg.temperature)


def fixed_logprobs(policy: Policy, micro: MicroBatch, cfg: GrpoConfig) -> torch.Tensor | None:
    """[N,T] log-probs of the reference (adapter off); no pass is made when beta is 0."""
    return policy.response_logprobs(micro.packed, cfg.temperature, reference=True) if cfg.beta else None


def optimizer_step(
    policy: Policy, optimizer: torch.optim.Optimizer, cfg: GrpoConfig, step: int, sums: TokenSums, world: World
) -> None:
    """Sum gradients over ranks, clip, step. Raises FloatingPointError, before stepping, when the norm is not finite."""
    parameters = list(policy.trainable().values())
    world.sum_gradients(parameters)
    sums.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip))
    if not torch.isfinite(torch.tensor(sums.grad_norm)):
        raise FloatingPointError(f"step {step + 1}: the gradient norm is {sums.grad_norm}; no optimizer step was made")
    sums.lr = cfg.lr * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    for group in optimizer.param_groups:
        group["lr"] = sums.lr
    optimizer.step()


def record(out: Path, bar: tqdm, metrics: dict, rows: list[dict], clock: "Clock", step: int, cfg: GrpoConfig) -> None:
    """Append to the run folder and show the step."""
    append_jsonl(out / "metrics.jsonl", [metrics])
    append_jsonl(out / "rollouts.jsonl", rows)
    seconds = clock.total()
    rate = metrics["num_tokens"] / seconds
    append_jsonl(
        out / "timing.jsonl", [{"step": step, **clock.laps, "timing_s/step": seconds, "tokens_per_second": rate}]
    )
    bar.set_postfix_str(f"reward {metrics['reward']:+.3f}, {rate:.0f} tok/s")
    bar.update()
    if bar.disable:  # not a terminal: plain lines
        left = (cfg.steps - step) * seconds
        print(
            f"step {step}/{cfg.steps}  reward {metrics['reward']:+.3f}  batch accuracy "
            f"{metrics.get('rewards/batch_accuracy', float('nan')):.3f}  kl {metrics['kl']:.4f}  "
            f"length {metrics['completions/mean_length']:.0f}  {rate:.0f} tok/s  {left / 60:.1f} min left",
            flush=True,
        )


def save(out: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int, cfg: GrpoConfig) -> None:
    """Write a checkpoint: adapter and AdamW moments by parameter name."""
    names = list(policy.trainable())
    moments = {
        f"{key}/{names[index]}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }  # fmt: skip
    assert policy.lora is not None
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.model,
        **policy.lora,
    }
    save_checkpoint(out, step, policy.adapter_tensors(), adapter_config, moments, cfg.keep_checkpoints)


def restore(out: Path, policy: Policy, optimizer: torch.optim.Optimizer, world: World) -> int:
    """Load the newest checkpoint into policy and optimizer; returns its step (0 when the run died before its first)."""
    checkpoints = list_checkpoints(out)
    if not checkpoints:
        step = 0
    else:
        step, adapter, moments = load_checkpoint(checkpoints[-1])
        for name, tensor in policy.adapter_tensors().items():
            tensor.copy_(adapter[name])  # adapter_tensors shares storage with the parameters
        state = {}
        for index, name in enumerate(policy.trainable()):
            state[index] = {key: moments[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if world.is_main:
        rewind(out, step)
    return step


class Clock:
    """Seconds per phase of a step."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[f"timing_s/{phase}"], self.last = now - self.last, now

    def total(self) -> float:
        return time.perf_counter() - self.start


class StopRequest:
    """SIGTERM asks for a stop; the step is finished and saved, and the process exits 0."""

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def requested(self) -> bool:
        """True on every rank as soon as one rank was asked. Collective."""
        return self.world.largest(float(self.asked)) > 0
