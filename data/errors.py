"""Errors that a command prints as one sentence, without a traceback. Any other exception is a bug and keeps it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A file, a row or an option that the user gave cannot be used. The command exits with code 2.

    The message is one sentence: it names the file, row or option and says what to do.
    """


class RunError(RuntimeError):
    """The run cannot go on, for a reason other than the user's input. The command exits with code 1.

    The message is one sentence.
    """


def first_line(error: BaseException) -> str:
    """The first line of a library's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")


def first_sentence(error: Exception) -> str:
    """The beginning of a library's message: at most its first sentence, and at most 200 characters."""
    text = first_line(error).split(". ")[0]
    return text if len(text) <= 200 else f"{text[:200]}..."


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the error that safetensors has of its own where a disk is full, and of its own kind, into an OSError."""
    from safetensors import SafetensorError  # not for a command that writes none

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
