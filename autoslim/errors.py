"""The exception class for errors that the user can correct."""


class UserError(ValueError):
    """Raised for wrong input. The message is one line with the value, the rule and the remedy.

    Commands print it without a traceback and exit with code 1. Users of the library catch it as a ``ValueError``.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or the name of its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def first_sentence(error: BaseException) -> str:
    """Returns the first sentence of an exception's message without its full stop; torch's messages may have several."""
    return first_line(error).partition(". ")[0].removesuffix(".")
