"""Checks of the parameters against the network and the data. They say no or nothing: no number depends on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.channels.resize import resize
from autoslim.data.prepared import DataInfo
from autoslim.errors import UserError
from autoslim.models.building import find_constructor
from autoslim.models.pretrained import check_covered, check_weights, weights_file
from autoslim.models.released import released_method
from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.assembly import initial_network, span, traced_network
from autoslim.pipeline.costs import latency_target
from autoslim.pipeline.params import Model, Params, read_yaml
from autoslim.pipeline.project import RESOURCES
from autoslim.resources.budgets import format_amount, format_named_amount
from autoslim.resources.costs import Costs
from autoslim.resources.latency.backends import prepared
from autoslim.resources.latency.kernels import find_kernels
from autoslim.resources.latency.table import LatencyTable, Target


@dataclass(frozen=True)
class Reach:
    """Costs in the resource's unit: of the subnets that bound the supernet, of the default network, and the budget."""

    resource: str
    narrowest: float
    widest: float
    default: float
    stop: float  # where the search ends
    budget: float
    written: str  # the budget, as people write it
    several: bool  # there are budgets of other resources beside it

    def amount(self, value: float) -> str:
        return format_named_amount(value, self.resource)

    def bounds(self) -> str:
        return (
            f"the supernet spans {format_amount(self.narrowest, self.resource)} to {self.amount(self.widest)}, "
            f"the default network takes {format_amount(self.default, self.resource)}"
        )

    def asked(self) -> str:
        """The budget as written, with its value where that is written otherwise."""
        told = f"budget.{self.resource} {self.written}" if self.several else f"budget {self.written}"
        if format_amount(self.budget, self.resource) == self.written:
            return told
        return f"{told} ({self.amount(self.budget)})"


def check_pipeline(params: Params, info: DataInfo) -> None:
    """The network fits the data, and the budget and trained weights the network.

    Raises:
        UserError: they do not.
    """
    check_smoothing(params, info)
    network, graph = traced_network(params.model, info)
    check_reach(params, graph)
    initial_network(params.model, params.supernet, network, graph)


def check_smoothing(params: Params, info: DataInfo) -> None:
    """Label smoothing suits the number of classes.

    Raises:
        UserError: it makes another class as likely as the label.
    """
    most = 1 - 1 / len(info.classes)
    for stage, smoothing in (
        ("supernet", params.supernet.label_smoothing),
        ("retrain", params.retrain.label_smoothing),
    ):
        if smoothing > most:
            raise UserError(
                f"{stage}.label_smoothing is {smoothing}; with {len(info.classes)} classes at most {most:.3g} leaves "
                "the label more likely than the others: lower it"
            )


def check_model(model: Model) -> None:
    """What can be known of the network before there are data: it and its weights exist, and DVC watches their files.

    Raises:
        UserError: there is no such callable, or no such weights, or the deps of a stage that uses a file lack it.
    """
    find_constructor(model.name)
    place = model.name.rpartition(":")[0]
    if place.endswith(".py"):
        _check_watched("model.name", place, ("resources", "supernet", "search", "allocate", "retrain", "report"))
    if model.weights is not None:
        check_weights(model.name, model.weights)
        if weights_file(model.weights):
            _check_watched("model.weights", model.weights, ("supernet",))


def check_table(table: str) -> None:
    """The latency table's file is there, and DVC watches it.

    Raises:
        UserError: it is not, or DVC does not.
    """
    if not Path(table).is_file():
        raise UserError(
            f"latency.table {table!r} is not there; make it with `autoslim latency measure --to {table}` on the "
            "machine that is to run the network, or set latency.table to null"
        )
    _check_watched("latency.table", table, ("resources",))


def check_kernels(
    table: LatencyTable, network: nn.Module, graph: ChannelGraph, grid: Mapping[str, Sequence[int]]
) -> None:
    """The latency table was measured with this network's kernels, over all of the search's channel numbers.

    Raises:
        UserError: it was not (the same groups may do other work), or the network has none.
    """
    Costs(graph, table)
    here = {kernel.name: kernel.work for kernel in find_kernels(network, graph, table.target.batch)}
    there = {name: times.work for name, times in table.kernels.items()}
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            raise UserError(
                f"the latency table is of another network ({table.network}) than this one: at {name} it has "
                f"{there.get(name, 'nothing')}, and this one {here.get(name, 'nothing')}; measure this one with "
                "`autoslim latency measure`"
            )
    for times in table.kernels.values():
        for groups, sizes in ((times.inputs, times.input_sizes), (times.outputs, times.output_sizes)):
            low, high = (sum(grid[group][end] for group in groups) for end in (-1, 0))
            if not sizes[0] <= low <= high <= sizes[-1]:
                raise UserError(
                    f"the latency table was measured at {sizes[0]} to {sizes[-1]} channels of {' and '.join(groups)}, "
                    f"and the search goes from {low} to {high}; measure it again with `autoslim latency measure`, or "
                    "set supernet.width and supernet.grid as they were"
                )


def check_runs(network: nn.Module, graph: ChannelGraph, target: Target) -> None:
    """The runtime can run the network, which the report is to measure in it.

    Raises:
        UserError: it cannot.
    """
    prepared(resize(network, graph, graph.default), [torch.ones(target.batch, *graph.input_shape)], target)


def check_reliable(table: LatencyTable) -> None:
    """Raises:
    UserError: the table's predictions do not rank networks as their measured times do.
    """
    if not table.trusted:
        raise UserError(
            f"{table.summary()}. Leave the machine to it and run `dvc repro resources` again; to search by such a "
            "table all the same, write it with `autoslim latency measure --to FILE`, and name FILE in latency.table"
        )


def check_measured_here(params: Params, table: LatencyTable | None) -> None:
    """Latencies are those of the machine at hand where the parameters name no table: others' outputs may lie here.

    Raises:
        UserError: they are of another machine.
    """
    if table is None or params.latency.table is not None:
        return
    machine = latency_target(params.latency).machine
    if table.target.machine != machine:
        raise UserError(
            f"latency.table is null, but {RESOURCES}/latency.json was measured on {table.target.machine}, and this is "
            f"{machine}; measure this one with `dvc repro --force --single-item resources`, or keep those latencies: "
            "copy the file to another place, and name it in latency.table"
        )


def check_reach(params: Params, graph: ChannelGraph, table: LatencyTable | None = None) -> list[Reach]:
    """Each budget lies where the search can go, and released lists and trained weights go as far as they are asked to.

    A budget of latency is passed over as long as there is no table.

    Raises:
        UserError: they are not, or there is nothing to slim, or a budget is above the widest subnet, below the
            narrowest, or below where the search stops.
    """
    check_groups(params.model.name, graph)
    for method in params.methods:
        if listed := released_method(method):
            _check_held(method, listed.channels(graph), params, graph)
    if params.model.weights is not None:
        check_covered(graph, graph.scaled(params.supernet.width, params.supernet.grid.divisor))
    reaches = measure_reach(params, Costs(graph, table))
    for reach in reaches:
        if reach.budget < reach.narrowest:
            raise UserError(
                f"{reach.asked()} is below the narrowest subnet; {reach.bounds()}: "
                "raise budget or lower supernet.grid.narrowest"
            )
        if reach.budget < reach.stop and len(params.budgets) == 1:
            raise UserError(
                f"{reach.asked()} is below {format_amount(reach.stop, reach.resource)}, where the search stops; "
                f"{reach.bounds()}: raise budget or lower search.stop ({params.search.stop})"
            )
    if reaches and len(reaches) == len(params.budgets) and all(reach.budget > reach.widest for reach in reaches):
        raise UserError(
            f"{reaches[0].asked()} is above the widest subnet; {reaches[0].bounds()}: "
            "lower budget or raise supernet.width"
        )
    return reaches


def _check_held(method: str, channels: Channels, params: Params, graph: ChannelGraph) -> None:
    """Raises:
    UserError: retraining is to start from the supernet's weights, and the supernet has not as many channels.
    """
    if params.retrain.start == "scratch":
        return
    for name, levels in span(params.supernet).grid(graph).items():
        if channels[name] > levels[0]:
            raise UserError(
                f"retrain.start is supernet, but method {method} has {channels[name]} channels at {name}, and the "
                f"supernet {levels[0]}; set retrain.start to scratch, or raise supernet.width"
            )


def measure_reach(params: Params, costs: Costs) -> list[Reach]:
    """For each budget whose resource is known."""
    levels = span(params.supernet).grid(costs.graph)
    reaches = []
    for resource, budget in params.budgets.items():
        if resource == "latency" and costs.table is None:
            continue
        default = costs.of(costs.graph.default, resource)
        reaches.append(
            Reach(
                resource=resource,
                narrowest=costs.of({name: options[-1] for name, options in levels.items()}, resource),
                widest=costs.of({name: options[0] for name, options in levels.items()}, resource),
                default=default,
                stop=params.search.stop * default,
                budget=budget.absolute(default),
                written=budget.text,
                several=len(params.budgets) > 1,
            )
        )
    return reaches


def check_trajectory(trajectory: dict[str, Any], path: Path, params: Params, graph: ChannelGraph) -> None:
    """The trajectory is of this network.

    Raises:
        UserError: it is not.
    """
    if trajectory["default"]["channels"] != graph.default:
        raise UserError(
            f"{path} is of another network (default {format_amount(trajectory['default']['macs'])} MACs) than "
            f"model.name {params.model.name!r} ({format_amount(graph.macs())} MACs); run `dvc repro search`"
        )


def check_allocation(chosen: Allocation, params: Params, graph: ChannelGraph) -> None:
    """The channels are of this network.

    Raises:
        UserError: they are not.
    """
    if chosen.channels.keys() != graph.groups.keys():
        raise UserError(
            f"the channels of method {chosen.method} are of another network ({len(chosen.channels)} groups) than "
            f"model.name {params.model.name!r} ({len(graph.groups)} groups); run `dvc repro allocate`"
        )
    graph.check(chosen.channels)


def check_groups(name: str, graph: ChannelGraph) -> None:
    """Raises:
    UserError: there is nothing to slim.
    """
    if not graph.groups:
        layer, reason = next(iter(graph.not_prunable.items()), ("every layer", "it has no convolution or linear layer"))
        raise UserError(
            f"model.name {name!r} has no channels that can be slimmed ({layer}: {reason}); "
            "`autoslim profile` lists the reason for each layer; choose another network or mend these"
        )


def _check_watched(parameter: str, file: str, users: Sequence[str]) -> None:
    """``file``, or a folder that holds it, is among the deps of the stages that use it."""
    stages = read_yaml(Path("dvc.yaml"))["stages"]
    watchers = {str(PurePath(file)), *map(str, PurePath(file).parents)}
    deps = {name: stages[name].get("do", stages[name])["deps"] for name in users}
    blind = [name for name in users if not any(str(PurePath(str(dep))) in watchers for dep in deps[name])]
    if blind:
        raise UserError(
            f"{parameter} is the file {file}, which DVC does not watch: a change of it would not rerun "
            f"{', '.join(blind)}; add '- {file}' to {'their' if len(blind) > 1 else 'its'} deps in dvc.yaml"
        )
