"""The README against what it describes."""

import json
from pathlib import Path

import pytest
from paths import ROOT
from pydantic import BaseModel
from typer.testing import CliRunner

from autoslim.cli.main import app
from autoslim.pipeline.params import Params, load_params


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


def code_blocks() -> list[str]:
    return [part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```python")[1:]]


def test_a_users_own_network_has_the_groups_that_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = next(block for block in code_blocks() if "def build" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    Path("my_network.py").write_text(code)
    result = CliRunner().invoke(app, ["profile", "my_network.py:build", "--size", "32", "--verify", "--json"])
    assert result.exit_code == 0, result.output
    groups = {group["name"]: group["members"] for group in json.loads(result.stdout)["groups"]}
    assert groups == {
        "0.0": ["0.0", "1.back", "2.back", "3.back"],
        "1.wide": ["1.wide"],
        "2.wide": ["2.wide"],
        "3.wide": ["3.wide"],
    }


def test_library_example_runs(tmp_path: Path) -> None:
    code = next(block for block in code_blocks() if "Supernet(" in block)
    printed: list[str] = []
    exec(code, {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    assert printed == [line.split("#")[1].strip() for line in code.splitlines() if line.startswith("print")]
