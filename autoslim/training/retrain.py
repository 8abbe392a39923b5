"""Retrains a chosen network, from scratch or from the supernet's weights, once for each seed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.channels.resize import initialise, resize
from autoslim.data.batches import eval_batches
from autoslim.data.prepared import PreparedData
from autoslim.tasks.classification import CLASSIFICATION
from autoslim.tasks.evaluation import Evaluation, evaluate_measures
from autoslim.tasks.task import Task
from autoslim.training.checkpoints import Checkpoints, load_weights, save_weights
from autoslim.training.device import RunContext, seed_everything, to_device
from autoslim.training.distillation import Teacher, taught_step
from autoslim.training.loop import Row, Step, label_step, train
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
    teacher: Teacher | None = None,
    label: str,
    folder: Path,
    origin: Mapping[str, str] | None = None,
    checkpoints: Checkpoints,
    observe: Callable[[int, Row], None],
    task: Task = CLASSIFICATION,
) -> dict[int, list[Row]]:
    """Trains ``network`` resized to ``channels`` once for each seed, and writes ``seed-N.safetensors`` to ``folder``.

    The rows contain the task's measures on the search split after each epoch. The test split is not used.

    Args:
        network: the default network. It is not changed.
        graph: ``trace`` of it.
        seeds: seeds of the random weights and of the data order.
        start: file with the weights that every seed starts from. By default, each seed trains from scratch.
        teacher: a trained network that takes part in the loss. It is moved to the device.
        label: name of the network in the progress display.
        origin: what identifies the networks besides their seed, for the metadata of their files.
        observe: called with the seed and the row of each epoch. A resumed run calls it again with the earlier rows.
        task: computes the loss and the measures.

    Returns:
        The rows of each seed, one per epoch.
    """

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
            step=retrain_step(plain, task, recipe, context, teacher),
            batches=recipe.batches(data, seed, context),
            learning_rate=recipe.rate(plan),
            validate=lambda: {
                f"search_{name}": value
                for name, value in evaluate_split(plain, data, "search", recipe, context, task).values.items()
            },
            observe=lambda row: observe(seed, row),
            checkpoints=checkpoints,
            name=f"seed-{seed}",
            label=f"retrain {label}, seed {seed}",
            world=context.world,
            measures=task.measures(data.info),
            clip_norm=recipe.clip_norm,
            ema=recipe.ema,
        )
        if context.world.is_rank_zero:
            save_weights(plain, folder / f"seed-{seed}.safetensors", {**(origin or {}), "seed": str(seed)})
        return rows

    return {seed: train_once(seed) for seed in seeds}


def retrain_step(
    network: nn.Module, task: Task, recipe: Recipe, context: RunContext, teacher: Teacher | None = None
) -> Step:
    """Returns the step function of retraining. A teacher is moved to the device."""

    def loss(output: Any, targets: Any) -> torch.Tensor:
        return task.smoothed_loss(output, targets, recipe.label_smoothing)

    if teacher is None:
        return label_step(network, loss, recipe.autocast(context))
    to_device(teacher.network, context.device, recipe.channels_last)
    return taught_step(network, loss, teacher, recipe.autocast(context), task.distillation)


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
    origin: Mapping[str, str] | None = None,
    task: Task = CLASSIFICATION,
) -> dict[int, list[Row]]:
    """Writes the weights in ``start`` to ``seed-N.safetensors`` as ``retrain`` would, without training them.

    Returns:
        One row for ``seed``, with epoch 0 and the task's measures on the search split.
    """
    plain = resize(network, graph, channels, seed=None)
    load_weights(plain, start)
    if context.world.is_rank_zero:
        save_weights(plain, folder / f"seed-{seed}.safetensors", {**(origin or {}), "seed": str(seed)})
    to_device(plain, context.device, recipe.channels_last)
    values = evaluate_split(plain, data, "search", recipe, context, task).values
    return {seed: [{"epoch": 0, **{f"search_{name}": value for name, value in values.items()}}]}


def over_seeds(rows: Mapping[int, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Returns mean and sample standard deviation over seeds of the last epoch's metrics (no deviation for one seed).

    A network that was not trained (see ``keep``) has no loss.
    """
    last = [epochs[-1] for epochs in rows.values()]
    figures: dict[str, dict[str, float]] = {}
    for name in (*(name for name in last[0] if name.startswith("search_")), "loss"):
        if name not in last[0]:
            continue
        values = [row[name] for row in last]
        figures[name] = {"mean": fmean(values)} | ({"std": stdev(values)} if len(values) > 1 else {})
    return figures


def evaluate_split(
    network: nn.Module, data: PreparedData, split: str, recipe: Recipe, context: RunContext, task: Task
) -> Evaluation:
    """Returns the score and the task's measures of a plain network on a split, in the recipe's precision."""
    chunks = eval_batches(data, split, batch_size=EVALUATION_BATCH, device=context.device, workers=context.workers)
    return evaluate_measures(task, data.info, network, chunks, recipe.autocast(context))


def evaluate_retrained(
    network: nn.Module,
    graph: ChannelGraph,
    channels: Channels,
    data: PreparedData,
    recipe: Recipe,
    context: RunContext,
    *,
    seeds: Sequence[int],
    folder: Path,
    origin: Mapping[str, str] | None = None,
    task: Task = CLASSIFICATION,
) -> dict[int, dict[str, float]]:
    """Returns seed -> the task's measures, by name, on the *test* split, of the networks that ``retrain`` wrote.

    Raises:
        UserError: weights are missing, damaged, or those of another seed or ``origin``.
    """
    values = {}
    for seed in seeds:
        plain = resize(network, graph, channels, seed=None)
        load_weights(plain, folder / f"seed-{seed}.safetensors", {**(origin or {}), "seed": str(seed)})
        to_device(plain, context.device, recipe.channels_last)
        values[seed] = evaluate_split(plain, data, "test", recipe, context, task).values
    return values
