"""MkDocs hook that fills in the parts of the site that are derived from other files, so that nothing is written twice.

``<!-- include FILE.md -->`` replaces a page by a Markdown file of the repository's root, and ``<!-- parameters -->`` is
replaced by tables of all parameters, from the schema and ``params.yaml``.
"""

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r"<!-- include (\S+) -->")
PARAMETERS = "<!-- parameters -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if match := INCLUDE.search(markdown):
        markdown = with_links_from(page.file.src_uri, (ROOT / match[1]).read_text(encoding="utf-8"))
    if PARAMETERS in markdown:
        markdown = markdown.replace(PARAMETERS, parameter_tables())
    return markdown


def with_links_from(page: str, markdown: str) -> str:
    """Markdown of a file in the repository's root with its links relative to ``page``, a path below ``docs/``.

    Files of the root that are included as pages become links to these pages.
    """
    pages = {
        match[1]: posixpath.join("docs", path.relative_to(ROOT / "docs").as_posix())
        for path in (ROOT / "docs").rglob("*.md")
        if (match := INCLUDE.search(path.read_text(encoding="utf-8")))
    }
    folder = posixpath.join("docs", posixpath.dirname(page))

    def relative(match: re.Match[str]) -> str:
        path, anchor, fragment = match[1].partition("#")
        if not path or ":" in path:
            return match[0]
        return f"]({posixpath.relpath(pages.get(path, path), folder)}{anchor}{fragment})"

    return re.sub(r"\]\(([^)\s]+)\)", relative, markdown)


def parameter_tables() -> str:
    """One table for each section of ``params.yaml``, in the order of the schema."""
    from autoslim.pipeline.params import Params, read_yaml

    schema, values = Params.model_json_schema(), read_yaml(ROOT / "params.yaml")
    sections: dict[str, list[str]] = {}
    for name, field in parameters(schema, schema.get("$defs", {})):
        section = name.partition(".")[0] if "." in name else "General"
        value: Any = values
        for part in name.split("."):
            value = value[part]
        cells = (f'<a id="{name}"></a>`{name}`', allowed(field, schema["$defs"]), f"`{written(value)}`")
        description = field["description"].replace("|", "\\|")
        sections.setdefault(section, []).append(f"| {' | '.join(cells)} | {description} |")
    head = "| parameter | type and range | `params.yaml` | meaning |\n|---|---|---|---|\n"
    return "\n\n".join(f"## {section}\n\n{head}" + "\n".join(rows) for section, rows in sections.items())


def parameters(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dotted name and the JSON schema of each parameter. A section has properties and is no parameter itself."""
    for name, field in schema["properties"].items():
        section = definitions.get(field.get("$ref", "").rpartition("/")[2], {})
        if "properties" in section:
            yield from parameters(section, definitions, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema's type and range in words."""
    if "$ref" in schema:
        return allowed(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(allowed(choice, definitions) for choice in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{written(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{written(schema['const'])}`"
    kind = schema.get("type")
    if kind == "null":
        return "`null`"
    if kind == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(allowed(item, definitions) for item in schema['prefixItems'])}]"
        return f"list of {allowed(schema['items'], definitions)}" + (", not empty" if schema.get("minItems") else "")
    if kind == "integer" and schema.get("exclusiveMinimum") is not None:
        schema = {**schema, "minimum": schema["exclusiveMinimum"] + 1, "exclusiveMinimum": None}
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    ranges = [f"{sign} {schema[bound]:g}" for bound, sign in bounds if schema.get(bound) is not None]
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return " ".join([names.get(str(kind), "mapping"), " and ".join(ranges)]).strip()


def written(value: Any) -> str:
    """A value as it stands in YAML."""
    return value if isinstance(value, str) else json.dumps(value)
