"""Edits of YAML files that people also edit: values, comments and order are kept."""

import io
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.representer import RoundTripRepresenter

_WIDTH = 120  # of the lines of the clone's dvc.yaml
_LISTS = ("deps", "params", "outs", "metrics", "plots")


class _Representer(RoundTripRepresenter):
    """Writes ``null``, which ruamel leaves out."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def parsed(text: str) -> Any:
    """Returns the contents of a YAML file, with its comments."""
    return _yaml().load(text)


def dumped(values: Any) -> str:
    """Returns the text of a YAML file with the contents ``values``."""
    stream = io.StringIO()
    _yaml().dump(values, stream)
    return stream.getvalue()


def with_missing_parameters(text: str, template: str, schema: type[BaseModel]) -> str:
    """Returns the parameter file ``text`` with the parameters that only ``template`` has, in the template's order.

    They have the template's values and comments. All other lines keep their text. The contents of a parameter that is
    itself a mapping, such as ``model.kwargs``, are one value, to which nothing is added.
    """
    while path := _first_missing(parsed(text), parsed(template), schema):
        text = _with_parameter(text, template, path)
    return text


def _first_missing(values: Any, template: Any, schema: type[BaseModel]) -> tuple[str, ...]:
    """Returns the path of the first parameter that ``values`` lacks; () if there is none."""
    for name in template:
        if name not in values:
            return (name,)
        section = schema.model_fields[name].annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel) and isinstance(values[name], dict)):
            continue
        if path := _first_missing(values[name], template[name], section):
            return (name, *path)
    return ()


def _with_parameter(text: str, template: str, path: tuple[str, ...]) -> str:
    target, source = parsed(text), parsed(template)
    *sections, name = path
    for section in sections:
        target, source = target[section], source[section]
    lines, new = text.splitlines(), template.splitlines()
    if target.fa.flow_style():
        return _with_flow_parameter(lines, target, name, source)
    line, column = source.lc.key(name)
    start, end = _comments_above(new, line), _end(new, line, column)
    names = list(source)
    before = [other for other in names[: names.index(name)] if other in target]
    neighbour = target.lc.key(before[-1] if before else next(iter(target)))
    position = _end(lines, *neighbour) if before else _comments_above(lines, neighbour[0])
    entry = [" " * neighbour[1] + row[column:] if row.strip() else "" for row in new[start:end]]
    if _is_empty(new, start - 1) and not _is_empty(lines, position - 1):
        entry = ["", *entry]
    if _is_empty(new, end) and not _is_empty(lines, position):
        entry = [*entry, ""]
    return "\n".join([*lines[:position], *entry, *lines[position:]]) + "\n"


def _with_flow_parameter(lines: list[str], target: CommentedMap, name: str, source: CommentedMap) -> str:
    """Inserts a parameter into a section in braces, before the first parameter that follows it, or else in front."""
    value = CommentedMap({name: source[name]})
    value.fa.set_flow_style()
    entry = dumped(value).strip()[1:-1]
    names = list(source)
    following = [other for other in names[names.index(name) + 1 :] if other in target]
    if target:
        line, column = target.lc.key(following[0] if following else next(iter(target)))
        entry += ", "
    else:
        line, column = target.lc.line, target.lc.col + 1  # after the brace
    lines[line] = lines[line][:column] + entry + lines[line][column:]
    return "\n".join(lines) + "\n"


def _comments_above(lines: list[str], line: int) -> int:
    """Returns the first of the lines with comments directly above ``line``; ``line`` if there are none."""
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
    return line


def _is_empty(lines: list[str], number: int) -> bool:
    """Returns whether a line is empty, as are those before the first and after the last."""
    return not 0 <= number < len(lines) or not lines[number].strip()


def _end(lines: list[str], line: int, column: int) -> int:
    """Returns the line after the entry whose key is at ``line`` and ``column``."""
    end = line + 1
    for number in range(line + 1, len(lines)):
        row = lines[number].lstrip()
        indent = len(lines[number]) - len(row)
        if not row or row.startswith("#"):
            continue
        if indent < column or (indent == column and not row.startswith("- ")):
            break
        end = number + 1
    return end


def update_pipeline(values: CommentedMap, template: CommentedMap, generated: tuple[str, ...]) -> None:
    """Changes the stages of ``values``, the contents of a ``dvc.yaml``, to those of ``template``.

    Further stages, plots of other files and settings are kept, as are further deps, except those below the folders
    ``generated``. A command that contains the template's, such as ``uv run autoslim stage search``, is kept too.
    """
    for name, stage in template["stages"].items():
        if name in values["stages"]:
            _update_stage(values["stages"][name], stage, generated)
        else:
            values["stages"][name] = stage
    plots = values.setdefault("plots", [])
    for plot in template.get("plots", []):
        same = [number for number, other in enumerate(plots) if list(other) == list(plot)]  # their files
        for number in reversed(same[1:]):
            del plots[number]
        if not same:
            plots.append(plot)
        elif plots[same[0]] != plot:
            plots[same[0]] = plot


def with_further_dep(text: str, stage: str, path: str) -> str:
    """Returns the text of a ``dvc.yaml`` with ``path`` at the end of a stage's deps. All other lines keep their text.

    Args:
        stage: a stage with at least one dep.
    """
    entry = parsed(text)["stages"][stage]
    deps = entry.get("do", entry)["deps"]
    lines = text.splitlines()
    line, column = deps.lc.item(len(deps) - 1)
    if not deps.fa.flow_style():
        lines.insert(line + 1, lines[line][:column] + dumped(path).splitlines()[0])
        return "\n".join(lines) + "\n"
    column += len(str(deps[-1]))
    while (end := lines[line].find("]", column)) < 0:
        line, column = line + 1, 0
    new = CommentedSeq([path])
    new.fa.set_flow_style()
    indent = " " * (len(lines[line]) - len(lines[line].lstrip()) + 2 * (line == deps.lc.line))
    rest = dumped(new).strip()[1:]
    separator = ", " if len(lines[line][:end] + rest) + 2 <= _WIDTH else f",\n{indent}"
    lines[line] = lines[line][:end] + separator + rest + lines[line][end + 1 :]
    return "\n".join(lines) + "\n"


def _update_stage(current: Any, stage: Mapping[str, Any], generated: tuple[str, ...]) -> None:
    for key in [key for key in _LISTS if key in current and key not in stage and key != "deps"]:
        del current[key]
    for key, value in stage.items():
        if key == "do":
            _update_stage(current.setdefault("do", CommentedMap()), value, generated)
        elif key == "deps":
            for dep in current.get("deps", []):
                if dep not in value and not str(dep).startswith(generated):
                    value.append(dep)
            if sorted(current.get("deps", [])) != sorted(value):
                current["deps"] = value
        elif key == "cmd" and value in str(current.get("cmd")):
            continue
        elif current.get(key) != value:
            current[key] = value
