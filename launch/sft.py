"""Cold start: fine-tune a checkpoint on accepted traces.

    python launch/sft.py --traces traces.jsonl --model base --out runs/sft
    torchrun --nproc-per-node 8 launch/sft.py --recipe sft_paper --traces traces.jsonl \\
        --model Qwen2.5-7B-Instruct --out runs/sft
"""

from data.puzzles import Puzzle
from eval.metrics import score
from launch.options import command
from trainer.sft.settings import SftConfig

METRICS = ("cell_accuracy", "batch_accuracy", "format_validity", "uniqueness")


def paper_metrics(answers: list[str], puzzles: list[Puzzle]) -> dict[str, float]:
    """The paper's metrics of answers to held-out puzzles."""
    metrics = score(answers, puzzles)
    return {name: getattr(metrics, name) for name in METRICS}


@command(SftConfig)
def main(config: SftConfig) -> None:
    """Supervised fine-tuning on accepted traces, LoRA or full, completion-only loss; writes OUT/model."""
    from trainer.sft.loop import train  # transformers takes seconds to load: not for --help or a bad setting

    train(config, paper_metrics)


if __name__ == "__main__":
    main()
