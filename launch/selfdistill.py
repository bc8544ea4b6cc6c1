"""A model as its own teacher: it answers the puzzles, its right answers train it, and again (STaR, arXiv:2203.14465).

python launch/selfdistill.py --model runs/sft/model --puzzles puzzles/train.parquet --out runs/rounds --rounds 2
    ... --workflow consensus      # its answers vote, and one trace of the result trains it (data/distill/workflow.py)
"""

import json
from pathlib import Path
from typing import Any

from data.distill.report import OF_ROUND, round_row
from data.distill.rounds import OF_TRAINING, SelfDistillConfig, record_settings
from data.errors import UserError
from data.files import lock_folder, write_whole
from data.puzzles import read_puzzles, shared_puzzles
from data.status.status import reporting
from eval.run_files import unfinished
from launch.options import command
from launch.stages import begun, run_stage
from trainer.record.runfolder import FINISHED
from trainer.sft.settings import SftConfig


@command(SelfDistillConfig)
def main(config: SelfDistillConfig) -> None:
    """Distil from the model, train it on its right answers, and take the result as the next teacher."""
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds}: must be at least 1")
    out, teacher = Path(config.out), Path(config.model)
    refuse(config, teacher)
    with reporting(out, config.notify, "round") as report:
        lock_folder(out)
        record_settings(config, out)
        report.progress(0, config.rounds)
        rows = [round_row(0, evaluate(config, teacher, out / "start"), None)]
        for number in range(1, config.rounds + 1):
            folder = out / f"round-{number}"
            teacher = run_round(config, teacher, folder, number)
            of_answers = json.loads((folder / "traces.report.json").read_text(encoding="utf-8"))
            rows.append(round_row(number, evaluate(config, teacher, folder / "eval"), of_answers))
            write_json(out / "rounds.json", rows)
            print_rows(rows)
            report.progress(number, config.rounds)
        write_json(out / FINISHED, {"rounds": config.rounds, "model": str(teacher)})
    print(f"last model: {teacher}")


def refuse(config: SelfDistillConfig, teacher: Path) -> None:
    """Raises UserError for what a stage would be refused for when hours have passed, and for held-out puzzles that teach."""
    from trainer.start.preflight import model_config, rank_problem  # seconds, which `--help` need not wait for

    puzzles = read_puzzles(config.puzzles)
    config.refuse_too_few(len(puzzles))
    if not (teacher / "config.json").is_file():
        raise UserError(f"--model {teacher}: no checkpoint folder (config.json is missing)")
    if problem := rank_problem(config.lora_rank, model_config(config.model)):
        raise UserError(problem)
    SftConfig(
        traces="traces.jsonl", model=config.model, out="sft", **{name: getattr(config, name) for name in OF_TRAINING}
    )
    if config.test and (shared := shared_puzzles(read_puzzles(config.test), puzzles, by_donor=False)):
        raise UserError(f"--test {config.test}: shares {shared} with --puzzles; name puzzles that it is not taught on")


def run_round(config: SelfDistillConfig, teacher: Path, folder: Path, number: int) -> Path:
    """Let the teacher answer, then train; returns the trained checkpoint. Finished stages are not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    traces, seed = folder / "traces.jsonl", config.seed + number  # every round draws other answers
    words = ["--resume"] if (folder / "traces.raw.jsonl").is_file() else []
    words += ["--hint"] if config.hint else []
    words += ["--eager"] if config.eager else []
    answers = config.answers() | {"teacher": "vllm", "model": teacher, "puzzles": config.puzzles, "out": traces}
    run_stage(f"round {number}: answer", traces, "distill", *words, seed=seed, skip=config.skipped(number), **answers)
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
    words = [*(["--eager"] if config.eager else []), *unfinished(folder)]
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
