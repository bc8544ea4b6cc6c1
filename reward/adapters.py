"""Reward functions written for TRL or verl, used unchanged: `--reward trl:module:fn`, `--reward verl:file.py:fn`.

TRL   fn(prompts, completions, **columns) -> list of float or None. As TRL does for a chat dataset, a prompt is a list
      of {"role", "content"} turns and a completion is a list with one such turn. columns: puzzle_id, answer,
      candidates, cells, context and the columns of the puzzle's row. The function is called with one response at a
      time, so it cannot compare the responses of a group.
verl  fn(data_source, solution_str, ground_truth, extra_info) -> float or {"score": float, ...}. ground_truth is the
      answer as published, "T cell | B cell". extra_info has puzzle_id, candidates and n_cells.
"""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from data.errors import UserError
from data.prompts import answer_text
from data.puzzles import Puzzle
from reward.result import Reward, RewardFn, Status


def is_async(fn: Callable) -> bool:
    """Whether a call of `fn`, or of the function that an adapter wraps, is a coroutine."""
    called = (fn, type(fn).__call__)  # also an object with `async def __call__`
    return any(map(inspect.iscoroutinefunction, called)) or getattr(fn, "is_async", False) is True


def adapt(style: str, fn: Callable) -> RewardFn:
    """`fn` as a reward function of (completion, puzzle). Raises UserError when it needs an argument we do not have."""
    if style == "verl":
        return _from_verl(fn)
    needed = [
        name
        for name, parameter in inspect.signature(fn).parameters.items()
        if parameter.default is parameter.empty and name in ("completion_ids", "environments")
    ]
    if needed:
        raise UserError(f"--reward trl:...:{fn.__name__}: it needs '{needed[0]}', which is not passed on here")
    return _from_trl(fn)


def _from_trl(fn: Callable) -> RewardFn:
    """A function in TRL's style as a reward function. What it logs with log_metric becomes parts of the reward."""
    # TRL passes every column as a keyword; a function without **kwargs can only take those it names
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(fn).parameters.values())
    names = set(inspect.signature(fn).parameters)

    def arguments(completion: str, puzzle: Puzzle, parts: dict[str, float]) -> dict[str, Any]:
        columns = {
            **puzzle.to_row(),
            "puzzle_id": puzzle.id,
            "answer": puzzle.answer,
            "candidates": puzzle.candidates,
            "cells": puzzle.cells,
            "context": puzzle.context,
        }
        given = {
            "prompts": [puzzle.chat()],
            "completions": [[{"role": "assistant", "content": completion}]],
            **{name: [value] for name, value in columns.items()},
            "trainer_state": None,
            "log_metric": lambda name, value: parts.update({name: float(value)}),
            "log_extra": lambda name, values: None,
        }
        return given if takes_all else {name: value for name, value in given.items() if name in names}

    def settle(results: list, parts: dict[str, float]) -> Reward:
        if not isinstance(results, (list, tuple)) or len(results) != 1:
            raise UserError(f"a TRL-style reward returns one number per completion; for one it returned {results!r}")
        if results[0] is None:  # TRL: the function does not apply to this response
            return Reward(total=float("nan"), parts=parts, status=Status.DECLINED, message="the function returned None")
        return Reward(total=float(results[0]), parts=parts)

    def scored(completion: str, puzzle: Puzzle) -> Reward | Awaitable[Reward]:
        parts: dict[str, float] = {}
        return _then(fn(**arguments(completion, puzzle, parts)), lambda results: settle(results, parts))

    scored.is_async = is_async(fn)
    return scored


def _from_verl(fn: Callable) -> RewardFn:
    """A function in verl's style as a reward function. Further numbers in its dict become parts of the reward."""

    def settle(result: Any) -> Reward:
        if not isinstance(result, dict):
            return Reward(total=float(result))
        numbers = {k: float(v) for k, v in result.items() if k != "score" and isinstance(v, (bool, int, float))}
        return Reward(total=float(result["score"]), parts=numbers)

    def scored(completion: str, puzzle: Puzzle) -> Reward | Awaitable[Reward]:
        result = fn(
            data_source="cellpuzzles",
            solution_str=completion,
            ground_truth=answer_text(puzzle.answer),
            extra_info={"puzzle_id": puzzle.id, "candidates": puzzle.candidates, "n_cells": len(puzzle.cells)},
        )
        return _then(result, settle)

    scored.is_async = is_async(fn)
    return scored


def _then(result: Any, settle: Callable[[Any], Reward]) -> Reward | Awaitable[Reward]:
    """settle(result); for an async function, an awaitable of it."""
    if not inspect.isawaitable(result):
        return settle(result)

    async def later() -> Reward:
        return settle(await result)

    return later()
