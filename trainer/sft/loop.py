"""Supervised cold start: completion-only cross entropy on accepted traces, packed and padding-free, LoRA, DoRA or full.

The loss of an optimizer step is the mean over its response tokens, counted before the first micro-batch. A trace that is
too long is skipped and counted, or refused, never cut: half an answer teaches half an answer.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data.errors import UserError
from data.puzzles import Puzzle, read_rows
from rollout import Canary, Engine, Sampling
from trainer.config import SftConfig
from trainer.grpo import CANARY_TOKENS, hand_over, make_canary
from trainer.model.merge import sampler_model, weight_files, write_checkpoint
from trainer.packing import pack, split_by_tokens
from trainer.policy import Policy
from trainer.ranks.world import StopRequest, World, guarded, join_world, leave_world
from trainer.record.runfolder import append_jsonl, check_run, open_run, restore_training, save_training, write_json
from trainer.sft.examples import Example, encode_traces, split_by_puzzle
from trainer.start.parts import load_policy, make_optimizer

BETAS = (0.9, 0.95)
Judge = Callable[[list[str], list[Puzzle]], dict[str, float]]
"""(answers, puzzles) -> {metric: value}"""


def train(cfg: SftConfig, judge: Judge | None = None) -> Path:
    """Fine-tune and write OUT/model, a Hugging Face checkpoint (adapter merged in float32); returns OUT.

    judge: what --eval-engine reports of the answers to the held-out puzzles. Raises UserError for settings or data the
    user must change, FloatingPointError before a step that would not be finite.
    """
    world = join_world(hang_seconds=cfg.hang_seconds)
    with guarded(world):
        train_rank(cfg, world, judge)
    leave_world()
    return Path(cfg.out)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a rank trains with."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    kept: list[Example]
    held_out: list[Example]
    skipped: int
    """Traces that were too long."""
    out: Path
    steps_per_epoch: int
    first_step: int
    best: "Best"
    answers: "HeldOutAnswers | None"


def train_rank(cfg: SftConfig, world: World, judge: Judge | None) -> None:
    """The whole work of a rank."""
    stop = StopRequest(world)
    run = prepare(cfg, world, judge)
    policy, optimizer, n_steps = run.policy, run.optimizer, cfg.epochs * run.steps_per_epoch
    bar = tqdm(total=n_steps, initial=run.first_step, desc="SFT", unit="step", disable=None if world.is_main else True)
    done, stopped = run.first_step, False

    while done < n_steps and not run.best.tired() and not stopped:
        start, (epoch, place) = time.perf_counter(), divmod(done, run.steps_per_epoch)
        batch = batch_of_step(run.kept, cfg, epoch, place)
        lr = learning_rate(done, n_steps, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        world.enter("update", done + 1)
        loss = accumulate(policy, batch, cfg, world)
        grad_norm = step_if_finite(list(policy.trainable().values()), optimizer, cfg, done, world)
        done += 1
        metrics = {"step": done, "epoch": epoch + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        timing = {"step": done, **speed(batch, time.perf_counter() - start)}
        ends_epoch = place == run.steps_per_epoch - 1
        if run.held_out and ends_epoch:
            metrics |= evaluate(run, cfg, world, done)
            run.best.seen(epoch + 1, metrics["eval_loss"], policy, world)
        if world.is_main:
            append_jsonl(run.out / "metrics.jsonl", [metrics])
            append_jsonl(run.out / "timing.jsonl", [timing])
            show(bar, metrics, n_steps)
        stopped = stop.requested()
        last = done == n_steps or stopped or run.best.tired()
        if last or (ends_epoch if cfg.save_every == 0 else done % cfg.save_every == 0):
            world.enter("save", done)
            save_training(run.out, policy, optimizer, done, cfg, world, {})

    bar.close()
    finish(run, cfg, world, done < n_steps and not run.best.tired(), done)


def prepare(cfg: SftConfig, world: World, judge: Judge | None) -> Run:
    """Read, check and load everything; the run folder is made when nothing the user must change is left."""
    rows = read_rows(cfg.traces)
    if not rows:
        raise UserError(f"--traces {cfg.traces}: holds no trace; make some with launch/distill.py")
    check_run(cfg)
    if cfg.lora_rank:
        weight_files(Path(cfg.model))  # the adapter is merged into them at the end
    policy = load_policy(cfg, world.device)
    examples, skipped = encode_traces(policy, rows, cfg)
    kept, held_out = split_by_puzzle(examples, cfg.holdout, cfg.seed)
    check_held_out(held_out, policy, cfg)
    out = open_run(cfg, world)
    steps_per_epoch = math.ceil(len(kept) / cfg.batch_size)
    optimizer = make_optimizer(cfg, list(policy.trainable().values()), BETAS)
    first_step, _ = restore_training(out, policy, optimizer, world) if cfg.resume else (0, {})
    answers = HeldOutAnswers(cfg, policy, held_out, world, judge) if cfg.eval_engine == "vllm" and held_out else None
    if world.is_main:
        n_steps = cfg.epochs * steps_per_epoch
        print(f"SFT: {len(kept)} traces, {len(held_out)} held out, {skipped} too long, {n_steps} steps", flush=True)
    return Run(
        policy=policy,
        optimizer=optimizer,
        kept=kept,
        held_out=held_out,
        skipped=skipped,
        out=out,
        answers=answers,
        steps_per_epoch=steps_per_epoch,
        first_step=first_step,
        best=Best(out, cfg, first_step // steps_per_epoch),
    )


def check_held_out(held_out: list[Example], policy: Policy, cfg: SftConfig) -> None:
    """Raises UserError when --patience or --eval-engine cannot work with the held-out puzzles."""
    if not held_out and (cfg.patience or cfg.eval_engine != "none"):
        raise UserError(f"--traces {cfg.traces}: too few puzzles to hold one out for --patience or --eval-engine")
    longest = max((len(example.prompt_ids) for example in held_out), default=0)
    context = getattr(policy.causal_lm.config, "max_position_embeddings", math.inf)
    if cfg.eval_engine != "none" and longest + cfg.eval_response_tokens > context:
        raise UserError(
            f"--eval-response-tokens {cfg.eval_response_tokens}: with prompts of up to {longest} tokens more than the model's "
            f"{context} positions; use at most {context - longest}"
        )


def evaluate(run: Run, cfg: SftConfig, world: World, step: int) -> dict[str, float]:
    """eval_loss of the held-out traces and, with --eval-engine, the metrics of answers to their puzzles. Collective."""
    world.enter("evaluate", step)
    found = {"eval_loss": evaluate_loss(run.policy, run.held_out, cfg, world)}
    return found | (run.answers.metrics(step) if run.answers else {})


def finish(run: Run, cfg: SftConfig, world: World, stopped: bool, done: int) -> None:
    """Write the model, unless the run was asked to stop before its end."""
    if run.answers:
        run.answers.close()
    if stopped:
        print(f"stopped after step {done} of {cfg.epochs * run.steps_per_epoch}; go on with --resume", flush=True)
        return
    if world.is_main:
        run.best.restore(run.policy)
        save_model(run.policy, cfg, run.out / "model")
        counts = {"kept": len(run.kept), "held_out": len(run.held_out), "skipped_too_long": run.skipped}
        write_json(run.out / "traces.json", counts)


def batch_of_step(kept: list[Example], cfg: SftConfig, epoch: int, place: int) -> list[Example]:
    """The traces of a step: a function of the settings alone, so a resumed run needs no stored position."""
    order = list(range(len(kept)))
    random.Random(f"{cfg.seed} epoch {epoch}").shuffle(order)
    return [kept[i] for i in order[place * cfg.batch_size : (place + 1) * cfg.batch_size]]


def speed(batch: list[Example], seconds: float) -> dict[str, float]:
    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for e in batch)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


def learning_rate(step: int, n_steps: int, cfg: SftConfig) -> float:
    """Linear warm-up, then cosine to a tenth of the peak. step is 0-based."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(n_steps - cfg.warmup_steps, 1)
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def token_losses(policy: Policy, batch: list[Example], cfg: SftConfig):
    """Yields per micro-batch the sum of -log p over its response tokens (scalar tensor with graph)."""
    sizes = [(len(e.prompt_ids), [len(e.response_ids)]) for e in batch]
    for plan in split_by_tokens(sizes, cfg.micro_tokens):
        packed = pack([(batch[i].prompt_ids, [batch[i].response_ids]) for i, _ in plan], policy.device)
        yield -policy.response_logprobs(packed).sum()


def accumulate(policy: Policy, batch: list[Example], cfg: SftConfig, world: World) -> float:
    """Add this rank's share of the batch's gradient; returns the batch's mean loss per token over all ranks."""
    n_tokens = sum(len(e.response_ids) for e in batch)  # of all ranks: every rank sees the whole batch's lengths
    total = 0.0
    for loss_sum in token_losses(policy, batch[world.rank :: world.size], cfg):
        (loss_sum / n_tokens).backward()
        world.advance()
        total += loss_sum.item() / n_tokens
    return world.total(total)[0]


def step_if_finite(parameters, optimizer, cfg: SftConfig, step: int, world: World) -> float:
    """Sum gradients over ranks, clip, step; returns the norm before clipping. Raises FloatingPointError instead of a NaN step."""
    for p in parameters:
        if p.grad is None:  # a rank without a row of this batch
            p.grad = torch.zeros_like(p)
    world.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip))
    if not math.isfinite(norm):
        raise FloatingPointError(f"SFT step {step + 1}: the gradient norm is {norm}; no optimizer step was made")
    optimizer.step()
    return norm


@torch.no_grad()
def evaluate_loss(policy: Policy, held_out: list[Example], cfg: SftConfig, world: World) -> float:
    """Mean -log p per response token of the held-out traces."""
    total = sum(float(loss) for loss in token_losses(policy, held_out[world.rank :: world.size], cfg))
    return world.total(total)[0] / sum(len(e.response_ids) for e in held_out)


class HeldOutAnswers:
    """Greedy answers of the model as it stands to the held-out puzzles, through vLLM, judged."""

    def __init__(
        self, cfg: SftConfig, policy: Policy, held_out: list[Example], world: World, judge: Judge | None
    ) -> None:
        from rollout.vllm_engine import VLLMEngine

        assert judge is not None
        of_puzzle = {example.puzzle_id: example for example in held_out}
        self.examples = [of_puzzle[name] for name in sorted(of_puzzle)][: cfg.eval_puzzles]
        self.cfg, self.policy, self.world, self.judge = cfg, policy, world, judge
        longest = max(len(e.prompt_ids) for e in self.examples)
        self.engine: Engine = VLLMEngine(
            sampler_model(cfg.model, cfg.quantize, cfg.dtype, cfg.out),
            lora=policy.lora,
            max_model_len=longest + cfg.eval_response_tokens,
            dtype=cfg.dtype,
            memory_fraction=cfg.memory_fraction,
            rank=world.rank,
            size=world.size,
            may_sleep=True,
        )
        self.canary: Canary = make_canary(policy, self.examples[0].prompt_ids[:CANARY_TOKENS], cfg)

    def metrics(self, step: int) -> dict[str, float]:
        """{"eval/<metric>": value}; the same on every rank. Collective."""
        hand_over(self.engine, self.policy, self.canary, version=step)
        greedy = Sampling(n=1, max_tokens=self.cfg.eval_response_tokens, temperature=0.0, top_p=1.0, seed=0)
        self.engine.ask(step, [e.puzzle_id for e in self.examples], [e.prompt_ids for e in self.examples], greedy)
        ids = self.world.gather([group[0].response_ids for group in self.engine.collect(step)])
        texts = self.policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        found = self.judge(texts, [e.puzzle for e in self.examples])
        found["response_length"] = sum(map(len, ids)) / len(ids)
        return {f"eval/{name}": value for name, value in found.items()}

    def close(self) -> None:
        self.engine.close()


class Best:
    """The epoch with the lowest eval_loss and, with --patience, its weights on disk (OUT/best)."""

    def __init__(self, out: Path, cfg: SftConfig, epochs_done: int) -> None:
        self.folder, self.patience, self.now = out / "best", cfg.patience, epochs_done
        self.epoch, self.loss = 0, math.inf
        record = self.folder / "best.json"
        if self.patience and record.is_file():
            found = json.loads(record.read_text())
            if found["epoch"] <= epochs_done:  # of a later epoch: it will come again
                self.epoch, self.loss = found["epoch"], found["eval_loss"]

    def seen(self, epoch: int, loss: float, policy: Policy, world: World) -> None:
        """Take note of an epoch; rank 0 keeps the weights of the best."""
        self.now = epoch
        if loss >= self.loss:
            return
        self.epoch, self.loss = epoch, loss
        if self.patience and world.is_main:
            partial = self.folder.with_name("best.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            save_file(
                {name: t.contiguous().cpu() for name, t in policy.adapter_tensors().items()},
                partial / "best.safetensors",
            )
            write_json(partial / "best.json", {"epoch": epoch, "eval_loss": loss})
            shutil.rmtree(self.folder, ignore_errors=True)
            partial.rename(self.folder)

    def tired(self) -> bool:
        """Was the best epoch --patience epochs ago?"""
        return bool(self.patience and self.epoch and self.now - self.epoch >= self.patience)

    def restore(self, policy: Policy) -> None:
        """Give the policy the weights of the best epoch."""
        if self.patience and self.epoch and self.epoch != self.now:
            policy.load_adapter(load_file(self.folder / "best.safetensors"))


def show(bar: tqdm, metrics: dict, n_steps: int) -> None:
    """The bar on a terminal, a line every tenth of the run elsewhere."""
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
    bar.update()
    if bar.disable and (metrics["step"] % max(1, n_steps // 10) == 0 or "eval_loss" in metrics):
        print("SFT " + json.dumps(metrics), flush=True)


def save_model(policy: Policy, cfg: SftConfig, folder: Path) -> None:
    """Write a plain checkpoint (adapter merged in float32) under a temporary name, then rename; an old one is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    dtype = getattr(torch, cfg.dtype)
    if policy.lora:
        adapter = {name: t.cpu() for name, t in policy.adapter_tensors().items()}
        write_checkpoint(
            cfg.model, folder, dtype, adapter=adapter, config=policy.lora, quantize=cfg.quantize, held=dtype
        )
        return
    model, attention = policy.causal_lm, policy.causal_lm.config._attn_implementation
    partial = folder.with_name(folder.name + ".partial")
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(partial)
    model.config._attn_implementation = attention
    policy.tokenizer.save_pretrained(partial)
    partial.rename(folder)
