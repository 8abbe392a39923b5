"""The training recipe: optimiser, learning rate schedule and batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from autoslim.data.augmentation import Augmentation
from autoslim.data.batches import batches_per_epoch, train_batches
from autoslim.data.prepared import PreparedData
from autoslim.training.device import Precision, RunContext, autocast
from autoslim.training.loop import Batches, Plan

Schedule = Literal["linear", "cosine", "multistep"]


def sgd(
    network: nn.Module, *, learning_rate: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.SGD:
    """Returns SGD with weight decay only on the weights of dense convolutions and linear layers, as the authors do.

    Depthwise convolutions, biases and normalisation layers are not decayed. A supernet must be at its widest
    configuration, because ``select`` changes the ``groups`` of its depthwise convolutions.
    """
    decays: dict[nn.Parameter, bool] = {}  # in the order of network.parameters()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decays[parameter] = decays.get(parameter, True) and _is_decayed(module, name, parameter)
    groups = [
        {"params": [p for p, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=True)


def _is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups == module.in_channels > 1  # a grey image's stem has one input channel, in one group
        return name == "weight" and not depthwise
    # For other modules the shape decides: a depthwise weight has one input channel per group.
    return parameter.dim() == 2 or (parameter.dim() >= 3 and parameter.shape[1] != 1)


def learning_rate_at(
    step: int, total: int, *, base: float, schedule: Schedule, warmup: int = 0, milestones: Sequence[float] = ()
) -> float:
    """Returns the learning rate of a step (counted from 0). It changes at every step.

    It rises linearly during ``warmup`` steps. After them, ``linear`` decreases it to 0 (as in the paper), ``cosine``
    decreases it to 0 along half a cosine, and ``multistep`` divides it by 10 at each of ``milestones``, which are
    fractions of ``total``.
    """
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return base * (1 - progress)
    if schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * progress))
    return float(base * 0.1 ** sum(step >= milestone * total for milestone in milestones))


@dataclass(frozen=True)
class Recipe:
    """The training parameters. ``pipeline.params.Training`` describes the fields."""

    epochs: int
    batch_size: int
    label_smoothing: float
    augmentation: Augmentation
    learning_rate: float
    schedule: Schedule
    milestones: Sequence[float]
    warmup_epochs: float
    momentum: float
    nesterov: bool
    weight_decay: float
    precision: Precision
    channels_last: bool

    def plan(self, data: PreparedData, context: RunContext) -> Plan:
        return Plan(self.epochs, batches_per_epoch(data, self.batch_size), context.checkpoint_every_s)

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        return sgd(
            network,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )

    def rate(self, plan: Plan) -> Callable[[int], float]:
        """Returns a function that maps each step of ``plan`` to its learning rate."""
        warmup = round(self.warmup_epochs * plan.steps_per_epoch)
        return lambda step: learning_rate_at(
            step, plan.steps, base=self.learning_rate, schedule=self.schedule, warmup=warmup, milestones=self.milestones
        )

    def batches(self, data: PreparedData, seed: int, context: RunContext) -> Batches:
        return lambda epoch, skip: train_batches(
            data,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            seed=seed,
            epoch=epoch,
            device=context.device,
            workers=context.workers,
            rank=context.world.rank,
            world_size=context.world.world_size,
            skip=skip,
        )

    def autocast(self, context: RunContext) -> Callable[[], torch.autocast]:
        return autocast(context.device, self.precision)
