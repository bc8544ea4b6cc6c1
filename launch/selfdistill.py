"""A model as its own teacher: it answers the puzzles, what is right trains it, and again (STaR, arXiv:2203.14465).

python launch/selfdistill.py --model runs/sft/model --puzzles puzzles/train.parquet --out runs/rounds --rounds 2
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.puzzles import read_puzzles
from launch.demo import run_stage
from launch.options import command, option
from trainer.record.runfolder import write_json

SHOWN = ("batch_accuracy", "cell_accuracy", "format_validity", "response_length")


@dataclass(frozen=True, kw_only=True)
class SelfDistillConfig:
    """Rounds of distillation from the model itself."""

    model: str = option(dataclasses.MISSING, "Checkpoint folder of the first teacher.")
    puzzles: str = option(dataclasses.MISSING, "Puzzles to answer, .parquet or .jsonl.")
    test: str | None = option(None, "Held-out puzzles on which every round is evaluated (greedy).")
    out: str = option(dataclasses.MISSING, "Folder of the rounds; finished stages in it are not run again.")
    rounds: int = option(2, "Times that the model teaches itself.")
    student: str = option(
        "teacher", "What each round trains: its teacher, or the first model anew.", ("teacher", "first")
    )
    candidates: int = option(4, "Answers per puzzle and round.")
    stop_at: int = option(0, "Stop answering a puzzle after so many right answers; 0: never.")
    keep: str = option("random", "Which right answers train.", ("first", "shortest", "random", "all"))
    hint: bool = option(False, "Ask again, with the answer hinted, where no answer was right.")
    temperature: float = option(1.0, "Of the answers.")
    accept: str = option("reward.cellpuzzles:batch_reward", "Reward that accepts an answer, by import path.")
    accept_at: float = option(1.0, "Least reward of an accepted answer.")
    limit: int | None = option(None, "Use only the first LIMIT puzzles.")
    max_response_tokens: int = option(3000, "Longest answer.")
    epochs: int = option(1, "Passes over the accepted answers of a round.")
    batch_size: int = option(128, "Answers per optimizer step.")
    lr: float = option(5e-5, "Peak learning rate of a round.")
    lora_rank: int = option(256, "LoRA rank; 0 trains every weight.")
    lora_alpha: float = option(512.0, "LoRA alpha.")
    dtype: str = option("float32", "Weights and compute.", ("float32", "bfloat16"))
    eval_limit: int | None = option(None, "Evaluate on the first EVAL_LIMIT held-out puzzles only.")
    seed: int = option(0, "Every random choice.")


@command(SelfDistillConfig)
def main(config: SelfDistillConfig) -> None:
    """Distil from the model, train it on what it got right, and take the result as the next teacher."""
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds}: must be at least 1")
    read_puzzles(config.puzzles)  # says what is wrong before anything runs
    out, teacher = Path(config.out), Path(config.model)
    if not (teacher / "config.json").is_file():
        raise UserError(f"--model {teacher}: no checkpoint folder (config.json is missing)")
    take_up(config, out)
    table = [round_row(0, evaluate(config, teacher, out / "start"), None)]
    for number in range(1, config.rounds + 1):
        folder = out / f"round-{number}"
        teacher = one_round(config, teacher, folder, number)
        report = json.loads((folder / "traces.report.json").read_text(encoding="utf-8"))
        table.append(round_row(number, evaluate(config, teacher, folder / "eval"), report))
        write_json(out / "rounds.json", table)
        print_table(table)
    print(f"last model: {teacher}")


def take_up(config: SelfDistillConfig, out: Path) -> None:
    """Record the settings, or find them recorded. Raises UserError when a setting but --rounds is another one."""
    settings = {name: value for name, value in vars(config).items() if name not in ("out", "rounds")}
    recorded = out / "config.json"
    if recorded.is_file():
        before = json.loads(recorded.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"--{changed[0].replace('_', '-')} {settings[changed[0]]}: was {before.get(changed[0])} when {out} was begun; "
                "give that, or name another --out"
            )
    write_json(recorded, settings)


def one_round(config: SelfDistillConfig, teacher: Path, folder: Path, number: int) -> Path:
    """Answers, then training; returns the trained checkpoint. What is finished is found again."""
    folder.mkdir(parents=True, exist_ok=True)
    traces, seed = folder / "traces.jsonl", config.seed + number  # other answers each round
    begun = ["--resume"] if (folder / "traces.raw.jsonl").is_file() else []
    hint = ["--hint"] if config.hint else []
    run_stage(
        f"round {number}: answer",
        traces,
        "distill",
        *begun,
        *hint,
        teacher="vllm",
        model=teacher,
        puzzles=config.puzzles,
        out=traces,
        candidates=config.candidates,
        stop_at=config.stop_at,
        keep=config.keep,
        temperature=config.temperature,
        accept=config.accept,
        accept_at=config.accept_at,
        limit=config.limit,
        dtype=config.dtype,
        max_response_tokens=config.max_response_tokens,
        seed=seed,
    )
    begun = ["--resume"] if (folder / "sft/config.json").is_file() else []
    student = teacher if config.student == "teacher" else Path(config.model)
    run_stage(
        f"round {number}: learn",
        folder / "sft/model/config.json",
        "sft",
        *begun,
        traces=traces,
        model=student,
        out=folder / "sft",
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        dtype=config.dtype,
        holdout=0.02,
        seed=seed,
    )
    return folder / "sft/model"


def evaluate(config: SelfDistillConfig, model: Path, folder: Path) -> dict[str, Any]:
    """metrics.json of the model on the held-out puzzles; empty without them."""
    if config.test is None:
        return {}
    run_stage(
        f"evaluate {folder.parent.name}/{folder.name}",
        folder / "metrics.json",
        "evaluate",
        model=model,
        out=folder,
        puzzles=config.test,
        limit=config.eval_limit,
        max_response_tokens=config.max_response_tokens,
        dtype=config.dtype,
    )
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def round_row(number: int, metrics: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"round": number, **{name: metrics[name] for name in SHOWN if name in metrics}}
    return row | ({"acceptance": report["acceptance"], "accepted": report["puzzles_accepted"]} if report else {})


def print_table(table: list[dict[str, Any]]) -> None:
    columns = ["round", *SHOWN, "acceptance"]
    print("\n" + "".join(f"{name:>17}" for name in columns))
    for row in table:
        cells = [row.get(name, "-") for name in columns]
        print("".join(f"{cell:17.3f}" if isinstance(cell, float) else f"{cell!s:>17}" for cell in cells))


if __name__ == "__main__":
    main()
