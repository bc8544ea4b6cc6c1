"""Score saved rollouts with another reward, and compare rewards and advantages. Nothing is sampled or trained."""

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.files import sha256
from data.puzzles import Puzzle, read_puzzles
from reward.scoring import Scorer
from rollout import group_numbers
from trainer.advantages import differ, group_advantages, overlong_penalty


def puzzles_of_run(file: str, recorded: str | None) -> dict[str, Puzzle]:
    """{id: puzzle} of a file. recorded: SHA-256 of the file that the run asked, if that is known.

    Raises UserError for another file, whose ids may mean other puzzles, and for an id that means two puzzles.
    """
    puzzles = read_puzzles(file)
    if recorded and sha256(Path(file)) != recorded:
        raise UserError(f"{file}: is not the file that the run asked (other SHA-256); name that with --puzzles")
    found: dict[str, Puzzle] = {}
    for puzzle in puzzles:
        if found.setdefault(puzzle.id, puzzle) != puzzle:
            raise UserError(
                f"{file}: two different puzzles are called {puzzle.id}, so their responses cannot be told apart"
            )
    return found


def rescore(
    rollouts: list[dict[str, Any]],
    puzzles: dict[str, Puzzle],
    scorer: Scorer,
    advantage: str,
    eps: float,
    overlong: tuple[int, float] = (0, 0.0),
) -> list[dict[str, Any]]:
    """Rows {step, puzzle_id, response, old_reward, reward, status, message, parts, old_advantage, advantage}, in order.

    rollouts: rows of rollouts.jsonl. puzzles: by id. overlong: (--max-response-tokens, --overlong-buffer) of the run, whose
    penalty is added to the new rewards too. Advantages compare the responses of a group, as in training, where
    a puzzle may have several groups in a step; a response without a score has reward None and advantage 0. Raises
    UserError if a puzzle is missing.
    """
    missing = [row["puzzle_id"] for row in rollouts if row["puzzle_id"] not in puzzles]
    if missing:
        raise UserError(f"puzzle {missing[0]} is not in the puzzle file; name the file of the run with --puzzles")
    rewards = scorer.score(
        [row["completion"] for row in rollouts],
        [puzzles[row["puzzle_id"]] for row in rollouts],
        [row["finish_reason"] == "length" for row in rollouts],
    )
    penalties = [overlong_penalty(len(row["response_ids"]) if overlong[1] else 0, *overlong) for row in rollouts]
    rewards = [
        replace(reward, total=reward.total + penalty) for reward, penalty in zip(rewards, penalties, strict=True)
    ]
    groups = torch.tensor(group_numbers(rollouts))
    totals = torch.tensor([reward.total for reward in rewards])  # float32, as in training
    # totals is nan where not scored, so those stay out of the group's mean
    scored = torch.tensor([reward.scored for reward in rewards])
    advantages = torch.zeros_like(totals)
    if scored.any():
        advantages[scored] = group_advantages(totals[scored], groups[scored], advantage, eps)
    return [
        {
            "step": row["step"],
            "puzzle_id": row["puzzle_id"],
            "response": row["response"],
            "old_reward": row["reward"],
            "reward": reward.total if reward.scored else None,
            "status": str(reward.status),
            "message": reward.message,
            "parts": reward.parts,
            "old_advantage": row["advantage"],
            "advantage": value,
        }
        for row, reward, value in zip(rollouts, rewards, advantages.tolist(), strict=True)
    ]


def summary_lines(rows: list[dict[str, Any]], shown: int = 5) -> list[str]:
    """The comparison as text. shown: number of responses listed with the largest changes of their advantage."""
    both = [row for row in rows if row["old_reward"] is not None and row["reward"] is not None]
    old, new = [row["old_reward"] for row in both], [row["reward"] for row in both]
    changed = sum(a != b for a, b in zip(old, new, strict=True))
    # the sign decides whether a response is made likelier or less likely; the size only how fast
    signs = [(_sign(row["old_advantage"]), _sign(row["advantage"])) for row in rows]
    groups: dict[int, list[dict]] = defaultdict(list)
    for row, number in zip(rows, group_numbers(rows), strict=True):
        groups[number].append(row)
    # a group whose rewards are all equal has advantages of 0, so it has no gradient
    teach = [
        sum(differ(row[key] for row in group if row[key] is not None) for group in groups.values())
        for key in ("old_reward", "reward")
    ]
    lines = [
        f"{len(rows)} responses in {len(groups)} groups, {len(rows) - len(both)} without one of the two rewards",
        f"mean reward              {_mean(old):+.4f} -> {_mean(new):+.4f}; changed for {changed} responses",
        f"groups that teach        {teach[0]} -> {teach[1]} (rewards differ within the group)",
        f"advantages               {signs.count((1, -1)) + signs.count((-1, 1))} change sign, "
        f"{sum(a == 0 != b for a, b in signs)} from 0 to not 0, {sum(a != 0 == b for a, b in signs)} from not 0 to 0; "
        f"correlation {_correlation([r['old_advantage'] for r in rows], [r['advantage'] for r in rows])}",
    ]
    for status in sorted({row["status"] for row in rows if row["reward"] is None}):
        of_status = [row for row in rows if row["reward"] is None and row["status"] == status]
        first = of_status[0]
        lines.append(
            f"not scored ({status})    {len(of_status)}; the first: step {first['step']}, puzzle {first['puzzle_id']}, "
            f"response {first['response']}: {first['message']}"
        )
    ordered = sorted(both, key=lambda row: -abs(row["advantage"] - row["old_advantage"]))
    moved = [row for row in ordered[:shown] if row["advantage"] != row["old_advantage"]]
    if moved:
        lines.append("largest changes of an advantage:")
    lines += [
        f"  step {row['step']}, puzzle {row['puzzle_id']}, response {row['response']}: reward {row['old_reward']:g} -> "
        f"{row['reward']:g}, advantage {row['old_advantage']:+.3f} -> {row['advantage']:+.3f}"
        for row in moved
    ]
    return lines


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _correlation(a: list[float], b: list[float]) -> str:
    pair = torch.tensor([a, b], dtype=torch.float64)
    if not (pair.std(-1) > 0).all():  # also false for nan: the std of one row
        return "none, since one of them is constant"
    return f"{torch.corrcoef(pair)[0, 1].item():.3f}"
