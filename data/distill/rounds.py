"""The settings of a self-distillation (launch/selfdistill.py): its answers are options of a distillation, its training of SFT."""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from data.distill.settings import DistillConfig
from data.distill.workflow import WORKFLOWS
from data.errors import UserError
from data.files import model_hashes, sha256, write_whole
from data.options import DTYPES, flag_of, option, settle_dtype
from data.status.status import NOTIFY

FILES, ANSWERS, TRAINING = "Model, puzzles and rounds", "The answers of a round", "The training of a round"
"""Headings of --help."""
OF_ANSWERS = (
    *("candidates", "stop_at", "keep", "temperature", "accept", "accept_at", "limit", "dtype"),
    "max_response_tokens",
)
"""Settings that are options of launch/distill.py too."""
OF_WORKFLOW = ("workflow", "comparisons", "lookups")
"""More of them; written down only where there is a workflow."""
LATER = (*OF_WORKFLOW, "new_puzzles")
"""Settings that older versions did not write down; they are not written down where they have no effect."""
OF_TRAINING = ("epochs", "batch_size", "lr", "lora_rank", "lora_alpha", "dtype")
"""Settings that are options of launch/sft.py too."""


@dataclass(frozen=True, kw_only=True)
class SelfDistillConfig:
    model: str = option(MISSING, "Checkpoint folder of the first teacher.", section=FILES)
    puzzles: str = option(MISSING, "Puzzles to answer, .parquet or .jsonl.", section=FILES)
    test: str | None = option(None, "Held-out puzzles on which every round is evaluated (greedy).", section=FILES)
    out: str = option(MISSING, "Folder of the rounds; finished stages in it are not run again.", section=FILES)
    rounds: int = option(2, "Times that the model teaches itself.", section=FILES)
    student: str = option(
        "teacher",
        "What each round trains: its teacher, or the first model again.",
        ("teacher", "first"),
        section=FILES,
    )
    candidates: int = option(4, "Answers per puzzle and round.", section=ANSWERS)
    stop_at: int = option(0, "Stop answering a puzzle after this many right answers; 0: never.", section=ANSWERS)
    keep: str = option("random", "Which right answers train.", ("first", "shortest", "random", "all"), section=ANSWERS)
    workflow: str = option(
        "none", "What is made of the answers before one trains, as in launch/distill.py.", WORKFLOWS, section=ANSWERS
    )
    comparisons: int = option(3, "As in launch/distill.py.", section=ANSWERS)
    lookups: int = option(4, "As in launch/distill.py.", section=ANSWERS)
    hint: bool = option(False, "Ask again, with the answer hinted, where no answer was right.", section=ANSWERS)
    temperature: float = option(1.0, "Sampling temperature.", section=ANSWERS)
    accept: str = option(
        "reward.cellpuzzles:batch_reward", "Reward that accepts an answer, by import path.", section=ANSWERS
    )
    accept_at: float = option(1.0, "Lowest reward of an accepted answer.", section=ANSWERS)
    limit: int | None = option(None, "Use only the first LIMIT puzzles.", section=FILES)
    new_puzzles: bool = option(
        False, "Let each round answer the next LIMIT puzzles, and not the first ones again.", section=FILES
    )
    max_response_tokens: int = option(3000, "Longest answer.", section=ANSWERS)
    epochs: int = option(1, "Passes over the accepted answers of a round.", section=TRAINING)
    batch_size: int = option(128, "Answers per optimizer step.", section=TRAINING)
    lr: float = option(5e-5, "Peak learning rate of a round.", section=TRAINING)
    lora_rank: int = option(256, "LoRA rank; 0 trains every weight.", section=TRAINING)
    lora_alpha: float = option(512.0, "LoRA alpha.", section=TRAINING)
    dtype: str = option(
        "auto",
        "Weights and compute; auto: bfloat16 on a GPU, float32 on a CPU or where every weight is trained.",
        DTYPES,
        section=TRAINING,
    )
    eager: bool = option(
        False, "vLLM on a GPU: no compiling, no CUDA graphs; it starts sooner and samples slower.", section=ANSWERS
    )
    eval_limit: int | None = option(None, "Evaluate on the first EVAL_LIMIT held-out puzzles only.", section=FILES)
    seed: int = option(0, "Seed of every random choice.", section=FILES)
    notify: str = option("", NOTIFY, section=FILES)

    def __post_init__(self) -> None:
        settle_dtype(self, every_weight=not self.lora_rank)
        # refuses what the answers of a round would be refused for, before anything runs
        DistillConfig(puzzles=self.puzzles, out="traces.jsonl", teacher="vllm", hint=self.hint, **self.answers())
        if self.workflow != "none" and self.stop_at:
            raise UserError(f"--workflow {self.workflow} needs all --candidates: leave --stop-at out")
        if self.new_puzzles and self.limit is None:
            raise UserError("--new-puzzles: say with --limit how many puzzles a round answers")

    def skipped(self, number: int) -> int | None:
        """Puzzles that round `number` (from 1) leaves out, since earlier rounds answered them."""
        return (number - 1) * self.limit if self.new_puzzles and self.limit else None

    def refuse_too_few(self, n_puzzles: int) -> None:
        """Raises UserError when the file has too few puzzles for new ones in every round."""
        last = self.skipped(self.rounds + 1)
        if last and last > n_puzzles:
            raise UserError(
                f"--new-puzzles: {self.rounds} rounds of {self.limit} answer {last:,} puzzles, and {self.puzzles} holds "
                f"{n_puzzles:,}; lower --limit or --rounds"
            )

    def answers(self) -> dict[str, Any]:
        """The settings of a round's answers, as launch/distill.py takes them."""
        return {name: getattr(self, name) for name in ("model", *OF_ANSWERS, *OF_WORKFLOW)}


def record_settings(config: SelfDistillConfig, out: Path) -> None:
    """Write the settings to OUT/config.json, with the hashes of the files.

    Raises UserError when an earlier call had another setting (--rounds may grow), or when a file is another one since then.
    """
    left_out = ("out", "rounds", "eager", "notify", *(OF_WORKFLOW if config.workflow == "none" else ()))
    left_out += () if config.new_puzzles else ("new_puzzles",)
    settings = {name: value for name, value in vars(config).items() if name not in left_out}
    paths = {name: Path(path) for name in ("puzzles", "test") if (path := getattr(config, name))}
    files = {name: sha256(path) for name, path in paths.items() if path.is_file()}
    files["model"] = model_hashes(config.model)
    recorded = out / "config.json"
    if recorded.is_file():
        before = json.loads(recorded.read_text(encoding="utf-8"))
        was = before.pop("files", {})  # an older version recorded none
        now = settings | {name: None for name in LATER if name in before and name not in settings}
        changed = [name for name, value in now.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{flag_of(changed[0])}: {out} was begun with {before.get(changed[0])}, and now it is "
                f"{getattr(config, changed[0])}; give that, or name another --out"
            )
        for name in [name for name in files if was.get(name, files[name]) != files[name]]:
            raise UserError(
                f"--{name} {getattr(config, name)}: is not what {out} was begun with (other SHA-256); put that back, or name "
                "another --out"
            )
    write_whole(recorded, json.dumps(settings | {"files": files}, indent=1, ensure_ascii=False) + "\n")
