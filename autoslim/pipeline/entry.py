"""How a command starts and ends: settings of other libraries, one-line errors and exit codes."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from autoslim.errors import UserError

# oneDNN keeps 1,024 primitives by default and builds anew what it forgot; the widths of a supernet need more of them
# (read when torch starts).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
# Nothing that a user runs here calls home.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A defect's traceback is for a bug report: Typer's boxes around every line of it are not.
os.environ.setdefault("TYPER_STANDARD_TRACEBACK", "1")


class InvalidParametersError(UserError):
    """All that is wrong with a file of parameters: as text one line, on the terminal one line for each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: {'; '.join(problems)}")
        self.source, self.problems = source, tuple(problems)


def with_clear_errors(command: Callable[..., Any]) -> Callable[..., None]:
    """``command`` with a ``UserError`` turned into one line on stderr and exit code 1, an interrupt into code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends as an interrupt: tracking is closed
        try:
            command(*args, **kwargs)
        except UserError as error:
            print(f"error: {_told(error)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; training and search go on from their last checkpoint when run again", file=sys.stderr)
            sys.exit(130)

    return run


def _told(error: UserError) -> str:
    if isinstance(error, InvalidParametersError) and len(error.problems) > 1:
        return "\n".join(
            [
                f"{error.source} has {len(error.problems)} wrong parameters:",
                *(f"  {_in_one_line(problem)}" for problem in error.problems),
            ]
        )
    return _in_one_line(str(error))


def _in_one_line(text: str) -> str:
    """What other people's code says (a network's constructor, say) may have several."""
    return " ".join(text.split())
