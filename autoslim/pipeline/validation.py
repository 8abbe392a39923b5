"""What is wrong with parameters, in words: the parameter's dotted name, its value, and what it may be."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_LONGEST_VALUE = 60  # characters of a value that are shown


def validation_messages(error: ValidationError, schema: type[BaseModel], values: Any) -> list[str]:
    """One line for each wrong parameter of ``values``, which ``schema`` refused.

    Rules are read off the schema: a parameter that fits none of several types (an integer, or "auto") is named once.
    What a section's own validators say begins with the parameter's name within the section.
    """
    return list(dict.fromkeys(_validation_message(dict(problem), schema, values) for problem in error.errors()))


def rule(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a parameter of this type may be: ``a whole number above 0, or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = arguments[0]
        return rule(inner, [*metadata, *(m for extra in arguments[1:] for m in _constraints(extra))])
    if origin in (Union, UnionType):
        kinds = [kind for kind in arguments if not (kind is int and float in arguments)]
        named = [rule(kind, metadata) for kind in kinds if kind is not NoneType]
        named += ["null"] if NoneType in kinds else []
        return ", or ".join([", ".join(named[:-1]), named[-1]]) if len(named) > 1 else named[0]
    if origin is Literal:
        choices = [shown(choice) if not isinstance(choice, str) else choice for choice in arguments]
        return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]
    if origin is list:
        least = " at least one of" if any(isinstance(m, MinLen) for m in metadata) else ""
        return f"a list{' with' if least else ' of'}{least} these: {rule(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {rule(arguments[0])}"
    if origin is dict:
        return "a mapping of names to values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with {', '.join(annotation.model_fields)}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return f"{names.get(annotation, 'a value')}{_bounds(metadata)}"


def shown(value: Any) -> str:
    """A value as YAML has it, in one line; text in quotes, so that "0.1" is told from 0.1."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _validation_message(problem: Mapping[str, Any], schema: type[BaseModel], values: Any) -> str:
    kind = problem["type"]
    name, expected, purpose, value = _place(problem["loc"], schema, values)
    if kind == "value_error":
        section = name if isinstance(expected, type) and issubclass(expected, BaseModel) else ""
        return f"{section}{'.' if section else ''}{problem['ctx']['error']}"
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(str(problem["loc"][-1]), name, expected)
    wanted = rule(expected) + (f" ({purpose})" if purpose else "")
    if kind == "missing" and value is None:
        return f"{name} is missing; add it, {wanted}"
    if not name:
        return f"there is {'nothing' if value is None else shown(value)} where the parameters should be; write {wanted}"
    return f"{name} is {_kind_of(value, expected)}{shown(value)}; set it to {wanted}"


def _unknown(key: str, section: str, expected: Any) -> str:
    known = list(expected.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"remove it; known here are {', '.join(known)}"
    return f"{section}{'.' if section else ''}{key} is unknown; {remedy}"


def _place(loc: Sequence[Any], schema: type[BaseModel], values: Any) -> tuple[str, Any, str, Any]:
    """The parameter at ``loc``: dotted name, annotation, description and value. For an unknown key, its section's."""
    name, expected, purpose, value = "", schema, "", values
    for part in loc:
        kind = _without_null(expected)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part not in kind.model_fields:
                break
            info = kind.model_fields[part]
            name, expected, purpose = f"{name}.{part}".lstrip("."), _annotated(info), info.description or ""
            value = value.get(part) if isinstance(value, Mapping) else None
        elif get_origin(kind) is list and isinstance(part, int):
            name, expected, value = f"{name}[{part}]", get_args(kind)[0], value[part]
        else:  # a union's readings and a tuple's items: people know the parameter as a whole
            break
    return name, expected, purpose, value


def _annotated(info: FieldInfo) -> Any:
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _without_null(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return _without_null(get_args(annotation)[0])
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if get_origin(annotation) in (Union, UnionType) and len(kinds) == 1 else annotation


def _constraints(extra: Any) -> list[Any]:
    return list(extra.metadata) if isinstance(extra, FieldInfo) else [extra]


def _bounds(metadata: Sequence[Any]) -> str:
    found: dict[type, Any] = {type(m): m for m in metadata}
    low, high = found.get(Ge), found.get(Le)
    if low and high:
        return f" from {low.ge} to {high.le}"
    names = ((Gt, "above", "gt"), (Ge, "at least", "ge"), (Lt, "below", "lt"), (Le, "at most", "le"))
    return " and".join(f" {word} {getattr(found[kind], field)}" for kind, word, field in names if kind in found)


def _kind_of(value: Any, expected: Any) -> str:
    """A word for a value whose writing hides what it is: a number in quotes is text."""
    if isinstance(value, str) and str not in (expected, *get_args(expected)):
        try:
            return "the text " if math.isfinite(float(value)) else ""
        except ValueError:
            return ""
    return ""
