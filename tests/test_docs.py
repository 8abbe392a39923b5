"""The README and the pages of the documentation, compared with what they describe."""

import importlib.util
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer
from dvc.cli.parser import get_main_parser
from paths import ROOT
from PIL import Image
from pydantic import BaseModel
from ruamel.yaml import YAML
from torch import nn
from typer.testing import CliRunner

from autoslim.cli.main import app
from autoslim.data.augmentation import Augmentation
from autoslim.data.batches import train_batches
from autoslim.data.prepare import prepare
from autoslim.data.prepared import PreparedData
from autoslim.pipeline.params import Params, check_params, load_params, read_yaml

CHANGELOG = "CHANGELOG.md"  # it also contains former names
PAGES = [
    "README.md",
    "RESULTS.md",
    "CONTRIBUTING.md",
    CHANGELOG,
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
FOLDERS = ["autoslim", "benchmarks", "docs", "evidence", "presets", "stages", "tests"]
SECTIONS = [name for name, field in Params.model_fields.items() if isinstance(field.annotation, type)]


def parameters(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    """Returns the dotted name and the description of each parameter."""
    found = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= parameters(field.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.description
    return found


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_lines(page: str) -> Iterator[str]:
    """Yields the lines of blocks that are indented or fenced without a language, without comments."""
    fenced = False
    for line in text(page).splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        elif not fenced and line.startswith("    "):
            yield line.partition(" #")[0].strip()


def code_words(page: str) -> list[str]:
    """Returns the inline code of a page, which may span several lines."""
    outside = re.sub(r"^ *```.*?^ *```", "", text(page), flags=re.M | re.S)
    return [" ".join(word.split()) for word in re.findall(r"`([^`]+)`", outside)]


def python_blocks(page: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text(page), re.M | re.S)]


def commands(page: str, program: str) -> list[list[str]]:
    """Returns the arguments of each command line of a program on a page."""
    lines = [*code_lines(page), *code_words(page)]
    return [shlex.split(line)[1:] for line in lines if line.split(" ")[0] == program and " " in line]


# Parameters


def test_every_parameter_is_described_and_in_the_generated_tables(hooks: ModuleType) -> None:
    tables = hooks.parameter_tables()
    for name, description in parameters(Params).items():
        assert description, name
        row = next(line for line in tables.splitlines() if f"</a>`{name}` |" in line)
        assert description.replace("|", "\\|") in row
        assert "| mapping |" not in row or name in ("model.kwargs", "supernet.grid.groups")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "exclusiveMinimum": 1}, "integer ≥ 2"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "number ≥ 0 and < 1"),
        ({"anyOf": [{"enum": ["l1", "bn_scale"]}, {"type": "null"}]}, "`l1`, `bn_scale` or `null`"),
        ({"type": "array", "items": {"$ref": "#/$defs/Seed"}, "minItems": 1}, "list of integer ≥ 0, not empty"),
    ],
)
def test_a_schema_in_words(hooks: ModuleType, schema: dict[str, Any], words: str) -> None:
    assert hooks.allowed(schema, {"Seed": {"type": "integer", "minimum": 0}}) == words


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG])
def test_parameters_that_a_page_names_exist(page: str) -> None:
    known = parameters(Params)
    for word in code_words(page):
        name = re.match(r"[a-z_]+(\.[a-z_]+)+(?=$|:|=)", word)
        if name and name[0].partition(".")[0] in SECTIONS and not name[0].endswith((".json", ".csv", ".png", ".md")):
            assert name[0] in known, word
        if word.endswith(".*"):
            assert any(each.startswith(word[:-1]) for each in known), word


@pytest.mark.parametrize(
    "path", ["params.yaml", *(str(p.relative_to(ROOT)) for p in (ROOT / "presets").glob("*.yaml"))]
)
def test_params_files_are_valid(path: str) -> None:
    load_params(ROOT / path)


# Files and links


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    for line in [*code_lines(page), *code_words(page)]:
        for word in line.split():
            path = word.strip("().,:;'\"").partition("::")[0]
            if path.partition("/")[0] in FOLDERS and "/" in path and "<" not in path:
                assert list(ROOT.glob(path.rstrip("/"))), f"{page}: {word}"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_point_to_files(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        path = target.partition("#")[0]
        if path and ":" not in path:
            assert (ROOT / page).parent.joinpath(path).exists(), f"{page}: {target}"


def test_included_pages_have_links_relative_to_themselves(hooks: ModuleType) -> None:
    markdown = "[a](docs/costs.md#x) [b](RESULTS.md) [c](https://example.org/a) [d](#here) ![e](docs/trajectory.png)"
    assert hooks.with_links_from("guide/page.md", markdown) == (
        "[a](../costs.md#x) [b](../results.md) [c](https://example.org/a) [d](#here) ![e](../trajectory.png)"
    )


def test_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 150


def test_the_architecture_page_lists_every_folder() -> None:
    listed = re.findall(r"^\| `autoslim/(\w+)(?:/|\.py)` \|", text("docs/architecture.md"), re.M)
    paths = [path for path in (ROOT / "autoslim").iterdir() if not path.name.startswith(("_", "."))]
    there = [path.stem for path in paths if path.suffix != ".typed"]
    assert sorted(listed) == sorted(there)


# Commands


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG])
def test_autoslim_commands_of_a_page_exist(page: str) -> None:
    for arguments in commands(page, "autoslim"):
        command: Any = typer.main.get_command(app)
        rest = [argument.strip("[]") for argument in arguments]
        while rest and hasattr(command, "commands"):
            if rest[0].startswith("-"):
                break
            assert rest[0] in command.commands, f"{page}: autoslim {' '.join(arguments)}"
            command = command.commands[rest.pop(0)]
        command.make_parser(command.context_class(command)).parse_args(rest)  # raises for an unknown option


@pytest.mark.parametrize("page", PAGES)
def test_dvc_commands_of_a_page_exist(page: str) -> None:
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    for arguments in commands(page, "dvc"):
        parsed = get_main_parser().parse_args([argument for argument in arguments if argument != "..."])
        if arguments[0] == "repro":
            assert set(parsed.targets) <= {"dvc.yaml", *stages}, arguments
        for override in getattr(parsed, "set_param", None) or []:
            name, _, values = override.partition("=")
            if name != "NAME":
                for value in values.split(","):
                    check_params(with_value(name, value), override)


def with_value(name: str, value: str) -> Any:
    """Returns ``params.yaml`` with another value of one parameter."""
    values = read_yaml(ROOT / "params.yaml")
    section = values
    *path, last = name.split(".")
    for part in path:
        section = section[part]
    assert last in section, name
    section[last] = YAML(typ="safe").load(value)
    return values


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHANGELOG])
def test_make_targets_and_scripts_of_a_page_exist(page: str) -> None:
    targets = set(re.findall(r"^(\w+):", text("Makefile"), re.M))
    for arguments in commands(page, "make"):
        assert arguments[0] in targets, arguments
    for arguments in commands(page, "python") + commands(page, "srun"):
        scripts = [argument for argument in arguments if argument.endswith(".py")]
        assert scripts, arguments
        assert all((ROOT / script).exists() for script in scripts), arguments


# Python


def test_a_users_network_has_the_groups_that_the_guide_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = [block for block in python_blocks("docs/guide/models.md") if "def build" in block]
    groups = profiled(code, "32", tmp_path, monkeypatch)
    assert groups == {
        "0.0": ["0.0", "1.back", "2.back", "3.back"],
        "1.wide": ["1.wide"],
        "2.wide": ["2.wide"],
        "3.wide": ["3.wide"],
    }


def test_the_network_of_the_main_road_can_be_slimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = python_blocks("docs/guide/own-repository.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    assert profiled(code, "64", tmp_path, monkeypatch) == {"0": ["0"], "3": ["3"], "6": ["6"]}


def test_the_data_sets_of_the_guide_can_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = python_blocks("docs/guide/data.md")
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for seed, (table, count) in enumerate({"train": 40, "test": 10}.items()):
        rows = ["file,class"]
        for index in range(count):
            pixels = np.random.default_rng((seed, index)).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"photos/{table}{index}.png")
            rows.append(f"{table}{index}.png,{'cat' if index % 2 else 'dog'}")
        Path(f"photos/{table}.csv").write_text("\n".join(rows))
    Path("my_data.py").write_text(code)
    run: dict[str, Any] = {"image_size": None, "channels": None, "search_images": 10, "seed": 0}
    info = prepare("my_data.py:build", Path("prepared"), **run)
    assert (info.classes, info.counts) == (("cat", "dog"), {"train": 30, "search": 10, "test": 10})
    data, epoch = PreparedData.open(Path("prepared")), {"batch_size": 15, "seed": 0, "epoch": 0, "device": "cpu"}
    batches = [list(train_batches(data, augmentation=Augmentation(), workers=workers, **epoch)) for workers in (0, 1)]
    assert [images.shape for images, _ in batches[0]] == [(15, 3, 32, 32)] * 2
    assert all(torch.equal(first, second) for (first, _), (second, _) in zip(*batches, strict=True))


def profiled(code: str, size: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    monkeypatch.chdir(folder)
    Path("my_network.py").write_text(code)
    result = CliRunner().invoke(app, ["profile", "my_network.py:build", "--size", size, "--verify", "--json"])
    assert result.exit_code == 0, result.output
    return {group["name"]: group["members"] for group in json.loads(result.stdout)["groups"]}


LIBRARY = sorted(path.name for path in (ROOT / "docs" / "library").glob("*.md"))


@pytest.mark.parametrize("page", LIBRARY)
def test_the_examples_of_the_library_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example slims a network to its budget, in at most 60 lines."""
    [code] = python_blocks(f"docs/library/{page}")
    assert len([line for line in code.splitlines() if line.strip()]) <= 60
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    if page in ("loop.md", "detector.md"):
        share = 0.25 if page == "loop.md" else 0.5
        assert names["graph"].macs(names["channels"]) <= share * names["graph"].macs()
        return
    result, text = names["result"], code.replace('"', "")
    [share] = re.findall(r"scoring,\s+(?:{macs: )?(\d+)%", text)
    assert result.costs["macs"] <= int(share) / 100 * result.default_costs["macs"]
    assert result.costs["params"] == sum(parameter.numel() for parameter in result.network.parameters())


def test_the_python_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slimming takes at most 20 lines. The network and the loaders are the user's."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 4), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 4), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(32 * 4, 4))
    batches = [(torch.randn(16, 3, 32, 32), torch.arange(16) % 4) for _ in range(4)]
    monkeypatch.chdir(tmp_path)
    whole, steps = [block for block in python_blocks("README.md") if "from autoslim" in block]
    names: dict[str, Any] = {"__name__": "example", "network": network, "training": batches, "scoring": batches}
    for code in (whole, steps):
        assert len(code.splitlines()) <= 20
        exec(code, names)
    assert sum(parameter.numel() for parameter in names["slimmed"].parameters()) < names["graph"].params()
    assert names["graph"].macs(names["channels"]) <= 0.5 * names["graph"].macs()
    assert names["result"].costs["macs"] <= 0.5 * names["graph"].macs()


@pytest.mark.parametrize("page", ["docs/reference.md", "docs/architecture.md", "docs/guide/models.md"])
def test_python_examples_print_what_their_comments_state(page: str) -> None:
    blocks = [block for block in python_blocks(page) if "from autoslim" in block]
    assert blocks
    printed: list[str] = []
    for code in blocks:
        exec(code, {"__name__": "example", "print": lambda *values: printed.append(" ".join(map(str, values)))})
        expected = re.findall(r"^print\(.*\)(?:  |\n)# (.*)$", code, re.M)
        assert len(expected) == len(re.findall(r"^print\(", code, re.M)) > 0
        assert printed == expected
        printed.clear()
