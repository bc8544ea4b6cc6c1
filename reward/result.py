"""What a reward function returns: a number, or a Reward with its parts and a status."""

import math
import numbers
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from data.errors import UserError
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


def as_reward(result: object) -> Reward:
    """What a reward function returned, as a Reward of plain floats.

    Raises UserError when it is neither a finite number nor a Reward whose total and parts are finite numbers.
    """
    if not isinstance(result, Reward):
        return Reward(total=_as_number(result, "the reward"))
    total = _as_number(result.total, "the total of the reward") if result.scored else math.nan
    parts = {str(name): _as_number(value, f"part {name!r} of the reward") for name, value in result.parts.items()}
    return replace(result, total=total, parts=parts, status=Status(result.status))


def _as_number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"{what} is {value!r}: return a finite number or a Reward")
    return float(value)
