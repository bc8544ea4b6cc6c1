"""Reasoning traces by rejection sampling, from the embedded teacher, an OpenAI-compatible endpoint, or a checkpoint.

    python launch/distill.py --puzzles train.parquet --out traces.jsonl
    python launch/distill.py --puzzles train.parquet --out traces.jsonl --teacher openai --model o3 \\
        --price-in 2 --price-out 8 --budget 50        # the key from $OPENAI_API_KEY
    python launch/distill.py --puzzles train.parquet --out traces.jsonl --teacher openai --model qwen \\
        --base-url http://127.0.0.1:8000/v1           # vllm serve
    python launch/distill.py --puzzles train.parquet --out traces.jsonl --teacher vllm --model checkpoints/qwen

Beside traces.jsonl it writes traces.raw.jsonl, every response before it is judged (data/distill/responses.py), and
traces.report.json. The same command with --resume goes on after a kill; no response that came is asked for again. A run that
ends by itself or by SIGTERM or Ctrl-C first waits for the responses in flight: only what is in flight at a `kill -9`, or at a
second signal, may be paid for twice.
"""

import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from tqdm import tqdm

from data.distill.distill import KEEP_RULES, Completion, Draws, Plan, Request, RequestKey, Teacher, distill
from data.distill.embedded_teacher import EmbeddedTeacher, TeacherConfig, marker_table
from data.distill.meter import Meter
from data.distill.report import acceptance_table, headline, make_report, write_report
from data.distill.responses import RawFile, prompts_hash
from data.errors import UserError
from data.puzzles import Puzzle, read_puzzles, write_rows
from launch.options import command, flag, option
from reward.judge import TraceJudge

TEACHERS = ("embedded", "openai", "vllm")
OF_TEACHER = {
    "teacher_noise": ("embedded",),
    "model": ("openai", "vllm"),
    "base": ("vllm",),
    "dtype": ("vllm",),
    "memory_fraction": ("vllm",),
    "base_url": ("openai",),
    "key_env": ("openai",),
    "temperature": ("openai", "vllm"),
    "top_p": ("openai", "vllm"),
    "max_response_tokens": ("openai", "vllm"),
    "concurrency": ("openai", "vllm"),
    "timeout_seconds": ("openai",),
    "retries": ("openai",),
    "backoff_seconds": ("openai",),
    "budget": ("openai",),
    "price_in": ("openai",),
    "price_out": ("openai",),
    "hint": ("openai", "vllm"),
}
"""Settings that only some teachers have."""
MEANING = ("model", "base", "dtype", "temperature", "top_p", "max_response_tokens", "teacher_noise")
"""Settings that give a response its meaning, beside teacher, seed and puzzles: they may not change under --resume."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    puzzles: str = option(dataclasses.MISSING, "Training puzzles, .parquet or .jsonl.")
    out: str = option(dataclasses.MISSING, "JSONL to write: accepted traces, one row per puzzle (see --keep).")
    teacher: str = option("embedded", "embedded: no model; openai: an endpoint; vllm: a checkpoint.", TEACHERS)
    model: str | None = option(None, "Name of the endpoint's model; vllm: checkpoint folder, or adapter folder.")
    base: str | None = option(None, "vllm: checkpoint under an adapter; default: the one the adapter names.")
    dtype: str = option("float32", "vllm: weights and compute.", ("float32", "bfloat16"))
    memory_fraction: float = option(0.85, "vllm: share of a GPU's memory that the engine may use.")
    base_url: str = option("https://api.openai.com/v1", "openai: the endpoint, up to /v1.")
    key_env: str = option("OPENAI_API_KEY", "openai: environment variable that holds the key.")
    candidates: int = option(8, "Traces drawn per puzzle before giving up (k of the paper).")
    stop_at: int = option(1, "Accepted traces after which a puzzle is asked no more; 0 draws all --candidates.")
    keep: str = option(
        "first", "Which of a puzzle's accepted traces are kept (see --stop-at); shortest counts characters.", KEEP_RULES
    )
    hint: bool = option(False, "Ask again, with the answer hinted, for puzzles whose every candidate was rejected.")
    hint_candidates: int = option(4, "Traces drawn with the answer hinted.")
    temperature: float = option(1.0, "Of the sampling.")
    top_p: float | None = option(None, "Nucleus of the sampling; default: the endpoint's own; vllm: 1.")
    max_response_tokens: int = option(4096, "Longest response, reasoning included.")
    concurrency: int | None = option(None, "openai: most requests in flight [16]; vllm: sampled together [256].")
    timeout_seconds: float = option(600.0, "openai: for a whole response.")
    retries: int = option(8, "openai: further tries on 408/409/429/5xx, time-outs and broken responses.")
    backoff_seconds: float = option(1.0, "openai: wait before the second try; it doubles, up to a minute.")
    price_in: float | None = option(None, "openai: currency units per million prompt tokens.")
    price_out: float | None = option(None, "openai: currency units per million response tokens.")
    budget: float | None = option(
        None,
        "openai: most to spend, in currency units, over all resumed runs; 0 asks for nothing and judges what is there.",
    )
    accept: str = option(
        "reward.cellpuzzles:batch_reward", "Reward that judges a trace, as --reward of launch/grpo.py."
    )
    accept_at: float = option(
        1.0, "Lowest reward that is accepted; a kept trace with wrong labels has the true ones as column answer."
    )
    reward_workers: int = option(1, "Processes that score.")
    reward_seconds: float = option(60.0, "Time limit per trace.")
    resume: bool = option(False, "Use the responses that are there, and ask for the others.")
    limit: int | None = option(None, "Use only the first LIMIT puzzles.")
    teacher_noise: float = option(0.5, "embedded: noise of its judgement; one specific marker counts about 1.")
    seed: int = option(0, "Every random choice.")


@command(DistillConfig)
def main(config: DistillConfig) -> None:
    """Draw up to --candidates traces per puzzle until --stop-at are accepted: format valid and every label right, or --accept."""
    start = time.monotonic()
    check(config)
    if config.keep != "first" and config.stop_at == 1 and not config.resume:
        click.echo(
            f"note: --keep {config.keep} has nothing to choose from, since --stop-at 1 ends a puzzle with its first accepted "
            "trace; --stop-at 0 draws all --candidates",
            err=True,
        )
    key = take_key(config)
    judge = TraceJudge(config.accept, config.accept_at, config.reward_workers, config.reward_seconds)
    puzzles = read_puzzles(config.puzzles)
    chosen = puzzles[: config.limit]
    plan = Plan(
        candidates=config.candidates,
        stop_at=config.stop_at,
        hint_candidates=config.hint_candidates if config.hint else 0,
    )
    if config.teacher == "embedded" and (variants := {puzzle.variant for puzzle in chosen} - {"batch"}):
        raise UserError(
            f"--puzzles {config.puzzles}: the embedded teacher answers batch-level puzzles only, and this file holds "
            f"'{min(variants)}' ones; choose --teacher openai or vllm"
        )
    draws = Draws(chosen, plan)
    meter = Meter(price_in=config.price_in or 0.0, price_out=config.price_out or 0.0, budget=config.budget)
    raw_path, free = beside(config.out, ".raw.jsonl"), config.teacher == "embedded"
    if not free and not config.resume and Path(config.out).exists() and not raw_path.exists():
        raise UserError(f"--out {config.out}: is there without its responses ({raw_path}); name another file")
    settings, worst = meaning(config, puzzles), worst_cases(config, puzzles, meter)
    with (
        closing(judge),
        RawFile(raw_path, settings, meter, resume=config.resume, replace=free, sync=not free, worst_cost=worst) as raw,
    ):
        teacher = make_teacher(config, key, puzzles, chosen, meter, raw)
        with Progress(draws, meter) as progress, Interruptible(teacher, raw, config) as interrupted:
            ended = distill(
                draws, teacher, judge, recorded=list(raw.completions.values()), record=raw.append, watch=progress.show
            )
            if ended == "stopped":
                interrupted.end()
        teacher.close()
    finish(config, draws, meter, ended, time.monotonic() - start)


def check(config: DistillConfig) -> None:
    """Raises click.UsageError or ValueError for settings that do not go together."""
    for name, teachers in OF_TEACHER.items():
        default = next(field.default for field in dataclasses.fields(config) if field.name == name)
        if config.teacher not in teachers and getattr(config, name) != default:
            raise click.UsageError(f"{flag(name)} needs --teacher {' or '.join(teachers)}, not {config.teacher}")
    if config.teacher != "embedded" and not config.model:
        raise click.UsageError(f"--teacher {config.teacher} needs --model")
    if Path(config.out).suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--out {config.out}: name a file that ends in .jsonl or .parquet")
    for written in (Path(config.out), beside(config.out, ".raw.jsonl"), beside(config.out, ".report.json")):
        if written.exists() and os.path.exists(config.puzzles) and os.path.samefile(written, config.puzzles):
            raise UserError(
                f"--out {config.out}: would write {written} over --puzzles {config.puzzles}; name another file"
            )
    if config.budget is not None and (config.price_in is None or not config.price_out):
        raise click.UsageError("--budget needs --price-in and --price-out, per million tokens")
    at_least = {
        "candidates": 1,
        "stop_at": 0,
        "hint_candidates": 1,
        "max_response_tokens": 1,
        "concurrency": 1,
        "retries": 0,
        "temperature": 0,
        "backoff_seconds": 0,
        "limit": 1,
        "budget": 0,
        "price_in": 0,
        "price_out": 0,
        "reward_workers": 1,
    }
    for name, least in at_least.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"{flag(name)} {value:g}: must be at least {least}")
    for name in ("timeout_seconds", "reward_seconds"):
        if getattr(config, name) <= 0:
            raise UserError(f"{flag(name)} {getattr(config, name):g}: must be more than 0")


def take_key(config: DistillConfig) -> str:
    """The endpoint's key, taken out of the environment so that no process started later inherits it.

    Raises UserError, never with the key in it, where an endpoint that is not on this machine has none, and where the URL or
    the name of the variable looks like a secret.
    """
    if config.teacher != "openai":
        return ""
    if re.search(r"://[^/]*@|[?#]", config.base_url) or not re.match(r"https?://[^/]", config.base_url):
        raise UserError(
            "--base-url: write it as https://HOST/v1, without user, password or query; the key goes into --key-env"
        )
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", config.key_env):
        raise UserError("--key-env: give the NAME of an environment variable, in capitals; never the key itself")
    key = os.environ.pop(config.key_env, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(
            f"--key-env {config.key_env}: its value holds a space or a character beyond ASCII; copy it again"
        )
    from rollout.teachers.openai import is_loopback

    if not key and not is_loopback(config.base_url):
        raise UserError(f"--base-url {config.base_url}: set the environment variable {config.key_env} to its key")
    return key or "none"


def beside(out: str, suffix: str) -> Path:
    """traces.jsonl, ".raw.jsonl" -> traces.raw.jsonl."""
    return Path(out).with_suffix(suffix)


def meaning(config: DistillConfig, puzzles: list[Puzzle]) -> dict[str, Any]:
    """The first line of the raw file: what gives the responses their meaning."""
    used = {name: getattr(config, name) for name in MEANING if config.teacher in OF_TEACHER[name]}
    return {"teacher": config.teacher, **used, "seed": config.seed, "prompts": prompts_hash(puzzles)}


def worst_cases(config: DistillConfig, puzzles: list[Puzzle], meter: Meter) -> Callable[[RequestKey], float]:
    """The most that a request of the raw file can cost, by its key."""
    by_id = {puzzle.id: puzzle for puzzle in puzzles}

    def worst(key: RequestKey) -> float:
        puzzle_id, attempt, hinted = key
        if puzzle_id not in by_id:
            return 0.0
        request = Request(puzzle=by_id[puzzle_id], attempt=attempt, hinted=hinted)
        return meter.worst_cost(request.chat(), config.max_response_tokens)

    return worst


def make_teacher(
    config: DistillConfig, key: str, puzzles: list[Puzzle], chosen: list[Puzzle], meter: Meter, raw: RawFile
) -> Teacher:
    """puzzles: of the whole file, from which the embedded teacher learns markers. chosen: those that will be asked."""
    if config.teacher == "embedded":
        return EmbeddedTeacher(marker_table(puzzles), config.seed, TeacherConfig(noise=config.teacher_noise))
    if config.teacher == "vllm":
        return vllm_teacher(config, chosen, meter)
    from rollout.teachers.openai import Endpoint, OpenAITeacher

    names = ("base_url", "temperature", "top_p", "max_response_tokens", "seed", "timeout_seconds", "retries")
    endpoint = Endpoint(
        model=str(config.model),
        key=key,
        concurrency=config.concurrency or 16,
        backoff_seconds=config.backoff_seconds,
        **{name: getattr(config, name) for name in names},
    )
    return OpenAITeacher(endpoint, meter, raw.write, say=lambda text: tqdm.write(text, file=sys.stderr))


def vllm_teacher(config: DistillConfig, puzzles: list[Puzzle], meter: Meter) -> Teacher:
    """A checkpoint, or a base checkpoint with an adapter, in a vLLM engine that holds the longest prompt and response."""
    from data.distill.hints import hinted_chat
    from rollout import Sampling
    from rollout.sync import Parcel
    from rollout.teachers.vllm import VLLMTeacher
    from rollout.vllm_engine import VLLMEngine
    from trainer.model.loading import load_tokenizer
    from trainer.policy import encode_prompt
    from trainer.ranks.world import join_world, leave_world
    from trainer.record.runfolder import read_adapter

    folder, adapter = Path(str(config.model)), None
    if (folder / "adapter_config.json").is_file():
        adapter, adapter_config = read_adapter(folder)
        folder = Path(config.base or adapter_config["base_model_name_or_path"])
    tokenizer = load_tokenizer(str(folder))
    chats = [hinted_chat(puzzle) if config.hint else puzzle.chat() for puzzle in puzzles]
    longest = max(len(encode_prompt(tokenizer, chat)) for chat in chats) + config.max_response_tokens
    context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings") or longest
    if longest > context:
        raise UserError(
            f"--max-response-tokens {config.max_response_tokens}: with the longest prompt {longest} tokens, and "
            f"{folder} takes {context}; lower it by {longest - context}"
        )
    join_world()
    lora = {name: adapter_config[name] for name in ("r", "lora_alpha", "target_modules")} if adapter else None
    batch = config.concurrency or 256
    engine = VLLMEngine(
        str(folder),
        lora=lora,
        max_model_len=longest,
        dtype=config.dtype,
        max_num_seqs=min(batch, 256),
        memory_fraction=config.memory_fraction,
    )
    if adapter:
        parcel = Parcel.of(adapter)
        engine.load_adapter(parcel, parcel.manifest(), version=1)
    top_p = 1.0 if config.top_p is None else config.top_p
    sampling = Sampling(
        n=1, max_tokens=config.max_response_tokens, temperature=config.temperature, top_p=top_p, seed=config.seed
    )
    return VLLMTeacher(
        engine,
        lambda chat: encode_prompt(tokenizer, chat),
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        sampling,
        batch,
        str(config.model),
        meter,
        leave_world,
    )


def finish(config: DistillConfig, draws: Draws, meter: Meter, ended: str, seconds: float) -> None:
    """Write the report and the accepted traces, and print both in short. Raises UserError when no trace was accepted."""
    rows = draws.rows(config.keep, config.seed)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}
    report = make_report(draws, meter, seed=config.seed, rows=len(rows), ended=ended, settings=settings)
    write_report(beside(config.out, ".report.json"), {**report, "timing": {"seconds": round(seconds, 1)}})
    print(acceptance_table(report), flush=True)
    if ended == "budget":
        click.echo(
            f"note: --budget {config.budget:g} is used up: puzzles are left, {report['puzzles'] - report['puzzles_asked']} of "
            "them never asked; raise it and add --resume",
            err=True,
        )
    if not rows:
        reasons = ", ".join(report["rejected"]) or "nothing was drawn"
        easier = "lower --teacher-noise" if config.teacher == "embedded" else "change the teacher"
        raise UserError(
            f"--puzzles {config.puzzles}: no trace was accepted ({reasons}); raise --candidates or {easier}"
        )
    write_rows(config.out, rows)
    print(json.dumps(headline(draws, config.seed)))


class Interruptible:
    """Inside it SIGTERM and SIGINT stop the teacher, which waits for what is in flight; a second signal of either kind ends the
    process at once. Either way all that came is on disk."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, teacher: Teacher, raw: RawFile, config: DistillConfig) -> None:
        self.teacher, self.raw, self.config, self.signal = teacher, raw, config, 0

    def __enter__(self) -> "Interruptible":
        self.before = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        for either in self.SIGNALS:
            signal.signal(either, signal.SIG_DFL)
        self.signal = number
        self.teacher.stop()

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Say how to go on, and leave with the exit code of the signal; engines and judges go with the process."""
        self.raw.flush()
        name = signal.Signals(self.signal).name
        click.echo(f"stopped by {name}: every response is in {self.raw.path}; add --resume to go on", err=True)
        sys.stdout.flush()
        os._exit(128 + self.signal)


class Progress:
    """Puzzles that are settled, acceptance rate and spend: a bar on a terminal, a line now and then elsewhere."""

    SECONDS = 20.0

    def __init__(self, draws: Draws, meter: Meter) -> None:
        self.draws, self.meter = draws, meter
        self.bar = tqdm(total=len(draws.by_id), desc="distill", unit="puzzle", disable=None)
        self.settled: set[str] = set()
        self.drawn = self.accepted = 0
        self.next_line = time.monotonic() + self.SECONDS

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, completion: Completion) -> None:
        """Count a completion whose verdict is in `draws`."""
        puzzle, judged = self.draws.by_id[completion.puzzle_id], self.draws.judged[completion.puzzle_id]
        self.drawn += 1
        self.accepted += judged[completion.hinted, completion.attempt][1].accepted
        if puzzle.id not in self.settled and not self.draws.wanted(puzzle):
            self.settled.add(puzzle.id)
            self.bar.update()
        money = f", {self.meter.spent + self.meter.lost:.4g} spent" if self.meter.priced else ""
        rate = f"{self.accepted} of {self.drawn} traces accepted ({self.accepted / self.drawn:.0%}){money}"
        self.bar.set_postfix_str(rate, refresh=False)
        if self.bar.disable and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + self.SECONDS
            click.echo(f"distill: {len(self.settled)} of {len(self.draws.by_id)} puzzles, {rate}", err=True)


if __name__ == "__main__":
    main()
