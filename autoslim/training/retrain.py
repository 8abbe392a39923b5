"""Retraining: a chosen network, from new weights or the supernet's, once for each seed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.channels.resize import initialise, resize
from autoslim.data.batches import eval_batches
from autoslim.data.prepared import PreparedData
from autoslim.tasks.classification import Score, evaluate, smoothed_cross_entropy
from autoslim.training.checkpoints import Checkpoints, load_weights, save_weights
from autoslim.training.device import RunContext, seed_everything, to_device
from autoslim.training.loop import Row, label_step, train
from autoslim.training.recipe import Recipe

EVALUATION_BATCH = 256


def retrain(
    network: nn.Module,
    graph: ChannelGraph,
    channels: Channels,
    data: PreparedData,
    recipe: Recipe,
    context: RunContext,
    *,
    seeds: Sequence[int],
    start: Path | None = None,
    label: str,
    folder: Path,
    checkpoints: Checkpoints,
    observe: Callable[[int, Row], None],
) -> dict[int, list[Row]]:
    """Trains ``network`` resized to ``channels``, for each seed, and writes ``seed-N.safetensors``.

    Each epoch's row holds the accuracy on the search split; the test split is not looked at.

    Args:
        start: the weights that each seed starts from. None: new ones, of the seed.

    Returns:
        The rows of each seed.
    """
    return {
        seed: _retrain_once(
            resize(network, graph, channels), start, data, recipe, context, seed, label, folder, checkpoints, observe
        )
        for seed in seeds
    }


def _retrain_once(
    network: nn.Module,
    start: Path | None,
    data: PreparedData,
    recipe: Recipe,
    context: RunContext,
    seed: int,
    label: str,
    folder: Path,
    checkpoints: Checkpoints,
    observe: Callable[[int, Row], None],
) -> list[Row]:
    if start is None:
        initialise(network, seed)
    else:
        load_weights(network, start)
    seed_everything(seed)
    to_device(network, context.device, recipe.channels_last)
    plan = recipe.plan(data, context)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return smoothed_cross_entropy(logits, labels, recipe.label_smoothing)

    rows = train(
        network,
        recipe.optimiser(network),
        plan,
        step=label_step(network, loss, recipe.autocast(context)),
        batches=recipe.batches(data, seed, context),
        learning_rate=recipe.rate(plan),
        validate=lambda: {"search_top1": 1 - split_score(network, data, "search", recipe, context).error},
        observe=lambda row: observe(seed, row),
        checkpoints=checkpoints,
        name=f"seed-{seed}",
        label=f"retrain {label}, seed {seed}",
        world=context.world,
    )
    if context.world.is_rank_zero:
        save_weights(network, folder / f"seed-{seed}.safetensors")
    return rows


def over_seeds(rows: Mapping[int, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (none for one seed) over the seeds of what each had at its last epoch."""
    last = [own[-1] for own in rows.values()]
    figures = {}
    for name in ("search_top1", "loss"):
        values = [row[name] for row in last]
        figures[name] = {"mean": fmean(values)} | ({"std": stdev(values)} if len(values) > 1 else {})
    return figures


def split_score(network: nn.Module, data: PreparedData, split: str, recipe: Recipe, context: RunContext) -> Score:
    """Top-1 error and cross-entropy of a plain network on a split, in the recipe's precision."""
    chunks = eval_batches(data, split, batch_size=EVALUATION_BATCH, device=context.device, workers=context.workers)
    return evaluate(network, chunks, recipe.autocast(context))


def retrained_top1(
    network: nn.Module,
    graph: ChannelGraph,
    channels: Channels,
    data: PreparedData,
    recipe: Recipe,
    context: RunContext,
    *,
    seeds: Sequence[int],
    folder: Path,
) -> dict[int, float]:
    """Seed -> top-1 accuracy on the *test* split of its network in ``folder``, a fraction."""
    accuracies = {}
    for seed in seeds:
        plain = resize(network, graph, channels)
        load_weights(plain, folder / f"seed-{seed}.safetensors")
        to_device(plain, context.device, recipe.channels_last)
        accuracies[seed] = 1 - split_score(plain, data, "test", recipe, context).error
    return accuracies
