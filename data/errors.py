"""Errors that a command tells in one sentence, without a traceback. Any other exception is a bug and keeps its traceback."""


class UserError(ValueError):
    """Something the user gave cannot be used: a file, a row, an option (exit code 2).

    The message is one sentence that names it and says what to do.
    """


class RunError(RuntimeError):
    """The run cannot go on, and the user's input is not why; the message is one sentence (exit code 1)."""
