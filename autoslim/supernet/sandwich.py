"""The sandwich rule with in-place distillation: one training step of a supernet."""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from autoslim.channels.batches import Batch, call, split_batch
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.errors import UserError
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.building import task_of
from autoslim.tasks.classification import CLASSIFICATION, check_logits, soft_cross_entropy
from autoslim.tasks.task import Task
from autoslim.training.loop import Step

Loss = Callable[[Any, Any], Tensor]
"""(output of the network, targets or output of the widest network) -> a scalar."""

Per = Literal["group", "network", "both"]
"""Unit for which a random width is drawn: each group (AutoSlim), the whole network (US-Nets), or both in turn."""


@dataclass(frozen=True)
class Sandwich:
    """The settings of the sandwich rule: how the subnets of a training step are chosen and trained.

    Attributes:
        random_widths: number of random subnets in each step, in addition to the widest and the narrowest.
        random_widths_per: the unit for which a random width is drawn.
        widths_by_rank: each of several processes draws different random widths. The result then depends on the number
            of processes: subnets of different widths cannot share batch statistics, so each rank uses those of its
            images.
        distillation: subnets learn from the widest network's output instead of the labels.
        seed: seed of the weights, the random widths and the data order.
    """

    random_widths: int
    random_widths_per: Per = "group"
    widths_by_rank: bool = False
    distillation: bool = True
    seed: int = 0


def sandwich_step(
    supernet: Supernet,
    batch: Batch,
    subnets: Sequence[Mapping[str, int]],
    *,
    loss: Loss | None = None,
    distillation: Loss | bool = True,
    task: Task | str | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    backward: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Accumulates the gradients of the widest network and of ``subnets`` for one batch.

    This is the sandwich rule of US-Nets (Yu & Huang, arXiv 1903.05134, section 3.3). The widest network learns from the
    targets. With distillation, each subnet learns from the detached output of the widest network for the same batch.
    Gradients are summed over the widths, not averaged. The function neither clears gradients nor steps an optimiser.
    Afterwards the widest network is selected.

    Args:
        supernet: the supernet, in training mode.
        batch: a pair (inputs, targets) on the device of the supernet. The network is called with the inputs (a tensor),
            with ``*inputs`` (a tuple or a list) or with ``**inputs`` (a mapping).
        subnets: the narrowest and the random configurations, in the order in which they are trained.
        loss: returns a scalar for (output, targets), which may have any structure. By default, it is the cross-entropy
            of logits (N, classes, ...) with targets (N, ...).
        distillation: how subnets learn. A function returns a scalar for (output, detached output of the widest
            network). True stands for the cross-entropy with the softmax of the widest network if ``loss`` is the
            default, and otherwise for no distillation, because no function fits every output. False: from the targets.
        task: a task, or its name such as ``regression``, whose losses take the place of ``loss`` and of the functions
            for ``distillation``.
        autocast: returns a context for a forward pass and its loss. Backward passes run outside it, as torch advises.
        backward: computes the gradients of a loss, by default ``Tensor.backward``. With a gradient scaler, pass
            ``lambda loss: scaler.scale(loss).backward()``.

    Returns:
        The detached loss of the widest network, a scalar on the device.

    Raises:
        UserError: the batch is not a pair, a loss is not a scalar, or the default loss does not fit the output.
    """
    inputs, targets = split_batch(batch)
    task = task_of(task)
    if task is not None:
        loss, distillation = task.loss, task.distillation if distillation is True else distillation
    distil: Loss | None = soft_cross_entropy if distillation and loss is None else None
    distil = distillation if callable(distillation) else distil
    target_loss = loss or _cross_entropy
    backward = backward or _backward
    try:
        supernet.select(supernet.widest)
        with autocast():
            output = call(supernet, inputs)
            widest_loss = _scalar(target_loss(output, targets), "loss")
        backward(widest_loss)
        teacher = None if distil is None else tree_map(_detached, output)
        for channels in subnets:
            supernet.select(channels)
            with autocast():
                output = call(supernet, inputs)
                if distil is None:
                    value = _scalar(target_loss(output, targets), "loss")
                else:
                    value = _scalar(distil(output, teacher), "distillation")
            backward(value)
    finally:
        supernet.select(supernet.widest)
    return widest_loss.detach()


def _cross_entropy(output: Any, targets: Any) -> Tensor:
    check_logits(output, targets, "loss")
    return F.cross_entropy(output, targets)


def _backward(loss: Tensor) -> None:
    loss.backward()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _scalar(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise UserError(f"{name} must return a scalar tensor, but it returned a value of {given}; use its mean")
    return value


def random_subnet(grid: Mapping[str, Sequence[int]], seed: int, step: int, index: int) -> Channels:
    """Draws a number of channels for each group independently, each number of the grid with equal probability.

    The draw is a function of (seed, step, index), so a resumed run draws the same subnets.
    """
    draw = random.Random(f"{seed}/{step}/{index}")
    return {name: draw.choice(levels) for name, levels in grid.items()}


def random_width(grid: Mapping[str, Sequence[int]], seed: int, step: int, index: int) -> Channels:
    """Draws one position between the widest and the narrowest configuration for all groups together (US-Nets).

    The draw is a function of (seed, step, index), so a resumed run draws the same widths.
    """
    position = random.Random(f"{seed}/{step}/{index}").random()
    return {name: levels[int(position * len(levels))] for name, levels in grid.items()}


def random_width_seed(seed: int, rank: int) -> int:
    """Returns the seed of a rank's random widths. On rank 0 it equals that of a single process."""
    return seed + (rank << 64)


def sandwich_rule(
    supernet: Supernet,
    grid: Grid,
    sandwich: Sandwich,
    *,
    label_smoothing: float,
    autocast: Callable[[], torch.autocast],
    rank: int = 0,
    task: Task = CLASSIFICATION,
) -> Step:
    """Returns the step function of supernet training, which trains the widest, the narrowest and random subnets."""
    draws = {"group": [random_subnet], "network": [random_width], "both": [random_subnet, random_width]}
    draw = draws[sandwich.random_widths_per]
    count = sandwich.random_widths
    seed = random_width_seed(sandwich.seed, rank) if sandwich.widths_by_rank else sandwich.seed
    narrowest = grid.narrowest

    distillation: Loss | bool = task.distillation if sandwich.distillation else False

    def loss(output: Any, targets: Any) -> Tensor:
        return task.smoothed_loss(output, targets, label_smoothing)

    def step(inputs: Any, targets: Any, number: int) -> Tensor:
        choices = [draw[(number * count + index) % len(draw)] for index in range(count)]
        drawn = [choice(grid, seed, number, index) for index, choice in enumerate(choices)]
        subnets = [narrowest, *drawn]
        return sandwich_step(
            supernet, (inputs, targets), subnets, loss=loss, distillation=distillation, autocast=autocast
        )

    return step
