"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """Bad input. The message is one line that names the value, the rule and the remedy.

    The shell prints it without a traceback and exits with code 1; library users catch it as a ``ValueError``.
    """
