"""Errors that are told in one sentence, and telling a user's mistake from a bug."""

import linecache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class RunError(RuntimeError):
    """The run cannot go on; the message is one sentence for its user (exit code 1)."""


def said_on_purpose(error: ValueError) -> bool:
    """Was it raised by a `raise` statement of ours? A ValueError out of a library or a builtin is a bug: keep its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    file = Path(trace.tb_frame.f_code.co_filename).resolve()
    ours = file.is_relative_to(ROOT) and "site-packages" not in file.parts
    return ours and linecache.getline(str(file), trace.tb_lineno).lstrip().startswith("raise ")
