"""PPO: as launch/grpo.py, with a critic that learns beside the policy.

python launch/ppo.py                                    # the embedded default; builds what is missing
torchrun --nproc-per-node 8 launch/ppo.py --model sft/model --puzzles train.parquet --lr 1e-5 --out runs/mine
"""

from pathlib import Path

from launch.grpo import prepare, say_where
from launch.options import command
from trainer.ppo.settings import PpoConfig


@command(
    PpoConfig,
    default_recipe=lambda given: None if given.get("model") else Path(__file__).parent / "recipes/ppo_demo.yaml",
)
def main(config: PpoConfig) -> None:
    """Train with PPO.

    Without --model the embedded default is trained (recipe ppo_demo.yaml), and built if it is missing.
    """
    if (ready := prepare(config)) is not None:
        from trainer.ppo.ppo import train

        say_where(train(*ready))


if __name__ == "__main__":
    main()
