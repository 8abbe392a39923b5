"""Builds limits, the search's objective and latency tables from the parameters."""

import dataclasses
import sys
from pathlib import Path

from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.errors import UserError, first_line
from autoslim.files import parse_json, read_json, unsealed, write_sealed
from autoslim.pipeline.assembly import checkpoints, grid_spec, own_python_files
from autoslim.pipeline.params import Latency, Params
from autoslim.pipeline.project import RESOURCES
from autoslim.resources.costs import Costs, Objective
from autoslim.resources.latency.backends import OTHER_RUNTIMES, check_runtime
from autoslim.resources.latency.measure import current_target, measure_table
from autoslim.resources.latency.table import LatencyTable, Target
from autoslim.training.device import select_device

MEASURING_CODE = tuple(
    f"autoslim.resources.latency.{name}"
    for name in ("backends", "kernels", "measure", "onnx_models", "runner", "table")
)
"""The modules whose code decides what is measured and how."""


def load_costs(graph: ChannelGraph) -> Costs:
    """Returns the costs of configurations, with latency if the stage ``resources`` wrote a table.

    Raises:
        UserError: the stage has not run, or the table belongs to another network.
    """
    path = _existing(RESOURCES / "latency.json")
    values = read_json(path, "resources")
    return Costs(graph, LatencyTable.from_dict(values, str(path)) if values else None)


def load_objective(costs: Costs) -> Objective:
    """Returns the objective of the search that the stage ``resources`` wrote.

    Raises:
        UserError: the stage has not run.
    """
    path = _existing(RESOURCES / "objective.json")
    values = read_json(path, "resources")
    try:
        return Objective(costs, values["resource"], dict(values["limits"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it and run `dvc repro resources`") from error


def budget_limits(params: Params, costs: Costs) -> dict[str, float]:
    """Returns the budgets in their resources' units.

    Raises:
        UserError: a budget is a share of the default network's latency, and there is no latency table.
    """
    return costs.limits(params.budgets)


def objective(params: Params, costs: Costs) -> Objective:
    """Returns the objective of the search.

    With one resource the objective does not depend on the budget, because one search serves all budgets. With several
    limits it does, because they decide which resource is binding.
    """
    several = len(params.budgets) > 1
    return Objective(costs, params.resource, budget_limits(params, costs) if several else {})


def latency_target(latency: Latency) -> Target:
    """Returns the target of latency measurements: this machine, with the settings of ``latency``.

    Raises:
        UserError: the device does not exist, or the runtime is not installed or does not support the settings.
    """
    device = latency_device(latency)
    check_runtime(latency.runtime, device.partition(":")[0], latency.precision, latency.channels_last)
    return current_target(
        device=select_device(device, parameter="latency.device"),
        runtime=latency.runtime,
        threads=latency.threads,
        batch=latency.batch,
        precision=latency.precision,
        channels_last=latency.channels_last,
    )


def latency_device(latency: Latency) -> str:
    """Returns ``latency.device``, or the device of the runtime if it is ``auto`` and the runtime is not torch."""
    support = OTHER_RUNTIMES.get(latency.runtime)
    return support.device if support is not None and latency.device == "auto" else latency.device


def report_target(latency: Latency, table: LatencyTable | None) -> Target:
    """Returns the target of the report: the table's settings if it was measured on this machine, else ``latency``.

    Raises:
        UserError: see ``latency_target``.
    """
    default = latency_target(latency)
    if table is None or table.target.machine != default.machine:
        return default
    settings = ("runtime", "threads", "batch", "precision", "channels_last")
    return latency_target(latency.model_copy(update={name: getattr(table.target, name) for name in settings}))


def measured_table(params: Params, network: nn.Module, graph: ChannelGraph, *, anew: bool = False) -> LatencyTable:
    """Returns the network's latency table on this machine, measured now or by an earlier run.

    Tables are cached by machine, backend, network and measuring code. An unreliable table is returned but not cached.

    Args:
        anew: measure again even if there is a cached table. An interrupted measurement is continued in any case.

    Raises:
        UserError: the network cannot be measured.
    """
    latency, target = params.latency, latency_target(params.latency)
    grid = graph.grid(grid_spec(params.supernet))
    state = checkpoints(
        "latency",
        *own_python_files(params.model.name),
        code=MEASURING_CODE,
        model=params.model.model_dump(),
        target=dataclasses.asdict(target),
        sizes={
            "grid": grid,
            "input": graph.input_shape,
            "params": graph.params(),  # depends on the number of classes
            "points": latency.points,
            "check_networks": latency.check_networks,
        },
    )
    path = state.folder / "table.json"
    with state.lock():
        if anew and path.exists():
            state.clear()
        if path.exists():
            try:
                return read_table(path)
            except UserError as error:
                print(f"{first_line(error)}; measuring again", file=sys.stderr)
                state.clear()
        table = measure_table(
            network,
            graph,
            grid,
            target,
            name=params.model.name,
            points=latency.points,
            check_networks=latency.check_networks,
            cache=state.folder / "kernels.json",
        )
        if table.reliable:
            write_sealed(path, table.to_dict())
        else:  # the next run measures everything again
            state.clear()
    return table


def read_table(path: Path) -> LatencyTable:
    """Reads a latency table from a file.

    Raises:
        UserError: the file does not exist or is not a latency table.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        values = unsealed(values) if isinstance(values, dict) else values
    except OSError as error:
        raise UserError(
            f"there is no latency table at {path}; make one with `autoslim latency measure --to {path}`, "
            "or set latency.table to null"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not a latency table ({first_line(error)}); make one with `autoslim latency measure`"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a latency table; make one with `autoslim latency measure`")
    return LatencyTable.from_dict(values, str(path))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist; run `dvc repro resources`")
    return path
