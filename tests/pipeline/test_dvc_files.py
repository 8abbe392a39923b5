"""dvc.yaml against the source: each stage's deps hold what its code imports, its params what its code reads."""

import ast
from pathlib import Path
from typing import Any

import pytest
from closure import ROOT, imported_files
from ruamel.yaml import YAML

# Code that cannot change a number: it says no, shows, or tracks. Parameters are values, and DVC compares those.
OBSERVERS = frozenset(
    Path(path)
    for path in (
        "autoslim/__init__.py",  # offers names of other modules, and imports them when they are asked for
        "autoslim/errors.py",
        "autoslim/pipeline/checks.py",
        "autoslim/pipeline/entry.py",
        "autoslim/pipeline/launch.py",
        "autoslim/pipeline/params.py",
        "autoslim/pipeline/project.py",
        "autoslim/pipeline/tracking.py",
        "autoslim/pipeline/validation.py",
        "autoslim/training/progress.py",
    )
)
UNTRACKED_PARAMS = {"tracking", "runtime"}
STAGES = ("prepare", "resources", "supernet", "search", "allocate", "retrain", "report")


def stage(name: str) -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    return stages[name].get("do", stages[name])


@pytest.mark.parametrize("name", STAGES)
def test_deps_hold_all_code_that_can_change_a_number(name: str) -> None:
    script = Path(f"stages/{name}.py")
    needed = {file for file in imported_files(script, OBSERVERS) if file.name != "__init__.py" or _has_code(file)}
    code = [Path(dep) for dep in stage(name)["deps"] if dep.startswith("autoslim")]
    covered = {file for file in needed if any(file == dep or dep in file.parents for dep in code)}
    assert needed - covered == set(), "imported, but not among deps"
    idle = {dep for dep in code if not any(file == dep or dep in file.parents for file in needed)}
    assert idle == set(), "among deps, but not imported"


@pytest.mark.parametrize("name", STAGES)
def test_params_are_those_that_the_code_reads(name: str) -> None:
    declared = set(stage(name)["params"])
    read = {
        value
        for value in values_read(Path(f"autoslim/pipeline/{name}.py"))
        if value.split(".")[0] not in UNTRACKED_PARAMS
    }
    assert {value for value in read if not any(_within(value, whole) for whole in declared)} == set(), "not declared"
    assert {whole for whole in declared if not any(_within(value, whole) for value in read)} == set(), "not read"


def _within(value: str, whole: str) -> bool:
    return value == whole or value.startswith(f"{whole}.")


def test_every_parameter_section_belongs_to_a_stage() -> None:
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    declared = {param.split(".")[0] for name in STAGES for param in stage(name)["params"]}
    assert set(params) == declared | UNTRACKED_PARAMS


def values_read(script: Path) -> set[str]:
    """What a stage reads of ``params``, dotted, but for what it hands to tracking, to checks and to labels."""
    tree = _run(ast.parse((ROOT / script).read_text()))
    functions = {
        node.name: node
        for module in ("assembly", "costs")
        for node in ast.walk(ast.parse((ROOT / f"autoslim/pipeline/{module}.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    return _values(tree, "params", "", functions)


def _values(tree: ast.AST, variable: str, prefix: str, functions: dict[str, ast.FunctionDef]) -> set[str]:
    """What ``tree`` reads of the values in ``variable``, which are those of ``prefix``."""
    found: set[str] = set()

    def path(node: ast.AST) -> list[str] | None:
        """The attributes that lead from ``variable`` to an expression; None where it does not start there."""
        if isinstance(node, ast.Name):
            return [] if node.id == variable else None
        before = path(node.value) if isinstance(node, ast.Attribute) else None
        return None if before is None else [*before, node.attr]  # type: ignore[attr-defined]

    def visit(node: ast.AST) -> None:
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if (
            called.startswith("check_")
            or called == "tracked"
            or (isinstance(node, ast.keyword) and node.arg == "label")
        ):
            return
        if called in functions:
            names = [argument.arg for argument in functions[called].args.args]
            for name, argument in zip(names, node.args, strict=False):  # type: ignore[attr-defined]
                if (steps := path(argument)) is None:
                    visit(argument)
                else:
                    inside = ".".join(filter(None, [prefix, *steps]))
                    found.update(_values(functions[called], name, inside, functions))
            for keyword in node.keywords:  # type: ignore[attr-defined]
                visit(keyword)
            return
        if (steps := path(node)) is not None:
            whole = [prefix, *steps] if not steps or steps[-1] != "model_dump" else [prefix, *steps[:-1]]
            name = ".".join(filter(None, whole))
            found.update({"budget", "resource"} if _within(name, "budgets") else {name})
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.arguments):
            visit(child)
    return found - {""}


def _run(tree: ast.Module) -> ast.FunctionDef:
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")


def _has_code(file: Path) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse((ROOT / file).read_text()).body)
