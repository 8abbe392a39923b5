"""The README against what it describes."""

from pathlib import Path

import pytest
from closure import ROOT
from pydantic import BaseModel

from autoslim.shell.params import Params, load_params


def parameters(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str | None]]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += parameters(field.annotation, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", field.description))
    return found


def test_every_parameter_is_described_in_schema_and_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, description in parameters(Params):
        assert description, name
        assert f"`{name}`" in readme, name


@pytest.mark.parametrize(
    "path", ["params.yaml", *(str(p.relative_to(ROOT)) for p in (ROOT / "presets").glob("*.yaml"))]
)
def test_params_files_are_valid(path: str) -> None:
    load_params(ROOT / path)


def test_files_that_the_readme_names_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for word in readme.replace("`", " ").replace("(", " ").replace(")", " ").split():
        if word.startswith(("presets/", "docs/")):
            assert (ROOT / word).exists(), word


def test_library_example_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python")[1].split("```")[0]
    printed: list[str] = []
    exec(code, {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    assert printed == [line.split("#")[1].strip() for line in code.splitlines() if line.startswith("print")]
