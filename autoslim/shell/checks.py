"""Checks of the parameters against the network and the data. They say no or nothing: no number depends on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from autoslim.engine.artifacts import Allocation
from autoslim.engine.data import DataInfo
from autoslim.networks.building import find_constructor
from autoslim.networks.fitting import check_covered
from autoslim.networks.graph import ChannelGraph
from autoslim.networks.pretrained import check_weights, weights_file
from autoslim.networks.released import released_method
from autoslim.shell.assembly import budget_limit, span, starting_network, traced_network
from autoslim.shell.params import Model, Params, read_yaml
from autoslim.vocabulary.budgets import format_amount
from autoslim.vocabulary.errors import UserError


@dataclass(frozen=True)
class Reach:
    """Costs in the resource's unit: of the subnets that bound the supernet, of the default network, and the budget."""

    resource: str
    narrowest: int
    widest: int
    default: int
    stop: float  # where the search ends
    budget: float


def check_pipeline(params: Params, info: DataInfo) -> None:
    """The network fits the data, and the budget and trained weights the network.

    Raises:
        UserError: they do not.
    """
    network, graph = traced_network(params.model, info)
    check_reach(params, graph)
    starting_network(params.model, params.supernet, network, graph)
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
        _check_watched("model.name", place, ("supernet", "search", "allocate", "retrain", "report"))
    if model.weights is not None:
        check_weights(model.name, model.weights)
        if weights_file(model.weights):
            _check_watched("model.weights", model.weights, ("supernet",))


def check_reach(params: Params, graph: ChannelGraph) -> Reach:
    """The budget lies where the search can go, and released lists and trained weights go as far as they are asked to.

    Raises:
        UserError: they are not, or there is nothing to slim, or the budget is above the widest subnet, below the
            narrowest, or below where the search stops.
    """
    _check_groups(params.model.name, graph)
    for method in params.methods:
        if listed := released_method(method):
            listed.channels(graph)
    if params.model.weights is not None:
        check_covered(graph, graph.scaled(params.supernet.width, params.supernet.grid.divisor))
    reach = measure_reach(params, graph)

    def amount(value: float) -> str:
        return format_amount(value, reach.resource)

    unit = {"macs": "MACs", "params": "parameters"}[reach.resource]
    budget = str(params.budget)
    written = budget if amount(reach.budget) == budget else f"{budget} ({amount(reach.budget)} {unit})"
    bounds = (
        f"the supernet spans {amount(reach.narrowest)} to {amount(reach.widest)} {unit}, "
        f"the default network takes {amount(reach.default)}"
    )
    if reach.budget > reach.widest:
        raise UserError(f"budget {written} is above the widest subnet; {bounds}: lower budget or raise supernet.width")
    if reach.budget < reach.narrowest:
        raise UserError(
            f"budget {written} is below the narrowest subnet; {bounds}: raise budget or lower supernet.grid.narrowest"
        )
    if reach.budget < reach.stop:
        raise UserError(
            f"budget {written} is below {amount(reach.stop)}, where the search stops; {bounds}: "
            f"raise budget or lower search.stop ({params.search.stop})"
        )
    return reach


def measure_reach(params: Params, graph: ChannelGraph) -> Reach:
    levels = span(params.supernet).grid(graph)
    default = graph.cost(graph.default, params.resource)
    return Reach(
        resource=params.resource,
        narrowest=graph.cost({name: options[-1] for name, options in levels.items()}, params.resource),
        widest=graph.cost({name: options[0] for name, options in levels.items()}, params.resource),
        default=default,
        stop=params.search.stop * default,
        budget=budget_limit(params, graph),
    )


def check_trajectory(trajectory: dict[str, Any], path: Path, params: Params, graph: ChannelGraph) -> None:
    """The trajectory is of this network and of the resource that the budget bounds.

    Raises:
        UserError: it is not.
    """
    if trajectory["default"]["channels"] != graph.default:
        raise UserError(
            f"{path} is of another network (default {format_amount(trajectory['default']['macs'])} MACs) than "
            f"model.name {params.model.name!r} ({format_amount(graph.macs())} MACs); run `dvc repro search`"
        )
    if trajectory["resource"] != params.resource:
        raise UserError(
            f"{path} was searched for {trajectory['resource']}, but resource is {params.resource}; "
            "run `dvc repro search`"
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


def _check_groups(name: str, graph: ChannelGraph) -> None:
    if not graph.groups:
        layer, reason = next(iter(graph.fixed.items()), ("every layer", "it has no convolution or linear layer"))
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
