"""``autoslim init``: the pipeline in a git repository of the user's own, and upgrades of such a project."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import error_from, facts, printed
from paths import ROOT
from PIL import Image
from ruamel.yaml import YAML
from tiny import merged, run, tiny_params, write_params

from autoslim.errors import UserError
from autoslim.models.building import build_network
from autoslim.pipeline import code_lock
from autoslim.pipeline.code_lock import check_lock, lock_text
from autoslim.pipeline.params import Params, load_params, read_yaml
from autoslim.pipeline.project import STAGES
from autoslim.pipeline.yaml_edits import dumped, parsed, with_further_dep, with_missing_parameters

TEMPLATES = ROOT / "autoslim/pipeline/templates"
NETWORK = """from torch import nn


def build(num_classes=10, width=8):
    first = nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU()
    second = nn.Conv2d(width, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""
OWN = ["--data", "folder:images", "--model", "net.py:build", "--weights", "trained.pt", "--budget", "50%"]
EARLIER = lock_text().replace("version: ", "version: 0.0.").replace("search: '", "search: 'x")
SMALL: dict[str, Any] = {
    "methods": ["autoslim"],
    "data": {"search_images": 32},
    "supernet": {"epochs": 1, "batch_size": 16, "random_widths": 1, "grid": {"steps": 4}},
    "search": {"chunk": 16, "stop": 0.4},
    "retrain": {"epochs": 1, "seeds": [0]},
    "tracking": {"enabled": False},
    "runtime": {"workers": 0},
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty git repository, which is the working directory, with a network, its weights and images."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    folder = tmp_path / "repository"
    folder.mkdir()
    monkeypatch.chdir(folder)
    subprocess.run(["git", "init", "-q"], check=True)
    Path("net.py").write_text(NETWORK)
    torch.manual_seed(0)
    torch.save(build_network("net.py:build", {}, 2).state_dict(), "trained.pt")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 16)):
        for label, name in enumerate(("dark", "bright")):
            images = Path("images", split, name)
            images.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(100 * label, 100 * label + 100, (12, 12, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")
    return folder


def contents(folder: Path = Path()) -> dict[str, bytes]:
    """Returns the contents of all files, except those of git."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".git" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def pipeline_stages(path: Path = Path("dvc.yaml")) -> dict[str, Any]:
    return {name: stage.get("do", stage) for name, stage in read_yaml(path)["stages"].items()}


# The templates


def test_the_template_of_the_parameters_is_that_of_the_clone() -> None:
    text = (ROOT / "params.yaml").read_text()
    assert (TEMPLATES / "params.yaml").read_text() == text, "copy params.yaml to autoslim/pipeline/templates"


def test_the_template_of_the_pipeline_is_that_of_the_clone() -> None:
    """It differs in the commands, and in that autoslim.lock takes the place of autoslim's folders."""
    template = read_yaml(TEMPLATES / "pipeline.yaml")
    clone = read_yaml(ROOT / "dvc.yaml")
    assert (template["plots"], [*template["stages"]]) == (clone["plots"], [*STAGES])
    assert template["stages"]["retrain"]["foreach"] == clone["stages"]["retrain"]["foreach"]
    stages = pipeline_stages(TEMPLATES / "pipeline.yaml")
    for name, stage in pipeline_stages(ROOT / "dvc.yaml").items():
        stage["cmd"] = stage["cmd"].replace("python stages/", "autoslim stage ").replace(".py", "")
        stage["params"].append({"autoslim.lock": [f"stages.{name}"]})
        stage["deps"] = [dep for dep in stage["deps"] if not dep.startswith("autoslim/")]
        assert stages[name] == {key: value for key, value in stage.items() if value}


@pytest.mark.parametrize("path", ["params.yaml", "pipeline.yaml", *sorted((ROOT / "presets").glob("*.yaml"))], ids=str)
def test_an_unchanged_file_keeps_its_text(path: str) -> None:
    text = (TEMPLATES / path).read_text()
    assert dumped(parsed(text)) == text


# A new project


def test_init_writes_a_project_with_the_users_files(repository: Path) -> None:
    before = contents()
    shown = printed("init", *OWN)
    assert "wrote .dvc, .dvcignore, params.yaml, dvc.yaml, autoslim.lock, .gitignore\n" in shown
    assert "dvc add trained.pt" in shown
    assert {name: data for name, data in contents().items() if name in before} == before
    expected = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    expected |= {"budget": "50%", "resource": "macs"}
    expected["data"]["source"] = "folder:images"
    expected["model"] |= {"name": "net.py:build", "kwargs": {}, "weights": "trained.pt"}
    expected["supernet"] |= {"width": 1.0, "sort": "l1"}
    expected["methods"] = ["default", "uniform", "autoslim"]  # the user's network is evaluated as it is
    assert read_yaml(Path("params.yaml")) == expected
    assert Path("params.yaml").read_text().count("#") == (ROOT / "params.yaml").read_text().count("#")
    stages = pipeline_stages()
    assert [name for name in STAGES if "net.py" in stages[name].get("deps", [])] == list(STAGES[1:])
    assert [name for name in STAGES if "trained.pt" in stages[name].get("deps", [])] == ["supernet"]
    assert run(["git", "check-ignore", "checkpoints/x", "mlflow.db", "outputs/search/x"], repository).count("\n") == 3
    assert "analytics = False" in Path(".dvc/config").read_text()
    assert "net.py:build" not in printed("check")  # the data are not prepared


def test_init_keeps_what_exists(repository: Path) -> None:
    Path(".gitignore").write_text("*.swp\n/checkpoints/")
    first = printed("init", *OWN)
    assert "added lines to .gitignore\n" in first
    lines = Path(".gitignore").read_text().splitlines()
    assert lines[:2] == ["*.swp", "/checkpoints/"]
    assert lines.count("/checkpoints/") == 1
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("budget: 50%", "budget: 30%"))
    Path("autoslim.lock").unlink()
    before = contents()
    shown = printed("init")
    assert "kept, because they exist: .dvc, params.yaml, dvc.yaml, .gitignore\nwrote autoslim.lock\n" in shown
    after = contents()
    assert after.pop("autoslim.lock").decode() == lock_text()
    assert after == before
    assert printed("init") == "kept, because they exist: .dvc, params.yaml, dvc.yaml, autoslim.lock, .gitignore\n"


def test_init_in_a_folder_of_the_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are those of the working directory, and become relative to the project."""
    Path("params.yaml").write_text("lr: 0.1\n")  # of another program
    assert "  cd sub/slimming\n" in printed("init", "sub/slimming", *OWN)
    monkeypatch.chdir("sub/slimming")
    params = load_params()
    assert (params.data.source, params.model.name) == ("folder:../../images", "../../net.py:build")
    assert params.model.weights == "../../trained.pt"
    assert "../../net.py" in pipeline_stages()["search"]["deps"]
    assert Path(".dvc").is_dir()
    assert facts(printed("check"))["data"] == "folder:../../images"


def test_init_from_a_preset(repository: Path) -> None:
    printed("init", "--preset", "cifar10", "--data", "folder:images", "--budget", "20MB")
    expected = read_yaml(ROOT / "presets/cifar10.yaml") | {"budget": "20MB", "resource": "memory"}
    expected["data"]["source"] = "folder:images"
    assert read_yaml(Path("params.yaml")) == expected


def test_init_for_fine_tuning_watches_the_teachers_weights(repository: Path) -> None:
    printed("init", "--preset", "finetune", *OWN)
    methods = ["default", "uniform", "autoslim"]
    expected = read_yaml(ROOT / "presets/finetune.yaml") | {"budget": "50%", "methods": methods}
    expected["data"]["source"] = "folder:images"
    expected["model"] |= {"name": "net.py:build", "weights": "trained.pt"}
    assert read_yaml(Path("params.yaml")) == expected
    stages = pipeline_stages()
    assert [name for name in STAGES if "trained.pt" in stages[name].get("deps", [])] == ["supernet", "retrain"]
    assert facts(printed("check"))["parameters"] == "params.yaml is complete"


@pytest.mark.parametrize(
    ("budget", "resource", "value"),
    [
        ("305M", "macs", "305M"),
        ("4.5ms", "latency", "4.5ms"),
        ("{memory: 20MB, params: 1M}", "memory", {"memory": "20MB", "params": "1M"}),
        ("{macs: 50%, memory: 20MB}", "macs", {"macs": "50%", "memory": "20MB"}),
    ],
)
def test_the_unit_of_the_budget_decides_the_resource(repository: Path, budget: str, resource: str, value: Any) -> None:
    printed("init", "--budget", budget)
    values = read_yaml(Path("params.yaml"))
    assert (values["resource"], values["budget"]) == (resource, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "lots"], "params.yaml: budget 'lots' is not an amount of macs"),
        (["--budget", "{macs"], "--budget '{macs' is not an amount; write it like 305M"),
        (["--data", "folder:gone"], "data folder gone does not exist; expected <folder>/train/"),
        (["--data", "images"], "data source 'images' is unknown; expected digits"),
        (["--model", "gone.py:build"], "model.name names the file 'gone.py', which does not exist"),
        (
            ["--model", "net.py:bild"],
            "model.name 'net.py:bild': net.py has no callable 'bild'; similar names are",
        ),
        (["--model", "net.py:build", "--weights", "gone.pt"], "model.weights names the file 'gone.pt'"),
        (
            ["--preset", "finetune", "--data", "folder:images", "--model", "net.py:build"],
            "--preset finetune starts from trained weights, and 'net.py:build' has no weights 'DEFAULT'; name the file "
            "of yours with --weights",
        ),
        (["--weights", "trained.pt"], "--weights trained.pt needs --model, the network that the weights belong to"),
        (["--preset", "cifar"], "--preset 'cifar' does not exist; presets are cifar10-small, cifar10,"),
        (["net.py"], "FOLDER/net.py is a file; name a folder"),
        (["--upgrade"], "FOLDER is not in an autoslim project"),
        (["--upgrade", "--budget", "3M"], "--upgrade keeps the parameters; edit params.yaml"),
        (["gone", "--upgrade"], "gone is not a folder; name the folder of a project"),
        (["images", "--upgrade"], "autoslim.lock does not exist in images"),
    ],
)
def test_a_wrong_choice_writes_nothing(repository: Path, options: list[str], message: str) -> None:
    before = contents()
    assert error_from("init", *options).startswith(message.replace("FOLDER", str(repository)))
    assert contents() == before
    assert error_from("init", "new", "--budget", "lots").startswith("params.yaml: budget 'lots'")
    assert not Path("new").exists()


def test_init_needs_a_git_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is not in a git repository, which DVC needs for experiments; run `git init`" in error_from("init")
    assert not contents()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("dvc.yaml", "stages: {train: {cmd: make}}", "dvc.yaml exists and has no commands `autoslim stage ...`"),
        ("dvc.yaml", "", "dvc.yaml exists and has no commands `autoslim stage ...`"),
        ("params.yaml", "lr: 0.1", "params.yaml exists and has other parameters than autoslim's"),
    ],
)
def test_files_of_another_pipeline_are_an_error(repository: Path, file: str, text: str, message: str) -> None:
    Path(file).write_text(text)
    before = contents()
    error = error_from("init")
    assert message in error
    assert "nothing was written; use another folder in this repository, such as `autoslim init slimming`" in error
    assert contents() == before


def test_options_for_parameters_that_exist_are_an_error(repository: Path) -> None:
    printed("init", *OWN)
    assert error_from("init", "--budget", "30%", "--model", "net.py:build") == (
        f"params.yaml exists in {repository} and is kept, so that --model and --budget would have no effect; edit it, "
        "and run `autoslim init --upgrade`"
    )


# Upgrades

TEXT = (ROOT / "params.yaml").read_text()


def without(text: str, number: int) -> str:
    """Returns ``text`` without the entry at a line: the line, those with a higher indentation, and no comments."""
    lines = text.splitlines()
    indent = len(lines[number]) - len(lines[number].lstrip())
    end = number + 1
    while end < len(lines) and lines[end].startswith(" " * (indent + 1)):
        end += 1
    if end < len(lines) and not lines[end] and (number == 0 or not lines[number - 1]):
        end += 1
    return "\n".join([*lines[:number], *lines[end:]]).rstrip("\n") + "\n"


KWARGS = [n for n, line in enumerate(TEXT.splitlines()) if line.startswith("    ")]
ONLY = "  refine:", "  figure_dpi:"  # a section without its only parameter is no mapping, which is an error
ENTRIES = [
    n for n, line in enumerate(TEXT.splitlines()) if line and not line.startswith(("#", *ONLY)) and n not in KWARGS
]


@pytest.mark.parametrize("number", ENTRIES, ids=lambda number: TEXT.splitlines()[number].partition(":")[0].strip())
def test_a_missing_parameter_is_added_where_it_was(number: int) -> None:
    assert with_missing_parameters(without(TEXT, number), TEXT, Params) == TEXT


def test_missing_parameters_are_added_to_a_file_that_the_user_edited() -> None:
    """Other indentation, order, values and comments are kept, as are values that are mappings."""
    theirs = TEXT.replace("  image_size: null", "  # ours\n  image_size: 64  ").replace("seed: 0", "seed: 7  # lucky")
    section = theirs[theirs.index("\nsearch:") : theirs.index("\nallocate:")]
    moved = theirs.replace(section, "") + section.replace("\n  ", "\n     ")
    moved = moved.replace(", nesterov: true", "").replace("     risk: 0.2\n", "").replace("    width: 8\n", "")
    moved = re.sub("methods: .*\n", "", moved)
    text = with_missing_parameters(moved, TEXT, Params)
    values = YAML(typ="safe").load(theirs)
    del values["model"]["kwargs"]["width"]
    assert YAML(typ="safe").load(text) == values
    assert "     incremental: true\n     risk: 0.2\n     precision: fp32" in text
    assert "  # ours\n  image_size: 64" in text
    assert text.count("# lucky") == theirs.count("# lucky")


def test_upgrade_adds_what_is_new_and_keeps_what_is_the_users(repository: Path) -> None:
    printed("init", *OWN)
    made = contents()
    assert printed("init", "--upgrade") == "the project is up to date\n"
    text = Path("params.yaml").read_text().replace("budget: 50%", "budget: 35%")
    Path("params.yaml").write_text(text.replace("  risk: 0.2\n", "").replace("weights: trained.pt", "weights: w.pt"))
    own = parsed(Path("dvc.yaml").read_text())
    stages = own["stages"]
    stages["search"]["cmd"] = "uv run autoslim stage search"
    stages["report"]["params"] = ["budget"]
    stages["allocate"]["deps"].append("outputs/old.json")
    stages["retrain"]["do"]["deps"].remove("net.py")
    stages["prepare"]["deps"] = ["images.dvc"]
    del stages["resources"]
    stages["deploy"] = {"cmd": "make deploy", "deps": ["outputs/report"]}
    Path("dvc.yaml").write_text(dumped(own).replace("  deploy:", "  # to the device\n  deploy:"))
    Path("autoslim.lock").write_text(EARLIER)
    Path(".gitignore").write_text("/checkpoints/\n")
    shown = printed("init", str(repository), "--upgrade")
    for changed in (
        "+  risk: 0.2",
        "-  search: 'x",
        "+/outputs/search/",
        "+    deps: [data/prepared, outputs/resources/",
    ):
        assert f"\n{changed}" in shown
    assert Path("params.yaml").read_text() == text.replace("weights: trained.pt", "weights: w.pt")
    assert Path("autoslim.lock").read_text() == lock_text()
    after, original = pipeline_stages(), YAML(typ="safe").load(made["dvc.yaml"].decode())["stages"]
    assert "# to the device\n" in Path("dvc.yaml").read_text()
    assert after.pop("deploy") == {"cmd": "make deploy", "deps": ["outputs/report"]}
    assert after.pop("prepare") == original["prepare"] | {"deps": ["images.dvc"]}
    assert after["search"].pop("cmd") == "uv run autoslim stage search"
    assert set(after["supernet"].pop("deps")) == {*original["supernet"]["deps"], "w.pt"}
    original["retrain"] = original["retrain"]["do"]
    for name, stage in after.items():
        assert stage == {key: original[name][key] for key in stage}, name
    assert after.keys() == original.keys() - {"prepare"}
    assert printed("init", "--upgrade") == "the project is up to date\n"


def test_upgrade_keeps_plots_of_other_files(repository: Path) -> None:
    printed("init", *OWN)
    own = parsed(Path("dvc.yaml").read_text())
    made = [list(plot) for plot in own["plots"]]
    own_plot = {"outputs/search/metrics.json": {"x": "a"}}
    own["plots"][0][made[0][0]]["x"] = "step"
    own["plots"].insert(0, own_plot)
    Path("dvc.yaml").write_text(dumped(own))
    printed("init", "--upgrade")
    plots = read_yaml(Path("dvc.yaml"))["plots"]
    assert [list(plot) for plot in plots] == [list(own_plot), *made]
    assert plots[1][made[0][0]]["x"] == "epoch"


def test_upgrade_of_wrong_parameters_changes_nothing(repository: Path) -> None:
    printed("init", *OWN)
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("  risk: 0.2\n", "").replace("figure_dpi", "picture_dpi"))
    before = contents()
    assert "report.picture_dpi is now report.figure_dpi" in error_from("init", "--upgrade")
    assert contents() == before


def test_check_reports_a_file_that_dvc_does_not_track(repository: Path) -> None:
    printed("init", *OWN)
    Path("other.py").write_text(NETWORK)
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("net.py:build", "other.py:build"))
    assert error_from("check") == (
        "model.name is the file other.py, which DVC does not track: changing it would not rerun resources, supernet, "
        "search, allocate, retrain, report; run `autoslim init --upgrade`, which adds other.py to their deps in "
        "dvc.yaml"
    )
    printed("init", "--upgrade")
    printed("check")


def test_upgrade_in_a_clone_changes_only_what_the_parameters_name(repository: Path) -> None:
    """Its dvc.yaml is written by hand, so that all other lines keep their text."""
    text = (ROOT / "dvc.yaml").read_text()
    Path("dvc.yaml").write_text(text)
    write_params(Path(), tiny_params())
    assert printed("init", "--upgrade") == "the project is up to date\n"
    assert "is a clone of autoslim, which has the files of a project; edit params.yaml" in error_from("init", *OWN)

    own = {"name": "net.py:build", "weights": "trained.pt"}
    write_params(Path(), tiny_params({"task": "regression", "model": own, "supernet": {"width": 1.0}}))
    before = pipeline_stages()
    shown = printed("init", "--upgrade")
    for name, stage in pipeline_stages().items():
        further = [*(["net.py"] if name != "prepare" else []), *(["trained.pt"] if name == "supernet" else [])]
        assert stage == before[name] | {"deps": before[name]["deps"] + further}
    changed = Path("dvc.yaml").read_text()
    assert {*text.splitlines()} - {*changed.splitlines()} == {
        line[1:] for line in shown.splitlines() if re.match("- .*]$", line)
    }
    assert max(map(len, changed.splitlines())) <= 120
    assert printed("init", "--upgrade") == "the project is up to date\n"
    assert not Path("autoslim.lock").exists()


@pytest.mark.parametrize(
    ("deps", "expected"),
    [
        ("[a.py, 'b c.py']  # ours", "[a.py, 'b c.py', 'd, e.py']  # ours"),
        ("[\n      a.py,\n      b.py\n    ]", "[\n      a.py,\n      b.py\n    , 'd, e.py']"),
        ("\n    - a.py\n    - b.py  # ours", "\n    - a.py\n    - b.py  # ours\n    - d, e.py"),
        (f"[{'a' * 95}.py]", f"[{'a' * 95}.py,\n      'd, e.py']"),
    ],
)
def test_a_further_dep_leaves_other_text_alone(deps: str, expected: str) -> None:
    text = "stages:\n  one:\n    cmd: x\n    deps: {}\n    outs: [c]\n# end\n"
    changed = with_further_dep(text.format(deps), "one", "d, e.py")
    assert changed == text.format(expected)
    assert YAML(typ="safe").load(changed)["stages"]["one"]["deps"][-1] == "d, e.py"


def test_stages_refuse_other_code_until_the_upgrade(repository: Path) -> None:
    printed("init", *OWN)
    Path("autoslim.lock").write_text(EARLIER)
    check_lock(["prepare", "supernet"])
    for command in (["stage", "search"], ["check"]):
        error = error_from(*command)
        assert error.startswith("autoslim.lock is from autoslim 0.0.0.")
        assert "has other code for search; run `autoslim init --upgrade`" in error
    Path("autoslim.lock").write_text("version: 1\n")
    assert error_from("check") == "autoslim.lock is damaged; write it again with `autoslim init --upgrade`"
    printed("init", "--upgrade")
    printed("check")


def test_the_digest_of_a_stage_follows_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = dict(code_lock.code_files("autoslim.pipeline.allocate"))
    assert {"pipeline/allocate.py", "search/methods.py", "models/released.yaml", "tracing/__init__.py"} <= files.keys()
    assert "search/methods.py" not in dict(code_lock.code_files("autoslim.pipeline.prepare"))
    code = tmp_path / "code.py"
    monkeypatch.setattr(code_lock, "code_files", lambda _: [("code.py", code)])
    digests = set()
    for text in ("a = 1", "a = 2", "a = 1"):
        code.write_text(text)
        digests.add(code_lock.stage_digest("search"))
    assert len(digests) == 2


def test_a_project_without_a_lock_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_lock()
    Path("autoslim.lock").write_text("[")
    with pytest.raises(UserError, match=r"autoslim\.lock is not valid YAML"):
        check_lock()


# The pipeline


def test_dvc_runs_a_project_of_ones_own(repository: Path) -> None:
    def dvc(*arguments: str) -> str:
        return run(["dvc", *arguments], repository, PYTHONPATH=str(ROOT))

    def changed() -> set[str]:
        return set(json.loads(dvc("status", "--json").splitlines()[-1]))

    run(["autoslim", "init", *OWN], repository, PYTHONPATH=str(ROOT))
    write_params(repository, merged(read_yaml(Path("params.yaml")), SMALL))
    run(["git", "add", "-A"], repository)
    run(["git", "commit", "-qm", "start"], repository)
    dvc("repro")
    before = json.loads(Path("outputs/report/metrics.json").read_text())["autoslim"]
    default = json.loads(Path("outputs/search/trajectory.json").read_text())["default"]["macs"]
    assert 0.25 * default < before["macs"] <= 0.5 * default
    with Path("net.py").open("a") as file:
        file.write("\n# changed\n")
    assert changed() == {"retrain@autoslim", *STAGES} - {"prepare", "retrain"}
    Path("net.py").write_text(NETWORK)
    lock = Path("autoslim.lock").read_text()
    Path("autoslim.lock").write_text(lock.replace("search: '", "search: 'x"))  # as if an upgrade changed its code
    assert changed() == {"search"}  # and no other stage is out of date
    Path("autoslim.lock").write_text(lock)
    output = dvc("exp", "run", "-S", "budget=80%")
    stages = {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")}
    assert stages == {"resources", "allocate", "retrain@autoslim", "report"}
    after = json.loads(Path("outputs/report/metrics.json").read_text())["autoslim"]
    assert 0.5 * default < after["macs"] <= 0.8 * default
