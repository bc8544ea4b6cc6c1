"""The settings of launch/ablate.py, and the configurations that they name."""

import re
import shlex
from dataclasses import MISSING, dataclass
from pathlib import Path

from data.errors import UserError
from data.options import option

TRAINERS = ("grpo", "ppo")
"""Commands of launch/ that an arm may run."""
PLACES = ("base", "sft", "puzzles")
"""What a command of an arm may name in braces."""
START, RUNS = "The common start", "The runs"
"""Headings of --help."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    out: str = option(MISSING, "Folder of all runs, the table and the figure.", section=RUNS)
    arms: tuple[str, ...] = option(
        (),
        "A configuration, NAME=COMMAND; repeat for several. The first is the one that the others are compared with.",
        section=RUNS,
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of each configuration; repeat for several.", section=RUNS)
    only: tuple[str, ...] = option(
        (), "Run only the configurations of these names; others are drawn as far as they have run.", section=RUNS
    )
    start: str = option(
        "runs/demo", "Folder of the demo's stages up to SFT; made here if it is not there.", section=START
    )
    start_recipe: str | None = option(
        None, "Recipe of launch/demo.py for the stages up to SFT; default: the demo's.", section=START
    )
    eval_puzzles: int = option(300, "Puzzles per held-out split that each trained model is evaluated on.", section=RUNS)
    curve_puzzles: int = option(
        0, "Held-out test puzzles that every kept checkpoint is evaluated on, for the curve; 0: none.", section=RUNS
    )


def read_arms(config: AblateConfig) -> dict[str, list[str]]:
    """{name: words of its command}. Raises UserError for a line that is no configuration."""
    found: dict[str, list[str]] = {}
    for line in config.arms:
        name, _, words = line.partition("=")
        name = name.strip()
        try:
            split = shlex.split(words)
        except ValueError as error:  # a quotation mark without its partner
            raise UserError(f"--arms {line!r}: cannot be split into words ({error})") from None
        if not name or not split or split[0] not in TRAINERS:
            raise UserError(
                f"--arms {line!r}: write NAME=COMMAND, with one of {', '.join(TRAINERS)} as the command, for example "
                "'A: GRPO=grpo --model {sft}'"
            )
        if unknown := set(re.findall(r"{(.*?)}", words)) - set(PLACES):
            raise UserError(f"--arms {line!r}: {{{min(unknown)}}} is none of {{base}}, {{sft}} and {{puzzles}}")
        if name in found or folder_name(name) in map(folder_name, found):
            raise UserError(f"--arms {line!r}: another configuration has this name, or a folder of the same name")
        found[name] = split
    if not found:
        raise UserError("--arms: name at least one configuration, or give --recipe launch/recipes/fig5.yaml")
    if wrong := [name for name in config.only if name not in found]:
        raise UserError(f"--only {wrong[0]}: no such configuration; there are {', '.join(found)}")
    return found


def folder_name(name: str) -> str:
    """A configuration's name as the name of a folder: "A: SFT + GRPO" -> "A-SFT-GRPO"."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "arm"


def filled(word: str, paths: tuple[Path, ...]) -> str:
    """A word of a command with the paths in the place of {base}, {sft} and {puzzles}."""
    for name, path in zip(PLACES, paths, strict=True):
        word = word.replace(f"{{{name}}}", str(path))
    return word
