"""Start and exit of a command: settings of other libraries, one-line errors and exit codes."""

import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from autoslim.errors import UserError, worker_error
from autoslim.files import os_error

# torch reads this on import. By default oneDNN caches 1,024 primitives, fewer than the widths of a supernet need, and
# rebuilds those that it has evicted.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
# No command sends usage statistics.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# torch searches for CUDA when it measures or compiles, and warns if there is only a compiler for it.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
# Plain tracebacks, without Typer's boxes, are easier to copy into a bug report.
os.environ.setdefault("TYPER_STANDARD_TRACEBACK", "1")

_INTERRUPTED = "interrupted; run again to continue training, search and latency tables from their last checkpoint"


class InvalidParametersError(UserError):
    """Raised for wrong parameters, with one message for each.

    Args:
        source: The file or options that the parameters were read from.
        problems: The messages.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: {'; '.join(problems)}")
        self.source, self.problems = source, tuple(problems)


def with_clear_errors(command: Callable[..., Any]) -> Callable[..., None]:
    """Wraps ``command``: a ``UserError`` is printed on stderr and exits with code 1, an interrupt with code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if main_thread:
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM ends the tracked run too
            command(*args, **kwargs)
        except UserError as error:
            print(f"error: {_formatted(error)}", file=sys.stderr)
            sys.exit(1)
        except OSError as error:
            if (message := os_error(error)) is None:
                raise
            print(f"error: {_formatted(message)}", file=sys.stderr)
            sys.exit(1)
        except RuntimeError as error:
            if (message := worker_error(error)) is None:
                raise
            print(f"error: {_formatted(message)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print(_INTERRUPTED, file=sys.stderr)
            sys.exit(130)
        except SystemExit as ending:
            if ending.code:
                raise
            # From code of the user's, such as a data set. DVC would take the end of a stage for its success.
            print(
                "error: sys.exit was called before the command was complete; remove it from your code", file=sys.stderr
            )
            sys.exit(1)
        finally:
            if main_thread:
                signal.signal(signal.SIGTERM, handler)

    return run


def _report_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints one line for an interrupt outside of a command, for example during the imports before it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(_INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)  # after this function, Python would end itself with the signal


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _report_interrupt


def _formatted(error: UserError) -> str:
    if isinstance(error, InvalidParametersError) and len(error.problems) > 1:
        return "\n".join(
            [
                f"{error.source} has {len(error.problems)} wrong parameters:",
                *(f"  {_on_one_line(problem)}" for problem in error.problems),
            ]
        )
    return _on_one_line(str(error))


def _on_one_line(text: str) -> str:
    """Joins the lines of a message: one from other code, such as a network's constructor, may have several.

    Characters that a terminal would obey, for example in the name of a file, are escaped.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
