"""What a reward function returns: a number, or a `Reward` with its parts and a status."""

import math
import numbers
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
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


LARGEST = 1e18
"""The largest reward, and part of one: advantages are computed in float32, with squares."""
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
    """Why the completion was not scored, or what is wrong with its format."""

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

    Raises UserError when it is neither a finite number nor a Reward whose total and parts are finite numbers, or when a
    number is above LARGEST.
    """
    if not isinstance(result, Reward):
        return Reward(total=as_number(result, "the reward"))
    status = Status(result.status)
    total = math.nan if status in NOT_SCORED else as_number(result.total, "the total of the reward")
    parts = {as_text(name): as_number(value, f"part {name!r} of the reward") for name, value in result.parts.items()}
    return Reward(total=total, parts=parts, status=status, message=as_text(result.message))


def timed_out(seconds: float) -> Reward:
    return Reward(total=math.nan, status=Status.TIMEOUT, message=f"it took longer than --reward-seconds {seconds:g}")


def nothing_usable(rows: list[dict]) -> str:
    """What is wrong when every response has an invalid format, was cut or was not scored, and the commonest reasons.

    rows: of rollouts.jsonl. "" if one response can be learned from.
    """
    if any(row["status"] == Status.OK for row in rows):
        return ""
    cut = "it was cut at --max-response-tokens"
    unscored = [row for row in rows if row["status"] in NOT_SCORED]
    reasons = Counter(
        cut if row["status"] == Status.TRUNCATED else row.get("message") or f"its status is {row['status']}"
        for row in rows
    )
    commonest = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    order = (Status.INVALID_FORMAT, *NOT_SCORED, Status.TRUNCATED)
    first = min(rows, key=lambda row: order.index(row["status"]))  # a whole response says more than a cut one
    text = first["completion"]
    shown = text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
    what = "was cut at the length limit" if list(reasons) == [cut] else "has an invalid format or was cut"
    if unscored:
        what = "was not scored" if len(unscored) == len(rows) else f"{what}, or was not scored"
    return (
        f"each of the {len(rows)} responses {what}, so there is nothing to learn from: {commonest}. Puzzle "
        f"{first['puzzle_id']} was answered {shown!r}"
    )


def as_text(value: object) -> str:
    """A user's value as text that can be written to a file; an object that cannot say what it is gives its type."""
    try:
        text = str(value)
    except BaseException as error:  # the method is the user's
        text = f"(a {type(value).__name__} whose text raises {type(error).__name__})"
    return text.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair is no character


def real_number(value: object) -> numbers.Real | None:
    """The number that a user's value is: a real number, or the one element of an array or tensor. None: it is none.

    A bool is 1 or 0, as for TRL and verl: a reward is often a comparison. A text is no number.
    """
    if not isinstance(value, numbers.Real) and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # several elements
            return None
    return value if isinstance(value, numbers.Real) else None


def as_number(value: object, what: str) -> float:
    """A user's number as a float. Raises UserError, which calls it `what`, when it is no finite number up to LARGEST."""
    number, shown = real_number(value), repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]} ..."
    if number is not None and LARGEST < abs(number) != math.inf:
        raise UserError(f"{what} is {shown}: its square must fit float32, so return at most {LARGEST:g} in size")
    if number is None or not math.isfinite(number):
        raise UserError(f"{what} is {shown}: return a finite number or a Reward")
    return float(number)
