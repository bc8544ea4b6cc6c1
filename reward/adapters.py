"""How a reward function is called, and functions written for TRL or verl, used unchanged.

`--reward trl:module:fn`, `--reward verl:file.py:fn`:

TRL   fn(prompts, completions, **columns) -> list of float or None. As TRL does for a chat dataset, a prompt is a list
      of {"role", "content"} turns and a completion is a list with one such turn. columns: id, puzzle_id, answer,
      candidates, cells, context and the columns of the puzzle's row. The function is called with one response at a
      time, so it cannot compare the responses of a group. The list may be an array or a tensor. trainer_state is None.
verl  fn(data_source, solution_str, ground_truth, extra_info) -> float or {"score": float, ...}. ground_truth is the
      answer as published, "T cell | B cell". extra_info has puzzle_id, candidates and n_cells.
"""

import asyncio
import bdb
import inspect
import json
import math
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from data.errors import UserError
from data.prompts import answer_text
from data.puzzles import MESSAGE_COLUMNS, Puzzle
from reward.result import Reward, RewardFn, Status, as_number, as_reward, as_text, real_number, timed_out

VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
TRL = ("prompts", "completions", "trainer_state", "log_metric", "log_extra")
STYLES = {"trl": "TRL", "verl": "verl"}
COLUMNS = ("id", "puzzle_id", "answer", "candidates", "cells", "context", *MESSAGE_COLUMNS)
"""What a function in TRL's style gets for every puzzle; the metadata of its puzzle come on top."""


def is_async(fn: Callable) -> bool:
    """Whether a call of `fn`, or of the function that an adapter wraps, is a coroutine."""
    called = (fn, type(fn).__call__)  # also an object with `async def __call__`
    return any(map(inspect.iscoroutinefunction, called)) or getattr(fn, "is_async", False) is True


def adapt(style: str, fn: Callable, path: str, puzzles: Iterable[Puzzle] = ()) -> RewardFn:
    """`fn` as a reward function of (completion, puzzle). style: "trl", "verl", or "" when it is one already.

    Raises UserError when it cannot be called with what we have. path: the text that the user wrote, for messages.
    puzzles: each must have the columns that a function in TRL's style needs.
    """
    if inspect.isclass(fn):
        raise UserError(
            f"--reward {path}: {fn.__name__} is a class; write an instance into the file, such as "
            f"`reward = {fn.__name__}()`, and name that"
        )
    if style == "trl":
        _check_trl(fn, path, puzzles)
        return _from_trl(fn)
    if style == "verl":
        _check_call(fn, path, f"the keywords {', '.join(VERL)}", **dict.fromkeys(VERL))
        return _from_verl(fn)
    _check_call(fn, path, "(completion, puzzle)", "", None)
    # it can be called so, and would read another thing; a decorator hides what it is
    names = list(getattr(_parameters(fn, wrapped=True), "parameters", ()))
    own = _parameters(fn)  # a decorator may swap them
    if own and list(own.parameters)[:2] == ["puzzle", "completion"]:
        raise UserError(
            f"--reward {path}: takes (puzzle, completion), and is called with (completion, puzzle); swap them"
        )
    if "puzzle" not in names and (style := _style_of(names[:2])):
        raise UserError(
            f"--reward {path}: takes {', '.join(names)}, as functions for {STYLES[style]} do, and is called with "
            f"(completion, puzzle); write {style}:{path}"
        )
    return fn


def _parameters(fn: Callable, wrapped: bool = False) -> inspect.Signature | None:
    """What a call of `fn` takes; None when Python does not know. wrapped: what the function takes that `fn` decorates.

    A decorator may itself pass an argument to the function, so only what `fn` itself takes can be a reason to refuse it.
    """
    for follow in (wrapped, True):  # functools.cache has no signature of its own
        try:
            return inspect.signature(fn, follow_wrapped=follow)
        except (TypeError, ValueError):
            pass
    return None


def _is_open(signature: inspect.Signature | None) -> bool:
    """Does it take any keyword?"""
    return signature is None or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _needed(fn: Callable) -> list[str]:
    """The names of the arguments without which `fn` cannot be called."""
    signature = _parameters(fn)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = signature.parameters.values() if signature else ()
    return [p.name for p in found if p.default is p.empty and p.kind not in several]


def _check_call(fn: Callable, path: str, what: str, *args: object, **kwargs: object) -> None:
    """Raise UserError when `fn` cannot be called with these arguments. what: how a message describes them."""
    signature = _parameters(fn)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = signature.parameters
        short = inspect.Signature([inspect.Parameter(p.name, p.kind) for p in names.values()])
        style = _style_of(names) if args else ""
        hint = f"; for a function written for {STYLES[style]} write {style}:{path}" if style else ""
        raise UserError(f"--reward {path}: it is called with {what}, and takes {short}: {error}{hint}") from None


def _style_of(names: Iterable[str]) -> str:
    """The style, trl or verl, of a function with one of the parameters that only functions for that program have; else ""."""
    meant = {"completions": "trl", "solution_str": "verl"}
    return next((style for name, style in meant.items() if name in names), "")


def _check_trl(fn: Callable, path: str, puzzles: Iterable[Puzzle]) -> None:
    needed = _needed(fn)
    for name in needed:
        if name in ("completion_ids", "environments"):
            raise UserError(
                f"--reward {path}: it needs '{name}', which is not passed on here; what is: "
                f"{', '.join(TRL + COLUMNS)} and the columns of the puzzles"
            )
    signature = _parameters(fn)
    named = [name for name in TRL + COLUMNS if signature and name in signature.parameters]
    what = f"keywords: {', '.join(TRL + COLUMNS)} and the columns of the puzzles"
    _check_call(fn, path, what, **dict.fromkeys(["completions", *named, *needed]))
    for puzzle in puzzles:
        if lacking := _lacking(needed, puzzle):
            raise UserError(f"--reward {path}: {lacking}")


def _lacking(needed: list[str], puzzle: Puzzle) -> str:
    """What is wrong when the puzzle has no column that a function in TRL's style needs; "" when it has all."""
    known = {*TRL, *COLUMNS, *puzzle.meta} - {"context_tail"}
    missing = [name for name in needed if name not in known]
    if not missing:
        return ""
    columns = [*COLUMNS, *sorted(known - {*TRL, *COLUMNS})]
    return f"it needs '{missing[0]}', and puzzle {puzzle.id} has no such column; it has {', '.join(columns)}"


def _from_trl(fn: Callable) -> RewardFn:
    """A function in TRL's style as a reward function. What it logs with log_metric becomes parts of the reward."""
    # TRL passes every column as a keyword; a function without **kwargs can only take those it names, and what it decorates
    # gets them only through its own **kwargs
    own, decorated, needed = _parameters(fn), _parameters(fn, wrapped=True), _needed(fn)
    takes_all = _is_open(own) and _is_open(decorated)
    names = {*(own.parameters if own else ()), *(decorated.parameters if decorated and _is_open(own) else ())}

    def arguments(completion: str, puzzle: Puzzle, parts: dict[str, float]) -> dict[str, Any]:
        if lacking := _lacking(needed, puzzle):
            raise UserError(lacking)
        columns = {
            **puzzle.to_row(),
            "id": puzzle.id,
            "puzzle_id": puzzle.id,
            "answer": puzzle.answer,
            "candidates": puzzle.candidates,
            "cells": puzzle.cells,
            "context": puzzle.context,
        }
        given = {
            **{name: [value] for name, value in columns.items()},
            "prompts": [puzzle.chat()],  # after the columns: a file of another program may have some of these names
            "completions": [[{"role": "assistant", "content": completion}]],
            "trainer_state": None,
            "log_metric": lambda name, value: parts.update({name: as_number(value, f"metric {name!r}")}),
            "log_extra": lambda name, values: None,
        }
        return given if takes_all else {name: value for name, value in given.items() if name in names}

    def settle(results: Any, parts: dict[str, float]) -> Reward:
        if callable(getattr(results, "tolist", None)):
            results = results.tolist()
        if not isinstance(results, (list, tuple)) or len(results) != 1:
            raise UserError(f"a TRL-style reward returns one number per completion; for one it returned {results!r}")
        if results[0] is None:  # TRL: the function does not apply to this response
            return Reward(total=float("nan"), parts=parts, status=Status.DECLINED, message="the function returned None")
        return Reward(total=as_number(results[0], "the reward"), parts=parts)

    def scored(completion: str, puzzle: Puzzle) -> Reward | Awaitable[Reward]:
        parts: dict[str, float] = {}
        return _then(fn(**arguments(completion, puzzle, parts)), lambda results: settle(results, parts))

    scored.is_async = is_async(fn)
    return scored


def _from_verl(fn: Callable) -> RewardFn:
    """A function in verl's style as a reward function. Further numbers in its dict become parts of the reward.

    data_source is the puzzle's column of that name; else "cell_data", by which the reward of Cell-o1's authors knows its rows.
    """

    def settle(result: Any) -> Reward:
        if not isinstance(result, dict):
            return Reward(total=as_number(result, "the reward"))
        if "score" not in result:
            keys = ", ".join(map(as_text, result)) or "nothing"
            raise UserError(f"a verl-style reward returns a number or a dict with 'score'; its dict has {keys}")
        others = {name: value for name, value in result.items() if name != "score" and real_number(value) is not None}
        parts = {name: as_number(value, f"{name!r} of the reward") for name, value in others.items()}
        return Reward(total=as_number(result["score"], "'score' of the reward"), parts=parts)

    def scored(completion: str, puzzle: Puzzle) -> Reward | Awaitable[Reward]:
        result = fn(
            data_source=puzzle.meta.get("data_source", "cell_data"),
            solution_str=completion,
            ground_truth=answer_text(puzzle.answer),
            extra_info={"puzzle_id": puzzle.id, "candidates": puzzle.candidates, "n_cells": len(puzzle.cells)},
        )
        return _then(result, settle)

    scored.is_async = is_async(fn)
    return scored


def _then(result: Any, settle: Callable[[Any], Reward]) -> Reward | Awaitable[Reward]:
    """settle(result); for an async function, an awaitable of it."""
    if not _is_awaitable(result):
        return settle(result)

    async def later() -> Reward:
        return settle(await result)

    return later()


def _is_awaitable(result: object) -> bool:
    """Raises UserError for a Future that nothing will complete: a plain function is called outside an event loop."""
    if asyncio.isfuture(result) and not result.done():
        raise UserError(
            "the reward returned an asyncio Future of an event loop that does not run: write the function with `async def`"
        )
    return inspect.isawaitable(result)


# ---- the call itself

CONCURRENT = 64
"""Responses that an async function scores side by side in one process."""
LOOP = asyncio.Runner()
"""One event loop for the life of a process: clients and locks of a reward function belong to the loop of their first use."""


def score_here(
    fn: RewardFn, completions: Sequence[str], puzzles: Sequence[Puzzle], stop_at_failure: bool
) -> dict[int, Reward]:
    """{index: reward} of responses, scored in this process; up to the first failure, for a plain function that is to stop there.

    The puzzles are what a worker process would get: a date or bytes in a column arrive as their text.
    """
    sent = [Puzzle(**json.loads(json.dumps(asdict(puzzle), default=str))) for puzzle in puzzles]
    pairs, found = list(zip(completions, sent, strict=True)), {}
    if not is_async(fn):
        for index, pair in enumerate(pairs):
            found[index] = score_plain(fn, *pair, None)
            if stop_at_failure and found[index].failed:
                break
        return found
    if _in_event_loop():
        raise UserError(
            "workers=0: an async reward cannot be awaited inside a running event loop (a notebook); use workers=1"
        )
    room = asyncio.Semaphore(CONCURRENT)

    async def one(pair: tuple[str, Puzzle]) -> Reward:
        async with room:
            return await score_async(fn, *pair, None)

    async def gather() -> list[Reward]:
        return await asyncio.gather(*map(one, pairs))

    return dict(enumerate(LOOP.run(gather())))


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


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
        outcome = as_reward(LOOP.run(within(result)) if _is_awaitable(result) else result)
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
    if isinstance(outcome, KeyboardInterrupt | bdb.BdbQuit) and seconds is None:
        raise outcome  # it is for the trainer, or for its debugger
    late = seconds is not None and time.monotonic() - start >= seconds
    if late and isinstance(outcome, Reward | TimeoutError):
        return timed_out(seconds)
    if isinstance(outcome, Reward):
        return outcome
    if isinstance(outcome, UserError):  # about what the function returned: it has no line
        return Reward(total=math.nan, status=Status.ERROR, message=as_text(outcome))
    where = traceback.extract_tb(outcome.__traceback__)[-1]
    message = f"{type(outcome).__name__}: {as_text(outcome)} ({os.path.basename(where.filename)}, line {where.lineno})"
    return Reward(total=math.nan, status=Status.ERROR, message=" ".join(message.split()))
