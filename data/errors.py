"""Errors that a command prints as one sentence, without a traceback. Any other exception is a bug and keeps it."""


class UserError(ValueError):
    """A file, a row or an option that the user gave cannot be used. The command exits with code 2.

    The message is one sentence: it names the file, row or option and says what to do.
    """


class RunError(RuntimeError):
    """The run cannot go on, for a reason other than the user's input. The command exits with code 1.

    The message is one sentence.
    """
