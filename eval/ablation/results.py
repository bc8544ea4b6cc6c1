"""What launch/ablate.py leaves in OUT: tables, numbers and a figure of all runs that are there."""

import json
from pathlib import Path

from data.errors import UserError
from data.files import write_whole
from data.puzzles import read_puzzles
from eval.ablation.compare import Arm, compare_arms, variety
from eval.ablation.figure import draw_arms
from eval.ablation.rounds import draw_rounds
from eval.ablation.tables import ablation_markdown


def write_results(out: Path, arms: list[Arm], files: list[str], limit: int) -> str:
    """Write ablation.json, ablation.md and ablation.png; returns the tables. files: held-out puzzles, of which the first
    `limit` were answered. Raises UserError when no configuration has run."""
    arms = [arm for arm in arms if arm.runs]
    if not arms:
        raise UserError(f"{out}: no configuration has run yet; run this command without --only")
    puzzles = {Path(file).stem: read_puzzles(file)[:limit] for file in files}
    found = {split: compare_arms(arms, split, of_split) for split, of_split in puzzles.items()}
    varieties = {arm.name: variety(arm, next(iter(puzzles.values()))) for arm in arms}
    if len(different := {one["k"] for one in varieties.values() if one}) > 1:
        raise UserError(
            f"{out}: the configurations have {min(different):g} to {max(different):g} answers to a puzzle in samples/; "
            "remove the folders of the fewer, and run again with one --samples"
        )
    text = ablation_markdown(found, arms[0].name, varieties)
    numbers = {**found, **({"varieties": varieties} if any(varieties.values()) else {})}
    write_whole(out / "ablation.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    write_whole(out / "ablation.md", text)
    # a configuration of one command of GRPO or PPO has a curve of rewards; several commands or rounds have models
    if all(run.steps for arm in arms for run in arm.runs):
        draw_arms(arms, found, out / "ablation.png")
    else:
        draw_rounds(found, out / "ablation.png")
    return text
