"""The sandwich rule with in-place distillation: one training step of a supernet."""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.channels.inputs import Arguments
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.classification import smoothed_cross_entropy
from autoslim.training.loop import Step

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
    images: Any,
    labels: Tensor,
    subnets: Sequence[Mapping[str, int]],
    *,
    label_smoothing: float = 0.0,
    distillation: bool = True,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Accumulates the gradients of the widest network and of ``subnets`` for one batch.

    This is the sandwich rule of US-Nets (Yu & Huang, arXiv 1903.05134, section 3.3). The widest network learns from the
    labels. Each subnet learns from the detached softmax of the widest network for the same batch, at temperature 1, or
    from the labels if ``distillation`` is off. Gradients are summed over the widths, not averaged. The function neither
    clears gradients nor steps an optimiser.

    Args:
        supernet: the supernet. The last of ``subnets`` stays selected.
        images: (N, C, H, W); for several inputs, a tuple or a mapping of tensors.
        labels: (N,), int64.
        subnets: the narrowest and the random configurations, in the order in which they are trained.
        label_smoothing: see ``smoothed_cross_entropy``.
        distillation: whether subnets learn from the widest network.
        autocast: returns a context for a forward pass and its loss. Backward passes run outside it, as torch advises.

    Returns:
        The detached loss of the widest network, a scalar on the device.
    """
    inputs = Arguments.of(images)
    supernet.select(supernet.widest)
    with autocast():
        logits = inputs.run(supernet)  # (N, classes)
        widest_loss = smoothed_cross_entropy(logits, labels, label_smoothing)
    widest_loss.backward()
    target = logits.detach().softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    for channels in subnets:
        supernet.select(channels)
        with autocast():
            logits = inputs.run(supernet)
            if distillation:
                loss = F.cross_entropy(logits, target)
            else:
                loss = smoothed_cross_entropy(logits, labels, label_smoothing)
        loss.backward()
    return widest_loss.detach()


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
) -> Step:
    """Returns the step function of supernet training, which trains the widest, the narrowest and random subnets."""
    draws = {"group": [random_subnet], "network": [random_width], "both": [random_subnet, random_width]}
    draw = draws[sandwich.random_widths_per]
    count = sandwich.random_widths
    seed = random_width_seed(sandwich.seed, rank) if sandwich.widths_by_rank else sandwich.seed
    narrowest = grid.narrowest

    def step(images: Tensor, labels: Tensor, number: int) -> Tensor:
        choices = [draw[(number * count + index) % len(draw)] for index in range(count)]
        drawn = [choice(grid, seed, number, index) for index, choice in enumerate(choices)]
        return sandwich_step(
            supernet,
            images,
            labels,
            [narrowest, *drawn],
            label_smoothing=label_smoothing,
            distillation=sandwich.distillation,
            autocast=autocast,
        )

    return step
