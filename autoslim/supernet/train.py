"""Trains a supernet, and writes its shared weights to disk."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid, GridSpec
from autoslim.channels.groups import Channels
from autoslim.channels.resize import initialise, resize
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.models.pretrained import check_covered
from autoslim.supernet.extract import SupernetFile
from autoslim.supernet.sandwich import Sandwich, sandwich_rule
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.classification import CLASSIFICATION, TRAIN_BETTER, is_chance
from autoslim.tasks.evaluation import Chunk, evaluate
from autoslim.tasks.task import Score, Task
from autoslim.training.checkpoints import Checkpoints, save_weights
from autoslim.training.device import RunContext, seed_everything, to_device
from autoslim.training.loop import Row, train
from autoslim.training.recipe import Recipe

VALIDATION_IMAGES = 2048  # of the search split, kept on the device
VALIDATION_CHUNK = 256  # images that share their batch statistics
SUBNETS = "widest", "default", "narrowest"
"""The configurations whose accuracy is recorded after each epoch."""


def train_supernet(
    network: nn.Module,
    graph: ChannelGraph,
    data: PreparedData,
    spec: GridSpec,
    recipe: Recipe,
    context: RunContext,
    *,
    sandwich: Sandwich,
    trained: bool = False,
    name: str,
    folder: Path,
    checkpoints: Checkpoints,
    observe: Callable[[Row], None],
    task: Task = CLASSIFICATION,
) -> tuple[list[Row], dict[str, Score]]:
    """Trains the supernet of ``network`` by the sandwich rule (US-Nets; AutoSlim) and writes it to ``folder``.

    Args:
        network: the default network. It is not changed.
        graph: ``trace`` of it.
        spec: the grid that the supernet spans.
        sandwich: which subnets each step trains, and how.
        trained: whether training starts from the weights of ``network``. Otherwise it starts from scratch.
        name: name of the network, recorded in ``supernet.json``.
        observe: called with the row of each epoch. A resumed run calls it again with the earlier rows.
        task: computes the losses and scores.

    Returns:
        One row of metrics for each epoch, and the final scores of the widest, default and narrowest configurations on
        the search split under batch statistics.
    """
    grid = graph.grid(spec)
    validated = validated_subnets(graph, grid)
    supernet = initial_supernet(network, graph, grid.widest, sandwich.seed, trained=trained)
    seed_everything(sandwich.seed)
    to_device(supernet, context.device, recipe.channels_last)
    plan = recipe.plan(data, context)
    chunks = search_chunks(
        data,
        images=VALIDATION_IMAGES,
        chunk=VALIDATION_CHUNK,
        seed=sandwich.seed,
        device=context.device,
        workers=context.workers,
    )
    score = subnet_scorer(supernet, chunks, recipe.autocast(context), task)

    def validate() -> Row:
        return {f"{which}_{task.score.name}": task.value(score(c).error) for which, c in validated.items()}

    step = sandwich_rule(
        supernet,
        grid,
        sandwich,
        task=task,
        label_smoothing=recipe.label_smoothing,
        autocast=recipe.autocast(context),
        rank=context.world.rank,
    )
    rows = train(
        supernet,
        recipe.optimiser(supernet),
        plan,
        step=step,
        batches=recipe.batches(data, sandwich.seed, context),
        learning_rate=recipe.rate(plan),
        validate=validate,
        observe=observe,
        checkpoints=checkpoints,
        name="supernet",
        label="supernet",
        world=context.world,
        synchronise_batch_norm=not sandwich.widths_by_rank,
        measures=[task.score],
        clip_norm=recipe.clip_norm,
        ema=recipe.ema,
    )
    supernet.select(supernet.widest)
    if context.world.is_rank_zero:
        digest = save_weights(supernet.network, folder / "weights.safetensors")
        SupernetFile(name, graph.input_shape, grid, graph.default, digest, data.digest).write(folder)
    final = context.world.on_rank_zero(lambda: {which: list(astuple(score(c))) for which, c in validated.items()})
    return rows, {which: Score(*values) for which, values in final.items()}


def initial_supernet(
    network: nn.Module, graph: ChannelGraph, widest: Channels, seed: int, *, trained: bool
) -> Supernet:
    """Returns the supernet before its first step, with random weights or with those of ``network``.

    Raises:
        UserError: ``trained`` is set and ``widest`` has more channels than ``network``, for which no weights exist.
    """
    if trained:
        check_covered(graph, widest)
    wide = resize(network, graph, widest, seed=None)
    if not trained:
        initialise(wide, seed)
    return Supernet(wide, graph)


def validated_subnets(graph: ChannelGraph, grid: Grid) -> dict[str, Channels]:
    """Returns the configurations of ``SUBNETS``.

    In a supernet that is narrower than the default network, ``default`` is cut to the supernet's channels.
    """
    default = {name: min(group.size, grid[name][0]) for name, group in graph.groups.items()}
    return dict(zip(SUBNETS, (grid.widest, default, grid.narrowest), strict=True))


def subnet_scorer(
    supernet: Supernet, chunks: Sequence[Chunk], autocast: Callable[[], torch.autocast], task: Task
) -> Callable[[Mapping[str, int]], Score]:
    """Returns a function that scores a configuration on ``chunks``, under the batch statistics of each chunk."""

    def score(channels: Mapping[str, int]) -> Score:
        supernet.select(channels)
        return evaluate(task, supernet, chunks, autocast)

    return score


def guessing_subnets(scores: Mapping[str, Score], chance: float | None) -> str:
    """Returns a warning if subnets are not better than ``chance`` (see ``Task.chance``), else ""."""
    guessing = {} if chance is None else {which: score for which, score in scores.items() if is_chance(score, chance)}
    if not guessing:
        return ""
    listed = ", ".join(f"{which} {1 - score.error:.1%}" for which, score in guessing.items())
    return (
        f"warning: the top-1 of subnets ({listed}) is not above chance, which is {chance:.1%}; among such subnets, the "
        f"search chooses by noise: {TRAIN_BETTER}"
    )


def check_finite(loss: float, subnet: str) -> None:
    """Raises ``UserError`` if the loss of ``subnet`` (a description) is not finite."""
    if not math.isfinite(loss):
        raise UserError(
            f"{subnet} has a loss of {loss}; set search.precision to fp32, or lower the supernet's "
            "learning_rate and train it again"
        )
