"""A step of GRPO with a slow judge: scored while others are sampled, against scored when all are sampled (--score-last).

    python -m tests.bench.scoring [--seconds 2] [--steps 12]     # after make demo

The demo's policy and puzzles with vLLM; an async judge that takes --seconds per response, up to 64 at once. Both sides run in
turns, and must write the same rollouts. Prints the ratio of the medians of the seconds of a step, its first one left out, and
of sampling and scoring alone; writes JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JUDGE = """import asyncio

from reward.cellpuzzles import batch_reward

async def judge(completion, puzzle):
    await asyncio.sleep({seconds})
    return batch_reward(completion, puzzle)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="runs/demo/sft/model")
    parser.add_argument("--puzzles", default="runs/demo/puzzles/train.parquet")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seconds", type=float, default=2.0, help="that the judge takes per response")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", default="runs/bench/scoring.json")
    arguments = parser.parse_args()
    found: dict[str, list[dict]] = {"early": [], "last": []}
    with tempfile.TemporaryDirectory() as folder:
        judge = Path(folder) / "judge.py"
        judge.write_text(JUDGE.format(seconds=arguments.seconds))
        for turn in range(arguments.turns):
            runs = {side: Path(folder) / f"{side}-{turn}" for side in found}
            for side, out in list(runs.items())[:: -1 if turn % 2 else 1]:
                train(arguments, f"{judge}:judge", out, ["--score-last"] * (side == "last"))
                rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
                found[side] += rows[1:]  # in the first step the workers start
            early, last = (run / "rollouts.jsonl" for run in runs.values())
            assert early.read_bytes() == last.read_bytes(), "the two sides differ"
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    for name, parts in (("step", ["step"]), ("sampling_and_scoring", ["sample", "score"])):
        seconds = {
            side: sorted(sum(row[f"timing_s/{part}"] for part in parts) for row in rows) for side, rows in found.items()
        }
        early, last = (statistics.median(seconds[side]) for side in ("early", "last"))
        print(f"{name}: {early:.2f} s, with --score-last {last:.2f} s")
        low, high = seconds["last"][0] / seconds["early"][-1], seconds["last"][-1] / seconds["early"][0]
        print(f"RATIO {name}_last_over_early {last / early:.2f} {low:.2f} {high:.2f}")


def train(arguments: argparse.Namespace, reward: str, out: Path, more: list[str]) -> None:
    """Run launch/grpo.py into OUT."""
    command = [sys.executable, "launch/grpo.py", "--recipe", arguments.recipe, "--model", arguments.model]
    command += ["--puzzles", arguments.puzzles, "--out", str(out), "--steps", str(arguments.steps), "--insist"]
    subprocess.run([*command, "--reward", reward, *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
