"""A model as its own teacher: it answers the puzzles, its right answers train it, and again (STaR, arXiv:2203.14465).

python launch/selfdistill.py --model runs/sft/model --puzzles puzzles/train.parquet --out runs/rounds --rounds 2
    ... --workflow consensus      # its answers vote, and one trace of the result trains it (data/distill/workflow.py)
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from data.distill.report import OF_ROUND, round_row
from data.distill.settings import DistillConfig
from data.distill.workflow import WORKFLOWS
from data.errors import UserError
from data.files import lock_folder, write_whole
from data.options import DTYPES, settle_dtype
from data.puzzles import read_puzzles
from launch.options import command, flag, option
from launch.stages import begun, run_stage
from trainer.record.runfolder import FINISHED

FILES, ANSWERS, TRAINING = "Model, puzzles and rounds", "The answers of a round", "The training of a round"
"""Headings of --help."""
OF_ANSWERS = (
    *("candidates", "stop_at", "keep", "temperature", "accept", "accept_at", "limit", "dtype"),
    "max_response_tokens",
)
"""Settings that are options of launch/distill.py too."""
OF_WORKFLOW = ("workflow", "comparisons", "lookups")
"""More of them; written down only where there is a workflow."""
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

    def __post_init__(self) -> None:
        settle_dtype(self, every_weight=not self.lora_rank)
        # refuses what the answers of a round would be refused for, before anything runs
        DistillConfig(puzzles=self.puzzles, out="traces.jsonl", teacher="vllm", hint=self.hint, **self.answers())

    def answers(self) -> dict[str, Any]:
        """The settings of a round's answers, as launch/distill.py takes them."""
        return {name: getattr(self, name) for name in ("model", *OF_ANSWERS, *OF_WORKFLOW)}


@command(SelfDistillConfig)
def main(config: SelfDistillConfig) -> None:
    """Distil from the model, train it on its right answers, and take the result as the next teacher."""
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds}: must be at least 1")
    read_puzzles(config.puzzles)  # raises before anything runs
    out, teacher = Path(config.out), Path(config.model)
    if not (teacher / "config.json").is_file():
        raise UserError(f"--model {teacher}: no checkpoint folder (config.json is missing)")
    lock_folder(out)
    record_settings(config, out)
    rows = [round_row(0, evaluate(config, teacher, out / "start"), None)]
    for number in range(1, config.rounds + 1):
        folder = out / f"round-{number}"
        teacher = run_round(config, teacher, folder, number)
        report = json.loads((folder / "traces.report.json").read_text(encoding="utf-8"))
        rows.append(round_row(number, evaluate(config, teacher, folder / "eval"), report))
        write_json(out / "rounds.json", rows)
        print_rows(rows)
    write_json(out / FINISHED, {"rounds": config.rounds, "model": str(teacher)})
    print(f"last model: {teacher}")


def record_settings(config: SelfDistillConfig, out: Path) -> None:
    """Write the settings to OUT/config.json.

    Raises UserError when an earlier call had another setting (--rounds may grow).
    """
    left_out = ("out", "rounds", "eager", *(OF_WORKFLOW if config.workflow == "none" else ()))
    settings = {name: value for name, value in vars(config).items() if name not in left_out}
    recorded = out / "config.json"
    if recorded.is_file():
        before = json.loads(recorded.read_text(encoding="utf-8"))
        now = settings | {name: None for name in OF_WORKFLOW if name in before and name not in settings}
        changed = [name for name, value in now.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{flag(changed[0])} {getattr(config, changed[0])}: was {before.get(changed[0])} when {out} was begun; give "
                "that, or name another --out"
            )
    write_json(recorded, settings)


def run_round(config: SelfDistillConfig, teacher: Path, folder: Path, number: int) -> Path:
    """Let the teacher answer, then train; returns the trained checkpoint. Finished stages are not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    traces, seed = folder / "traces.jsonl", config.seed + number  # every round draws other answers
    words = ["--resume"] if (folder / "traces.raw.jsonl").is_file() else []
    words += ["--hint"] if config.hint else []
    words += ["--eager"] if config.eager else []
    answers = config.answers() | {"teacher": "vllm", "model": teacher, "puzzles": config.puzzles, "out": traces}
    run_stage(f"round {number}: answer", traces, "distill", *words, seed=seed, **answers)
    student = teacher if config.student == "teacher" else Path(config.model)
    training = {name: getattr(config, name) for name in OF_TRAINING}
    training |= {"traces": traces, "model": student, "out": folder / "sft", "holdout": 0.02, "seed": seed}
    finished = folder / "sft/model/config.json"
    run_stage(f"round {number}: learn", finished, "sft", *begun(folder / "sft"), **training)
    return folder / "sft/model"


def evaluate(config: SelfDistillConfig, model: Path, folder: Path) -> dict[str, Any]:
    """metrics.json of the model on the held-out puzzles; {} without them."""
    if config.test is None:
        return {}
    settings = {name: getattr(config, name) for name in ("max_response_tokens", "dtype")}
    settings |= {"model": model, "out": folder, "puzzles": config.test, "limit": config.eval_limit}
    words = ["--eager"] if config.eager else []
    run_stage(f"evaluate {folder.parent.name}/{folder.name}", folder / "metrics.json", "evaluate", *words, **settings)
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print rounds.json as a table."""
    columns = ["round", *OF_ROUND, "acceptance", *(name for name in ("vote", "workflow") if name in rows[-1])]
    print("\n" + "".join(f"{name:>17}" for name in columns))
    for row in rows:
        cells = [row.get(name, "-") for name in columns]
        print("".join(f"{cell:17.3f}" if isinstance(cell, float) else f"{cell!s:>17}" for cell in cells))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
