"""Refuses ``.pt2`` files that could execute code while they are loaded or run.

``torch.export.load`` unpickles what an archive declares as pickled, loads its compiled libraries, evaluates its
expressions of sizes as Python, and finds the functions that a graph calls by any path below ``torch``, such as
``torch.os.system``. Files that ``autoslim export`` writes need none of this: they have plain tensors, integers as sizes
apart from the number of images, and operators of torch.
"""

import json
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

_ENTRY = re.compile(
    r"data/weights/(weight_\d+|\w+_weights_config\.json)"
    r"|data/constants/(tensor_\d+|\w+_constants_config\.json)"
    r"|data/sample_inputs/\w+\.pt|models/\w+\.json|extra/[\w.]+"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)|\.format_version"
)
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.\w+\.\w+|torch\.sym_(int|float|max|min|not|ite)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|getitem|eq|ne|lt|le|gt|ge)"
)
_SIZES = frozenset(
    {
        *("Symbol", "positive", "nonnegative", "integer", "True"),
        *("Integer", "Rational", "Add", "Mul", "Pow", "PowByNatural", "Max", "Min", "Mod", "PythonMod"),
        *("FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "ModularIndexing"),
    }
)
_TREES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict"})
_NAME = re.compile(r"[\w.]*")  # torch writes names into Python code, which it compiles
_TREE = re.compile(r'[\w\s.,:"\[\]{}\\-]*')
_FREE = frozenset({"metadata", "as_string", "torch_version"})  # entries that do not become code, whatever they contain
_REFUSED = frozenset({"as_custom_obj", "custom_obj", "guards_code", "treespec_namedtuple_fields", "custom_obj_values"})


def check_archive(file: Path) -> None:
    """Checks that nothing in a ``.pt2`` file can execute code.

    Raises:
        ValueError: it contains something that ``autoslim export`` does not write.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("it has two entries of one name")
        for name in names:
            entry = name.partition("/")[2]
            if not _ENTRY.fullmatch(entry):
                raise ValueError(f"it has an entry {name[:60]!r}, which autoslim does not write")
            if entry.startswith("data/sample_inputs/"):
                _check_tensors(archive.read(name))
            elif entry.endswith(".json") and not entry.startswith("extra/"):
                _check_values("", json.loads(archive.read(name)))


def _check_tensors(content: bytes) -> None:
    import torch

    try:
        torch.load(BytesIO(content), weights_only=True)
    except Exception as error:  # torch would then load it with full pickle
        raise ValueError("its example inputs are not plain tensors") from error


def _check_values(key: str, value: Any) -> None:
    """Checks the value of an entry, and everything inside it."""
    if key in _FREE:
        return
    if key in _REFUSED and value:
        raise ValueError(f"it has {key}")
    if key == "use_pickle" and value is not False:
        raise ValueError("it has pickled tensors")
    if isinstance(value, dict):
        for name, entry in value.items():
            _check_text("", name)
            _check_values(name, entry)
    elif isinstance(value, list):
        for entry in value:
            _check_values(key, entry)
    elif isinstance(value, str):
        _check_text(key, value)


def _check_text(key: str, text: str) -> None:
    if key == "target":
        allowed = _TARGET.fullmatch(text) is not None
    elif key == "expr_str":
        allowed = _is_size(text)
    elif key in ("in_spec", "out_spec"):
        allowed = not text or (_TREE.fullmatch(text) is not None and _tree_types(json.loads(text)) <= _TREES)
    else:
        allowed = _NAME.fullmatch(text) is not None
    if not allowed:
        raise ValueError(f"it has {text[:60]!r} as {key or 'a name'}, which autoslim does not write")


def _tree_types(tree: Any) -> set[Any]:
    """Returns the types of containers in the JSON of a tree of arguments."""
    if isinstance(tree, list):
        return set().union(*map(_tree_types, tree))
    if isinstance(tree, dict):
        return {str(tree["type"])} - {"None"} | _tree_types(tree.get("children_spec", []))
    return set()


def _is_size(text: str) -> bool:
    """Returns whether an expression consists of symbols such as s77, numbers, and arithmetic."""
    if not re.fullmatch(r"[\w\s'(),=+*/-]*", text):
        return False
    words = set(re.findall(r"[^\W\d]\w*", text))
    return all(word in _SIZES or re.fullmatch(r"[su]\d+", word) for word in words)
