"""The pipeline in a repository of the user's own: making a project, and bringing it up to date.

A project has the parameters, a ``dvc.yaml`` whose commands are ``autoslim stage``, and ``autoslim.lock``. No existing
file is overwritten when a project is made.
"""

import contextlib
import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

from autoslim.data.prepare import check_source
from autoslim.errors import UserError
from autoslim.files import write_bytes
from autoslim.models.building import find_constructor
from autoslim.models.pretrained import check_weights
from autoslim.pipeline.checks import own_files, unwatched
from autoslim.pipeline.code_lock import lock_text
from autoslim.pipeline.params import POLICY_SETTINGS, Params, check_params, read_yaml
from autoslim.pipeline.project import LOCK
from autoslim.pipeline.yaml_edits import (
    dumped,
    parsed,
    update_pipeline,
    with_further_dep,
    with_missing_parameters,
)
from autoslim.search.methods import DEFAULT
from autoslim.tasks.building import find_task, has_distillation
from autoslim.user_code import file_of

PARAMS, PIPELINE, IGNORED = Path("params.yaml"), Path("dvc.yaml"), Path(".gitignore")
_HERE = Path(__file__).parent
_GENERATED = "outputs/", "data/prepared"


@dataclass(frozen=True)
class Choices:
    """What the user chose for a new project; None: as in the preset, or as in the default parameters."""

    data: str | None = None
    model: str | None = None
    weights: str | None = None
    task: str | None = None
    budget: str | None = None
    preset: str | None = None


@dataclass(frozen=True)
class Created:
    """What was written, what existed and got further lines, what was kept, and the project's parameters."""

    written: tuple[str, ...]
    extended: tuple[str, ...]
    kept: tuple[str, ...]
    params: Params


def create_project(folder: Path, choices: Choices) -> Created:
    """Makes a project in ``folder``, which is created if it does not exist. Everything is checked before files change.

    Relative paths in ``choices`` are looked up in the working directory and then in ``folder``.

    Raises:
        UserError: ``folder`` is not in a git repository, has files of another pipeline, or a choice is wrong.
    """
    folder = folder.resolve()
    git = _git_root(folder)
    _check_foreign(folder)
    text = _own_or_new_params(folder, choices)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.chdir(folder):
            params = check_params(YAML(typ="safe").load(text), str(PARAMS))
            _check_choices(params, choices)
            if choices.task is not None and not has_distillation(find_task(params.task)):
                text = _without_distillation(text)
                params = check_params(YAML(typ="safe").load(text), str(PARAMS))
            files = {PARAMS: text, PIPELINE: _pipeline(params), LOCK: lock_text()}
    except BaseException:
        if not existed:
            folder.rmdir()
        raise
    written: list[str] = []
    extended: list[str] = []
    kept: list[str] = []
    with contextlib.chdir(folder):
        if Path(".dvc").exists():
            kept.append(".dvc")
        else:
            written += _init_dvc(git)
        for path, content in files.items():
            if path.exists():
                kept.append(str(path))
            else:
                write_bytes(path, content.encode())
                written.append(str(path))
        existed = IGNORED.exists()
        changed = _ignore()
        (kept if not changed else extended if existed else written).append(str(IGNORED))
    return Created(tuple(written), tuple(extended), tuple(kept), params)


def upgrade_project(folder: Path) -> str:
    """Brings a project up to date with the installed version of autoslim and with its own ``params.yaml``.

    New parameters get their default values. The stages of ``dvc.yaml`` become those of this version, with the user's
    files that the parameters name among their deps; other stages and deps are kept. In a clone of autoslim, whose
    stages are already those of its version, only these files are added, and the plots named after the task's score.

    Returns:
        The differences of all changed files, as a unified diff; "" if everything is up to date.

    Raises:
        UserError: ``folder`` has no project that ``create_project`` made and is no clone, or its parameters are wrong.
            No file changed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder of a project")
    with contextlib.chdir(folder):
        clone = PIPELINE.is_file() and _is_clone(read_yaml(PIPELINE))
        for path in (PARAMS, PIPELINE) if clone else (LOCK, PARAMS, PIPELINE):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist in {folder}, so that this is no complete project of `autoslim init`; "
                    "run `autoslim init`, which adds the missing files"
                )
        values, pipeline = read_yaml(PARAMS), read_yaml(PIPELINE)
        if not isinstance(values, dict):
            raise UserError(f"{PARAMS} is not a mapping of parameters; restore it from git")
        if not clone and not _is_ours(pipeline):
            raise UserError(f"{PIPELINE} has no commands `autoslim stage ...`; delete it and run `autoslim init`")
        paths = (PARAMS, PIPELINE) if clone else (PARAMS, PIPELINE, LOCK)
        before = {path: path.read_text(encoding="utf-8") for path in paths}
        text = with_missing_parameters(before[PARAMS], _template(PARAMS.name), Params)
        params = check_params(YAML(typ="safe").load(text), str(PARAMS))
        if clone:
            after = {PARAMS: text, PIPELINE: _updated_clone(before[PIPELINE], params)}
        else:
            current = parsed(before[PIPELINE])
            update_pipeline(current, parsed(_pipeline(params)), _GENERATED)
            unchanged = parsed(before[PIPELINE]) == current
            after = {PARAMS: text, PIPELINE: before[PIPELINE] if unchanged else dumped(current), LOCK: lock_text()}
        ignored = IGNORED.read_text(encoding="utf-8") if IGNORED.is_file() else ""
        for path, content in after.items():
            if content != before[path]:
                write_bytes(path, content.encode())
        if not clone and _ignore():
            before[IGNORED], after[IGNORED] = ignored, IGNORED.read_text(encoding="utf-8")
    return "".join(_difference(path, before[path], after[path]) for path in after)


def presets() -> dict[str, Path]:
    """Returns the parameter files that come with autoslim, by name."""
    return {path.stem: path for path in sorted((_HERE / "presets").glob("*.yaml"))}


def _difference(path: Path, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"{path} (before)", f"{path} (after)"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _template(name: str) -> str:
    # The template of dvc.yaml has another name: DVC would take it for a pipeline of the clone.
    return (_HERE / "templates" / name).read_text(encoding="utf-8")


def _git_root(folder: Path) -> Path:
    root = next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)
    if root is None:
        raise UserError(
            f"{folder} is not in a git repository, which DVC needs for experiments; run `git init` in it first"
        )
    return root


def _check_foreign(folder: Path) -> None:
    """Raises ``UserError`` if ``folder`` has a ``dvc.yaml`` or ``params.yaml`` that does not belong to autoslim."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    remedy = "nothing was written; use another folder in this repository, such as `autoslim init slimming`"
    exists = (folder / PIPELINE).exists()
    pipeline = read_yaml(folder / PIPELINE) if exists else None
    if _is_clone(pipeline):
        raise UserError(
            f"{folder} is a clone of autoslim, which has the files of a project; edit {PARAMS}, and run `autoslim init "
            "--upgrade`, which adds your files to the deps in dvc.yaml"
        )
    if exists and not _is_ours(pipeline):
        raise UserError(f"{folder / PIPELINE} exists and has no commands `autoslim stage ...`; {remedy}")
    if (folder / PARAMS).exists():
        values = read_yaml(folder / PARAMS)
        if not isinstance(values, dict) or not {"supernet", "retrain"} <= {*values}:
            raise UserError(f"{folder / PARAMS} exists and has other parameters than autoslim's; {remedy}")


def _is_ours(pipeline: Any) -> bool:
    stages = pipeline.get("stages") if isinstance(pipeline, dict) else None
    return isinstance(stages, dict) and "autoslim stage" in str(stages.get("supernet"))


def _is_clone(pipeline: Any) -> bool:
    """Returns whether a ``dvc.yaml`` is that of a clone of autoslim, whose stages run its files below ``stages/``."""
    stages = pipeline.get("stages") if isinstance(pipeline, dict) else None
    return isinstance(stages, dict) and "stages/supernet.py" in str(stages.get("supernet"))


def _updated_clone(text: str, params: Params) -> str:
    """Returns the ``dvc.yaml`` of a clone with the user's files."""
    for file in own_files(params):
        for name in unwatched(file, parsed(text)["stages"]):
            text = with_further_dep(text, name, file.path)
    return text


def _own_or_new_params(folder: Path, choices: Choices) -> str:
    """Returns the text of the project's ``params.yaml``: the existing one, or a new one with ``choices``."""
    chosen = {name: value for name, value in vars(choices).items() if value is not None}
    if (folder / PARAMS).exists():
        if chosen:
            options = " and ".join(f"--{name}" for name in chosen)
            raise UserError(
                f"{PARAMS} exists in {folder} and is kept, so that {options} would have no effect; edit it, "
                "and run `autoslim init --upgrade`"
            )
        return (folder / PARAMS).read_text(encoding="utf-8")
    return _new_params(folder, choices)


def _new_params(folder: Path, choices: Choices) -> str:
    if choices.preset is not None and choices.preset not in presets():
        raise UserError(f"--preset {choices.preset!r} does not exist; presets are {', '.join(presets())}")
    if choices.weights is not None and choices.model is None and choices.preset is None:
        raise UserError(f"--weights {choices.weights} needs --model, the network that the weights belong to")
    preset = presets().get(choices.preset or "")
    values = parsed(preset.read_text(encoding="utf-8") if preset else _template(PARAMS.name))
    if choices.data is not None:
        values["data"]["source"] = _source(choices.data, folder)
        if file_of(choices.data) is not None:  # the user's data sets do their own transforms and augmentation
            values["data"].update(image_size=None, channels=None, storage="auto")
            for stage in ("supernet", "retrain"):
                augment = values[stage]["augment"]
                augment.update({name: _off(augment[name]) for name in augment if name not in POLICY_SETTINGS})
    if choices.model is not None:
        values["model"]["name"] = _source(choices.model, folder) if file_of(choices.model) else choices.model
        values["model"]["kwargs"] = _empty()
        values["model"]["leaves"] = type(values["model"]["leaves"])()
        values["model"]["leaves"].fa.set_flow_style()
        values["model"]["part"] = None
    if choices.weights is not None:
        values["model"]["weights"] = _moved(choices.weights, folder)
        if DEFAULT not in values["methods"]:
            values["methods"].insert(0, DEFAULT)  # it shows what the other methods lose
        values["supernet"]["width"] = min(1.0, values["supernet"]["width"])
        values["supernet"]["sort"] = "l1"
    if choices.task is not None:
        values["task"] = choices.task if file_of(choices.task) is None else _source(choices.task, folder)
        if choices.task != "classification":
            for stage in ("supernet", "retrain"):
                values[stage]["label_smoothing"] = 0.0
    if choices.budget is not None:
        resource = str(values["resource"]) if preset else "macs"  # the template's is that of the first run
        for name, value in _budget(choices.budget, resource).items():
            values[name] = value
    return dumped(values)


def _source(data: str, folder: Path) -> str:
    """Returns ``data.source``, ``task`` or ``model.name`` with a path relative to ``folder``."""
    if (file := file_of(data)) is not None:
        return f"{_moved(file, folder)}:{data.rpartition(':')[2]}"
    scheme, _, rest = data.partition(":")
    if scheme not in ("folder", "hf"):
        return data
    path, query, columns = rest.partition("?" if scheme == "hf" else "\0")
    return f"{scheme}:{_moved(path, folder)}{query}{columns}"


def _off(value: Any) -> Any:
    """Returns the value that switches a transform off: false, 0 or null."""
    if isinstance(value, bool):
        return False
    return 0.0 if isinstance(value, float) else 0 if isinstance(value, int) else None


def _empty() -> CommentedMap:
    values = CommentedMap()
    values.fa.set_flow_style()
    return values


def _moved(path: str, folder: Path) -> str:
    """Returns ``path`` relative to ``folder`` if it exists in the working directory; otherwise it stays as it is."""
    if Path(path).is_absolute() or not Path(path).exists():
        return path
    return Path(os.path.relpath(Path(path).resolve(), folder)).as_posix()


def _budget(text: str, resource: str) -> dict[str, Any]:
    """Returns the parameters ``budget`` and ``resource``. A unit of memory or of time decides the resource."""
    try:
        budget = YAML().load(text)
    except YAMLError as error:
        raise UserError(f"--budget {text!r} is not an amount; write it like 305M, 20MB, 4.5ms or 50%") from error
    if isinstance(budget, dict):
        return {"budget": budget, "resource": resource if resource in budget else next(iter(budget), resource)}
    fits = [each for each in (resource, "memory", "latency") if _is_amount(budget, each)]
    return {"budget": budget, "resource": fits[0] if fits else resource}


def _is_amount(budget: Any, resource: str) -> bool:
    from autoslim.resources.budgets import parse_budgets

    try:
        parse_budgets(budget, resource)
    except ValueError:
        return False
    return True


def _check_choices(params: Params, choices: Choices) -> None:
    check_source(params.data.source)
    find_task(params.task)
    find_constructor(params.model.name)
    if params.model.weights is None:
        return
    try:
        check_weights(params.model.name, params.model.weights)
    except UserError as error:
        if choices.preset is None or choices.model is None or choices.weights is not None:
            raise
        raise UserError(
            f"--preset {choices.preset} starts from trained weights, and {params.model.name!r} has no weights "
            f"{params.model.weights!r}; name the file of yours with --weights"
        ) from error


def _without_distillation(text: str) -> str:
    """Returns the parameters for a task without a distillation loss."""
    values = parsed(text)
    values["supernet"]["distillation"] = False
    values["retrain"]["teacher"] = None
    return dumped(values)


def _pipeline(params: Params) -> str:
    """Returns a ``dvc.yaml`` with the files that ``params`` name among the deps of the stages that read them."""
    values = parsed(_template("pipeline.yaml"))
    for file in own_files(params):
        for name in file.readers:
            stage = values["stages"][name]
            stage = stage.get("do", stage)
            if "deps" not in stage:
                deps = CommentedSeq()
                deps.fa.set_flow_style()
                stage.insert(list(stage).index("cmd") + 1, "deps", deps)
            if file.path not in stage["deps"]:
                stage["deps"].append(file.path)
    return dumped(values)


def _init_dvc(git: Path) -> list[str]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    ignore_file_exists = Path(".dvcignore").exists()
    logger = logging.getLogger("dvc")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it would print that the repository was made
    try:
        with Repo.init(str(Path.cwd()), subdir=git != Path.cwd()) as repo, repo.config.edit("repo") as config:
            config["core"]["analytics"] = False  # dvc sends usage statistics otherwise
    except DvcException as error:
        raise UserError(f"`dvc init` failed: {error}; correct this and run `autoslim init` again") from error
    finally:
        logger.setLevel(level)
    return [".dvc", *([] if ignore_file_exists else [".dvcignore"])]


def _ignore() -> bool:
    """Adds the lines that ``.gitignore`` lacks, and returns whether there were any."""
    text = IGNORED.read_text(encoding="utf-8") if IGNORED.exists() else ""
    comment, *patterns = _template("gitignore").splitlines()
    missing = [pattern for pattern in patterns if pattern not in text.splitlines()]
    if missing:
        separator = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        write_bytes(IGNORED, "\n".join([text + separator + comment, *missing, ""]).encode())
    return bool(missing)
