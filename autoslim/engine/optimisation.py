"""Optimiser and learning-rate schedules of both trainings."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine", "multistep"]


def sgd(
    network: nn.Module, *, learning_rate: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.SGD:
    """SGD that decays dense convolution and linear weights only: 2-D weights, and 4-D ones with more than one input per
    group, so not depthwise ones, biases or normalisation (the authors' code)."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in network.parameters():
        dense = parameter.dim() == 2 or (parameter.dim() >= 3 and parameter.shape[1] != 1)
        (decayed if dense else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=True)


def learning_rate_at(
    step: int, total: int, *, base: float, schedule: Schedule, warmup: int = 0, milestones: Sequence[float] = ()
) -> float:
    """The learning rate of a step (from 0), changed at every iteration.

    After ``warmup`` steps of linear increase: ``linear`` falls to 0 (the paper's), ``cosine`` to 0 along half a cosine,
    ``multistep`` to a tenth at each of ``milestones``, fractions of the whole run.
    """
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    passed = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return base * (1 - passed)
    if schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * passed))
    return float(base * 0.1 ** sum(step >= milestone * total for milestone in milestones))
