"""Builds the library's objects from checked parameters."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from autoslim.channels.batches import batch_arguments
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import GridSpec
from autoslim.channels.inputs import Inputs
from autoslim.channels.limits import GroupLimits
from autoslim.channels.sort import importance_orders, permute
from autoslim.data.augmentation import Augmentation
from autoslim.data.batches import worker_count
from autoslim.data.prepared import FILE_NAME, DataInfo
from autoslim.distributed.ranks import SINGLE, World
from autoslim.errors import UserError
from autoslim.files import file_digest
from autoslim.models.building import build_network, check_network
from autoslim.models.pretrained import insert_weights, load_trained_tensors
from autoslim.pipeline import params as P
from autoslim.pipeline.checkpoint_keys import KeyedCheckpoints, code_digest, imported_modules
from autoslim.pipeline.project import repository_root
from autoslim.pipeline.tracking.tags import flattened
from autoslim.tasks.building import try_task
from autoslim.tasks.classification import CLASSIFICATION
from autoslim.tasks.task import Task
from autoslim.tracing import trace
from autoslim.training.device import RunContext, select_device
from autoslim.training.recipe import Recipe
from autoslim.user_code import file_of


def traced_network(
    model: P.Model,
    info: DataInfo,
    task: Task = CLASSIFICATION,
) -> tuple[nn.Module, ChannelGraph]:
    """Builds, checks and traces the default network for the data and the task.

    Raises:
        UserError: the network cannot be built or traced, does not fit the data or the task, or lacks a module of
            ``model.leaves`` or ``model.part``.
    """
    for argument in ("weights", "pretrained"):
        if model.kwargs.get(argument):
            raise UserError(
                f"model.kwargs.{argument} is {model.kwargs[argument]!r}, but only the supernet can start from trained "
                "weights; name them in model.weights instead"
            )
    # Parameters that keep the constructor's initialisation (see initialise) are then the same in every run.
    torch.manual_seed(0)
    network = build_network(model.name, model.kwargs, task.outputs(info))
    check_leaves(network, model.name, model.leaves)
    output = check_network(network, model.name, info, task)
    try_task(task, info, output)
    return network, trace(network, batch_arguments(info.example()), leaves=model.leaves, part=model.part or "")


def inputs_of(network: nn.Module, info: DataInfo) -> Inputs:
    """Returns the inputs of the whole network; those of the graph are the part's if only a part of it is slimmed."""
    return Inputs.of(network, batch_arguments(info.example()))


@dataclass(frozen=True)
class InitialNetwork:
    """What a supernet starts from.

    Attributes:
        network: the default network, with ``model.weights`` and sorted channels if there are any.
        trained: the default network with ``model.weights``, in the order of these; None without them.
        new: the layers that have random weights instead, because ``model.weights`` are for other classes.
        note: a line that describes all this; "" without ``model.weights``.
    """

    network: nn.Module
    trained: nn.Module | None = None
    new: tuple[str, ...] = ()
    note: str = ""


def initial_network(
    model: P.Model, supernet: P.SupernetParams, network: nn.Module, graph: ChannelGraph
) -> InitialNetwork:
    """Returns the network that a supernet starts from.

    Raises:
        UserError: ``model.weights`` cannot be loaded or belong to another network, or sorting is not possible.
    """
    if model.weights is None:
        return InitialNetwork(network)
    source = f"model.weights {model.weights!r}"
    tensors = load_trained_tensors(network, model.name, model.kwargs, model.weights)
    start, new = insert_weights(network, graph, tensors, supernet.seed, source=source)
    trained = start
    notes = [f"starts from {source}"]
    if new:
        notes.append(f"random weights for other classes in {', '.join(new)}")
    if supernet.sort is not None:
        orders = importance_orders(start, graph, supernet.sort)
        start = permute(start, graph, orders)
        notes.append(f"{len(orders)} of {len(graph.groups)} groups sorted by {supernet.sort}")
        if unsorted := [name for name in graph.groups if name not in orders]:
            notes.append(f"not sorted, because the order matters: {', '.join(unsorted)}")
    return InitialNetwork(start, trained, tuple(new), "; ".join(notes))


def check_leaves(network: nn.Module, name: str, leaves: Sequence[str]) -> None:
    """Raises ``UserError`` if ``leaves`` names a module that ``network`` does not have."""
    modules = dict(network.named_modules())
    for leaf in leaves:
        if leaf not in modules:
            near = difflib.get_close_matches(leaf, modules, n=3, cutoff=0.4)
            raise UserError(
                f"model.leaves names {leaf!r}, which is not a module of {name!r}; "
                + (f"similar names: {', '.join(near)}" if near else "correct or remove it")
            )


def grid_spec(supernet: P.SupernetParams) -> GridSpec:
    grid = supernet.grid
    return GridSpec(supernet.width, grid.narrowest, grid.steps, grid.divisor, grid.anchor, group_limits(grid))


def group_limits(grid: P.Grid) -> dict[str, GroupLimits]:
    return {pattern: GroupLimits(**limits.model_dump()) for pattern, limits in grid.groups.items()}


def recipe(training: P.Training) -> Recipe:
    shared = {field.name: getattr(training, field.name) for field in fields(Recipe) if hasattr(training, field.name)}
    optimiser = training.optimiser.model_dump()
    return Recipe(
        **shared,
        **{"optimiser_name" if name == "name" else name: value for name, value in optimiser.items()},
        augmentation=Augmentation(**training.augment.model_dump()),
    )


def teacher_network(params: P.Params, network: nn.Module, graph: ChannelGraph) -> nn.Module | None:
    """Returns the trained network of ``retrain.teacher``; None if it is null.

    Raises:
        UserError: ``model.weights`` cannot be loaded, belong to another network, or are for other classes.
    """
    weights = params.model.weights
    if params.retrain.teacher is None or weights is None:
        return None
    source = f"model.weights {weights!r}"
    tensors = load_trained_tensors(network, params.model.name, params.model.kwargs, weights)
    trained, new = insert_weights(network, graph, tensors, seed=0, source=source)
    if new:
        raise UserError(
            f"retrain.teacher is {params.retrain.teacher}, but {source} are for other classes than the data: "
            f"{', '.join(new)} would have random weights, which cannot teach; set retrain.teacher to null, or use "
            "weights that were trained for these classes"
        )
    return trained


def run_context(runtime: P.Runtime, world: World = SINGLE) -> RunContext:
    """Returns the device and settings of ``runtime``, and sets the number of torch's threads."""
    if runtime.threads != "auto":
        torch.set_num_threads(runtime.threads)
    elif world.local_world_size > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_world_size))
    device, workers = select_device(runtime.device, world), worker_count(runtime.workers, world.local_world_size)
    return RunContext(device, workers, runtime.checkpoint_minutes * 60, world)


def inputs(model: P.Model, prepared: Path, task: str = CLASSIFICATION.name) -> list[Path]:
    """Returns the input files of a run, besides earlier outputs: the prepared data, the user's network and task.

    ``data.json`` contains the digests of the other prepared files, which are compared with them when they are read.
    """
    return [prepared / FILE_NAME, *own_python_files(model.name, task)]


def own_python_files(*names: str) -> list[Path]:
    """Returns the user's Python files among import paths, such as ``net.py`` of ``net.py:build``."""
    files = dict.fromkeys(file_of(name) for name in names)
    return [Path(file) for file in files if file is not None]


def checkpoints(stage: str, *files: Path, code: Iterable[str] | None = None, **parameters: object) -> KeyedCheckpoints:
    """Returns the checkpoints of a stage's run, keyed by what decides its result (see ``checkpoint_keys``).

    Args:
        stage: name of the run; the part before the first hyphen is the name of the stage's module.
        files: the run's input files.
        code: the modules whose code decides the result. By default, those that the stage's module imports.
        parameters: the stage's parameters.
    """
    modules = code if code is not None else imported_modules(f"autoslim.pipeline.{stage.partition('-')[0]}")
    parts = {
        **flattened(parameters),
        **{str(path): file_digest(path) for path in files},
        "code": code_digest(modules),
        "torch": torch.__version__,
    }
    return KeyedCheckpoints(repository_root() / "checkpoints", stage, parts)
