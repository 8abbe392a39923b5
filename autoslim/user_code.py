"""Objects in Python files and packages of the user's, found by import path: networks, data sets and tasks."""

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autoslim.errors import UserError, first_line


def file_of(name: str) -> str | None:
    """Returns the path of the Python file in ``path/to/file.py:callable``; None for other names."""
    path = name.rpartition(":")[0]
    return path if path.endswith(".py") else None


def find_callable(name: str, parameter: str, formats: str, *, relative_to: Path = Path()) -> Callable[..., Any]:
    """Returns the callable that ``package.module:callable`` or ``path/to/file.py:callable`` refers to.

    The path of a file starts at ``relative_to``. The file may import its neighbours, and modules in ``relative_to``.

    Args:
        parameter: the parameter with the name, for the error message.
        formats: the forms of a name, for the error message.

    Raises:
        UserError: the callable does not exist or cannot be imported.
    """
    location, _, attribute = name.rpartition(":")
    if not location or not attribute:
        raise UserError(f"{parameter} {name!r} is not an import path; {formats}")
    try:
        with importing_from(location, relative_to):
            if location.endswith(".py"):
                module = _load_file(relative_to / location, location, parameter)
            else:
                module = importlib.import_module(location)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{parameter} {name!r} cannot be imported: {first_line(error)}; {formats}") from error
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(found):
        similar = difflib.get_close_matches(attribute, [n for n in dir(module) if callable(getattr(module, n))], 5)
        remedy = f"similar names are {', '.join(similar)}" if similar else "correct the name"
        raise UserError(f"{parameter} {name!r}: {location} has no callable {attribute!r}; {remedy}")
    return found


@contextlib.contextmanager
def importing_from(location: str, relative_to: Path = Path()) -> Iterator[None]:
    """Allows imports from the folder of the file ``location``, if it is one, and from ``relative_to``.

    Neither is on the path of a stage's script.
    """
    folder = (relative_to / location).parent if location.endswith(".py") else relative_to
    added = [str(folder.resolve()), str(relative_to.resolve())]
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            sys.path.remove(path)


def _load_file(path: Path, written: str, parameter: str) -> Any:
    if not path.is_file():
        raise UserError(
            f"{parameter} names the file {written!r}, which does not exist; give its path from the repository's root"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    replaced = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # dataclasses look up their module there while the file is executed
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(spec.name)
        if replaced is not None:
            sys.modules[spec.name] = replaced
    return module
