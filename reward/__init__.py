"""Rewards: `fn(completion: str, puzzle: Puzzle) -> float | Reward`, sync or async, named by import path.

`reward/scoring.py` runs them in worker processes; `reward/adapters.py` takes functions in TRL's and verl's styles.
"""

import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from data.puzzles import Puzzle


class Status(StrEnum):
    """What became of a completion. Nothing collapses silently to a reward of 0."""

    OK = "ok"
    """Scored."""
    INVALID_FORMAT = "invalid_format"
    """Scored, as an answer that breaks the format."""
    TRUNCATED = "truncated"
    """Scored, but the response hit the length limit."""
    ERROR = "error"
    """The reward function raised, returned no number, or brought its process down. Not scored."""
    TIMEOUT = "timeout"
    """The reward function took too long. Not scored."""
    DECLINED = "declined"
    """A TRL-style function returned None for this completion. Not scored; left out of its group under every policy."""


NOT_SCORED = (Status.ERROR, Status.TIMEOUT, Status.DECLINED)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A score with its parts. Example: Reward(total=-1.0, parts={"format_validity": 0.0}, status=Status.INVALID_FORMAT)"""

    total: float
    """What the advantages are computed from; nan when the status says that the completion was not scored."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named numbers behind the total, averaged into `rewards/<name>` of metrics.jsonl."""
    status: Status = Status.OK
    message: str = ""
    """Why it was not scored."""

    @property
    def failed(self) -> bool:
        """Is this a case for --on-reward-error?"""
        return self.status in (Status.ERROR, Status.TIMEOUT)

    @property
    def scored(self) -> bool:
        return self.status not in NOT_SCORED


RewardFn = Callable[[str, Puzzle], "float | Reward | Awaitable[float | Reward]"]


def load_reward(path: str) -> RewardFn:
    """The function behind `package.module:function` or `path/to/file.py:function`.

    `trl:` and `verl:` in front take a function written for those programs (reward/adapters.py).
    Raises ValueError, with the reason, when it does not import, is not there, or is not callable.
    """
    style, _, rest = path.partition(":")
    if style in ("trl", "verl") and ":" in rest:
        from reward.adapters import adapt

        return adapt(style, _load_function(path, rest))
    return _load_function(path, path)


def _load_function(path: str, function: str) -> Callable:
    """`function` is what names the function, `path` what the user wrote."""
    module_name, colon, name = function.rpartition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"--reward {path}: write it as module:function or path/to/file.py:function")
    module = _load_file(path, module_name) if module_name.endswith(".py") else _load_module(path, module_name)
    fn = getattr(module, name, None)
    if fn is None:
        known = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise ValueError(
            f"--reward {path}: {module_name} has no '{name}'; its functions are {', '.join(known) or 'none'}"
        )
    if not callable(fn):
        raise ValueError(f"--reward {path}: '{name}' is a {type(fn).__name__}, not a function of (completion, puzzle)")
    return fn


def _load_module(path: str, module_name: str):
    if str(Path.cwd()) not in sys.path:  # `python launch/grpo.py` puts launch/ there, not the user's folder
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--reward {path}: cannot import {module_name} ({error})") from error


def _load_file(path: str, file_name: str):
    if not Path(file_name).is_file():
        raise ValueError(f"--reward {path}: no file {file_name}")
    name = "reward_file_" + Path(file_name).stem
    spec = importlib.util.spec_from_file_location(name, file_name)
    assert spec is not None and spec.loader is not None, "a .py path always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"--reward {path}: cannot import {file_name} ({error})") from error
    return module


def as_reward(result: object) -> Reward:
    """What a reward function returned, as a Reward of plain floats.

    Raises ValueError when it is neither a finite number nor a Reward whose total and parts are finite numbers.
    """
    if not isinstance(result, Reward):
        return Reward(total=_as_number(result, "the reward"))
    total = _as_number(result.total, "the total of the reward") if result.scored else math.nan
    parts = {str(name): _as_number(value, f"part {name!r} of the reward") for name, value in result.parts.items()}
    return replace(result, total=total, parts=parts, status=Status(result.status))


def _as_number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}: return a finite number or a Reward")
    return float(value)
