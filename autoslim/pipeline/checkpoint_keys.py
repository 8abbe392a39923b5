"""Checkpoint keys, which decide whether a run can continue from an existing checkpoint.

A key covers everything that decides a stage's result: parameters, data, weights, torch's version and the code. The code
enters as the syntax trees, without comments and docstrings, of the modules that the stage imports. Modules that cannot
change a result are left out.
"""

import ast
import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from autoslim.files import run_key, write_json
from autoslim.training.checkpoints import Checkpoints

OBSERVERS = frozenset(
    {
        "autoslim",
        "autoslim.errors",
        "autoslim.files",
        "autoslim.pipeline.checks",
        "autoslim.pipeline.entry",
        "autoslim.pipeline.experiment",
        "autoslim.pipeline.checkpoint_keys",
        "autoslim.pipeline.launch",
        "autoslim.pipeline.params",
        "autoslim.pipeline.project",
        "autoslim.pipeline.recorded_inputs",
        "autoslim.pipeline.times",
        "autoslim.pipeline.tracking",
        "autoslim.pipeline.tracking.experiments",
        "autoslim.pipeline.tracking.kept",
        "autoslim.pipeline.tracking.logged_network",
        "autoslim.pipeline.tracking.run_file",
        "autoslim.pipeline.tracking.sender",
        "autoslim.pipeline.tracking.stage",
        "autoslim.pipeline.tracking.store",
        "autoslim.pipeline.tracking.tags",
        "autoslim.pipeline.tracking.tracker",
        "autoslim.pipeline.validation",
        "autoslim.training.progress",
        "autoslim.user_code",
    }
)
"""Modules that cannot change a result: they check, display, track, start processes, find objects, or store results."""

_PACKAGE = Path(__file__).parent.parent


def imported_modules(module: str, ignored: frozenset[str] = OBSERVERS) -> set[str]:
    """Returns ``module`` and all modules of autoslim that it imports, directly or indirectly.

    Imports inside functions count; those under ``TYPE_CHECKING`` do not. ``ignored`` modules, and modules that only
    they import, are left out.
    """
    modules: set[str] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        if current not in modules and current not in ignored:
            modules.add(current)
            pending += _imports(current)
    return modules


def code_files(module: str) -> list[tuple[str, Path]]:
    """Returns the names and paths of the files of ``imported_modules(module)`` and of the data files next to them."""
    files = {_file(name) for name in imported_modules(module)}
    folders = {file.parent for file in files}
    files |= {data for folder in folders for pattern in ("*.yaml", "*.html") for data in folder.glob(pattern)}
    return sorted((file.relative_to(_PACKAGE).as_posix(), file) for file in files)


def code_digest(modules: Iterable[str]) -> str:
    """Returns a digest of the syntax trees of ``modules`` without comments and docstrings."""
    digest = hashlib.sha256()
    for module in sorted(modules):
        tree = ast.parse(_file(module).read_bytes())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [part for part in body if not _is_docstring(part)]  # type: ignore[attr-defined]
        digest.update(f"{module}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


RUN_FILE = "run.json"
"""The file with the id of the MLflow run (see ``pipeline.tracking.run_file``)."""


class KeyedCheckpoints(Checkpoints):
    """The checkpoints of a stage's run, stored with the parts of their key.

    Args:
        root: the folder with the checkpoints of all runs.
        stage: name of the run.
        parts: everything that decides the result, by name.
    """

    def __init__(self, root: Path, stage: str, parts: Mapping[str, Any]) -> None:
        super().__init__(root, stage, run_key(**parts))
        self._root, self._stage, self._parts = root, stage, {name: run_key(part=part) for name, part in parts.items()}
        self._finished = False

    @property
    def run_file(self) -> Path:
        return self.folder / RUN_FILE

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run's lock. For a new run, prints on stderr why the latest checkpoint of the stage is not used."""
        with super().lock():
            if not (self.folder / "key.json").exists():
                if difference := self._difference():
                    print(f"{self._stage}: {difference}", file=sys.stderr)
                write_json(self.folder / "key.json", self._parts)
            try:
                yield
                if self._finished:
                    self.clear()
            finally:
                if {path.name for path in self.folder.glob("*")} <= {"key.json", RUN_FILE}:
                    self.clear()  # the run ended before its first checkpoint

    def finish(self) -> None:
        """Removes the checkpoints when the lock is released: after the results are written and the run is tracked."""
        self._finished = True

    def _difference(self) -> str:
        """Returns how the latest checkpoint of this stage differs from this run; an empty string if there is none."""
        pattern = re.compile(re.escape(self._stage) + "-[0-9a-f]{16}")
        others = [path for path in self._root.glob("*/key.json") if pattern.fullmatch(path.parent.name)]
        if not others:
            return ""
        latest = max(others, key=lambda path: path.stat().st_mtime)
        try:
            parts = json.loads(latest.read_text())
            names = [name for name in {**parts, **self._parts} if parts.get(name) != self._parts.get(name)]
        except (ValueError, TypeError, AttributeError, OSError):
            return ""
        return f"the checkpoint {latest.parent} is not used, because these differ: {', '.join(names)}"


@cache
def _imports(module: str) -> tuple[str, ...]:
    names = []
    for node in _runtime_nodes(ast.parse(_file(module).read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    internal = [name for name in names if name.split(".")[0] == "autoslim"]
    parents = {".".join(name.split(".")[:end]) for name in internal for end in range(1, name.count(".") + 2)}
    return tuple(sorted(name for name in parents if _file(name).is_file()))


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes except those under ``if TYPE_CHECKING``."""
    yield tree
    hidden = tree.body if isinstance(tree, ast.If) and getattr(tree.test, "id", "") == "TYPE_CHECKING" else []
    for child in ast.iter_child_nodes(tree):
        if child not in hidden:
            yield from _runtime_nodes(child)


def _file(module: str) -> Path:
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_docstring(node: ast.AST) -> bool:
    """Returns whether a statement is a bare string: a docstring, or the description of a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
