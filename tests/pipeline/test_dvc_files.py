"""dvc.yaml against the code: the deps of a stage cover what it imports, and its params cover what it reads."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from paths import ROOT
from ruamel.yaml import YAML
from small_project import change_params, finished_project, one_thread

from autoslim.errors import UserError
from autoslim.pipeline import params as schema
from autoslim.pipeline.checkpoint_keys import OBSERVERS, imported_modules
from autoslim.pipeline.project import STAGES

UNTRACKED_PARAMS = {"tracking", "runtime"}


def stage(name: str) -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    return stages[name].get("do", stages[name])


@pytest.mark.parametrize("name", STAGES)
def test_deps_cover_the_code_that_can_change_a_result(name: str) -> None:
    files = {path_of(module) for module in imported_modules(f"autoslim.pipeline.{name}")}
    needed = {file for file in files if file.name != "__init__.py" or file.parent.name == "tracing"}
    code = [Path(dep) for dep in stage(name)["deps"] if dep.startswith("autoslim")]
    covered = {file for file in needed if any(file == dep or dep in file.parents for dep in code)}
    assert needed - covered == set(), "imported, but not among deps"
    unused = {dep for dep in code if not any(file == dep or dep in file.parents for file in needed)}
    assert unused == set(), "among deps, but not imported"


def path_of(module: str) -> Path:
    path = Path(*module.split("."))
    return path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")


@contextlib.contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """Collects the dotted names of all parameters that are read, except by modules that cannot change a result."""
    reads: set[str] = set()
    prefixes: dict[int, str] = {}
    sections: list[object] = []  # keeps objects alive, so that no id is reused
    observers = {str(ROOT / path_of(module)) for module in OBSERVERS}
    original = schema.Section.__getattribute__

    def observed(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_filename in observers and frame.f_code.co_name != "budgets":
                return True
            frame = frame.f_back
        return False

    def read(self: schema.Section, name: str) -> Any:
        value = original(self, name)
        if name not in type(self).model_fields and name not in ("model_dump", "model_copy"):
            return value
        prefix = "" if isinstance(self, schema.Params) else prefixes.get(id(self), "?.")
        if isinstance(value, schema.Section):
            sections.append(value)
            prefixes[id(value)] = f"{prefix}{name}."
        elif not observed(sys._getframe(1)):
            reads.add(prefix.removesuffix(".") if name.startswith("model_") and prefix else f"{prefix}{name}")
        return value

    schema.Section.__getattribute__ = read  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        schema.Section.__getattribute__ = original  # type: ignore[method-assign]


@pytest.mark.parametrize("name", STAGES)
def test_params_are_those_that_a_run_reads(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(shutil.copytree(finished_project(tmp_path_factory.getbasetemp()), tmp_path / "project"))
    change_params(Path(), {"retrain": {"start": "supernet"}})
    run = import_module(f"autoslim.pipeline.{name}").run
    with one_thread(), recorded_reads() as reads:
        run(*(["uniform"] if name == "retrain" else []))
        if name == "resources":  # it reads more if latency is limited
            monkeypatch.setattr("autoslim.pipeline.costs.measure_table", refuse)
            change_params(Path(), {"resource": "latency", "budget": "50%"})
            with pytest.raises(UserError, match="not measured"):
                run()
    declared = set(stage(name)["params"])
    read = {value for value in reads if value.split(".")[0] not in UNTRACKED_PARAMS}
    assert {value for value in read if not any(within(value, whole) for whole in declared)} == set(), "not declared"
    assert {whole for whole in declared if not any(within(value, whole) for value in read)} == set(), "not read"


def refuse(*_: object, **__: object) -> None:
    raise UserError("not measured here")


def within(value: str, whole: str) -> bool:
    return value == whole or value.startswith(f"{whole}.")


def test_every_parameter_section_belongs_to_a_stage() -> None:
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    declared = {param.split(".")[0] for name in STAGES for param in stage(name)["params"]}
    assert set(params) == declared | UNTRACKED_PARAMS
