"""Retrains a chosen network, from scratch or from the supernet's weights, once for each seed."""

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
    """Trains ``network`` resized to ``channels`` once for each seed, and writes ``seed-N.safetensors`` to ``folder``.

    The rows contain the accuracy on the search split after each epoch. The test split is not used.

    Args:
        network: the default network. It is not changed.
        graph: ``trace`` of it.
        seeds: seeds of the random weights and of the data order.
        start: file with the weights that every seed starts from. By default, each seed trains from scratch.
        label: name of the network in the progress display.
        observe: called with the seed and the row of each epoch. A resumed run calls it again with the earlier rows.

    Returns:
        The rows of each seed, one per epoch.
    """

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return smoothed_cross_entropy(logits, labels, recipe.label_smoothing)

    def train_once(seed: int) -> list[Row]:
        plain = resize(network, graph, channels, seed=None)
        if start is None:
            initialise(plain, seed)
        else:
            load_weights(plain, start)
        seed_everything(seed)
        to_device(plain, context.device, recipe.channels_last)
        plan = recipe.plan(data, context)
        rows = train(
            plain,
            recipe.optimiser(plain),
            plan,
            step=label_step(plain, loss, recipe.autocast(context)),
            batches=recipe.batches(data, seed, context),
            learning_rate=recipe.rate(plan),
            validate=lambda: {"search_top1": 1 - split_score(plain, data, "search", recipe, context).error},
            observe=lambda row: observe(seed, row),
            checkpoints=checkpoints,
            name=f"seed-{seed}",
            label=f"retrain {label}, seed {seed}",
            world=context.world,
        )
        if context.world.is_rank_zero:
            save_weights(plain, folder / f"seed-{seed}.safetensors")
        return rows

    return {seed: train_once(seed) for seed in seeds}


def keep(
    network: nn.Module,
    graph: ChannelGraph,
    channels: Channels,
    data: PreparedData,
    recipe: Recipe,
    context: RunContext,
    *,
    seed: int,
    start: Path,
    folder: Path,
) -> dict[int, list[Row]]:
    """Writes the weights in ``start`` to ``seed-N.safetensors`` as ``retrain`` would, without training them.

    Returns:
        One row for ``seed``, with epoch 0 and the accuracy on the search split.
    """
    plain = resize(network, graph, channels, seed=None)
    load_weights(plain, start)
    if context.world.is_rank_zero:
        save_weights(plain, folder / f"seed-{seed}.safetensors")
    to_device(plain, context.device, recipe.channels_last)
    return {seed: [{"epoch": 0, "search_top1": 1 - split_score(plain, data, "search", recipe, context).error}]}


def over_seeds(rows: Mapping[int, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Returns mean and sample standard deviation over seeds of the last epoch's metrics (no deviation for one seed).

    A network that was not trained (see ``keep``) has no loss.
    """
    last = [epochs[-1] for epochs in rows.values()]
    figures: dict[str, dict[str, float]] = {}
    for name in ("search_top1", "loss"):
        if name not in last[0]:
            continue
        values = [row[name] for row in last]
        figures[name] = {"mean": fmean(values)} | ({"std": stdev(values)} if len(values) > 1 else {})
    return figures


def split_score(network: nn.Module, data: PreparedData, split: str, recipe: Recipe, context: RunContext) -> Score:
    """Returns the top-1 error and cross-entropy of a plain network on a split, in the recipe's precision."""
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
    """Returns seed -> top-1 accuracy (a fraction) on the *test* split of the networks that ``retrain`` wrote."""
    accuracies = {}
    for seed in seeds:
        plain = resize(network, graph, channels, seed=None)
        load_weights(plain, folder / f"seed-{seed}.safetensors")
        to_device(plain, context.device, recipe.channels_last)
        accuracies[seed] = 1 - split_score(plain, data, "test", recipe, context).error
    return accuracies
