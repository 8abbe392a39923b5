"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """Bad input. The message is one line that names the value, the rule and the remedy.

    The shell prints it without a traceback and exits with code 1; library users catch it as a ``ValueError``.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says first, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
