"""What a reward function returns: a number, or a `Reward` with its parts and a status."""

import math
import numbers
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from data.errors import UserError
from data.puzzles import Puzzle


class Status(StrEnum):
    """What happened to a completion. A failure is never turned into a reward of 0."""

    OK = "ok"
    """Scored."""
    INVALID_FORMAT = "invalid_format"
    """Scored; the response breaks the format."""
    TRUNCATED = "truncated"
    """Scored; the response was cut at the length limit."""
    ERROR = "error"
    """Not scored: the reward function raised, returned no number, or its process died."""
    TIMEOUT = "timeout"
    """Not scored: the reward function took too long."""
    DECLINED = "declined"
    """Not scored: a TRL-style function returned None. The response is left out of its group under every policy."""


NOT_SCORED = (Status.ERROR, Status.TIMEOUT, Status.DECLINED)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A score with its parts.

    Example: Reward(total=-1.0, parts={"format_validity": 0.0}, status=Status.INVALID_FORMAT)
    """

    total: float
    """The number from which advantages are computed; nan when the completion was not scored."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named numbers that explain the total. Their means are `rewards/<name>` in metrics.jsonl."""
    status: Status = Status.OK
    message: str = ""
    """Why the completion was not scored."""

    @property
    def failed(self) -> bool:
        """Whether the option --on-reward-error decides what happens to this completion."""
        return self.status in (Status.ERROR, Status.TIMEOUT)

    @property
    def scored(self) -> bool:
        return self.status not in NOT_SCORED


RewardFn = Callable[[str, Puzzle], "float | Reward | Awaitable[float | Reward]"]


def as_reward(result: object) -> Reward:
    """The result of a reward function as a Reward of plain floats.

    Raises UserError when it is neither a finite number nor a Reward whose total and parts are finite numbers.
    """
    if not isinstance(result, Reward):
        return Reward(total=_as_number(result, "the reward"))
    total = _as_number(result.total, "the total of the reward") if result.scored else math.nan
    parts = {str(name): _as_number(value, f"part {name!r} of the reward") for name, value in result.parts.items()}
    return replace(result, total=total, parts=parts, status=Status(result.status))


def _as_number(value: object, what: str) -> float:
    # a bool is a number in Python; as a reward it is a comparison that was returned by mistake
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"{what} is {value!r}: return a finite number or a Reward")
    return float(value)
