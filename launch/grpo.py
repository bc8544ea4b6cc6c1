"""GRPO: train a LoRA adapter on cell-type puzzles with vLLM sampling.

python launch/grpo.py                                   # the embedded default; builds what it lacks
torchrun --nproc-per-node 2 launch/grpo.py
torchrun --nproc-per-node 8 launch/grpo.py --model sft/model --puzzles train.parquet --out runs/mine
"""

import dataclasses
from pathlib import Path

import click

from data.puzzles import read_puzzles
from launch.options import command
from reward import load_reward
from trainer.config import GrpoConfig

DEMO = Path("runs/demo")


@command(
    GrpoConfig, default_recipe=lambda given: None if given.get("model") else Path(__file__).parent / "recipes/demo.yaml"
)
def main(config: GrpoConfig) -> None:
    """Train with GRPO. Without --model the embedded default is trained (recipe demo.yaml), and built where missing."""
    load_reward(config.reward)  # the workers load their own; a bad path is refused before anything is built
    if config.model and not config.puzzles:
        raise click.UsageError("--model needs --puzzles: the training puzzles (launch/build.py makes them)")
    if config.model is None:
        build_embedded()
        puzzles = config.puzzles or str(DEMO / "puzzles/train.parquet")
        config = dataclasses.replace(config, model=str(DEMO / "sft/model"), puzzles=puzzles)
    puzzles = read_puzzles(str(config.puzzles))

    from trainer.grpo import train  # torch and vLLM load only once the settings are known to be good

    out = train(config, puzzles)
    print(f"wrote {out}")


def build_embedded() -> None:
    """Simulate, build, distill and cold-start the embedded default on rank 0 while the other ranks wait."""
    from trainer.world import join_world

    world = join_world()
    if world.is_main and not (DEMO / "sft/model/config.json").is_file():
        from launch.demo import DemoConfig, prepare

        prepare(DemoConfig(out=str(DEMO)))
    world.total(0)


if __name__ == "__main__":
    main()
