"""The sandwich rule with in-place distillation: one training step of a supernet."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.channels.groups import Channels
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.classification import smoothed_cross_entropy
from autoslim.training.loop import Step


def sandwich_step(
    supernet: Supernet,
    images: Tensor,
    labels: Tensor,
    subnets: Sequence[Mapping[str, int]],
    *,
    label_smoothing: float = 0.0,
    distillation: bool = True,
) -> Tensor:
    """Adds the gradients of the widest network and of ``subnets`` to those of the weights.

    The sandwich rule of US-Nets (Yu & Huang, arXiv 1903.05134). The widest learns from the labels. Each subnet learns
    from the widest one's softmax of the same batch, detached, at temperature 1 (with ``distillation`` off: from the
    labels too). Gradients are summed over the widths, not averaged. The optimiser is not stepped and gradients are not
    cleared.

    Args:
        images: (N, C, H, W).
        labels: (N,), int64.
        subnets: the narrowest and the random configurations, in the order in which they are trained.

    Returns:
        The widest network's loss, detached, a scalar on the device.
    """
    supernet.select(supernet.widest)
    logits = supernet(images)  # (N, classes)
    loss = smoothed_cross_entropy(logits, labels, label_smoothing)
    loss.backward()
    target = logits.detach().softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    for channels in subnets:
        supernet.select(channels)
        logits = supernet(images)
        if distillation:
            F.cross_entropy(logits, target).backward()
        else:
            smoothed_cross_entropy(logits, labels, label_smoothing).backward()
    return loss.detach()


def random_subnet(grid: Mapping[str, Sequence[int]], seed: int, step: int, index: int) -> Channels:
    """A configuration drawn group by group, each level of the grid equally likely; the same for the same numbers."""
    draw = random.Random(f"{seed}/{step}/{index}")
    return {name: draw.choice(levels) for name, levels in grid.items()}


def random_width(grid: Mapping[str, Sequence[int]], seed: int, step: int, index: int) -> Channels:
    """A configuration at one place between widest and narrowest for all groups, each place equally likely (US-Nets)."""
    place = random.Random(f"{seed}/{step}/{index}").random()
    return {name: levels[int(place * len(levels))] for name, levels in grid.items()}


Per = Literal["group", "network", "both"]
"""What a random width is drawn for: each group (AutoSlim), all groups together (US-Nets), or every second time each."""


def sandwich_rule(
    supernet: Supernet,
    grid: Mapping[str, Sequence[int]],
    *,
    random_widths: int,
    random_widths_per: Per = "group",
    seed: int,
    label_smoothing: float,
    distillation: bool,
    autocast: Callable[[], torch.autocast],
) -> Step:
    """The step function of supernet training: widest, narrowest and ``random_widths`` random subnets on ``grid``."""
    narrowest = {name: levels[-1] for name, levels in grid.items()}
    draws = {"group": [random_subnet], "network": [random_width], "both": [random_subnet, random_width]}
    draw = draws[random_widths_per]

    def step(images: Tensor, labels: Tensor, number: int) -> Tensor:
        turns = [draw[(number * random_widths + index) % len(draw)] for index in range(random_widths)]
        drawn = [turn(grid, seed, number, index) for index, turn in enumerate(turns)]
        with autocast():
            return sandwich_step(
                supernet,
                images,
                labels,
                [narrowest, *drawn],
                label_smoothing=label_smoothing,
                distillation=distillation,
            )

    return step
