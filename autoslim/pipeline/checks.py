"""Checks of the parameters against the network and the data. They raise or pass, and never change a result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.channels.resize import check_memory, resize
from autoslim.channels.sort import check_batch_norms
from autoslim.data.prepare import check_source
from autoslim.data.prepared import DataInfo
from autoslim.data.random_transforms import check_mixing
from autoslim.errors import UserError
from autoslim.models.building import find_constructor
from autoslim.models.pretrained import check_covered, check_weights, weights_file
from autoslim.models.released import released_method
from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.assembly import (
    grid_spec,
    initial_network,
    inputs_of,
    recipe,
    teacher_network,
    traced_network,
)
from autoslim.pipeline.costs import latency_target
from autoslim.pipeline.params import Data, Model, Params, Search, Training, read_yaml
from autoslim.pipeline.project import RESOURCES, STAGES, check_trajectory_format
from autoslim.resources.budgets import format_amount, format_named_amount
from autoslim.resources.costs import Costs
from autoslim.resources.latency.backends import prepare_forward
from autoslim.resources.latency.kernels import find_kernels
from autoslim.resources.latency.table import LatencyTable, Target
from autoslim.search.methods import need_supernet
from autoslim.tasks.building import can_smooth_labels, find_task, has_distillation
from autoslim.tasks.task import Task
from autoslim.user_code import file_of


@dataclass(frozen=True)
class Reach:
    """The range of a resource that the search covers, in the resource's unit, and the budget."""

    resource: str
    narrowest: float
    widest: float
    default: float
    stop: float  # where the search ends
    budget: float
    written: str  # the budget as the user wrote it
    several: bool  # whether there are budgets of other resources too

    def amount(self, value: float) -> str:
        return format_named_amount(value, self.resource)

    def span(self) -> str:
        return (
            f"the supernet spans {format_amount(self.narrowest, self.resource)} to {self.amount(self.widest)}, "
            f"and the default network has {format_amount(self.default, self.resource)}"
        )

    def requested(self) -> str:
        """Returns the budget as written, followed by its absolute value if that differs."""
        text = f"budget.{self.resource} {self.written}" if self.several else f"budget {self.written}"
        if format_amount(self.budget, self.resource) == self.written:
            return text
        return f"{text} ({self.amount(self.budget)})"


@dataclass(frozen=True)
class OwnFile:
    """A file of the user's that a parameter names, with the stages that read it."""

    parameter: str
    path: str
    readers: Sequence[str]


def check_pipeline(params: Params, info: DataInfo) -> None:
    """Raises ``UserError`` if the network does not fit the data, the budget or the trained weights."""
    task = find_task(params.task)
    check_task(params, info, task)
    network, graph = traced_network(params.model, info, task)
    check_reach(params, graph)
    initial = initial_network(params.model, params.supernet, network, graph)
    check_methods(params, network, graph, initial.new)
    check_teacher(params, network, graph)


def size_notes(params: Params, info: DataInfo) -> list[str]:
    """Returns a note for each number of images that is too large for the data. The stages lower it to what there is."""
    notes = (
        search_images_note(params.data, info),
        batch_note("supernet", params.supernet, info),
        search_note(params.search, info),
        batch_note("retrain", params.retrain, info),
    )
    return [note for note in notes if note]


def search_images_note(data: Data, info: DataInfo) -> str:
    """Returns a note if more search images were asked for than could be held out; else ""."""
    count = info.counts["search"]
    if data.search_images <= count:
        return ""
    return f"data.search_images is {data.search_images}, but only {count} images could be held out: they are used"


def batch_note(section: str, training: Training, info: DataInfo) -> str:
    """Returns a note if a batch is larger than the train split, which then is one batch; else ""."""
    count = info.counts["train"]
    if training.batch_size <= count:
        return ""
    return (
        f"{section}.batch_size is {training.batch_size}, but there are {count} training images: each step uses all of "
        "them, and an epoch has one step"
    )


def search_note(search: Search, info: DataInfo) -> str:
    """Returns a note if fewer images than a chunk are scored, which then are one chunk; else ""."""
    count = min(search.images, info.counts["search"])
    if search.chunk <= count:
        return ""
    return f"search.chunk is {search.chunk}, but {count} images are scored: they are one chunk"


def check_task(params: Params, info: DataInfo, task: Task) -> None:
    """Checks that the parameters have a meaning for the task.

    Raises:
        UserError: the score or the losses are none of the task's, the labels cannot be mixed, or label smoothing gives
            another class a higher probability than the label.
    """
    check_score(params, task)
    for name, used, off in (
        ("supernet.distillation", params.supernet.distillation, "false"),
        ("retrain.teacher", params.retrain.teacher, "null"),
    ):
        if used and not has_distillation(task):
            raise UserError(
                f"{name} is {str(used).lower()}, but task {params.task} has no distillation loss; define its method "
                f"distillation, or set {name} to {off}"
            )
    for stage, training in (("supernet", params.supernet), ("retrain", params.retrain)):
        classes = len(info.classes) if task.smooths_labels else 0
        check_mixing(recipe(training).augmentation, classes, f"{stage}.augment")
    if can_smooth_labels(task):
        _check_smoothing(params, info)
        return
    for stage, smoothing in (
        ("supernet", params.supernet.label_smoothing),
        ("retrain", params.retrain.label_smoothing),
    ):
        if smoothing:
            raise UserError(
                f"{stage}.label_smoothing is {smoothing}, which has no meaning for task {params.task}; set it to 0.0"
                + (", or define its method smoothed_loss" if task.smooths_labels else "")
            )


def check_score(params: Params, task: Task) -> None:
    """Raises ``UserError`` if ``search.score`` is not one of the task's."""
    if params.search.score not in ("error", "loss", task.loss_name):
        raise UserError(
            f"search.score is {params.search.score}, but the scores of task {params.task} are error "
            f"({task.score.title}) and loss ({task.loss_name}); set search.score to one of these"
        )


def _check_smoothing(params: Params, info: DataInfo) -> None:
    classes = info.outputs or len(info.classes)
    maximum = 1 - 1 / max(1, classes)
    for stage, smoothing in (
        ("supernet", params.supernet.label_smoothing),
        ("retrain", params.retrain.label_smoothing),
    ):
        if smoothing > maximum:
            raise UserError(
                f"{stage}.label_smoothing is {smoothing}, but with {classes} classes it must be at most "
                f"{maximum:.3g}, so that the label stays the most likely class; lower it"
            )


def check_data(data: Data, *, relative_to: Path = Path()) -> None:
    """Checks that the data source exists, and that DVC tracks the file of a function of the user's.

    Raises:
        UserError: there is no such source, or the deps of a stage lack the file.
    """
    check_source(data.source, relative_to=relative_to)
    for own in _data_files(data):
        _check_tracked(own)


def check_task_source(task: str) -> None:
    """Checks that the task exists, and that DVC tracks the file of a class of the user's. This needs no data.

    Raises:
        UserError: there is no such task, or the deps of a stage lack the file.
    """
    find_task(task)
    for own in _task_files(task):
        _check_tracked(own)


def check_model(model: Model) -> None:
    """Checks that the network and its weights exist, and that DVC tracks their files. This needs no data.

    Raises:
        UserError: there is no such callable, there are no such weights, or the deps of a stage lack one of the files.
    """
    find_constructor(model.name)
    if model.weights is not None:
        check_weights(model.name, model.weights)
    for own in _model_files(model):
        _check_tracked(own)


def check_teacher(params: Params, network: nn.Module, graph: ChannelGraph) -> None:
    """Raises ``UserError`` if ``model.weights`` cannot teach, or if the deps of ``retrain`` lack their file."""
    check_teacher_file(params)
    teacher_network(params, network, graph)


def check_teacher_file(params: Params) -> None:
    """Raises ``UserError`` if the deps of ``retrain`` lack the file with the teacher's weights."""
    for own in _teacher_files(params):
        _check_tracked(own)


def check_table(table: str) -> None:
    """Raises ``UserError`` if the latency table's file does not exist, or if DVC does not track it."""
    if not Path(table).is_file():
        raise UserError(
            f"latency.table {table!r} does not exist; make it with `autoslim latency measure --to {table}` on the "
            "machine that will run the network, or set latency.table to null"
        )
    _check_tracked(_table_file(table))


def check_kernels(
    table: LatencyTable, network: nn.Module, graph: ChannelGraph, grid: Mapping[str, Sequence[int]]
) -> None:
    """Checks that the table covers this network's kernels and all numbers of channels of the search.

    The graph's groups alone do not show this, because groups with the same names may belong to other layers.

    Raises:
        UserError: the table does not cover them, or the network cannot be split into kernels.
    """
    Costs(graph, table)
    expected = {kernel.name: kernel.work for kernel in find_kernels(network, graph, table.target.batch)}
    measured = {name: times.work for name, times in table.kernels.items()}
    for name in (*expected, *measured):
        if expected.get(name) != measured.get(name):
            raise UserError(
                f"the latency table belongs to another network ({table.network}): at {name} it has "
                f"{measured.get(name, 'nothing')}, this network {expected.get(name, 'nothing')}; measure this network "
                "with `autoslim latency measure`"
            )
    for times in table.kernels.values():
        for groups, sizes in ((times.inputs, times.input_sizes), (times.outputs, times.output_sizes)):
            low, high = (sum(grid[group][end] for group in groups) for end in (-1, 0))
            if not sizes[0] <= low <= high <= sizes[-1]:
                raise UserError(
                    f"the latency table was measured at {sizes[0]} to {sizes[-1]} channels of {' and '.join(groups)}, "
                    f"but the search needs {low} to {high}; measure it again with `autoslim latency measure`, or "
                    "restore supernet.width and supernet.grid"
                )


def check_runs(network: nn.Module, graph: ChannelGraph, info: DataInfo, target: Target) -> None:
    """Raises ``UserError`` if the backend that the report uses to measure latency cannot run the network."""
    prepare_forward(resize(network, graph, graph.default), inputs_of(network, info).ones(target.batch), target)


def check_reliable(table: LatencyTable) -> None:
    """Raises ``UserError`` if the table's predictions and the measured latencies do not agree in rank."""
    if not table.reliable:
        raise UserError(
            f"{table.summary()}. Stop other work on this machine and run `dvc repro resources` again. To use such a "
            "table anyway, write it with `autoslim latency measure --to FILE`, and set latency.table to FILE"
        )


def check_measured_here(params: Params, table: LatencyTable | None) -> None:
    """Checks that latencies were measured on this machine, unless ``latency.table`` is set.

    Raises:
        UserError: they were measured on another machine; DVC may have pulled that machine's outputs.
    """
    if table is None or params.latency.table is not None:
        return
    machine = latency_target(params.latency).machine
    if table.target.machine != machine:
        raise UserError(
            f"latency.table is null, but {RESOURCES}/latency.json was measured on {table.target.machine}, not on this "
            f"machine ({machine}); measure again with `dvc repro --force --single-item resources`, or keep the "
            "latencies: copy the file and set latency.table to the copy"
        )


def check_methods(params: Params, network: nn.Module, graph: ChannelGraph, new: Sequence[str] | None = None) -> None:
    """Checks that the methods that prune a trained network can prune this one, before anything is trained.

    Args:
        new: the layers that ``model.weights`` leave with random weights; None: look for them, if it matters.

    Raises:
        UserError: ``bn_scale`` has no batch norms to compare, or ``taylor`` or ``sensitivity`` would score a network
            whose weights are for other classes.
    """
    if "bn_scale" in params.methods:
        check_batch_norms(network, graph)
    scored = [method for method in ("taylor", "sensitivity") if method in params.methods]
    if scored and new is None:
        new = initial_network(params.model, params.supernet, network, graph).new
    if scored and new:
        raise UserError(
            f"method {scored[0]} scores the trained network on the data, but model.weights "
            f"{params.model.weights!r} are for other classes: {', '.join(new)} would have random weights; use weights "
            "that were trained for these classes, or methods l1 or bn_scale"
        )


def check_reach(params: Params, graph: ChannelGraph, table: LatencyTable | None = None) -> list[Reach]:
    """Checks that the methods can reach each budget, and that released lists and trained weights fit the supernet.

    A latency budget is not checked without a table.

    Raises:
        UserError: no group can be slimmed; a budget is above the widest subnet, below the narrowest, or below the end
            of the search; a list or trained weights do not fit; or the supernet needs more memory than is free.
    """
    check_groups(params.model.name, graph)
    for method in params.methods:
        if listed := released_method(method):
            _check_listed(method, listed.channels(graph), params, graph)
    width = params.supernet.width
    check_memory(
        graph,
        graph.grid(grid_spec(params.supernet)).widest,
        torch.device("cpu"),  # on which every network is built
        name=f"supernet.width is {width}, and the supernet",
        remedy="lower supernet.width, or the number of channels of model.name",
    )
    if params.model.weights is not None:
        check_covered(graph, graph.scaled(params.supernet.width, params.supernet.grid.divisor))
    reaches = measure_reach(params, Costs(graph, table))
    for reach in reaches:
        if reach.budget < reach.narrowest:
            raise UserError(
                f"{reach.requested()} is below the narrowest subnet; {reach.span()}: "
                "raise budget or lower supernet.grid.narrowest"
            )
        if reach.budget < reach.stop and len(params.budgets) == 1 and need_supernet(params.methods):
            raise UserError(
                f"{reach.requested()} is below {format_amount(reach.stop, reach.resource)}, the end of the search; "
                f"{reach.span()}: raise budget or lower search.stop ({params.search.stop})"
            )
    if reaches and len(reaches) == len(params.budgets) and all(reach.budget > reach.widest for reach in reaches):
        raise UserError(
            f"{reaches[0].requested()} is above the widest subnet; {reaches[0].span()}: "
            "lower budget or raise supernet.width"
        )
    return reaches


def _check_listed(method: str, channels: Channels, params: Params, graph: ChannelGraph) -> None:
    """Raises ``UserError`` if a released list is wider than the weights that retraining starts from."""
    start = params.retrain.start
    if start == "scratch" or (params.model.weights is None and not need_supernet(params.methods)):
        return
    from_supernet = start == "supernet" and need_supernet(params.methods)
    available = graph.grid(grid_spec(params.supernet)).widest if from_supernet else graph.default
    for name, maximum in available.items():
        if channels[name] > maximum:
            raise UserError(
                f"retrain.start is {start}, but method {method} has {channels[name]} channels in group {name} and "
                + (
                    f"the supernet has {maximum}; set retrain.start to scratch, or raise supernet.width"
                    if from_supernet
                    else f"model.weights have {maximum}; set retrain.start to scratch"
                )
            )


def measure_reach(params: Params, costs: Costs) -> list[Reach]:
    """Returns the range of each limited resource whose costs are known."""
    grid = costs.graph.grid(grid_spec(params.supernet))
    reaches = []
    for resource, budget in params.budgets.items():
        if resource == "latency" and costs.table is None:
            continue
        default = costs.of(costs.graph.default, resource)
        reaches.append(
            Reach(
                resource=resource,
                narrowest=costs.of(grid.narrowest, resource),
                widest=costs.of(grid.widest, resource),
                default=default,
                stop=params.search.stop * default,
                budget=budget.absolute(default),
                written=budget.text,
                several=len(params.budgets) > 1,
            )
        )
    return reaches


def check_trajectory(trajectory: dict[str, Any], path: Path, params: Params, graph: ChannelGraph) -> None:
    """Raises ``UserError`` if the trajectory belongs to another network or to another version of autoslim."""
    check_trajectory_format(trajectory)
    if trajectory["default"]["channels"] != graph.default:
        raise UserError(
            f"{path} belongs to another network (default {format_amount(trajectory['default']['macs'])} MACs) than "
            f"model.name {params.model.name!r} ({format_amount(graph.macs())} MACs); run `dvc repro search`"
        )


def check_allocation(allocation: Allocation, params: Params, graph: ChannelGraph) -> None:
    """Raises ``UserError`` if the channels belong to another network."""
    if different := allocation.channels.keys() ^ graph.groups.keys():
        raise UserError(
            f"the channels of method {allocation.method} belong to another network than model.name "
            f"{params.model.name!r}: group {min(different)} exists in only one of them; run `dvc repro allocate`"
        )
    graph.check(allocation.channels)


def check_groups(name: str, graph: ChannelGraph) -> None:
    """Raises ``UserError`` if no group can be slimmed."""
    if not graph.groups:
        layer, reason = next(iter(graph.not_prunable.items()), ("every layer", "it has no convolution or linear layer"))
        raise UserError(
            f"model.name {name!r} has no channels that can be slimmed ({layer}: {reason}); "
            "`autoslim profile` lists the reason for each layer; choose another network or change these layers"
        )


def own_files(params: Params) -> list[OwnFile]:
    """Returns the files that the parameters name and that DVC has to track."""
    tables = [] if params.latency.table is None else [_table_file(params.latency.table)]
    return [
        *_data_files(params.data),
        *_model_files(params.model),
        *_task_files(params.task),
        *_teacher_files(params),
        *tables,
    ]


def _data_files(data: Data) -> list[OwnFile]:
    readers = [stage for stage in STAGES if stage != "resources"]
    return [] if data.own_file is None else [OwnFile("data.source", data.own_file, readers)]


def _model_files(model: Model) -> list[OwnFile]:
    path = file_of(model.name)
    files = [] if path is None else [OwnFile("model.name", path, STAGES[1:])]
    if model.weights is not None and weights_file(model.weights):
        files.append(OwnFile("model.weights", model.weights, ("supernet",)))
    return files


def _task_files(task: str) -> list[OwnFile]:
    file = file_of(task)
    return [] if file is None else [OwnFile("task", file, STAGES[1:])]


def _teacher_files(params: Params) -> list[OwnFile]:
    weights = params.model.weights
    if params.retrain.teacher is None or weights is None or not weights_file(weights):
        return []
    return [OwnFile("model.weights", weights, ("retrain",))]


def _table_file(table: str) -> OwnFile:
    return OwnFile("latency.table", table, ("resources",))


def unwatched(own: OwnFile, stages: Mapping[str, Any]) -> list[str]:
    """Returns those readers of a file whose deps contain neither the file nor one of its parents.

    Args:
        stages: the stages of ``dvc.yaml``.
    """
    covering = {str(PurePath(own.path)), *map(str, PurePath(own.path).parents)}
    deps = {name: stages[name].get("do", stages[name]).get("deps", []) for name in own.readers}
    return [name for name in own.readers if not any(str(PurePath(str(dep))) in covering for dep in deps[name])]


def _check_tracked(own: OwnFile) -> None:
    """Raises ``UserError`` unless the deps of each stage that reads the file contain it or one of its parents."""
    missing = unwatched(own, read_yaml(Path("dvc.yaml"))["stages"])
    if missing:
        raise UserError(
            f"{own.parameter} is the file {own.path}, which DVC does not track: changing it would not rerun "
            f"{', '.join(missing)}; run `autoslim init --upgrade`, which adds {own.path} to "
            f"{'their' if len(missing) > 1 else 'its'} deps in dvc.yaml"
        )
