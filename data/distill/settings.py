"""The settings of a distillation (launch/distill.py), and which of them exclude one another."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.distill.distill import KEEP_RULES
from data.distill.embedded_teacher import VOICES
from data.distill.responses import prompts_hash
from data.distill.workflow import WORKFLOWS, Workflow
from data.errors import UserError
from data.files import model_hashes
from data.options import (
    DTYPES,
    check_endpoint,
    check_key_env,
    check_numbers,
    check_temperature,
    flag_of,
    option,
    settle_dtype,
)
from data.puzzles import Puzzle
from data.status.status import NOTIFY

TEACHERS = ("embedded", "openai", "vllm")
OF_TEACHER = {
    "teacher_noise": ("embedded",),
    "teacher_voice": ("embedded",),
    "teacher_glance": ("embedded",),
    "model": ("openai", "vllm"),
    "base": ("vllm",),
    "dtype": ("vllm",),
    "memory_fraction": ("vllm",),
    "eager": ("vllm",),
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
"""{setting: the teachers that have it}; all teachers have the settings that are not listed."""
MEANING = ("model", "base", "dtype", "temperature", "top_p", "max_response_tokens", "teacher_noise")
"""Settings that decide what a response is, besides teacher, seed and puzzles. They may not change under --resume."""
NEWER = {"teacher_voice": "notes", "teacher_glance": 0.78}
"""More of them, with the values that raw files from before there were such settings were made with."""
RANGES = {
    "at least 1": (
        *("candidates", "hint_candidates", "max_response_tokens", "concurrency", "limit", "reward_workers"),
        *("comparisons", "lookups"),
    ),
    "at least 0": (
        *("stop_at", "temperature", "retries", "backoff_seconds", "budget", "price_in", "price_out", "teacher_noise"),
        "skip",
    ),
    "above 0": ("timeout_seconds", "reward_seconds"),
    "above 0 and at most 1": ("top_p", "memory_fraction"),
    "at least 0 and at most 1": ("teacher_glance",),
}
"""What a number may be -> the settings."""
FILES, TEACHER, ENDPOINT = "Puzzles and traces", "The teacher", "An endpoint (--teacher openai)"
CANDIDATES, SAMPLING, MONEY, JUDGE = "Candidates", "Sampling", "Money (--teacher openai)", "What is accepted"
"""Headings of --help."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Which puzzles, which teacher, how many candidates, and what is accepted."""

    puzzles: str = option(dataclasses.MISSING, "Training puzzles, .parquet or .jsonl.", section=FILES)
    out: str = option(
        dataclasses.MISSING, "JSONL to write: accepted traces, one row per puzzle (see --keep).", section=FILES
    )
    notify: str = option("", NOTIFY, section=FILES)
    teacher: str = option(
        "embedded", "embedded: no model; openai: an endpoint; vllm: a checkpoint.", TEACHERS, section=TEACHER
    )
    model: str | None = option(
        None, "Name of the endpoint's model; vllm: checkpoint folder, or adapter folder.", section=TEACHER
    )
    base: str | None = option(
        None, "vllm: checkpoint under an adapter; default: the one that the adapter names.", section=TEACHER
    )
    dtype: str = option(
        "auto", "vllm: weights and compute; auto: bfloat16 on a GPU, float32 on a CPU.", DTYPES, section=TEACHER
    )
    memory_fraction: float = option(0.85, "vllm: share of a GPU's memory that the engine may use.", section=TEACHER)
    eager: bool = option(
        False, "vllm on a GPU: no compiling, no CUDA graphs; it starts sooner and samples slower.", section=TEACHER
    )
    base_url: str = option("https://api.openai.com/v1", "URL of the endpoint, up to /v1.", section=ENDPOINT)
    key_env: str = option("OPENAI_API_KEY", "Environment variable that holds the key.", section=ENDPOINT)
    candidates: int = option(8, "Traces drawn per puzzle before giving up (k of the paper).", section=CANDIDATES)
    stop_at: int = option(
        1,
        "Accepted traces after which no more are requested for a puzzle; 0 draws all --candidates.",
        section=CANDIDATES,
    )
    keep: str = option(
        "first",
        "Which of a puzzle's accepted traces are kept (see --stop-at); shortest counts characters.",
        KEEP_RULES,
        section=CANDIDATES,
    )
    hint: bool = option(
        False,
        "Ask again, with the answer hinted, for puzzles whose every candidate was rejected.",
        section=CANDIDATES,
    )
    hint_candidates: int = option(
        4, "Traces drawn with the answer hinted; with --workflow, with the final assignment.", section=CANDIDATES
    )
    workflow: str = option(
        "none",
        "What is made of the candidates before one is kept: their one-to-one vote (consensus), then also a comparison of "
        "two rivals (debate) or a look into tables (tools).",
        WORKFLOWS,
        section=CANDIDATES,
    )
    comparisons: int = option(
        3,
        "--workflow debate: answers that compare the two rivals; tools: answers that may look something up.",
        section=CANDIDATES,
    )
    lookups: int = option(4, "--workflow tools: most requests to the tables before an answer.", section=CANDIDATES)
    temperature: float = option(1.0, "Sampling temperature.", section=SAMPLING)
    top_p: float | None = option(
        None, "Nucleus of the sampling; default: the endpoint's own; vllm: 1.", section=SAMPLING
    )
    max_response_tokens: int = option(4096, "Longest response, reasoning included.", section=SAMPLING)
    concurrency: int | None = option(
        None, "openai: most requests in flight [16]; vllm: prompts sampled together [256].", section=SAMPLING
    )
    timeout_seconds: float = option(600.0, "Time limit for a whole response.", section=ENDPOINT)
    retries: int = option(8, "Further tries on 408/409/429/5xx, time-outs and broken responses.", section=ENDPOINT)
    backoff_seconds: float = option(
        1.0, "Wait before the second try; it doubles with each try, up to a minute.", section=ENDPOINT
    )
    price_in: float | None = option(None, "Currency units per million prompt tokens.", section=MONEY)
    price_out: float | None = option(None, "Currency units per million response tokens.", section=MONEY)
    budget: float | None = option(
        None,
        "Most to spend, in currency units, over all resumed runs; 0 requests nothing and judges what is there.",
        section=MONEY,
    )
    accept: str = option(
        "reward.cellpuzzles:batch_reward",
        "Reward that judges a trace, as --reward of launch/grpo.py.",
        section=JUDGE,
    )
    accept_at: float = option(
        1.0,
        "Lowest reward that is accepted; a kept trace with wrong labels has the true ones as column answer.",
        section=JUDGE,
    )
    reward_workers: int = option(1, "Processes that score.", section=JUDGE)
    reward_seconds: float = option(60.0, "Time limit per trace.", section=JUDGE)
    resume: bool = option(False, "Use the responses that are on disk, and request the others.", section=FILES)
    skip: int = option(0, "Leave out the first SKIP puzzles; --limit counts from there.", section=FILES)
    limit: int | None = option(None, "Use only the first LIMIT puzzles.", section=FILES)
    teacher_noise: float = option(
        0.5, "embedded: noise of its judgement; one specific marker counts about 1.", section=TEACHER
    )
    teacher_voice: str = option(
        "notes", "embedded: keywords for a model from scratch, or plain English.", VOICES, section=TEACHER
    )
    teacher_glance: float = option(
        0.78, "embedded: share of traces that name the labels and cite no marker.", section=TEACHER
    )
    seed: int = option(0, "Seed of every random choice.", section=SAMPLING)

    def __post_init__(self) -> None:
        """Raises UserError for settings out of range, or that do not go together."""
        for field in dataclasses.fields(self):
            teachers = OF_TEACHER.get(field.name, TEACHERS)
            if self.teacher not in teachers and getattr(self, field.name) != field.default:
                raise UserError(f"{flag_of(field.name)} needs --teacher {' or '.join(teachers)}, not {self.teacher}")
        if self.teacher != "embedded" and not self.model:
            raise UserError(f"--teacher {self.teacher} needs --model")
        if self.teacher == "openai":
            check_endpoint("--base-url", self.base_url)
            check_key_env(self.key_env)
        if Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise UserError(f"--out {self.out}: name a file that ends in .jsonl or .parquet")
        self._refuse_half_a_workflow()
        if self.budget is not None and (self.price_in is None or not self.price_out):
            raise UserError("--budget needs --price-in and --price-out, per million tokens")
        if self.teacher == "vllm":
            settle_dtype(self)
        check_numbers(self, RANGES)
        check_temperature(self.temperature)
        default = type(self).hint_candidates
        if self.workflow == "none" and not self.hint and self.hint_candidates != default:
            raise UserError("--hint-candidates goes with --hint or --workflow; give one of them too, or leave it out")

    def _refuse_half_a_workflow(self) -> None:
        """Raises UserError for settings that do not go with the workflow."""
        if self.workflow != "none" and self.hint:
            raise UserError(f"--hint shows the right answer, --workflow {self.workflow} finds its own: leave one out")
        if self.workflow != "none" and self.candidates < 2:
            raise UserError(
                f"--candidates {self.candidates}: --workflow {self.workflow} needs at least 2 answers that vote"
            )
        if self.workflow != "none" and self.stop_at > 1:
            raise UserError(f"--workflow {self.workflow} needs all --candidates: leave --stop-at out")
        for name, kinds in (("comparisons", ("debate", "tools")), ("lookups", ("tools",))):
            (field,) = (field for field in dataclasses.fields(self) if field.name == name)
            if self.workflow not in kinds and getattr(self, name) != field.default:
                raise UserError(
                    f"{flag_of(name)} goes with --workflow {' or '.join(kinds)}; give that too, or leave it out"
                )

    @property
    def raw_file(self) -> Path:
        """The file of all responses: traces.jsonl -> traces.raw.jsonl."""
        return Path(self.out).with_suffix(".raw.jsonl")

    @property
    def report_file(self) -> Path:
        """The file of the report: traces.jsonl -> traces.report.json."""
        return Path(self.out).with_suffix(".report.json")

    def refuse_overwriting(self) -> None:
        """Raises UserError when a file to write is the file of puzzles, or --out is there without its responses."""
        for written in (Path(self.out), self.raw_file, self.report_file):
            if written.exists() and os.path.exists(self.puzzles) and os.path.samefile(written, self.puzzles):
                raise UserError(
                    f"--out {self.out}: would write {written} over --puzzles {self.puzzles}; name another file"
                )
        if not self.resume and Path(self.out).exists() and not self.raw_file.exists():
            raise UserError(f"--out {self.out}: is there without its responses ({self.raw_file}); name another file")

    @property
    def used_workflow(self) -> Workflow | None:
        """The workflow and how often it asks; None without one."""
        if self.workflow == "none":
            return None
        return Workflow(
            kind=self.workflow, comparisons=self.comparisons, lookups=self.lookups, writes=self.hint_candidates
        )

    def shown(self) -> dict[str, Any]:
        """The settings as the report shows them; those of a workflow only with one."""
        left_out = {"resume", "notify"} | ({"workflow", "comparisons", "lookups"} if self.workflow == "none" else set())
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def meaning(self, puzzles: list[Puzzle]) -> dict[str, Any]:
        """What decides the content of a response: the first line of the raw file. puzzles: of the whole file."""
        used = {name: getattr(self, name) for name in MEANING if self.teacher in OF_TEACHER[name]}
        used |= {name: getattr(self, name) for name, before in NEWER.items() if getattr(self, name) != before}
        if self.teacher == "vllm":  # another model may lie under the same name
            files = [model_hashes(place) for place in (self.model, self.base) if place]
            used["model_files"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
        return {"teacher": self.teacher, **used, "seed": self.seed, "prompts": prompts_hash(puzzles)}
