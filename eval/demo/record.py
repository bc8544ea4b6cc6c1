"""The record of the settings of a demo run, OUT/demo.json: what is made keeps the settings that it was made with."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import read_sealed, sealed, write_whole
from data.options import flag_of
from eval.demo.settings import DemoConfig

RECORD = "demo.json"
"""File of OUT with the settings that it is made with."""
CUT = "grpo_recipe max_response_tokens"
"""Recorded apart from the rest of the recipe: the evaluations before GRPO cut answers there too."""
PUZZLES, CELLS, TRACES = "puzzles/report.json", "cells/report.json", "traces.jsonl"
BASE, SFT, GRPO, EVALUATED = "base/config.json", "sft/model/config.json", "grpo/finished.json", "eval/*/*/metrics.json"
MADE: dict[str, tuple[str, ...]] = {
    "seed": ("atlas.h5ad", PUZZLES),
    "h5ad": (PUZZLES,),
    "donors": ("atlas.h5ad",),
    "types": ("atlas.h5ad",),
    "noise": ("atlas.h5ad",),
    "build": (PUZZLES,),
    "cells_h5ad": (CELLS, BASE, SFT),
    "cells_build": (CELLS,),
    "distill": (TRACES,),
    "traces_from": (TRACES,),
    "model": (SFT, EVALUATED),
    "hidden": (BASE,),
    "layers": (BASE,),
    "sft": (SFT,),
    "sft_epochs": (SFT,),
    "sft_lr": (SFT,),
    "grpo_recipe": (GRPO,),
    "grpo_steps": (GRPO,),
    CUT: (EVALUATED,),
    "eval_puzzles": (EVALUATED,),
}
"""{setting: files that were made with it}. Until one of them is there the setting may change; of a training that has begun
and not ended, --resume says what may change. Of those that are not here only `annotate` makes something: its
folder may be removed to make it again."""
FREE = frozenset(
    {"workers", "concurrency", "resume", "memory_fraction", "eager", "reward_workers", "reward_seconds", "notify"}
)
"""Options of the stages that are no trainings which say how a machine is used, and may always change."""


def recorded_settings(config: DemoConfig, recipe: dict[str, Any]) -> dict[str, Any]:
    """What demo.json holds. recipe: the values of --grpo-recipe, which count and not its name; steps and CUT among them."""
    found: dict[str, Any] = {name: value for name, value in vars(config).items() if name in MADE}
    apart = {"steps", "max_response_tokens"}
    found["grpo_recipe"] = [f"{name}={value}" for name, value in recipe.items() if name not in apart]
    found["grpo_steps"] = config.grpo_steps or recipe["steps"]
    found[CUT] = recipe["max_response_tokens"]
    return json.loads(json.dumps(found))  # so that both sides of a comparison have JSON's types


def refuse_other_settings(config: DemoConfig, recipe: dict[str, Any], free: set[str]) -> None:
    """Raises UserError when something in OUT was made with another value of a setting. A folder without a record goes on.

    recipe: as for `recorded_settings`. free: options of a training that may change when it goes on.
    """
    out = Path(config.out)
    if not (out / RECORD).is_file():
        return
    before = read_sealed(out / RECORD)
    for name, value in recorded_settings(config, recipe).items():
        # decay_steps may change while a run goes on, and what is compared here is finished
        may_change = FREE | (free - {"decay_steps"} if name in ("sft", "grpo_recipe") else set())
        was, now = (_items(one, may_change) for one in (before.get(name, value), value))
        if was != now and _is_made(out, MADE[name]):
            old, new = (", ".join(sorted(one)) or "nothing" for one in (was - now, now - was))
            raise UserError(
                f"{flag_of(name)}: {out} was begun with {old}, and now gets {new}; give the old value again, or name "
                "another --out"
            )


def refuse_another_start(config: DemoConfig, recipe: dict[str, Any], free: set[str] | None) -> None:
    """`refuse_other_settings` for the start of a comparison. free: None where no recipe of the start was named.

    Then OUT may have been made with other numbers, and with no other files, model or response limit than the default.
    """
    if free is not None:
        return refuse_other_settings(config, recipe, free)
    path, now = Path(config.out) / RECORD, recorded_settings(config, recipe)
    before = read_sealed(path) if path.is_file() else {}
    for name in ("model", "h5ad", "cells_h5ad", CUT):
        if before.get(name, now[name]) != now[name]:
            made = f"--start {config.out}: was made with {name.split()[-1]} {before[name]}"
            raise UserError(f"{made}, not {now[name] or 'the default'}; name its recipe with --start-recipe")


def record_settings(config: DemoConfig, recipe: dict[str, Any], anew: bool = True) -> None:
    """Write OUT/demo.json, unless an earlier version, or another command, has made something there: with what is unknown.

    anew: also where there is a record, some of whose settings may change.
    """
    out = Path(config.out)
    if (anew and (out / RECORD).is_file()) or not any(_is_made(out, files) for files in MADE.values()):
        write_whole(out / RECORD, json.dumps(sealed(recorded_settings(config, recipe)), indent=1) + "\n")


def last_of(checkpoints: list[Path], run: Path) -> Path:
    """The last checkpoint of a finished run. Raises UserError when they were removed."""
    if not checkpoints:
        raise UserError(f"{run}: is finished and holds no checkpoint; put {run / 'checkpoints'} back, or remove {run}")
    return checkpoints[-1]


def _is_made(out: Path, files: tuple[str, ...]) -> bool:
    return any(any(out.glob(pattern)) for pattern in files)


def _items(value: Any, free: Set[str]) -> set[str]:
    """A value as the parts that a sentence shows: of a list those that are not free."""
    if isinstance(value, list):
        return {item for item in value if item.partition("=")[0].replace("-", "_") not in free}
    return set() if value is None else {str(value)}
