"""Fields of settings dataclasses, with the text that their flag shows (launch/options.py makes the flags)."""

import dataclasses
from typing import Any


def option(default: Any, help: str, choices: tuple[str, ...] = (), *, section: str = "") -> Any:
    """A dataclass field with the help text of its flag.

    default: dataclasses.MISSING for a required option. choices: the values that are allowed, if only some are. section:
    the heading of --help under which the flag is listed; "" for the last one.
    """
    metadata = {"help": help, "choices": choices, "section": section}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def argument(help: str) -> Any:
    """A dataclass field that is a positional argument of its command."""
    return dataclasses.field(metadata={"help": help, "choices": (), "section": "", "argument": True})
