"""The inputs of a stage that DVC records, which must not change while the stage runs.

DVC reads parameters and dependencies when a stage has ended. If a file was edited while the stage ran, DVC would record
the result as that of the edited file, and would restore it from its cache whenever the file is the same again.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autoslim.errors import UserError
from autoslim.files import sha256
from autoslim.pipeline.params import read_yaml

_HASHED = 2**20  # bytes; larger files are compared by size and time
_NAMED = 3  # changed inputs that the error names


class RecordedInputs:
    """The parameters and the files that ``dvc.yaml`` lists for a stage. Create it before the stage reads any of them.

    Without a ``dvc.yaml`` in the working directory there are none.

    Args:
        stage: name of the stage.
        method: the argument of ``retrain``.
    """

    def __init__(self, stage: str, method: str = "") -> None:
        self._stage, self._method = stage, method
        self._before = _recorded(stage, method)

    def check(self) -> None:
        """Checks that no input has changed. Call it before the stage's checkpoints are removed.

        Raises:
            UserError: an input has changed.
        """
        now = _recorded(self._stage, self._method)
        names = [name for name in {**self._before, **now} if self._before.get(name) != now.get(name)]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise UserError(
                f"{', '.join(names[:_NAMED])}{more} changed while the stage {self._stage} ran, so DVC would record the "
                "result for inputs that it was not made from; run `dvc repro` again, after undoing the change if you "
                "want the old inputs: a stage that trains or searches then continues from its last checkpoint"
            )


def _recorded(stage: str, method: str) -> dict[str, Any]:
    """Returns the parameters of a stage, and digests or sizes and times of its files, by name."""
    pipeline = Path("dvc.yaml")
    if not pipeline.is_file():
        return {}
    entry = read_yaml(pipeline)["stages"].get(stage, {})
    entry = entry.get("do", entry)
    found: dict[str, Any] = {}
    for listed in entry.get("params", ()):
        for file, names in listed.items() if isinstance(listed, Mapping) else [("params.yaml", [listed])]:
            values = read_yaml(Path(file))
            for name in names or values:
                found[name if file == "params.yaml" else f"{name} in {file}"] = _value(values, name)
    for listed in entry.get("deps", ()):
        path = Path((next(iter(listed)) if isinstance(listed, Mapping) else str(listed)).replace("${item}", method))
        found |= {str(file): _content(file) for file in _files(path)}
    return found


def _value(values: Any, name: str) -> Any:
    """Returns a parameter by its dotted name; None if it does not exist."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _files(path: Path) -> Iterator[Path]:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and "__pycache__" not in file.parts:
            yield file


def _content(file: Path) -> object:
    status = file.stat()
    return sha256(file) if status.st_size <= _HASHED else (status.st_size, status.st_mtime_ns)
