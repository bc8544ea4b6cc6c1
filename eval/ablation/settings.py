"""The settings of launch/ablate.py, and the configurations that they name."""

import json
import re
import shlex
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import read_settings, write_whole
from data.options import check_numbers, option
from data.puzzles import Puzzle, read_puzzles
from data.status.status import NOTIFY

TRAINERS = ("grpo", "ppo")
"""Commands of launch/ that leave checkpoints of an adapter."""
VERBS = (*TRAINERS, "selfdistill")
"""Commands of launch/ that an arm may run."""
START = "start"
"""In the place of a command: the cold start as it is."""
THEN = "then"
"""The word between two commands of an arm."""
PLACES = ("base", "sft", "puzzles", "model")
"""What a command of an arm may name in braces; {model} is what the command before it made, for the first one {sft}."""
COMMANDS = "commands.json"
"""In the folder of a run: the commands of its arm, before anything is filled in."""
FINISHED = "finished.json"
"""As in trainer.record.runfolder, which eval does not import."""
COMMON, RUNS = "The common start", "The runs"
"""Headings of --help."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    out: str = option(MISSING, "Folder of all runs, the table and the figure.", section=RUNS)
    arms: tuple[str, ...] = option(
        (),
        "A configuration, NAME=COMMAND or NAME=COMMAND then COMMAND; repeat for several. The first is the one that the others "
        "are compared with.",
        section=RUNS,
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "Seeds of each configuration; repeat for several.", section=RUNS)
    only: tuple[str, ...] = option(
        (), "Run only the configurations of these names; others are drawn as far as they have run.", section=RUNS
    )
    start: str = option(
        "runs/demo", "Folder of the demo's stages up to SFT; made here if it is not there.", section=COMMON
    )
    start_recipe: str | None = option(
        None, "Recipe of launch/demo.py for the stages up to SFT; default: the demo's.", section=COMMON
    )
    eval_puzzles: int = option(300, "Puzzles per held-out split that each trained model is evaluated on.", section=RUNS)
    curve_puzzles: int = option(
        0, "Held-out test puzzles that every kept checkpoint is evaluated on, for the curve; 0: none.", section=RUNS
    )
    checkpoints: bool = option(
        False, "Evaluate every kept checkpoint of grpo and ppo too: what was learnt for how many tokens.", section=RUNS
    )
    notify: str = option("", NOTIFY, section=RUNS)
    samples: int = option(
        0,
        "Answers (temperature 1) of each last model to a puzzle of the first split: how many differ, and is one right; 0: none.",
        section=RUNS,
    )

    def __post_init__(self) -> None:
        check_numbers(self, {"at least 1": ("eval_puzzles",), "at least 0": ("curve_puzzles", "samples")})
        if self.samples == 1:
            raise UserError("--samples 1: how many answers differ needs at least 2; 0 asks for none")


def read_arms(config: AblateConfig) -> dict[str, list[list[str]]]:
    """{name: the words of each of its commands}. Raises UserError for a line that is no configuration."""
    found: dict[str, list[list[str]]] = {}
    for line in config.arms:
        name, _, words = line.partition("=")
        name = name.strip()
        try:
            commands = split_commands(shlex.split(words))
        except ValueError as error:  # a quotation mark without its partner
            raise UserError(f"--arms {line!r}: cannot be split into words ({error})") from None
        known = commands == [[START]] or all(command and command[0] in VERBS for command in commands)
        if not name or not known:
            raise UserError(
                f"--arms {line!r}: write NAME=COMMAND, with one of {', '.join(VERBS)} as the command, for example "
                f"'A: GRPO=grpo --model {{sft}}', several of them with '{THEN}' between, or NAME={START}"
            )
        if given := next((word for word in shlex.split(words) if re.match("--(seed|out)(=|$)", word)), None):
            raise UserError(
                f"--arms {line!r}: {given.partition('=')[0]} is given to every run here; use --seeds and --out"
            )
        if unknown := set(re.findall(r"{(.*?)}", words)) - set(PLACES):
            raise UserError(f"--arms {line!r}: {{{min(unknown)}}} is none of {', '.join(map('{{{}}}'.format, PLACES))}")
        for number, command in enumerate(commands[1:], start=2):
            if not any("{model}" in word for word in command):
                raise UserError(
                    f"--arms {line!r}: command {number} would not go on from command {number - 1}; give it --model {{model}}"
                )
        if name in found or folder_name(name) in map(folder_name, found):
            raise UserError(f"--arms {line!r}: another configuration has this name, or a folder of the same name")
        found[name] = commands
    if not found:
        raise UserError("--arms: name at least one configuration, or give --recipe launch/recipes/fig5.yaml")
    if wrong := [name for name in config.only if name not in found]:
        raise UserError(f"--only {wrong[0]}: no such configuration; there are {', '.join(map(repr, found))}")
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"--seeds: {max(config.seeds, key=config.seeds.count)} is named twice")
    return found


def split_commands(words: list[str]) -> list[list[str]]:
    """The words of each command.

    >>> split_commands("grpo --model {sft} then selfdistill --model {model}".split())
    [['grpo', '--model', '{sft}'], ['selfdistill', '--model', '{model}']]
    """
    commands: list[list[str]] = [[]]
    for word in words:
        if word == THEN:
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def folder_name(name: str) -> str:
    """A configuration's name as the name of a folder: "A: SFT + GRPO" -> "A-SFT-GRPO"."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "arm"


def filled(words: list[str], paths: dict[str, Path]) -> list[str]:
    """The words of a command with paths in the place of {base}, {sft}, {puzzles} and {model}."""
    for name, path in paths.items():
        words = [word.replace(f"{{{name}}}", str(path)) for word in words]
    return words


def refuse_test_puzzles(trained: dict[str, list[str | None]], files: list[str]) -> None:
    """Raises UserError when an arm would train on a puzzle that the arms are compared on.

    trained: {name of an arm: the puzzle files of its commands}. files: of the puzzles that are compared on.
    """
    compared = [(puzzle, (file, puzzle.id)) for file in files for puzzle in read_puzzles(file)]
    whole = {content_of(puzzle): name for puzzle, name in compared}
    # a variant of a test puzzle (launch/variant.py) shows one of its cells, or all of them without the labels
    held_out = {cell: name for puzzle, name in compared for cell in cells_of(puzzle)} | whole
    checked: set[str] = set()
    for name, given in trained.items():
        for file in sorted({file for file in given if file} - checked):
            checked.add(file)
            for puzzle in read_puzzles(file):
                same = [held_out.get(content_of(puzzle)), *(whole.get(cell) for cell in cells_of(puzzle))]
                if (known := next(filter(None, same), None)) is not None:
                    raise UserError(
                        f"--arms {name}: it would train on puzzle {puzzle.id} of {file}, which is {known[1]} of {known[0]} or "
                        "shows cells of it, and on that one the configurations are compared; name training puzzles, such as "
                        "{puzzles}"
                    )


def refuse_other_commands(
    runs: dict[Path, tuple[str, list[list[str]]]], values: dict[str, list[dict[str, Any]]] | None = None
) -> None:
    """Raises UserError where a finished run was made with other commands, or other settings, than are given now.

    runs: {folder of a run: (name of its arm, its commands)}. values: as for `record_commands`, of each arm. A folder that
    does not say its commands is taken as it is.
    """
    for folder, (name, commands) in runs.items():
        if not (folder / COMMANDS).is_file():
            continue
        recorded = read_settings(folder / COMMANDS)
        made = recorded["commands"]
        done = [*folder.glob(FINISHED), *folder.glob(f"command-*/{FINISHED}"), *folder.glob("eval/*/metrics.json")]
        # a run that finished nothing may be begun with what was mended
        if made != commands and done:
            before = f" {THEN} ".join(map(shlex.join, made))
            raise UserError(
                f"--arms {name}: {folder} was made with {before!r}; give that again, or another name, or another --out"
            )
        for was, now in zip(recorded.get("values", []) if done else [], (values or {}).get(name, []), strict=False):
            if changed := [key for key in was if key in now and was[key] != now[key]]:  # a recipe was edited
                key = changed[0]
                raise UserError(
                    f"--arms {name}: {folder} was made with {key} {was[key]}, and now gets {now[key]}; give the old value "
                    "again, or another name, or another --out"
                )


def record_commands(folder: Path, commands: list[list[str]], values: list[dict[str, Any]] | None = None) -> None:
    """Write what `refuse_other_commands` compares. values: the settings of each command, those of its recipes among them."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"commands": commands, "values": values or []}
    write_whole(folder / COMMANDS, json.dumps(record, ensure_ascii=False) + "\n")


def content_of(puzzle: Puzzle) -> tuple:
    """What two puzzles share when they are the same one under two ids, or with other labels to choose from."""
    return puzzle.context, tuple(map(tuple, puzzle.cells))


def cells_of(puzzle: Puzzle) -> list[tuple]:
    """`content_of` puzzles that show a single cell of this one."""
    return [(puzzle.context, (tuple(cell),)) for cell in puzzle.cells]
