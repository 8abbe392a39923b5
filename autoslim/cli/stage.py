"""``autoslim stage``: runs one stage of the pipeline. ``dvc repro`` calls it in projects made by ``autoslim init``."""

import inspect
from importlib import import_module
from typing import Annotated

import typer

from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import STAGES, enter_project


def stage_cli(
    name: Annotated[str, typer.Argument(help=", ".join(STAGES[:-1]) + f" or {STAGES[-1]}.")],
    method: Annotated[
        str | None, typer.Argument(help="For retrain: default, uniform, autoslim or released/NAME.")
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the full traceback of an error.")] = False,
) -> None:
    """Run one stage of the pipeline, as `dvc repro` does. Use `dvc repro` to produce results.

    Called directly, the command runs the stage on the existing files, without checking that they are up to date. DVC
    does not record the run: if the outputs change, the next `dvc repro` runs the stage again.

    Examples:

    autoslim stage search

    autoslim stage retrain autoslim --traceback
    """
    (run_stage if traceback else with_clear_errors(run_stage))(name, method)


def run_stage(name: str, method: str | None) -> None:
    """Runs the stage ``name`` in this process.

    Raises:
        UserError: There is no such stage, a method is required but missing, or the stage does not accept one; or the
            project's ``autoslim.lock`` has other code.
    """
    if name not in STAGES:
        raise UserError(f"there is no stage {name!r}; stages are {', '.join(STAGES)}")
    enter_project()
    from autoslim.pipeline.code_lock import check_lock  # imports torch
    from autoslim.pipeline.times import timed

    check_lock([name])
    run = import_module(f"autoslim.pipeline.{name}").run
    needs_method = bool(inspect.signature(run).parameters)
    if needs_method and method is None:
        raise UserError(f"stage {name} needs a method; write `autoslim stage {name} autoslim`")
    if method is not None and not needs_method:
        raise UserError(f"stage {name} does not accept a method, but {method!r} was passed; omit it")
    timed(run, *([method] if method is not None else []))
