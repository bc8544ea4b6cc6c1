"""Supervised cold start, one optimizer step after another, read top to bottom in `train_rank`.

Cross entropy of the response tokens of accepted traces, given their prompts: packed without padding; LoRA, DoRA or all
weights. The loss of an optimizer step is the mean over its response tokens, counted over all ranks before the first
micro-batch. A trace that is too long is skipped and counted, or refused. It is never cut: half an answer teaches half
an answer.
"""

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.clusters.known import cell_types_file
from data.errors import UserError, disk_errors
from data.files import append_rows, replacing_folder, weight_files
from data.processes import how_to_go_on
from data.puzzles import read_rows
from trainer.model.merge import write_checkpoint
from trainer.packing import pack, split_by_tokens
from trainer.policy import Policy
from trainer.ranks.world import StopRequest, World, guarded, join_world, leave_world
from trainer.record.runfolder import (
    check_run,
    open_run,
    restore_training,
    save_training,
    with_date,
    write_json,
)
from trainer.sft.examples import Example, encode_traces, note_on_formats, split_by_puzzle
from trainer.sft.heldout import BestEpoch, HeldOutAnswers, Judge
from trainer.sft.settings import SftConfig
from trainer.start.model_check import check_model
from trainer.start.parts import load_policy, make_optimizer, note_on_warmup, print_notes, refuse_to_replace
from trainer.start.preflight import (
    context_of,
    model_config,
    rank_problem,
    refuse_problems,
    served_positions,
    steady_positions,
)

BETAS = (0.9, 0.95)
"""AdamW's decay rates."""


def train(cfg: SftConfig, judge: Judge | None = None) -> Path:
    """Fine-tune and write OUT/model, a Hugging Face checkpoint (adapter merged in float32). Returns OUT.

    Called by every rank of the launch. judge: computes the metrics of the answers under --eval-engine. Raises UserError
    for settings or data that the user must change, FloatingPointError before a step that would not be finite.
    """
    world = join_world(hang_seconds=cfg.hang_seconds)
    with guarded(world):
        train_rank(cfg, world, judge)
    leave_world()
    return Path(cfg.out)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the steps of a run share on one rank. No field is replaced while the run lasts."""

    cfg: SftConfig
    world: World
    policy: Policy
    optimizer: torch.optim.Optimizer
    out: Path
    """The run folder."""
    training: list[Example]
    held_out: list[Example]
    skipped: int
    """Number of traces that were too long."""
    first_step: int
    """From 0; above 0 in a resumed run."""
    best: BestEpoch
    answers: HeldOutAnswers | None
    """None without --eval-engine."""

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.training) / self.cfg.batch_size)

    @property
    def n_steps(self) -> int:
        return self.cfg.epochs * self.steps_per_epoch


def train_rank(cfg: SftConfig, world: World, judge: Judge | None) -> None:
    """The whole work of a rank."""
    stop = StopRequest(world)
    run = prepare(cfg, world, judge)
    parameters = list(run.policy.trainable().values())
    log = StepLog(run)
    done = run.first_step  # optimizer steps made

    for step in range(run.first_step, run.n_steps):
        if run.best.is_over():  # also in a run that is resumed after it stopped early
            break
        start = time.perf_counter()
        epoch, place = divmod(step, run.steps_per_epoch)  # both from 0
        # ---- the batch: the same list on every rank; rank r trains on batch[r :: size]
        batch = batch_of_step(run.training, cfg, epoch, place)
        # ---- update
        world.enter("update", step + 1)
        lr = set_learning_rate(run, step)
        run.optimizer.zero_grad(set_to_none=True)
        loss = accumulate(run.policy, batch, cfg, world)
        grad_norm = sum_and_clip_gradients(parameters, cfg.grad_clip, world)
        refuse_what_is_not_finite(grad_norm, step)  # before the weights change
        run.optimizer.step()
        done = step + 1
        metrics = {"step": done, "epoch": epoch + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        timing = {"step": done, **speed(batch, time.perf_counter() - start)}
        # ---- evaluate after each epoch, and every --eval-every steps
        ends_epoch = done % run.steps_per_epoch == 0
        if run.held_out and (ends_epoch or (cfg.eval_every and done % cfg.eval_every == 0)):
            metrics |= evaluate(run, done)
            run.best.see(metrics["eval_loss"])
            if ends_epoch:
                run.best.compare(epoch + 1, metrics["eval_loss"], run.policy, world)
            refuse_a_useless_model(run, metrics)
        # ---- record
        log.write(metrics, timing)
        stopped = stop.requested()  # collective: all ranks stop after the same step
        last = done == run.n_steps or stopped or run.best.is_over()
        if last or (ends_epoch if cfg.save_every == 0 else done % cfg.save_every == 0):
            world.enter("save", done)
            save_training(run, done, run.best.state())  # in the place of rollouts, of which none wait here
        if stopped:
            break

    log.close()
    finish(run, done)


def prepare(cfg: SftConfig, world: World, judge: Judge | None) -> Run:
    """Read, check and load everything. Makes the run folder last, when nothing is left that the user must change."""
    rows = read_rows(cfg.traces)
    if not rows:
        raise UserError(f"--traces {cfg.traces}: the file has no trace; make some with launch/distill.py")
    cell_types_file(cfg.labels, cfg.traces, cfg.model)  # refuse a bad file now, not after the training
    check_run(cfg)
    refuse_to_replace(Path(cfg.out), "model", *["best"] * bool(cfg.patience and not cfg.resume))
    cfg = with_date(cfg, world)
    check = check_model(str(cfg.model), vllm=cfg.eval_engine == "vllm", lora=cfg.lora_rank > 0, begun=cfg.resume)
    refuse_problems(check)
    if problem := rank_problem(cfg.lora_rank, model_config(str(cfg.model))):
        raise UserError(problem)
    if cfg.lora_rank:
        weight_files(Path(cfg.model))  # refuse now what the adapter could not be merged into at the end
    policy = load_policy(cfg, world.device)
    cfg = replace(cfg, attn=policy.attn)  # what auto took
    examples, skipped = encode_traces(policy, rows, cfg, world.advance)
    longest = max(len(example.prompt_ids) + len(example.response_ids) for example in examples)
    shape = policy.causal_lm.config.to_dict()
    context = min(context_of(shape) or math.inf, steady_positions(shape))
    if longest > context and not cfg.resume:  # a run that was begun by an older version may end
        which = "positions" + (
            " that do not depend on the texts beside it" if context == steady_positions(shape) else ""
        )
        raise UserError(
            f"--max-tokens {cfg.max_tokens}: a trace has {longest} tokens with its prompt, and the model {context} {which}; "
            f"give --max-tokens {context} --overlong skip to leave such traces out, or take another model"
        )
    training, held_out = split_by_puzzle(examples, cfg.holdout, cfg.seed)
    check_held_out(held_out, policy, cfg)
    out = open_run(cfg, world)
    optimizer = make_optimizer(cfg, list(policy.trainable().values()), BETAS)
    first_step, state = restore_training(out, policy, optimizer, world) if cfg.resume else (0, {})
    epochs_done = first_step // math.ceil(len(training) / cfg.batch_size)  # whole epochs; a part does not count
    best = BestEpoch(out, cfg, epochs_done, state)
    answers = HeldOutAnswers(cfg, policy, held_out, world, judge) if cfg.eval_engine == "vllm" and held_out else None
    run = Run(
        cfg=cfg,
        world=world,
        policy=policy,
        optimizer=optimizer,
        out=out,
        training=training,
        held_out=held_out,
        skipped=skipped,
        first_step=first_step,
        best=best,
        answers=answers,
    )
    if world.is_main:
        print_notes(policy.chat)
        for note in filter(None, (note_on_formats(rows, cfg), note_on_warmup(cfg.warmup_steps, run.n_steps))):
            print(f"note: {note}", file=sys.stderr, flush=True)
        counts = f"{len(training)} traces, {len(held_out)} held out, {skipped} too long"
        print(f"SFT: {counts}, {run.n_steps} steps", flush=True)
    return run


def check_held_out(held_out: list[Example], policy: Policy, cfg: SftConfig) -> None:
    """Raises UserError if what the settings ask of the held-out puzzles cannot be done with them."""
    if not held_out and (needs := cfg.needs_held_out()):
        raise UserError(f"--traces {cfg.traces}: too few puzzles to hold one out for {needs}")
    longest = max((len(example.prompt_ids) for example in held_out), default=0)
    shape = policy.causal_lm.config.to_dict()
    context = min(context_of(shape) or math.inf, served_positions(shape))
    if cfg.eval_engine != "none" and longest + cfg.eval_response_tokens > context:
        raise UserError(
            f"--eval-response-tokens {cfg.eval_response_tokens}: with prompts of up to {longest} tokens more than the "
            f"model's {context} positions{' as it is trained' * (context == served_positions(shape))}; use at most "
            f"{context - longest}"
        )


# ---- the verbs of a step


def batch_of_step(training: list[Example], cfg: SftConfig, epoch: int, place: int) -> list[Example]:
    """The traces of step `place` of an epoch (both from 0), over all ranks.

    A function of the arguments alone, so a resumed run needs no stored position.
    """
    order = list(range(len(training)))
    random.Random(f"{cfg.seed} epoch {epoch}").shuffle(order)
    return [training[i] for i in order[place * cfg.batch_size : (place + 1) * cfg.batch_size]]


def set_learning_rate(run: Run, step: int) -> float:
    """Set the optimizer's learning rate for a step (from 0), and return it."""
    lr = learning_rate(step, run.n_steps, run.cfg)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(step: int, n_steps: int, cfg: SftConfig) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it. step: from 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(n_steps - cfg.warmup_steps, 1)
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))  # from 1 at progress 0 to 0.1 at 1


def token_losses(policy: Policy, batch: list[Example], cfg: SftConfig) -> Iterator[Tensor]:
    """Yields per micro-batch the sum of -log p over its response tokens, a scalar with a graph."""
    sizes = [(len(e.prompt_ids), [len(e.response_ids)]) for e in batch]
    for plan in split_by_tokens(sizes, cfg.micro_tokens):
        # one response per prompt, so the group number i is the number of the example
        packed = pack([(batch[i].prompt_ids, [batch[i].response_ids]) for i, _ in plan], policy.device)
        yield -policy.response_logprobs(packed).sum()  # padding is 0, so it adds nothing


def accumulate(policy: Policy, batch: list[Example], cfg: SftConfig, world: World) -> float:
    """Add this rank's share of the batch's gradient to .grad. Returns the batch's mean loss per token. Collective.

    batch: of all ranks.
    """
    n_tokens = sum(len(e.response_ids) for e in batch)  # over all ranks, so every rank divides by the same number
    total = 0.0
    for loss_sum in token_losses(policy, batch[world.rank :: world.size], cfg):
        (loss_sum / n_tokens).backward()  # frees this graph before the next micro-batch is made
        world.advance()
        total += loss_sum.item() / n_tokens  # waits for the GPU
    return world.total(total)[0]


def sum_and_clip_gradients(parameters: list[torch.nn.Parameter], largest: float, world: World) -> float:
    """Sum .grad over the ranks and scale it to a norm of at most `largest`. Returns the norm before. Collective."""
    for p in parameters:
        if p.grad is None:  # a rank without a trace of this batch must still take part in the sum
            p.grad = torch.zeros_like(p)
    world.sum_gradients(parameters)
    return float(torch.nn.utils.clip_grad_norm_(parameters, largest))  # of the sum, so equal on all ranks


def refuse_what_is_not_finite(grad_norm: float, step: int) -> None:
    """Raises FloatingPointError if the gradient is not finite: on all ranks, since the norm is that of their sum."""
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"SFT step {step + 1}: the gradient norm is {grad_norm}; no optimizer step was made")


def speed(batch: list[Example], seconds: float) -> dict[str, float]:
    """A step's part of timing.jsonl. Prompt and response tokens of all ranks count."""
    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for e in batch)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds}


class StepLog:
    """Rank 0's record of a run: metrics.jsonl, timing.jsonl, and a progress bar or plain lines."""

    def __init__(self, run: Run) -> None:
        self.out, self.n_steps, self.world, self.is_main = run.out, run.n_steps, run.world, run.world.is_main
        # disable None: tqdm shows the bar on a terminal only
        hidden = None if self.is_main else True
        self.bar = tqdm(total=run.n_steps, initial=run.first_step, desc="SFT", unit="step", disable=hidden)
        self.seconds: list[float] = []

    def write(self, metrics: dict, timing: dict) -> None:
        """Append a step to the run folder and show it. On other ranks than 0: nothing."""
        if not self.is_main:
            return
        append_rows(self.out / "metrics.jsonl", [metrics])
        append_rows(self.out / "timing.jsonl", [timing])
        self.world.step_made(metrics["step"], self.n_steps, timing["seconds"])
        self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
        self.bar.update()
        self.seconds.append(timing["seconds"])
        # without a terminal: ten lines per run, and one per evaluation
        if self.bar.disable and (metrics["step"] % max(1, self.n_steps // 10) == 0 or "eval_loss" in metrics):
            # of all steps: traces differ in length, so one step says little
            left = (self.n_steps - metrics["step"]) * sum(self.seconds) / len(self.seconds)
            print(f"SFT {json.dumps(metrics)}  {left / 60:.1f} min left", flush=True)

    def close(self) -> None:
        self.bar.close()


# ---- after each epoch (and every --eval-every steps), and after the last


def evaluate(run: Run, step: int) -> dict[str, float]:
    """eval_loss of the held-out traces and, with --eval-engine, the metrics of answers to their puzzles. Collective.

    step: from 1.
    """
    run.world.enter("evaluate", step)
    found = {"eval_loss": evaluate_loss(run.policy, run.held_out, run.cfg, run.world)}
    run.world.enter("answer", step)
    return found | (run.answers.metrics(step) if run.answers else {})


@torch.no_grad()
def evaluate_loss(policy: Policy, held_out: list[Example], cfg: SftConfig, world: World) -> float:
    """Mean -log p per response token of the held-out traces, in nats. Collective."""
    total = 0.0
    for loss in token_losses(policy, held_out[world.rank :: world.size], cfg):
        total += float(loss)
        world.advance()
    return world.total(total)[0] / sum(len(e.response_ids) for e in held_out)


def refuse_a_useless_model(run: Run, metrics: dict) -> None:
    """Raises FloatingPointError if eval_loss is not finite, unless --patience kept an earlier epoch: on all ranks.

    Then the run goes on to the end of its patience, and metrics gets None, since JSON has no nan.
    """
    loss, kept = metrics["eval_loss"], run.cfg.patience and run.best.epoch
    if math.isfinite(loss):
        return
    found = f"SFT step {metrics['step']}: the eval_loss in epoch {metrics['epoch']} is {loss}"
    if not kept:
        raise FloatingPointError(
            f"{found}; no checkpoint was made of these weights. Try a lower --lr, or keep --dtype float32"
        )
    metrics["eval_loss"] = None
    if run.world.is_main:
        tqdm.write(f"note: {found}; epoch {run.best.epoch} stays the best")


def finish(run: Run, done: int) -> None:
    """Write OUT/model, unless SIGTERM stopped the run before its end: the best epoch, or where --stop-loss was reached."""
    if run.answers:
        run.answers.close()
    if done < run.n_steps and not run.best.is_over():
        if run.world.is_main:
            print(f"stopped after step {done} of {run.n_steps}; {how_to_go_on()}", flush=True)
    elif run.world.is_main:  # the others wait in leave_world() for the end of the merge
        if run.best.low_enough:
            print(f"SFT: ended after step {done} of {run.n_steps}, at an eval_loss within --stop-loss", flush=True)
        run.best.load_into(run.policy)
        save_model(run.policy, run.cfg, run.out / "model")
        counts = {"kept": len(run.training), "held_out": len(run.held_out), "skipped_too_long": run.skipped}
        write_json(run.out / "traces.json", counts)
        print(f"wrote {run.out / 'model'}", flush=True)


def save_model(policy: Policy, cfg: SftConfig, folder: Path) -> None:
    """Write a plain checkpoint (adapter merged in float32) under a temporary name, then rename it."""
    dtype = getattr(torch, cfg.dtype)
    known = cell_types_file(cfg.labels, cfg.traces, cfg.model)  # what launch/annotate.py may offer as candidates
    if policy.lora:
        adapter = {name: t.cpu() for name, t in policy.adapter_tensors().items()}
        write_checkpoint(
            cfg.model,
            folder,
            dtype,
            adapter=adapter,
            config=policy.lora,
            quantize=cfg.quantize,
            base_dtype=dtype,
            extra=known,
        )
        return
    model, attention = policy.causal_lm, policy.causal_lm.config._attn_implementation
    with replacing_folder(folder) as partial, disk_errors(folder):
        model.config._attn_implementation = "sdpa"  # ours is nobody else's, so the saved config must not name it
        model.save_pretrained(partial)
        model.config._attn_implementation = attention
        policy.tokenizer.save_pretrained(partial)
        for name, text in known.items():
            (partial / name).write_text(text, encoding="utf-8")
