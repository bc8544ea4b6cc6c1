"""GRPO: train a LoRA adapter on cell-type puzzles with vLLM sampling.

python launch/grpo.py                                   # the embedded default; builds what is missing
torchrun --nproc-per-node 2 launch/grpo.py --out runs/two    # on CPUs, or two GPUs; a new --out for each run
torchrun --nproc-per-node 8 launch/grpo.py --model sft/model --puzzles train.parquet --lr 1e-5 --out runs/mine
python launch/grpo.py --recipe demo --recipe dapo --out runs/dapo   # another published objective on that default
"""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data.errors import UserError
from data.files import lock_folder, unlock_folder
from data.puzzles import Puzzle, read_puzzles
from eval.metrics import score, with_pass_rates
from launch.options import command
from reward import load_reward
from trainer.config import GrpoConfig, OnlineConfig
from trainer.record.runfolder import check_run
from trainer.start.memory import estimate_memory
from trainer.start.preflight import check_launch, format_rows, launch_of, refuse_learned, refuse_problems

if TYPE_CHECKING:  # loads transformers
    from trainer.prompts.validation import HeldOut

DEMO = Path("runs/demo")
METRICS = ("batch_accuracy", "cell_accuracy", "format_validity", "uniqueness", "response_length")
"""The paper's five, as --validate reports them."""


@command(
    GrpoConfig, default_recipe=lambda given: None if given.get("model") else Path(__file__).parent / "recipes/demo.yaml"
)
def main(config: GrpoConfig) -> None:
    """Train with GRPO.

    Without --model the embedded default is trained (recipe demo.yaml), and built if it is missing.
    """
    if (ready := prepare(config)) is not None:
        from trainer.grpo import train

        say_where(train(*ready))


def prepare(config: OnlineConfig) -> "tuple[OnlineConfig, list[Puzzle], HeldOut | None] | None":
    """What a run of GRPO or PPO starts from; None after a dry run.

    (settings with the model's and the puzzles' paths, the puzzles, what --validate measures on).

    Builds the embedded default where no model is named. Refuses what cannot work before a model is loaded.
    """
    load_reward(config.reward)  # the workers load it again; here a bad path is refused before anything is built
    if config.dry_run:
        dry_run(config)
        return None
    for name in ("nodes", "ranks_per_node", "rank_gib"):
        if getattr(config, name):  # else a machine that is not there would be checked
            raise UserError(f"--{name.replace('_', '-')}: describes a machine for --dry-run; leave it out of a run")
    if config.model and not config.puzzles:
        raise UserError("--model needs --puzzles: the training puzzles (launch/build.py makes them)")
    if config.model is None:
        with embedded(config) as built:
            return read_and_check(built)
    return read_and_check(config)


def read_and_check(config: OnlineConfig) -> "tuple[OnlineConfig, list[Puzzle], HeldOut | None]":
    """The files of a run, and all that can be refused before its model is loaded."""
    if config.placement == "colocate":  # under split, a rank that only samples may start when the folder exists already
        check_run(config)
    puzzles = read_puzzles(str(config.puzzles))
    if config.curriculum:
        puzzles = with_pass_rates(puzzles, config.curriculum)
    held_out = held_out_puzzles(config, puzzles) if config.validate else None
    load_reward(config.reward, puzzles)  # again: a function in the style of TRL may need a column that they have not
    launch = launch_of(config)
    refuse_problems(check_launch(config, launch))
    from trainer.start.model_check import check_model  # loads transformers: only once the settings are known to be good

    refuse_problems(check_model(str(config.model), config.engine == "vllm", config.lora_rank > 0, config.resume))
    if os.environ.get("RANK", "0") == "0":
        for row in estimate_memory(config, launch):  # an estimate: a note, not a refusal
            if row.problem:
                click.echo(f"note: {row.what} {row.value}: {row.problem}", err=True)
    return config, puzzles, held_out


def held_out_puzzles(config: OnlineConfig, training: list[Puzzle]) -> "HeldOut":
    """The puzzles of --validate, and the paper's metrics. Raises UserError when they are no held-out puzzles."""
    from trainer.prompts.validation import HeldOut, refuse_leaks

    held_out = read_puzzles(str(config.validate))
    notes = [refuse_leaks(held_out, training, str(config.validate)), refuse_learned(held_out, config)]
    if config.steps < config.validate_every:
        notes.append(f"--validate-every {config.validate_every}: {config.steps} steps end before it")
    for note in filter(None, notes if os.environ.get("RANK", "0") == "0" else []):
        click.echo(f"note: {note}", err=True)
    return HeldOut(puzzles=held_out, judge=paper_metrics)


def paper_metrics(answers: list[str], puzzles: list[Puzzle], lengths: list[int]) -> dict[str, float]:
    """The paper's metrics of an answer to each puzzle. lengths: in tokens."""
    metrics = score(answers, puzzles, lengths)
    return {name: getattr(metrics, name) for name in METRICS}


def say_where(out: Path) -> None:
    if os.environ["RANK"] == "0":
        print(f"wrote {out}")


def dry_run(config: OnlineConfig) -> None:
    """Print what a run would need, without loading a model. Exit code 2 when it cannot work."""
    if os.environ.get("RANK", "0") != "0":
        return
    config = on_demo(config)
    if config.resume:
        check_run(config)
        unlock_folder(config.out)  # it only looks
    launch = launch_of(config)
    rows = check_launch(config, launch)
    from trainer.start.model_check import check_model

    rows += check_model(str(config.model), config.engine == "vllm", config.lora_rank > 0, config.resume, dry_run=True)
    # a model that cannot be trained has no estimate
    if not any(row.problem for row in rows):
        rows += estimate_memory(config, launch)
    click.echo(format_rows(rows))
    if any(row.problem for row in rows):
        raise SystemExit(2)


def on_demo(config: OnlineConfig) -> OnlineConfig:
    """The settings with the files of the embedded default where no model is named."""
    puzzles = config.puzzles or str(DEMO / "puzzles/train.parquet")
    return config if config.model else dataclasses.replace(config, model=str(DEMO / "sft/model"), puzzles=puzzles)


@contextmanager
def embedded(config: OnlineConfig) -> Iterator[OnlineConfig]:
    """Simulate, build, distill and cold-start the embedded default on rank 0 while the other ranks wait; its settings.

    The ranks watch each other from here on, so a refusal inside it must end the watch, or it would look like a death.
    """
    from trainer.ranks.world import guarded, join_world

    world = join_world(config.ranks_apart, config.hang_seconds)
    with guarded(world):
        if world.is_main and not (DEMO / "sft/model/config.json").is_file():
            from launch import demo

            lock_folder(DEMO)
            settings = demo.DemoConfig(out=str(DEMO))
            try:
                demo.refuse_other_settings(settings, recipe := demo.recipe_values(settings), demo.FREE_ON_RESUME)
            except UserError as error:
                raise UserError(
                    f"without --model: {str(error).partition(';')[0]}; finish that, or name --model"
                ) from None
            demo.record_settings(settings, recipe)
            demo.prepare(settings)
            unlock_folder(DEMO)
        world.meet("the embedded default to be built")
        yield on_demo(config)


if __name__ == "__main__":
    main()
