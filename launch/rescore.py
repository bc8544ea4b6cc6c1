"""Score saved rollouts with another reward, without sampling, and see how rewards and advantages change.

python launch/rescore.py runs/demo/grpo/rollouts.jsonl --reward reward.cellpuzzles:mixed_reward
python launch/rescore.py runs/demo/grpo/rollouts.jsonl --reward my_rewards.py:fn --out rescored.jsonl
"""

import itertools
from dataclasses import MISSING, dataclass
from pathlib import Path

from data.errors import UserError
from data.options import check_numbers
from data.puzzles import of_other_steps, read_rows, write_rows
from eval.run_files import record_beside
from launch.options import argument, command, option
from reward import load_reward

COLUMNS = ("step", "puzzle_id", "response", "completion", "reward", "advantage", "finish_reason")


@dataclass(frozen=True, kw_only=True)
class RescoreConfig:
    rollouts: str = argument("rollouts.jsonl of a GRPO run.")
    reward: str = option(MISSING, "As for launch/grpo.py: module:function, file.py:function, trl:... or verl:...")
    puzzles: str | None = option(None, "Puzzle file of the run; default: the one its config.json names.")
    step: tuple[int, ...] = option((), "Only the rollouts of this step; repeatable.")
    out: str | None = option(None, "Write one line per response, .jsonl.")
    reward_workers: int = option(1, "Processes that score; 0 scores in this process (to debug a reward).")
    reward_seconds: float = option(60.0, "Time limit per response, in a worker process.")

    def __post_init__(self) -> None:
        check_numbers(self, {"at least 0": ("reward_workers",), "above 0": ("reward_seconds",)})


@command(RescoreConfig)
def main(config: RescoreConfig) -> None:
    """Re-score saved rollouts and print what changes. A response whose reward fails is named, never counted as 0."""
    load_reward(config.reward)
    if config.out and not config.out.endswith(".jsonl"):
        raise UserError(f"--out {config.out}: name a file that ends in .jsonl")
    record = record_beside(Path(config.rollouts))
    settings = record["settings"]
    puzzle_file = config.puzzles or settings.get("puzzles")
    inputs = [Path(path).resolve() for path in (config.rollouts, puzzle_file) if path]
    if config.out and Path(config.out).resolve() in inputs:
        raise UserError(f"--out {config.out}: is an input, which would be lost; name another file")
    needed, numbers = (*COLUMNS, *["response_ids"] * bool(settings.get("overlong_buffer"))), itertools.count(1)

    def wanted(row: dict) -> dict | None:
        number, other = next(numbers), config.step and row.get("step", config.step[0]) not in config.step
        if lacking := [] if other else [f"(no '{name}' in row {number})" for name in needed if name not in row]:
            raise UserError(f"{config.rollouts}: not the rollouts of a GRPO run {lacking[0]}; name another file")
        return None if other else {name: row[name] for name in needed}

    rows = read_rows(config.rollouts, wanted, of_other_steps(config.step))
    if puzzle_file is None:
        raise UserError(f"{config.rollouts}: no config.json beside it names the puzzles; name them with --puzzles")
    if not rows:
        raise UserError(f"{config.rollouts}: holds no rollout of step {config.step[0] if config.step else 1}")

    from reward.scoring import Scorer
    from trainer.inspect.rescore import puzzles_of_run, rescore, summary_lines

    puzzles = puzzles_of_run(puzzle_file, record.get("data", {}).get("puzzles"))
    scorer = Scorer(config.reward, config.reward_workers, config.reward_seconds)
    overlong = (settings.get("max_response_tokens", 0), settings.get("overlong_buffer", 0))
    how = (settings.get("advantage", "grpo"), settings.get("advantage_eps", 1e-6))
    rescored = rescore(rows, puzzles, scorer, *how, overlong)
    scorer.close()
    print(f"{config.rollouts}: {settings.get('reward', 'its reward')} -> {config.reward}")
    print("\n".join(summary_lines(rescored)))
    if config.out:
        write_rows(config.out, rescored)
        print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
