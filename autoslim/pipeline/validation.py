"""Messages for wrong parameters: pydantic's messages with the parameter's dotted name, value and description."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_MAX_LENGTH = 60  # characters of a value that a message shows


def validation_messages(
    error: ValidationError, schema: type[BaseModel], values: Any, renamed: Mapping[str, str]
) -> list[str]:
    """Returns one message for each wrong parameter.

    A parameter that matches none of several types (an integer, or "auto") gets a single message. The messages of a
    section's own validators start with the name of a parameter within the section.

    Args:
        error: pydantic's error.
        schema: the schema that ``values`` do not match.
        values: the contents of the parameter file.
        renamed: ``section.parameter`` -> its new dotted name, and ``section.parameter: value`` -> the new value.
    """
    problems: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        problems.setdefault(_locate(problem, values)[0], []).append(problem)
    for old, new in renamed.items():
        if old in problems:
            problems.pop(new, None)  # it is missing only because the old name was used
    return [_message(same_name, schema, values, renamed) for same_name in problems.values()]


def _message(problems: Sequence[ErrorDetails], schema: type[BaseModel], values: Any, renamed: Mapping[str, str]) -> str:
    first = problems[0]
    kind, (name, value), (section, field) = first["type"], _locate(first, values), _schema_of(first["loc"], schema)
    for old in (name, f"{name}: {value}"):
        if old in renamed:
            return f"{old} is now {renamed[old]}"
    is_section = field is None or field.annotation is section
    if kind == "value_error":
        return f"{name}.{first['ctx']['error']}" if name and is_section else str(first["ctx"]["error"])
    known = ", ".join(section.model_fields)
    if kind in ("extra_forbidden", "invalid_key"):
        near = difflib.get_close_matches(str(first["loc"][-1]), section.model_fields, n=1)
        return f"{name} is unknown; {f'did you mean {near[0]}?' if near else f'expected one of {known}'}"
    description = f"A section with {known}." if field is None or is_section else field.description
    if kind == "missing":
        return f"{name} is missing; add it. {description}"
    expected = [problem["msg"].removeprefix("Input should be ") for problem in problems]
    if kind == "model_type":
        expected = ["a mapping"]
    elif expected[0] == first["msg"]:  # such as "List should have at least 1 item"
        return f"{name} is {_shown(value)}; {first['msg'][0].lower()}{first['msg'][1:]}. {description}"
    return (
        f"{name or 'the file'} is {_shown(value)}; it should be {' or '.join(dict.fromkeys(expected))}. {description}"
    )


def _locate(problem: ErrorDetails, values: Any) -> tuple[str, Any]:
    """Returns the parameter's dotted name and value, without parts of pydantic's location that name a union's type."""
    name, value = "", values
    for part in problem["loc"]:
        if isinstance(value, Mapping) and part in value:
            name, value = f"{name}.{part}".lstrip("."), value[part]
        elif isinstance(value, Sequence) and isinstance(part, int) and part < len(value):
            name, value = f"{name}[{part}]", value[part]
        elif problem["type"] == "missing":
            name, value = f"{name}[{part}]" if isinstance(part, int) else f"{name}.{part}".lstrip("."), None
        else:
            break
    return name, value


def _schema_of(loc: Sequence[Any], section: type[BaseModel]) -> tuple[type[BaseModel], FieldInfo | None]:
    """Returns the innermost section at ``loc``, and the last field on the path to it (None for the whole file)."""
    field = None
    for part in loc:
        if part not in section.model_fields:
            break
        field = section.model_fields[part]
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        section = field.annotation
    return section, field


def _shown(value: Any) -> str:
    """Formats ``value`` as in YAML, on one line. Text is quoted, so that "0.1" differs from 0.1."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
