"""Reasoning traces by rejection sampling, from the embedded teacher, an OpenAI-compatible endpoint, or a checkpoint.

    python launch/distill.py --puzzles train.parquet --out traces.jsonl
    python launch/distill.py --puzzles train.parquet --out traces.jsonl --teacher openai --model o3 \\
        --price-in 2 --price-out 8 --budget 50        # the key from $OPENAI_API_KEY
    python launch/distill.py --puzzles train.parquet --out traces.jsonl --teacher openai --model qwen \\
        --base-url http://127.0.0.1:8000/v1           # vllm serve
    python launch/distill.py --puzzles train.parquet --out traces.jsonl --teacher vllm --model checkpoints/qwen
    ... --workflow consensus      # one trace of what the candidates say together (data/distill/workflow.py)

Beside traces.jsonl it writes traces.raw.jsonl, which holds every response before it is judged
(data/distill/responses.py), and traces.report.json. The same command with --resume continues after a kill; a response
on disk is never requested again. A run that ends by itself, by SIGTERM or by Ctrl-C first waits for the responses in
flight. Only what is in flight at a `kill -9`, or at a second signal, may be paid for twice.
"""

import functools
import json
import os
import sys

import click
from tqdm import tqdm

from data.distill.distill import Teacher
from data.distill.embedded_teacher import EmbeddedTeacher, TeacherConfig, marker_table
from data.distill.hints import hinted_chat
from data.distill.lookups import Tables
from data.distill.meter import Meter
from data.distill.responses import RawFile
from data.distill.session import run_distillation
from data.distill.settings import DistillConfig
from data.distill.workflow import largest_requests
from data.errors import UserError
from data.puzzles import Puzzle
from launch.options import command
from reward.judge import TraceJudge


@command(DistillConfig)
def main(config: DistillConfig) -> None:
    """Draw up to --candidates traces per puzzle until --stop-at are accepted.

    A trace is accepted when its format is valid and every label is right; --accept sets another rule.
    """
    if config.keep != "first" and config.stop_at == 1 and config.workflow == "none" and not config.resume:
        click.echo(
            f"note: --keep {config.keep} has nothing to choose from, since --stop-at 1 ends a puzzle with its first "
            "accepted trace; --stop-at 0 draws all --candidates",
            err=True,
        )
    key = take_key(config)
    judge = TraceJudge(config.accept, config.accept_at, config.reward_workers, config.reward_seconds)
    run_distillation(config, judge, functools.partial(make_teacher, config, key))


def take_key(config: DistillConfig) -> str:
    """The endpoint's key, removed from the environment so that no process started later inherits it.

    Raises UserError, never with the key in it, when the key is malformed, or missing for an endpoint on another
    machine.
    """
    if config.teacher != "openai":
        return ""
    from rollout.teachers.openai import is_loopback, read_key

    key = read_key(config.key_env)
    os.environ.pop(config.key_env, None)
    if not key and not is_loopback(config.base_url):
        raise UserError(f"--base-url {config.base_url}: set the environment variable {config.key_env} to its key")
    return key or "none"


def make_teacher(
    config: DistillConfig, key: str, puzzles: list[Puzzle], chosen: list[Puzzle], meter: Meter, raw: RawFile
) -> Teacher:
    """The teacher of --teacher.

    puzzles: of the whole file, from which the embedded teacher learns markers. chosen: the puzzles that will be asked.
    """
    if config.teacher == "embedded":
        writes = TeacherConfig(noise=config.teacher_noise, voice=config.teacher_voice, glance=config.teacher_glance)
        return EmbeddedTeacher(marker_table(puzzles), config.seed, writes)
    if config.teacher == "vllm":
        return vllm_teacher(config, longest_chats(config, puzzles, chosen), meter)
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


def longest_chats(config: DistillConfig, puzzles: list[Puzzle], chosen: list[Puzzle]) -> list[list[dict[str, str]]]:
    """Chats of which one is as long as any that will be asked. puzzles: of the whole file. chosen: those asked about."""
    workflow, tables = config.used_workflow, Tables(puzzles)
    if workflow is not None:
        return [request.chat() for puzzle in chosen for request in largest_requests(workflow, puzzle, tables)]
    return [hinted_chat(puzzle) if config.hint else puzzle.chat() for puzzle in chosen]


def vllm_teacher(config: DistillConfig, chats: list[list[dict[str, str]]], meter: Meter) -> Teacher:
    """A checkpoint, or an adapter on one, in a vLLM engine with room for the longest prompt of `chats` and a response."""
    from rollout import Sampling
    from rollout.teachers.vllm import VLLMTeacher
    from trainer.model.opening import open_checkpoint
    from trainer.model.serving import start_engine
    from trainer.ranks.world import leave_world

    opened = open_checkpoint(str(config.model), config.base)
    for note in opened.chat.notes:
        click.echo(f"note: {note}", err=True)
    longest = max(len(opened.chat.prompt_ids(chat)) for chat in chats) + config.max_response_tokens
    model = json.loads((opened.base / "config.json").read_text())
    context = model.get("max_position_embeddings") or longest
    if longest > context:
        raise UserError(
            f"--max-response-tokens {config.max_response_tokens}: with the longest prompt {longest} tokens, and "
            f"{opened.base} takes {context}; lower it by {longest - context}"
        )
    batch = config.concurrency or 256
    engine = start_engine(
        opened,
        longest=longest,
        dtype=config.dtype,
        memory_fraction=config.memory_fraction,
        sequences=batch,
        eager=config.eager,
    )
    top_p = 1.0 if config.top_p is None else config.top_p
    sampling = Sampling(
        n=1,
        max_tokens=config.max_response_tokens,
        temperature=config.temperature,
        top_p=top_p,
        seed=config.seed,
        stop_ids=opened.chat.stop_ids,
    )
    return VLLMTeacher(engine, opened.chat, sampling, batch, str(config.model), meter, leave_world)


if __name__ == "__main__":
    main()
