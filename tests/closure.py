"""Which files of this repository a module imports, directly or through others, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imported_files(file: Path, ignored: frozenset[Path] = frozenset()) -> set[Path]:
    """All files of the package that ``file`` imports, but for ``ignored`` ones and what only these import.

    Relative to the repository's root. A package counts with its ``__init__.py``; imports inside functions count too.
    """
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current in found or current in ignored:
            continue
        found.add(current)
        for node in _walk_at_run_time(ast.parse((ROOT / current).read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    waiting += _files_of(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                waiting += _files_of(node.module)
                for alias in node.names:
                    waiting += _files_of(f"{node.module}.{alias.name}")
    return found - {file}


def _walk_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    yield tree
    hidden = tree.body if isinstance(tree, ast.If) and getattr(tree.test, "id", "") == "TYPE_CHECKING" else []
    for child in ast.iter_child_nodes(tree):
        if child not in hidden:
            yield from _walk_at_run_time(child)


def _files_of(module: str) -> list[Path]:
    if module.split(".")[0] != "autoslim":
        return []
    parts = Path(*module.split("."))
    files = [parent / "__init__.py" for parent in (parts, *parts.parents) if (ROOT / parent / "__init__.py").exists()]
    if (ROOT / parts.with_suffix(".py")).exists():
        files.append(parts.with_suffix(".py"))
    return files
