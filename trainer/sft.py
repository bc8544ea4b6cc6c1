"""Supervised cold start: completion-only cross entropy on accepted traces, packed and padding-free, LoRA or full.

The loss of an optimizer step is the mean over its response tokens, counted before the first micro-batch. A trace that is
too long is skipped and counted, never cut: half an answer teaches half an answer.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.puzzles import Puzzle, read_rows
from trainer.config import SftConfig
from trainer.packing import pack, split_by_tokens
from trainer.policy import Policy, encode_prompt
from trainer.runfolder import append_jsonl, check_run, open_run, write_json
from trainer.world import World, join_world, leave_world


@dataclass(frozen=True, kw_only=True)
class Example:
    puzzle_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    """The trace and the end-of-turn token."""


def train(cfg: SftConfig) -> Path:
    """Fine-tune and write OUT/model, a Hugging Face checkpoint (LoRA merged in float32); returns OUT."""
    rows = read_rows(cfg.traces)
    if not rows:
        raise ValueError(f"--traces {cfg.traces}: holds no trace; make some with launch/distill.py")
    check_run(cfg, allow_resume=False)
    world = join_world()
    policy = Policy(cfg.model, lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha, seed=cfg.seed,
                    device=world.device, dtype=getattr(torch, cfg.dtype))  # fmt: skip
    examples, skipped = encode_traces(policy, rows, cfg)
    kept, held_out = split_by_puzzle(examples, cfg.holdout, cfg.seed)
    out = open_run(cfg, world)
    steps_per_epoch = math.ceil(len(kept) / cfg.batch_size)
    n_steps = cfg.epochs * steps_per_epoch
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.9, 0.95))
    if world.is_main:
        print(f"SFT: {len(kept)} traces, {len(held_out)} held out, {skipped} too long, {n_steps} steps", flush=True)
    bar = tqdm(total=n_steps, desc="SFT", unit="step", disable=None if world.is_main else True)

    for step in range(n_steps):
        epoch, place = divmod(step, steps_per_epoch)
        order = list(range(len(kept)))
        random.Random(f"{cfg.seed} epoch {epoch}").shuffle(order)
        batch = [kept[i] for i in order[place * cfg.batch_size : (place + 1) * cfg.batch_size]]
        lr = learning_rate(step, n_steps, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        world.enter("update", step + 1)
        loss = accumulate(policy, batch, cfg, world)
        grad_norm = step_if_finite(parameters, optimizer, cfg, step, world)
        metrics = {"step": step + 1, "epoch": epoch + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        if held_out and place == steps_per_epoch - 1:
            world.enter("evaluate", step + 1)
            metrics["eval_loss"] = evaluate_loss(policy, held_out, cfg, world)
        if world.is_main:
            append_jsonl(out / "metrics.jsonl", [metrics])
            show(bar, metrics, n_steps)

    bar.close()
    if world.is_main:
        save_model(policy, out / "model")
        write_json(out / "traces.json", {"kept": len(kept), "held_out": len(held_out), "skipped_too_long": skipped})
    leave_world()
    return out


def encode_traces(policy: Policy, rows: list[dict], cfg: SftConfig) -> tuple[list[Example], int]:
    """(examples that fit --max-tokens, number that do not). Raises ValueError naming a row that is no trace."""
    examples, skipped = [], 0
    for number, row in enumerate(rows):
        try:
            puzzle = Puzzle.from_row(row)
        except ValueError as error:
            raise ValueError(f"{cfg.traces}, row {number}: {error}") from None
        prompt_ids = encode_prompt(policy.tokenizer, puzzle.chat())
        response_ids = [*policy.tokenizer.encode(row["assistant_msg"], add_special_tokens=False), policy.eos_id]
        if len(prompt_ids) + len(response_ids) > cfg.max_tokens:
            skipped += 1
            continue
        examples.append(Example(puzzle_id=puzzle.id, prompt_ids=prompt_ids, response_ids=response_ids))
    if not examples:
        raise ValueError(f"--max-tokens {cfg.max_tokens}: none of the {len(rows)} traces of {cfg.traces} fits")
    return examples, skipped


def split_by_puzzle(examples: list[Example], holdout: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out): a share of the puzzles, never one puzzle on both sides."""
    names = sorted({example.puzzle_id for example in examples})
    random.Random(f"{seed} holdout").shuffle(names)
    out = set(names[: int(holdout * len(names))])
    return [e for e in examples if e.puzzle_id not in out], [e for e in examples if e.puzzle_id in out]


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


def show(bar: tqdm, metrics: dict, n_steps: int) -> None:
    """The bar on a terminal, a line every tenth of the run elsewhere."""
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
    bar.update()
    if bar.disable and (metrics["step"] % max(1, n_steps // 10) == 0 or "eval_loss" in metrics):
        print("SFT " + json.dumps(metrics), flush=True)


def save_model(policy: Policy, folder: Path) -> None:
    """Write a plain checkpoint (adapter merged in the weights' own dtype) under a temporary name, then rename."""
    model = policy.model.merge_and_unload() if policy.lora else policy.model
    model.config._attn_implementation = "sdpa"
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    policy.tokenizer.save_pretrained(partial)
    partial.rename(folder)
