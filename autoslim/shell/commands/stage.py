"""``autoslim stage``: one stage of the pipeline, for debugging."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from autoslim.shell.commands.project import enter_project
from autoslim.shell.exits import ending_clearly
from autoslim.vocabulary.errors import UserError


def stage_cli(
    name: Annotated[str, typer.Argument(help="prepare, resources, supernet, search, allocate, retrain or report.")],
    method: Annotated[str | None, typer.Argument(help="For retrain: autoslim, uniform or released/NAME.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Do not shorten errors to one line.")] = False,
) -> None:
    """Run one stage of the pipeline by itself, to debug it. Use `dvc repro` for results.

    It calls the function that `dvc repro` calls, on the files that lie there, and asks nobody whether they are up to
    date. DVC knows nothing of it: if the outputs differ, the next `dvc repro` runs the stage again.

    Examples:

    autoslim stage search

    autoslim stage retrain autoslim --traceback
    """
    (run_stage if traceback else ending_clearly(run_stage))(name, method)


def run_stage(name: str, method: str | None) -> None:
    """Calls ``main`` of the stage's file, and lets its errors pass.

    Raises:
        UserError: there is no such stage, or it takes a method and none is given (or the other way round).
    """
    folder = enter_project() / "stages"
    stages = sorted(path.stem for path in folder.glob("*.py"))
    if name not in stages:
        raise UserError(f"there is no stage {name!r}; stages are {', '.join(stages) or f'missing in {folder}'}")
    main = inspect.unwrap(_main(folder / f"{name}.py"))
    takes_method = bool(inspect.signature(main).parameters)
    if takes_method and method is None:
        raise UserError(f"stage {name} needs a method; write `autoslim stage {name} autoslim`")
    if method is not None and not takes_method:
        raise UserError(f"stage {name} takes no method, but {method!r} is given; leave it out")
    main(*([method] if method is not None else []))


def _main(file: Path) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"stages.{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[..., Any] = module.main
    return main
