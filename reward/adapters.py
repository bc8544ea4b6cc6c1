"""How a reward function is called, and functions written for TRL or verl, used unchanged.

`--reward trl:module:fn`, `--reward verl:file.py:fn`:

TRL   fn(prompts, completions, **columns) -> list of float or None. As TRL does for a chat dataset, a prompt is a list
      of {"role", "content"} turns and a completion is a list with one such turn. columns: puzzle_id, answer,
      candidates, cells, context and the columns of the puzzle's row. The function is called with one response at a
      time, so it cannot compare the responses of a group.
verl  fn(data_source, solution_str, ground_truth, extra_info) -> float or {"score": float, ...}. ground_truth is the
      answer as published, "T cell | B cell". extra_info has puzzle_id, candidates and n_cells.
"""

import asyncio
import inspect
import math
import os
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from data.errors import UserError
from data.prompts import answer_text
from data.puzzles import Puzzle
from reward.result import Reward, RewardFn, Status, as_reward, as_text, timed_out


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


# ---- the call itself


def score_plain(fn: RewardFn, completion: str, puzzle: Puzzle, seconds: float | None) -> Reward:
    """The reward of one response, by a plain function; it is called outside an event loop.

    An exception or a time-out becomes a status with total nan, never a number. This and `score_async` are the only places
    that catch everything: the function is the user's, and --on-reward-error decides.
    """
    start, process = time.monotonic(), os.getpid()

    async def within(awaitable: Awaitable) -> object:
        async with asyncio.timeout(seconds):
            return await awaitable

    try:
        result = fn(completion, puzzle)
        outcome = as_reward(asyncio.run(within(result)) if inspect.isawaitable(result) else result)
    except BaseException as error:  # also SystemExit, GeneratorExit and CancelledError
        outcome = error
    return _settle(outcome, start, process, seconds)


async def score_async(fn: RewardFn, completion: str, puzzle: Puzzle, seconds: float | None) -> Reward:
    """`score_plain` for an async function."""
    start, process = time.monotonic(), os.getpid()
    try:
        async with asyncio.timeout(seconds):
            outcome = as_reward(await fn(completion, puzzle))
    except BaseException as error:
        outcome = error
    return _settle(outcome, start, process, seconds)


def _settle(outcome: Reward | BaseException, start: float, process: int, seconds: float | None) -> Reward:
    """What counts of the outcome of a reward function. process: the one that called it, at `start`.

    seconds: the time limit; None in the trainer itself.
    """
    if os.getpid() != process:
        os._exit(0)  # the function forked and this is the child: its parent answers
    if isinstance(outcome, KeyboardInterrupt) and seconds is None:
        raise outcome  # it is for the trainer
    late = seconds is not None and time.monotonic() - start >= seconds
    if late and isinstance(outcome, Reward | TimeoutError):
        return timed_out(seconds)
    if isinstance(outcome, Reward):
        return outcome
    where = traceback.extract_tb(outcome.__traceback__)[-1]
    message = f"{type(outcome).__name__}: {as_text(outcome)} ({os.path.basename(where.filename)}, line {where.lineno})"
    return Reward(total=math.nan, status=Status.ERROR, message=" ".join(message.split()))
