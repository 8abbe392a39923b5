"""How a command ends: a mistake of the user's is one line and exit code 1, never a traceback."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from autoslim.vocabulary.errors import UserError


def ending_clearly(command: Callable[..., Any]) -> Callable[..., None]:
    """``command`` with a ``UserError`` turned into one line on stderr and exit code 1, an interrupt into exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on from the last checkpoint", file=sys.stderr)
            sys.exit(130)

    return run
