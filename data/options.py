"""Fields of settings dataclasses that carry the help text of their flag. launch/options.py turns them into flags."""

import dataclasses
from typing import Any


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its default, the help text of its flag and, for a choice, the allowed values."""
    metadata = {"help": help, "choices": choices}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str) -> Any:
    """A dataclass field that becomes a positional argument of its command."""
    return dataclasses.field(metadata={"help": help, "choices": (), "argument": True})
