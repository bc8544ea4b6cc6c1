"""The models that the commands of a configuration made, and what each of them cost in sampled tokens.

A command of launch/ makes one model (grpo, ppo) or one per round (selfdistill); with --checkpoints each kept checkpoint of
grpo and ppo counts as one too, as a part of the way to the last. What they cost is the response tokens that
were sampled for their training; prompts are not sampled, and evaluation is not training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import parse_json, write_whole
from eval.ablation.settings import START
from eval.run_files import read_result, read_steps

POINTS = "points.json"
"""In the folder of one configuration and seed: its models, in the order in which they were made."""
OF_ROUND = ("acceptance", "answers", "vote", "workflow")
"""What rounds.json says of the answers that taught a round, on the training puzzles."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model of a configuration."""

    name: str
    """Such as "grpo" or "round 2"."""
    model: Path
    """Checkpoint folder."""
    sampled: int
    """Response tokens sampled for it, beyond those of the model before it."""
    longest: int | None
    """--max-response-tokens of its training; None where nothing was trained."""
    taught: dict[str, float] = field(default_factory=dict)
    """Of a round of selfdistill: see OF_ROUND. `workflow` is the accuracy of what the round could learn at most."""
    partial: bool = False
    """A checkpoint on the way to the model that the command made."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model of a configuration that has been evaluated."""

    name: str
    sampled: int
    """Response tokens sampled since the cold start."""
    evaluated: Path
    """Folder with SPLIT/metrics.json and SPLIT/predictions.jsonl."""
    taught: dict[str, float]
    partial: bool = False


def models_of(verb: str, run: Path, models: Sequence[Path]) -> list[Made]:
    """The models of a command that has ended. run: its folder. models: its checkpoints, named step-000010, or its last alone."""
    if not models:
        raise UserError(f"{run}: holds no checkpoint of its run; put {run / 'checkpoints'} back, or name another --out")
    if verb == START:
        return [Made(name=START, model=models[-1], sampled=0, longest=None)]
    settings = parse_json((run / "config.json").read_text(encoding="utf-8"))
    if verb == "selfdistill":
        return [made_by_round(run, row, settings) for row in rounds_of(run)]
    settings = settings["settings"]
    answers = settings["prompts_per_step"] * settings["group_size"]
    # with --oversample the mean length of the groups that were kept stands for that of all
    lengths = [
        step["completions/mean_length"] * step.get("dynamic_sampling/num_gen_batches", 1)
        for step in read_steps(run / "metrics.jsonl")
    ]
    sampled = [round(sum(lengths[:step]) * answers) for step in (*map(step_of, models[:-1]), len(lengths))]
    names = [*(f"{verb}, step {step_of(model)}" for model in models[:-1]), verb]
    longest, last = settings["max_response_tokens"], models[-1]
    return [
        Made(name=name, model=model, sampled=after - before, longest=longest, partial=model is not last)
        for name, model, before, after in zip(names, models, [0, *sampled], sampled, strict=False)
    ]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def places(folder: Path, made: Sequence[Made]) -> list[Path]:
    """Where each model of a configuration is evaluated: FOLDER/eval the last, FOLDER/models/01, 02, ... those before it.

    A part of the way has the number of the model that it led to, and its step: models/01-step-000010.
    """
    found, number = [], 1
    for one in made:
        place = folder / "models" / (f"{number:02d}-{one.model.name}" if one.partial else f"{number:02d}")
        found.append(folder / "eval" if one is made[-1] else place)
        number += not one.partial
    return found


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """The rows of rounds.json, without that of the first teacher."""
    return [row for row in json.loads((run / "rounds.json").read_text(encoding="utf-8")) if row["round"] > 0]


def made_by_round(run: Path, row: dict[str, Any], settings: dict[str, Any]) -> Made:
    """row: of rounds.json."""
    folder = run / f"round-{row['round']}"
    return Made(
        name=f"round {row['round']}",
        model=folder / "sft/model",
        sampled=read_result(folder / "traces.report.json")["tokens"]["completion"],
        longest=settings["max_response_tokens"],
        taught={name: row[name] for name in OF_ROUND if name in row},
    )


def write_points(folder: Path, made: list[Made], evaluated: list[Path]) -> None:
    """Write points.json. evaluated: per model, the folder of its answers, inside `folder`."""
    rows, sampled = [], 0
    for one, where in zip(made, evaluated, strict=True):
        sampled += one.sampled
        place = where.relative_to(folder).as_posix()  # the folder may move
        part = {"partial": True} if one.partial else {}
        rows.append({"name": one.name, "sampled": sampled, "evaluated": place, "taught": one.taught, **part})
    write_whole(folder / POINTS, json.dumps(rows, indent=1) + "\n")


def read_points(folder: Path) -> list[Point]:
    """The models of one configuration and seed; [] where an older version of launch/ablate.py has run it."""
    if not (folder / POINTS).is_file():
        return []
    rows = parse_json((folder / POINTS).read_text(encoding="utf-8"))
    return [Point(**{**row, "evaluated": folder / row["evaluated"]}) for row in rows]
