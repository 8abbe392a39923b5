"""Checkpoint keys: what decides a stage's result, and so whether a checkpoint of it can be continued.

A key covers parameters, data, weights, torch's version and the meaning of the code: the syntax trees, without comments
and docstrings, of the modules that the stage imports. Modules that cannot change a result are left out.
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

from autoslim.training.checkpoints import Checkpoints, run_key, write_json

OBSERVERS = frozenset(
    {
        "autoslim",
        "autoslim.errors",
        "autoslim.pipeline.checks",
        "autoslim.pipeline.entry",
        "autoslim.pipeline.fingerprint",
        "autoslim.pipeline.launch",
        "autoslim.pipeline.params",
        "autoslim.pipeline.project",
        "autoslim.pipeline.tracking",
        "autoslim.pipeline.validation",
        "autoslim.training.progress",
    }
)
"""Modules that cannot change a result: they check, display, track or start processes."""

_PACKAGE = Path(__file__).parent.parent


def imported_modules(module: str, ignored: frozenset[str] = OBSERVERS) -> set[str]:
    """Returns all modules of autoslim that ``module`` imports, directly or through others, itself included.

    Imports inside functions count; those under ``TYPE_CHECKING`` do not. ``ignored`` modules, and modules that only
    they import, are left out.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in found and current not in ignored:
            found.add(current)
            waiting += _imports(current)
    return found


def code_digest(modules: Iterable[str]) -> str:
    """Returns a digest of the syntax trees of ``modules`` without comments and docstrings."""
    digest = hashlib.sha256()
    for module in sorted(modules):
        tree = ast.parse(_file(module).read_bytes())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
        digest.update(f"{module}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


class KeyedCheckpoints(Checkpoints):
    """The checkpoints of a stage's run, which remember what their key was made of.

    Args:
        root: the folder of all runs' checkpoints.
        stage: names the run.
        parts: everything that decides the result, by name.
    """

    def __init__(self, root: Path, stage: str, parts: Mapping[str, Any]) -> None:
        super().__init__(root, stage, run_key(**parts))
        self._root, self._stage, self._parts = root, stage, {name: run_key(part=part) for name, part in parts.items()}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the lock of the run. For a new run, a line on stderr says why an earlier checkpoint is not used."""
        with super().lock():
            if not (self.folder / "key.json").exists():
                if difference := self._difference():
                    print(f"{self._stage}: {difference}", file=sys.stderr)
                write_json(self.folder / "key.json", self._parts)
            try:
                yield
            finally:
                if [path.name for path in self.folder.glob("*")] == ["key.json"]:
                    self.clear()  # the run ended before its first checkpoint

    def _difference(self) -> str:
        """Describes how the latest checkpoint of this stage differs from this run; empty if there is none."""
        pattern = re.compile(re.escape(self._stage) + "-[0-9a-f]{16}")
        others = [path for path in self._root.glob("*/key.json") if pattern.fullmatch(path.parent.name)]
        if not others:
            return ""
        latest = max(others, key=lambda path: path.stat().st_mtime)
        try:
            parts = json.loads(latest.read_text())
            names = [name for name in {**parts, **self._parts} if parts.get(name) != self._parts.get(name)]
        except (ValueError, TypeError):
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
    own = [name for name in names if name.split(".")[0] == "autoslim"]
    parents = {".".join(name.split(".")[:end]) for name in own for end in range(1, name.count(".") + 2)}
    return tuple(sorted(name for name in parents if _file(name).is_file()))


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under ``if TYPE_CHECKING``."""
    yield tree
    hidden = tree.body if isinstance(tree, ast.If) and getattr(tree.test, "id", "") == "TYPE_CHECKING" else []
    for child in ast.iter_child_nodes(tree):
        if child not in hidden:
            yield from _runtime_nodes(child)


def _file(module: str) -> Path:
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is only a string: a docstring, or the description of a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
