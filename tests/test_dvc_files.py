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
        "autoslim/engine/progress.py",
        "autoslim/shell/checks.py",
        "autoslim/shell/environment.py",
        "autoslim/shell/exits.py",
        "autoslim/shell/launching.py",
        "autoslim/shell/params.py",
        "autoslim/shell/places.py",
        "autoslim/shell/tracking.py",
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
    needed.add(script)
    code = [Path(dep) for dep in stage(name)["deps"] if dep.startswith(("autoslim", "stages"))]
    covered = {file for file in needed if any(file == dep or dep in file.parents for dep in code)}
    assert needed - covered == set(), "imported, but not among deps"
    idle = {dep for dep in code if not any(file == dep or dep in file.parents for file in needed)}
    assert idle == set(), "among deps, but not imported"


@pytest.mark.parametrize("name", STAGES)
def test_params_are_those_that_the_code_reads(name: str) -> None:
    declared = {param.split(".")[0] for param in stage(name)["params"]}
    assert sections_read(Path(f"stages/{name}.py")) - UNTRACKED_PARAMS == declared


def test_every_parameter_section_belongs_to_a_stage() -> None:
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    declared = {param.split(".")[0] for name in STAGES for param in stage(name)["params"]}
    assert set(params) == declared | UNTRACKED_PARAMS


def sections_read(script: Path) -> set[str]:
    """The sections of ``params`` that a stage reads, but for what it hands to tracking, to checks and to labels."""
    tree = ast.parse((ROOT / script).read_text())
    functions = {
        node.name: node
        for module in ("assembly", "resources", "targets")
        for node in ast.walk(ast.parse((ROOT / f"autoslim/shell/{module}.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    return _sections(tree, functions)


def _sections(tree: ast.AST, functions: dict[str, ast.FunctionDef]) -> set[str]:
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", "")
            if called in ("tracked", "check_model", "check_reach", "check_table", "check_pipeline", "check_allocation"):
                return
            if called in functions and any(getattr(a, "id", "") == "params" for a in node.args):
                found.update(_sections(functions[called], functions))
        if isinstance(node, ast.keyword) and node.arg == "label":
            return
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "params":
            found.update({"budgets": {"budget", "resource"}}.get(node.attr, {node.attr}))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def _has_code(file: Path) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse((ROOT / file).read_text()).body)
