"""The settings of an evaluation (launch/evaluate.py), and which of them exclude one another."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.options import DTYPES, check_endpoint, check_key_env, check_numbers, check_temperature, option, settle_dtype
from data.puzzles import Puzzle
from data.status.status import NOTIFY
from eval.baselines import BASELINES
from eval.evaluation import puzzles_digest

FILES, MODEL, ENDPOINT = "Puzzles and results", "A model in vLLM", "A model behind an endpoint"
OTHERS, SAMPLING, MORE = "Saved predictions, or a baseline", "Sampling", "More measures"
"""Headings of --help."""
RANGES = {
    "at least 1": ("samples", "concurrency", "chunk", "max_response_tokens", "limit"),
    "at least 0": ("temperature",),
    "above 0 and at most 1": ("top_p", "memory_fraction"),
    "at least 0 and at most 1": ("consensus_threshold",),
}
"""What a number may be -> the settings."""
CONFIDENT_FROM = 0.5
"""Share of the valid answers from which on a voted label counts as confident."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, who answers, and what is measured."""

    puzzles: tuple[str, ...] = option(
        MISSING,
        "Puzzles, .parquet or .jsonl; repeat for several files (then OUT/<name> each, and their unweighted average).",
        section=FILES,
    )
    out: str = option(
        MISSING,
        "Folder for metrics.json, evaluation.md and predictions.jsonl. A model's answers in it are not replaced by others.",
        section=FILES,
    )
    limit: int | None = option(
        None,
        "Use only the first LIMIT puzzles of each file; of single cells the whole batches among them.",
        section=FILES,
    )
    resume: bool = option(False, "Continue a run with the same settings that was stopped.", section=FILES)
    notify: str = option("", NOTIFY, section=FILES)
    model: str | None = option(
        None,
        "Checkpoint folder, or an adapter folder (a GRPO checkpoint); with --endpoint the name of a model.",
        section=MODEL,
    )
    base: str | None = option(
        None, "Checkpoint under an adapter; default: the one that the adapter names.", section=MODEL
    )
    dtype: str = option(
        "auto", "Weights and compute; auto: bfloat16 on a GPU, float32 on a CPU.", DTYPES, section=MODEL
    )
    memory_fraction: float = option(0.85, "Share of a GPU's memory that vLLM may use.", section=MODEL)
    eager: bool = option(
        False, "vLLM on a GPU: no compiling, no CUDA graphs; it starts sooner and samples slower.", section=MODEL
    )
    chunk: int = option(256, "Puzzles that vLLM answers between two saves.", section=MODEL)
    endpoint: str | None = option(
        None, "Base URL of an OpenAI-compatible server that serves --model.", section=ENDPOINT
    )
    key_env: str = option(
        "OPENAI_API_KEY",
        "Environment variable with the endpoint's key, which is never written down.",
        section=ENDPOINT,
    )
    concurrency: int = option(8, "Requests to the endpoint at a time.", section=ENDPOINT)
    refused: str = option(
        "stop",
        "When the endpoint refuses a prompt for good (a content filter, for example): end without a result, or count "
        "the answer as invalid.",
        ("stop", "invalid"),
        section=ENDPOINT,
    )
    predictions: str | None = option(
        None,
        "Saved predictions: a .jsonl, .json or .parquet with id and prediction, or the --out folder of an evaluation.",
        section=OTHERS,
    )
    tokenizer: str | None = option(
        None, "Folder of the tokenizer that counts the tokens of saved predictions.", section=OTHERS
    )
    baseline: str | None = option(None, "A baseline instead of a model.", BASELINES, section=OTHERS)
    train: str | None = option(None, "Training puzzles that a baseline learns from.", section=OTHERS)
    samples: int = option(1, "Answers per puzzle; above 1 also pass@k and votes.", section=SAMPLING)
    consensus: bool = option(
        False,
        "With --samples: how far the one-to-one vote over the answers can be trusted, and a greedy answer of a checkpoint "
        "beside it.",
        section=SAMPLING,
    )
    consensus_threshold: float | None = option(
        None,
        "With --consensus: a cell is confident when at least this share of the valid answers gives it its label; default 0.5.",
        section=SAMPLING,
    )
    temperature: float | None = option(
        None, "Default: 0 (greedy) for one answer, 1 for several answers.", section=SAMPLING
    )
    top_p: float = option(1.0, "Nucleus that is sampled from.", section=SAMPLING)
    max_response_tokens: int = option(3000, "Longest response.", section=SAMPLING)
    seed: int = option(0, "Seed of samples, intervals and baselines.", section=SAMPLING)
    compare: str | None = option(
        None,
        "Predictions of another model for the same puzzles: a .jsonl, .json or .parquet, or an --out folder.",
        section=MORE,
    )
    medcpt: str | None = option(
        None, "Encoder folder (MedCPT-Query-Encoder) for the similarity of labels (Table 12).", section=MORE
    )

    @property
    def used_temperature(self) -> float:
        """The temperature, or its default for this number of samples."""
        return float(self.samples > 1) if self.temperature is None else self.temperature

    @property
    def confident_from(self) -> float | None:
        """The threshold of --consensus; None without it."""
        if not self.consensus:
            return None
        return CONFIDENT_FROM if self.consensus_threshold is None else self.consensus_threshold

    @property
    def asks_greedily(self) -> bool:
        """Is each puzzle answered once more, greedily? An endpoint is not: its answers are paid for."""
        return self.consensus and self.model is not None and self.endpoint is None

    def __post_init__(self) -> None:
        """Raises UserError for options that do not go together."""
        given = [name for name in ("model", "predictions", "baseline") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError("give either --model, --predictions or --baseline")
        needs = {"endpoint": "model", "base": "model", "train": "baseline", "tokenizer": "predictions"}
        for name, needed in needs.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise UserError(f"--{name} goes with --{needed}; give that too, or leave it out")
        if self.endpoint and self.base:
            raise UserError("--base is for an adapter folder, not for a model behind --endpoint: leave one out")
        check_key_env(self.key_env)
        if self.endpoint:
            check_endpoint("--endpoint", self.endpoint)
        if self.model is None and (self.samples > 1 or self.resume):
            raise UserError("--samples and --resume are for a --model; leave them out")
        if self.consensus and self.baseline:
            raise UserError("--consensus is for several answers to a puzzle, and a baseline gives one: leave it out")
        if self.consensus and self.model and self.samples < 2:
            raise UserError("--consensus needs several answers to a puzzle: give --samples 8, for example")
        if self.consensus_threshold is not None and not self.consensus:
            raise UserError("--consensus-threshold goes with --consensus; give that too, or leave it out")
        if self.model and not self.endpoint:
            settle_dtype(self)
        check_numbers(self, RANGES)
        check_temperature(self.temperature)
        if self.samples > 1 and self.temperature == 0:
            raise UserError("--samples above 1 with --temperature 0 gives the same answer again: raise --temperature")
        if len({Path(path).stem for path in self.puzzles}) < len(self.puzzles):
            raise UserError("two --puzzles files have the same name, and results go to OUT/<name>: evaluate them apart")


def settings_of(config: EvaluateConfig, whole_file: list[Puzzle], model_files: str | None) -> dict[str, Any]:
    """Everything that the answers depend on. It holds no key.

    It goes into metrics.json, and decides whether a run can be resumed.

    whole_file: all puzzles of the file, so that --limit may grow under --resume. model_files: a fingerprint of a local
    model.
    """
    sampling = ("samples", "temperature", "top_p", "max_response_tokens", "seed")
    local = config.model is not None and config.endpoint is None
    names_of = {
        "model": ("model", "base", "dtype", "chunk", *sampling) if local else ("model", "endpoint", *sampling),
        "baseline": ("baseline", "train", "seed"),
        "predictions": ("predictions", "tokenizer"),
    }
    (names,) = (names for kind, names in names_of.items() if getattr(config, kind) is not None)
    settings = {name: getattr(config, name) for name in names}
    if "temperature" in settings:
        settings["temperature"] = config.used_temperature
    settings |= {"greedy": True} if config.asks_greedily else {}  # the rows hold one answer more
    return settings | ({"model_files": model_files} if local else {}) | {"puzzles_digest": puzzles_digest(whole_file)}
