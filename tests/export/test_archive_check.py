"""Exported ``.pt2`` files that would execute code: torch loads them, ``open_exported`` refuses them."""

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import message_of
from small_data import small_network

from autoslim.data.prepared import DataInfo
from autoslim.export.formats import export
from autoslim.export.runtimes import open_exported

RAN: list[int] = []


def planted() -> int:
    RAN.append(1)
    return 1


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return planted, ()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "network.pt2"
    info = DataInfo("digits", tuple("0123456789"), 1, (8, 8), (0.5,), (0.2,), {}, "arrays", resize=8)
    export(small_network()[0].eval(), info, file, {})
    return file


def changed(file: Path, to: Path, change: Callable[[str, bytes], bytes | None], **added: bytes) -> Path:
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(to, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in added.items():
            new.writestr(f"{root}/{name}", content)
    return to


def model(edit: Callable[[dict[str, Any]], object]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.startswith("models/"):
            return content
        values = json.loads(content)
        edit(values)
        return json.dumps(values).encode()

    return change


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def example_inputs(name: str, content: bytes) -> bytes:
    return pickled(((Planted(),), {})) if name.startswith("data/sample_inputs") else content


def weight(name: str, content: bytes) -> bytes:
    if name.endswith("weights_config.json"):
        return content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    return pickled(Planted()) if name == "data/weights/weight_0" else content


def node(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = values["graph_module"]["graph"]["nodes"][0]
    return found


def first_size(value: Any) -> dict[str, Any] | None:
    """Returns the first expression of a size in nested JSON."""
    if isinstance(value, dict):
        return value if "expr_str" in value else first_size(list(value.values()))
    return next((found for entry in value if (found := first_size(entry))), None) if isinstance(value, list) else None


def in_size(values: dict[str, Any]) -> None:
    size = first_size(values)
    assert size is not None
    size["expr_str"] = "__import__('os').system('true')"


CALL = "x=print(1)"
ATTACKS: dict[str, tuple[Callable[[str, bytes], bytes | None], dict[str, bytes]]] = {
    "pickled example inputs": (example_inputs, {}),
    "a pickled weight": (weight, {}),
    "a function instead of an operator": (model(lambda m: node(m).update(target="torch.os.system")), {}),
    "a size": (model(in_size), {}),
    "guards": (model(lambda m: m.update(guards_code=["__import__('os').system('true')"])), {}),
    "the name of an input": (
        model(lambda m: m["graph_module"]["graph"]["inputs"][0]["as_tensor"].update(name=CALL)),
        {},
    ),
    "the name of a tensor": (model(lambda m: m["graph_module"]["graph"]["tensor_values"].update({CALL: {}})), {}),
    "a container": (
        model(
            lambda m: m["graph_module"]["module_call_graph"][0]["signature"].update(
                in_spec='[1, {"type": "collections.defaultdict", "context": "[]", "children_spec": []}]'
            )
        ),
        {},
    ),
    "a compiled library": (lambda name, content: content, {"data/aotinductor/model/model.so": b""}),
    "a pickled constant": (lambda name, content: content, {"data/constants/opaque_obj_0": b""}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_could_execute_code_is_refused(attack: str, exported: Path, tmp_path: Path) -> None:
    change, added = ATTACKS[attack]
    file = changed(exported, tmp_path / "network.pt2", change, **added)
    message = message_of(lambda: open_exported(file))
    assert message.startswith(f"{file} cannot be opened (it")
    assert not RAN


def test_the_attacks_work_without_the_check(exported: Path, tmp_path: Path) -> None:
    file = changed(exported, tmp_path / "network.pt2", example_inputs)
    with contextlib.suppress(Exception):
        torch.export.load(file)
    assert RAN, "torch no longer unpickles example inputs: the check may be simplified"
    RAN.clear()


def test_a_copied_file_opens(exported: Path, tmp_path: Path) -> None:
    open_exported(changed(exported, tmp_path / "network.pt2", lambda name, content: content))
