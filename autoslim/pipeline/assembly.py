"""From checked parameters to the library's objects."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Span
from autoslim.channels.sort import importance_orders, permute
from autoslim.data.augmentation import Augmentation
from autoslim.data.prepared import DataInfo
from autoslim.distributed.ranks import SINGLE, World
from autoslim.errors import UserError
from autoslim.models.building import build_network, check_network
from autoslim.models.pretrained import insert_weights, load_trained_tensors
from autoslim.pipeline import params as P
from autoslim.pipeline.project import repository_root
from autoslim.tracing import trace
from autoslim.training.checkpoints import Checkpoints, file_digest, run_key
from autoslim.training.device import RunContext, select_device, worker_count
from autoslim.training.recipe import Recipe

LIBRARY = (
    "channels",
    "data",
    "distributed",
    "models",
    "resources",
    "search",
    "supernet",
    "tasks",
    "tracing",
    "training",
)
"""Folders whose code can change a result."""


def traced_network(model: P.Model, info: DataInfo) -> tuple[nn.Module, ChannelGraph]:
    """The default network for the data, checked, and its channel graph.

    Raises:
        UserError: it cannot be built or traced, does not fit the data, or has no module that ``model.leaves`` names.
    """
    for argument in ("weights", "pretrained"):
        if model.kwargs.get(argument):
            raise UserError(
                f"model.kwargs.{argument} is {model.kwargs[argument]!r}, but the supernet alone can start from trained "
                "weights; name them in model.weights instead"
            )
    # Parameters that keep their constructor's distribution (see initialise) are the same each time.
    torch.manual_seed(0)
    network = build_network(model.name, model.kwargs, len(info.classes))
    check_leaves(network, model.name, model.leaves)
    shape = (info.channels, info.image_size, info.image_size)
    check_network(network, model.name, shape, len(info.classes))
    return network, trace(network, torch.empty(1, *shape), leaves=model.leaves)


def initial_network(
    model: P.Model, supernet: P.SupernetParams, network: nn.Module, graph: ChannelGraph
) -> tuple[nn.Module, str]:
    """The default network as a supernet starts from it, with the trained weights asked for; and a line on these, or "".

    Raises:
        UserError: ``model.weights`` cannot be had or are of another network, or it cannot be sorted as asked.
    """
    if model.weights is None:
        return network, ""
    source = f"model.weights {model.weights!r}"
    tensors = load_trained_tensors(network, model.name, model.kwargs, model.weights)
    start, new = insert_weights(network, graph, tensors, supernet.seed, source=source)
    told = [f"starts from {source}"]
    if new:
        told.append(f"new weights where they are of other classes: {', '.join(new)}")
    if supernet.sort is not None:
        orders = importance_orders(start, graph, supernet.sort)
        start = permute(start, graph, orders)
        told.append(f"{len(orders)} of {len(graph.groups)} groups sorted by {supernet.sort}")
        if kept := [name for name in graph.groups if name not in orders]:
            told.append(f"place matters in {', '.join(kept)}")
    return start, "; ".join(told)


def check_leaves(network: nn.Module, name: str, leaves: Sequence[str]) -> None:
    """Raises:
    UserError: a module that tracing shall not look into is not there.
    """
    modules = dict(network.named_modules())
    for leaf in leaves:
        if leaf not in modules:
            near = difflib.get_close_matches(leaf, modules, n=3, cutoff=0.4)
            raise UserError(
                f"model.leaves names {leaf!r}, which is no module of {name!r}; "
                + (f"near it: {', '.join(near)}" if near else "correct or remove it")
            )


def span(supernet: P.SupernetParams) -> Span:
    grid = supernet.grid
    return Span(supernet.width, grid.narrowest, grid.steps, grid.divisor, grid.anchor)


def recipe(training: P.Training) -> Recipe:
    o = training.optimiser
    return Recipe(
        epochs=training.epochs,
        batch_size=training.batch_size,
        label_smoothing=training.label_smoothing,
        augmentation=Augmentation(**training.augment.model_dump()),
        learning_rate=o.learning_rate,
        schedule=o.schedule,
        milestones=o.milestones,
        warmup_epochs=o.warmup_epochs,
        momentum=o.momentum,
        nesterov=o.nesterov,
        weight_decay=o.weight_decay,
        precision=training.precision,
        channels_last=training.channels_last,
    )


def run_context(runtime: P.Runtime, world: World = SINGLE) -> RunContext:
    """The machine that the parameters describe; torch's threads are set to what they ask for."""
    if runtime.threads != "auto":
        torch.set_num_threads(runtime.threads)
    elif world.local_world_size > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_world_size))
    device, workers = select_device(runtime.device, world), worker_count(runtime.workers, world)
    return RunContext(device, workers, runtime.checkpoint_minutes * 60, world)


def inputs(model: P.Model, prepared: Path) -> list[Path]:
    """The files, besides earlier outputs, that a run's checkpoints are keyed by: the splits, and the user's network."""
    splits = [path for path in sorted(prepared.iterdir()) if not path.name.endswith(".images.npy")]
    return splits + model_files(model)


def model_files(model: P.Model) -> list[Path]:
    """The file of the user's that the network is built from, if it is."""
    place = Path(model.name.rpartition(":")[0])
    return [place] if place.suffix == ".py" else []


def checkpoints(stage: str, *files: Path, **parameters: object) -> Checkpoints:
    """The checkpoints of a stage's run: keyed by its parameters, its input files and the code that trains."""
    package = Path(__file__).parent.parent
    code = [path for folder in LIBRARY for path in sorted((package / folder).rglob("*.py"))]
    digests = [file_digest(path) for path in files]
    key = run_key(parameters=parameters, inputs=digests, code=file_digest(*code))
    return Checkpoints(repository_root() / "checkpoints", stage, key)
