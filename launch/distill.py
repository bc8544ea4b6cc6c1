"""Reasoning traces by rejection sampling from the embedded teacher.

python launch/distill.py --puzzles train.parquet --out traces.jsonl
"""

import dataclasses
import json
from dataclasses import dataclass

from data.distill import TeacherConfig, distill, marker_table
from data.puzzles import read_puzzles, write_rows
from launch.options import command, option
from reward.cellpuzzles import batch_reward


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    puzzles: str = option(dataclasses.MISSING, "Training puzzles, .parquet or .jsonl.")
    out: str = option(dataclasses.MISSING, "JSONL to write: accepted traces, one row per puzzle.")
    candidates: int = option(8, "Traces drawn per puzzle before giving up (k of the paper).")
    limit: int | None = option(None, "Use only the first LIMIT puzzles.")
    teacher_noise: float = option(0.5, "Noise of the teacher's judgement; one specific marker counts about 1.")
    seed: int = option(0, "Every random choice.")


@command(DistillConfig)
def main(config: DistillConfig) -> None:
    """Draw up to --candidates traces per puzzle and keep the first that is valid and exactly right."""
    puzzles = read_puzzles(config.puzzles)
    rows, report = distill(
        puzzles[: config.limit],
        lambda trace, puzzle: batch_reward(trace, puzzle).total == 1.0,
        candidates=config.candidates,
        seed=config.seed,
        table=marker_table(puzzles),
        config=TeacherConfig(noise=config.teacher_noise),
    )
    if not rows:
        raise ValueError(
            f"--puzzles {config.puzzles}: no trace was accepted; raise --candidates or lower --teacher-noise"
        )
    write_rows(config.out, rows)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
