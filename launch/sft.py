"""Cold start: fine-tune a checkpoint on accepted traces.

python launch/sft.py --traces traces.jsonl --model base --out runs/sft
"""

from launch.options import command
from trainer.config import SftConfig
from trainer.sft import train


@command(SftConfig)
def main(config: SftConfig) -> None:
    """Supervised fine-tuning on accepted traces, LoRA or full, completion-only loss; writes OUT/model."""
    print(f"wrote {train(config)}/model")


if __name__ == "__main__":
    main()
