"""Numbers outside the range of their setting are refused before anything starts, in one sentence that says why."""

import dataclasses
import math

import pytest

from data.distill.settings import DistillConfig
from data.errors import UserError
from data.options import check_numbers
from eval.settings import EvaluateConfig
from tests.helpers.commands import run_command
from trainer.config import GrpoConfig
from trainer.ppo.settings import PpoConfig
from trainer.sft.settings import SftConfig

NEEDED = {
    GrpoConfig: {},
    PpoConfig: {},
    SftConfig: {"traces": "t.jsonl", "model": "m", "out": "o"},
    EvaluateConfig: {"puzzles": ("p.jsonl",), "out": "o", "model": "m"},
    DistillConfig: {"puzzles": "p.jsonl", "out": "o.jsonl", "teacher": "vllm", "model": "m"},
}
OPENAI = {"teacher": "openai", "price_in": 1.0, "price_out": 1.0}
INF, NAN = math.inf, math.nan

# (setting, values that are refused, what is said of them, values that are fine)
TRAINING = [
    ("lora_rank", [-1], "must be at least 0", [0, 1]),
    ("lora_alpha", [0.0, -8.0], "must be above 0: the adapter's update is multiplied by it", [0.5]),
    ("warmup_steps", [-1], "must be at least 0", [0]),
    ("grad_clip", [0.0, -1.0], "must be above 0", [1e-3]),
    ("micro_tokens", [0, -5], "must be at least 1", [1]),
    ("memory_fraction", [0.0, 1.5], "must be above 0 and at most 1", [1.0]),
    ("keep_checkpoints", [0], "must be at least 1", [1]),
    ("hang_seconds", [0.0], "must be above 0", [0.1]),
    ("lr", [0.0, -1e-6], "must be above 0", [1e-9]),
    ("weight_decay", [-0.1], "must be at least 0", [0.0]),
]
ONLINE = [
    *TRAINING,
    (
        "temperature",
        [0.009, 0.0, -1.0],
        "must be at least 0.01: vLLM samples at 0.01 what is lower, and the",
        [0.01],
    ),
    ("top_p", [0.0, 1.5, -0.1], "must be above 0 and at most 1", [0.1, 1.0]),
    ("clip_low", [2.0, -0.1], "must be at least 0 and at most 1: no ratio is below 0", [0.0, 1.0]),
    ("clip_high", [-0.1], "must be at least 0", [0.0, 5.0]),
    ("dual_clip", [1.0, 0.5, -3.0], "must be above 1: it bounds what the clip lets through", [1.01, None]),
    ("beta", [-1.0], "must be at least 0: a negative weight would pay for leaving the reference", [0.0]),
    ("correction_cap", [0.0, -1.0], "must be above 0", [0.5]),
    ("correction_floor", [-0.1], "must be at least 0", [0.0, 2.0]),
    ("correction_floor", [2.5], "above --correction-cap 2.0, so no weight is between them; lower it", []),
    ("decay_steps", [-1], "must be at least 0", [0, 100, 101]),
    ("validate_every", [0], "must be at least 1", [1]),
    ("overlong_buffer", [1.0, -0.1], "must be at least 0 and below 1", [0.0, 0.9]),
    ("steps", [0], "must be at least 1", [1]),
    ("prompts_per_step", [0], "must be at least 1", [1]),
    ("max_prompt_tokens", [0], "must be at least 1", [1]),
    ("max_response_tokens", [0], "must be at least 1", [1]),
    ("sampler_ranks", [0], "must be at least 1", [1]),
    ("tensor_parallel", [0], "must be at least 1", [1]),
    ("save_every", [0], "must be at least 1", [1]),
    ("max_staleness", [-1], "must be at least 0", [0]),
    ("restart_samplers", [-1], "must be at least 0", [0]),
    ("sync_port", [-1, 65536], "must be at least 0 and at most 65535", [65535]),
    ("nodes", [-1], "must be at least 0", [0]),
    ("ranks_per_node", [-1], "must be at least 0", [0]),
    ("rank_gib", [-0.5], "must be at least 0", [0.0]),
    ("reward_workers", [-1], "must be at least 0", [0]),
    ("reward_seconds", [0.0], "must be above 0", [0.1]),
]
RANGES = {
    GrpoConfig: [
        *ONLINE,
        (
            "advantage_eps",
            [0.0, -1e-6, 1e-13],
            "must be at least 1e-12: a group of equal rewards would divide",
            [1e-12],
        ),
        ("group_size", [1, 0], "must be at least 2: a response alone has none to be compared with, and", [2]),
        ("updates_per_batch", [0], "must be at least 1", [1]),
        ("oversample", [0], "must be at least 1", [1]),
        ("distill_failures", [-0.1], "must be at least 0", [0.0, 2.0]),
    ],
    PpoConfig: [
        *ONLINE,
        ("group_size", [0], "must be at least 1", [1]),
        ("epochs", [0], "must be at least 1", [1]),
        ("minibatches", [0], "must be at least 1", [1]),
        ("gamma", [-0.1, 1.1], "must be at least 0 and at most 1", [0.0, 1.0]),
        ("lam", [-0.1, 1.1], "must be at least 0 and at most 1", [0.0, 1.0]),
        ("critic_lr", [0.0, -1e-6], "must be above 0", [1e-9]),
        ("critic_warmup", [-1], "must be at least 0", [0]),
        ("value_clip", [0.0], "must be above 0", [0.2]),
        ("kl_target", [0.0], "must be above 0", [0.1]),
        ("kl_horizon", [0], "must be at least 1", [1]),
    ],
    SftConfig: [
        *TRAINING,
        ("epochs", [0], "must be at least 1", [1]),
        ("batch_size", [0], "must be at least 1", [1]),
        ("max_tokens", [0], "must be at least 1", [1]),
        ("holdout", [1.0, -0.1], "must be at least 0 and below 1", [0.0, 0.5]),
        ("eval_puzzles", [0], "must be at least 1", [1]),
        ("eval_response_tokens", [0], "must be at least 1", [1]),
        ("patience", [-1], "must be at least 0", [0]),
        ("save_every", [-1], "must be at least 0", [0]),
        ("eval_every", [-1], "must be at least 0", [0]),
        ("stop_loss", [-0.1], "must be at least 0", [0.0]),
    ],
    EvaluateConfig: [
        ("temperature", [-1.0], "must be at least 0", [0.0, 0.01, None]),
        ("temperature", [0.009], "vLLM samples at 0.01 what is below; give 0 (greedy), or at least 0.01", []),
        ("top_p", [0.0, 1.5], "must be above 0 and at most 1", [0.1, 1.0]),
        ("memory_fraction", [0.0, 1.5], "must be above 0 and at most 1", [1.0]),
        ("samples", [0], "must be at least 1", [1]),
        ("concurrency", [0], "must be at least 1", [1]),
        ("chunk", [0], "must be at least 1", [1]),
        ("max_response_tokens", [0], "must be at least 1", [1]),
        ("limit", [0], "must be at least 1", [1, None]),
        ("consensus_threshold", [-0.1, 1.5], "must be at least 0 and at most 1", [0.0, 1.0, None]),
    ],
    DistillConfig: [
        ("temperature", [-1.0], "must be at least 0", [0.0, 0.01]),
        ("temperature", [0.009], "vLLM samples at 0.01 what is below; give 0 (greedy), or at least 0.01", []),
        ("top_p", [0.0, 1.5], "must be above 0 and at most 1", [0.1, None]),
        ("memory_fraction", [0.0, 1.5], "must be above 0 and at most 1", [1.0]),
        ("candidates", [0], "must be at least 1", [1]),
        ("hint_candidates", [0], "must be at least 1", [4]),
        ("max_response_tokens", [0], "must be at least 1", [1]),
        ("concurrency", [0], "must be at least 1", [1, None]),
        ("limit", [0], "must be at least 1", [1]),
        ("reward_workers", [0], "must be at least 1", [1]),
        ("reward_seconds", [0.0], "must be above 0", [1.0]),
        ("stop_at", [-1], "must be at least 0", [0]),
        ("skip", [-1], "must be at least 0", [0]),
        ("retries", [-1], "must be at least 0", [0]),
        ("timeout_seconds", [0.0], "must be above 0", [1.0]),
        ("backoff_seconds", [-1.0], "must be at least 0", [0.0]),
        ("price_in", [-1.0], "must be at least 0", [0.0]),
        ("price_out", [-1.0], "must be at least 0", [0.0]),
        ("budget", [-1.0], "must be at least 0", [0.0]),
        ("comparisons", [0], "must be at least 1", [1]),
        ("lookups", [0], "must be at least 1", [1]),
        ("teacher_noise", [-1.0], "must be at least 0", [0.0]),
        ("teacher_glance", [-0.1, 1.5], "must be at least 0 and at most 1", [0.0, 1.0]),
    ],
}
UNBOUNDED = {"seed", "accept_at"}
"""Every finite number will do."""
ROWS = [(config, *row) for config, rows in RANGES.items() for row in rows]


def made(config: type, name: str, value: object):
    needed = NEEDED[config]
    if name in ("retries", "timeout_seconds", "backoff_seconds", "price_in", "price_out", "budget"):
        needed = {**needed, **OPENAI}
    if name in ("teacher_noise", "teacher_glance"):
        needed = {**needed, "teacher": "embedded", "model": None}
    if name in ("comparisons", "lookups"):
        needed = {**needed, "workflow": "tools"}
    if name == "consensus_threshold":
        needed = {**needed, "samples": 2, "consensus": True}
    return config(**{**needed, name: value})


@pytest.mark.parametrize(
    ("config", "name", "refused", "says", "fine"), ROWS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_range_of_a_setting(config, name, refused, says, fine):
    flag = "--" + name.replace("_", "-")
    for value in refused:
        with pytest.raises(UserError) as caught:
            made(config, name, value)
        assert str(caught.value).startswith(f"{flag} {value}: {says}") and "\n" not in str(caught.value)
    for value in fine:
        assert getattr(made(config, name, value), name) == value


@pytest.mark.parametrize("config", NEEDED, ids=lambda config: config.__name__)
def test_every_number_has_a_range_and_is_finite(config):
    numbers = [f for f in dataclasses.fields(config) if {"int", "float"} & set(str(type_name(f)).split(" | "))]
    assert {field.name for field in numbers} == {row[0] for row in RANGES[config]} | UNBOUNDED & {
        f.name for f in numbers
    }
    for field in numbers:
        for value in (INF, -INF, NAN) if "float" in type_name(field) else ():
            with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} {value}: must be a finite number"):
                made(config, field.name, value)


def type_name(field: dataclasses.Field) -> str:
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def test_how_a_range_is_read():
    @dataclasses.dataclass
    class Config:
        share: float = 0.0
        limit: int | None = None

    for range_of, inside, outside in (
        ("above 0 and at most 1", (1e-9, 1), (0, -1, 1.1)),
        ("at least 0 and below 1", (0, 0.5), (1, -0.1)),
        ("at least 2: above 5 would be better", (2, 3), (1.9,)),
    ):
        for value in inside:
            check_numbers(Config(share=value), {range_of: ("share", "limit", "not there")})
        for value in outside:
            with pytest.raises(UserError, match=f"--share {value}: must be {range_of}"):
                check_numbers(Config(share=value), {range_of: ("share",)})


def test_the_command_says_it_and_ends_with_2(tmp_path):
    for flags, says in (
        (
            ["--temperature", 0.001],
            "Error: --temperature 0.001: must be at least 0.01: vLLM samples at 0.01 what is lower",
        ),
        (["--group-size", 1], "Error: --group-size 1: must be at least 2: a response alone"),
        (["--beta", "nan"], "Error: --beta nan: must be a finite number"),
    ):
        done = run_command("grpo", "--out", tmp_path / "run", *flags)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()
