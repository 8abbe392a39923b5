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


def worker_error(error: RuntimeError) -> UserError | None:
    """Returns the error for the user if a process of torch's ``DataLoader`` has ended; None for other errors.

    torch raises a ``RuntimeError`` for this, in the main thread and wherever it is: it handles a signal.
    """
    if not str(error).startswith("DataLoader worker"):
        return None
    return UserError(
        f"a process that reads samples ended before its work was done ({first_line(error)}); run again to continue "
        "from the last checkpoint; if this is repeated, set runtime.workers to 0 to see an error in the code that "
        "reads them, or lower it if memory runs out"
    )
