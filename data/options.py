"""Fields of settings dataclasses, with the text that their flag shows (launch/options.py makes the flags)."""

import dataclasses
from typing import Any


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the text its flag shows and, where it is a choice, what may be chosen."""
    metadata = {"help": help, "choices": choices}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str) -> Any:
    """A dataclass field that is a positional argument of its command."""
    return dataclasses.field(metadata={"help": help, "choices": (), "argument": True})
