"""What configurations cost under the parameters: budgets as limits, the search's objective, latency tables."""

import dataclasses
import json
from pathlib import Path

from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.errors import UserError, first_line
from autoslim.pipeline.assembly import checkpoints, model_files, span
from autoslim.pipeline.params import Latency, Params
from autoslim.pipeline.project import RESOURCES
from autoslim.resources.costs import Costs, Objective
from autoslim.resources.latency.backends import check_runtime
from autoslim.resources.latency.measure import current_target, measure_table
from autoslim.resources.latency.table import LatencyTable, Target
from autoslim.training.checkpoints import read_json, write_json
from autoslim.training.device import select_device


def load_costs(graph: ChannelGraph) -> Costs:
    """What configurations take; of latency, where the stage ``resources`` wrote a table.

    Raises:
        UserError: the stage has not run, or the table is of another network.
    """
    path = _written(RESOURCES / "latency.json")
    values = read_json(path, "resources")
    return Costs(graph, LatencyTable.from_dict(values, str(path)) if values else None)


def load_objective(costs: Costs) -> Objective:
    """What the search lowers, as the stage ``resources`` wrote it.

    Raises:
        UserError: the stage has not run.
    """
    values = read_json(_written(RESOURCES / "objective.json"), "resources")
    return Objective(costs, values["resource"], values["limits"])


def budget_limits(params: Params, costs: Costs) -> dict[str, float]:
    """The budgets in their resources' units.

    Raises:
        UserError: a share of the default network's latency is asked for, and there is no table.
    """
    default = costs.graph.default
    return {
        resource: budget.amount * costs.of(default, resource) if budget.relative else budget.amount
        for resource, budget in params.budgets.items()
    }


def objective(params: Params, costs: Costs) -> Objective:
    """One resource, whatever its budget: a search serves all of them. Several limits: what binds depends on them."""
    several = len(params.budgets) > 1
    return Objective(costs, params.resource, budget_limits(params, costs) if several else {})


def _written(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"there is no {path}; run `dvc repro resources`")
    return path


def latency_target(asked: Latency) -> Target:
    """The machine at hand, as latency is to be measured on it.

    Raises:
        UserError: the device is not there, or the runtime is not installed or does not go with the rest.
    """
    device = "cpu" if asked.runtime == "onnxruntime" and asked.device == "auto" else asked.device
    check_runtime(asked.runtime, device, asked.precision, asked.channels_last)
    return current_target(
        device=select_device(device, parameter="latency.device"),
        runtime=asked.runtime,
        threads=asked.threads,
        batch=asked.batch,
        precision=asked.precision,
        channels_last=asked.channels_last,
    )


def report_target(asked: Latency, table: LatencyTable | None) -> Target:
    """What networks are measured on for the report: as the table was, where that was here; else as ``asked``.

    Raises:
        UserError: see ``latency_target``.
    """
    here = latency_target(asked)
    if table is None or table.target.machine != here.machine:
        return here
    settings = ("runtime", "threads", "batch", "precision", "channels_last")
    return latency_target(asked.model_copy(update={name: getattr(table.target, name) for name in settings}))


def measured_table(params: Params, network: nn.Module, graph: ChannelGraph, *, anew: bool = False) -> LatencyTable:
    """The network's latency table on the machine at hand: measured now, or as it was measured here before.

    One whose predictions are not to be trusted is handed back, and not kept.

    Args:
        anew: measure again what was measured before; a measurement that was interrupted goes on all the same.

    Raises:
        UserError: it cannot be measured.
    """
    asked, target = params.latency, latency_target(params.latency)
    grid = span(params.supernet).grid(graph)
    sizes = {
        "grid": grid,
        "input": graph.input_shape,
        "params": graph.params(),  # which tell the number of classes
        "points": asked.points,
        "check_networks": asked.check_networks,
    }
    kept = checkpoints(
        "latency",
        *model_files(params.model),
        model=params.model.model_dump(),
        target=dataclasses.asdict(target),
        sizes=sizes,
    )
    path = kept.folder / "table.json"
    with kept.lock():
        if anew and path.exists():
            kept.clear()
        if path.exists():
            return read_table(path)
        table = measure_table(
            network,
            graph,
            grid,
            target,
            name=params.model.name,
            points=asked.points,
            checked_on=asked.check_networks,
            kept=kept.folder / "kernels.json",
        )
        if table.trusted:
            write_json(path, table.to_dict())
        else:  # not worth going on from: all of it is measured again
            kept.clear()
    return table


def read_table(path: Path) -> LatencyTable:
    """A latency table from a file.

    Raises:
        UserError: there is none, or it is no such file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"there is no latency table at {path}; make one with `autoslim latency measure --to {path}`, "
            "or set latency.table to null"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is no latency table ({first_line(error)}); make one with `autoslim latency measure`"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no latency table; make one with `autoslim latency measure`")
    return LatencyTable.from_dict(values, str(path))
