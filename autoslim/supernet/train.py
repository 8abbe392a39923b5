"""Training a supernet, from the default network to shared weights on disk."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Span
from autoslim.channels.groups import Channels
from autoslim.channels.resize import initialise, resize
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.models.pretrained import check_covered
from autoslim.supernet.extract import SupernetFile
from autoslim.supernet.sandwich import Per, sandwich_rule
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.classification import Chunk, Score, evaluate
from autoslim.training.checkpoints import Checkpoints, save_weights
from autoslim.training.device import RunContext, seed_everything, to_device
from autoslim.training.loop import Row, train
from autoslim.training.recipe import Recipe


def subnet_scorer(
    supernet: Supernet, chunks: Sequence[Chunk], autocast: Callable[[], torch.autocast]
) -> Callable[[Mapping[str, int]], Score]:
    """The search's score function: a configuration under the batch statistics of each of the fixed chunks."""

    def score(channels: Mapping[str, int]) -> Score:
        supernet.select(channels)
        return evaluate(supernet, chunks, autocast)

    return score


def check_finite(cross_entropy: float, subnet: str) -> None:
    """Raises:
    UserError: the cross-entropy of ``subnet`` (in words) is no finite number.
    """
    if not math.isfinite(cross_entropy):
        raise UserError(
            f"{subnet} scores a cross-entropy of {cross_entropy}; set search.precision to fp32, or lower the "
            "supernet's learning_rate"
        )


VALIDATION_IMAGES = 2048  # of the search split, kept on the device
VALIDATION_CHUNK = 256  # images that share their batch statistics


def validated_subnets(graph: ChannelGraph, levels: Mapping[str, tuple[int, ...]]) -> dict[str, Channels]:
    """The configurations whose accuracy is shown at each epoch; the default one as far as the supernet is that wide."""
    return {
        "widest": {name: options[0] for name, options in levels.items()},
        "default": {name: min(group.size, levels[name][0]) for name, group in graph.groups.items()},
        "narrowest": {name: options[-1] for name, options in levels.items()},
    }


def initial_supernet(
    network: nn.Module, graph: ChannelGraph, widest: Channels, seed: int, *, trained: bool
) -> Supernet:
    """The supernet before its first step: with new weights, or with those of ``network``, which it keeps as they are.

    Raises:
        UserError: ``network`` is trained, and narrower than ``widest``: what is new would have no trained weights.
    """
    if trained:
        check_covered(graph, widest)
    wide = resize(network, graph, widest)
    if not trained:
        initialise(wide, seed)
    return Supernet(wide, graph)


def random_width_seed(seed: int, rank: int) -> int:
    """The seed of a process's own random widths; the first one's are those of a process alone."""
    return seed + (rank << 64)


def train_supernet(
    network: nn.Module,
    graph: ChannelGraph,
    data: PreparedData,
    span: Span,
    recipe: Recipe,
    context: RunContext,
    *,
    trained: bool = False,
    random_widths: int,
    random_widths_per: Per = "group",
    widths_by_rank: bool = False,
    distillation: bool,
    seed: int,
    name: str,
    folder: Path,
    checkpoints: Checkpoints,
    observe: Callable[[Row], None],
) -> tuple[list[Row], dict[str, Score]]:
    """Trains the supernet of ``network`` by the sandwich rule (US-Nets; AutoSlim) and writes it to ``folder``.

    Args:
        trained: ``network`` has trained weights, from which the supernet starts; the paper's has new ones.
        widths_by_rank: each of several processes draws random widths of its own. No longer is the result that of one
            process: with widths, batch statistics differ, so that each takes those of its own images.

    Returns:
        A row of figures for each epoch, and the scores of the widest, default and narrowest configuration at the end,
        on the search split under batch statistics.
    """
    levels = span.grid(graph)
    watched = validated_subnets(graph, levels)
    supernet = initial_supernet(network, graph, watched["widest"], seed, trained=trained)
    seed_everything(seed)
    to_device(supernet, context.device, recipe.channels_last)
    plan = recipe.plan(data, context)
    chunks = search_chunks(
        data,
        images=VALIDATION_IMAGES,
        chunk=VALIDATION_CHUNK,
        seed=seed,
        device=context.device,
        workers=context.workers,
    )
    score = subnet_scorer(supernet, chunks, recipe.autocast(context))

    def validate() -> Row:
        return {f"{which}_top1": 1 - score(channels).error for which, channels in watched.items()}

    step = sandwich_rule(
        supernet,
        levels,
        random_widths=random_widths,
        random_widths_per=random_widths_per,
        seed=random_width_seed(seed, context.world.rank) if widths_by_rank else seed,
        label_smoothing=recipe.label_smoothing,
        distillation=distillation,
        autocast=recipe.autocast(context),
    )
    rows = train(
        supernet,
        recipe.optimiser(supernet),
        plan,
        step=step,
        batches=recipe.batches(data, seed, context),
        learning_rate=recipe.rate(plan),
        validate=validate,
        observe=observe,
        checkpoints=checkpoints,
        name="supernet",
        label="supernet",
        world=context.world,
        synchronise_batch_norm=not widths_by_rank,
    )
    supernet.select(supernet.widest)
    if context.world.is_rank_zero:
        save_weights(supernet.network, folder / "weights.safetensors")
        SupernetFile(name, graph.input_shape, levels, graph.default).write(folder)
    return rows, context.world.on_rank_zero(lambda: {which: score(channels) for which, channels in watched.items()})
