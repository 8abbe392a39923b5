"""The layers of the source: imports point downwards only, and few modules import certain packages."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from paths import ROOT

import autoslim
from autoslim.pipeline.project import STAGES

LAYERS = (
    "errors",
    "files",
    "user_code",
    "channels",
    "tracing",
    "distributed",
    "data",
    "tasks",
    "training",
    "resources",
    "models",
    "supernet",
    "search",
    "slimming",
    "export",
    "report",
    "pipeline",
    "cli",
    "__main__",
)
"""Folders and single modules of the package; each may import from itself and from those before it."""

SHELL = ("report", "pipeline", "cli", "stages")

FILES = sorted((ROOT / "autoslim").rglob("*.py"))


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "autoslim" and len(parts) > 1 and parts[1] in LAYERS else None


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Yields every module or name that a file imports, at any level."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_all_files_belong_to_a_layer() -> None:
    assert {module_of(file) for file in FILES if layer_of(module_of(file)) is None} == {"autoslim"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    layer = layer_of(module_of(file))
    if layer is None:
        return
    for imported in imports(file):
        other = layer_of(imported)
        assert other is None or LAYERS.index(other) <= LAYERS.index(layer), f"{layer} imports {imported}"
        assert not imported.startswith("stages")
        if imported.startswith("autoslim"):
            assert other is not None, f"{imported}: inside the package, import the module, not the package"


def importers(*packages: str) -> set[str]:
    return {module_of(file) for file in FILES if any(imported.split(".")[0] in packages for imported in imports(file))}


def test_only_tracking_imports_mlflow() -> None:
    assert {module.rpartition(".")[0] for module in importers("mlflow")} == {"autoslim.pipeline.tracking"}


def test_configuration_stays_above_the_library() -> None:
    """Nothing below the report imports parameters, commands or figures."""
    for module in importers("pydantic", "typer", "rich", "matplotlib", "dvc"):
        assert layer_of(module) in SHELL, module


def test_the_algorithms_use_no_files() -> None:
    algorithms = {"autoslim.search.greedy", "autoslim.search.methods", "autoslim.supernet.sandwich"}
    assert not algorithms & importers("pathlib", "json", "os")


@pytest.mark.parametrize(
    "module", ["autoslim", "autoslim.resources.budgets", "autoslim.channels.groups", "autoslim.channels.grid"]
)
def test_torch_is_not_imported_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; print(sorted(m for m in ('torch', 'mlflow', 'numpy', 'dvc') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_slow_packages_only_where_they_are_used(stage: str) -> None:
    """A stage imports only what every run of it requires: torch, and matplotlib for the report."""
    slow = ["torchvision", "timm", "scipy", "sklearn", "matplotlib", "mlflow", "dvc", "onnx", "onnxruntime", "pandas"]
    code = f"import sys, autoslim.pipeline.{stage}; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ("['matplotlib']" if stage == "report" else "[]")


def test_the_packages_names_are_the_functions_of_its_modules() -> None:
    """At run time, for type checkers, in ``dir``, and in the API reference."""
    assert set(autoslim.__all__) == set(autoslim._MODULES) <= set(dir(autoslim))
    for name, module in autoslim._MODULES.items():
        assert getattr(autoslim, name) is getattr(import_module(module), name)
        assert f"from {module} import {name} as {name}\n" in (ROOT / "autoslim" / "__init__.py").read_text()
        assert f"| [`{name}`][{module}.{name}] |" in (ROOT / "docs" / "reference.md").read_text(), name
    assert (ROOT / "autoslim" / "py.typed").exists()
    with pytest.raises(AttributeError, match="has no attribute 'train'; it exports Costs, Grid"):
        autoslim.train  # type: ignore[attr-defined]  # noqa: B018
