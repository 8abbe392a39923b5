"""The training recipe: optimiser, learning rate schedule and batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from autoslim.data.augmentation import Augmentation
from autoslim.data.batches import batches_per_epoch, train_batches
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.training.averaging import check_decay
from autoslim.training.device import Precision, RunContext, autocast
from autoslim.training.loop import Batches, Plan

Schedule = Literal["linear", "cosine", "multistep"]
OptimiserName = Literal["sgd", "adamw"]


def sgd(
    network: nn.Module, *, learning_rate: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.SGD:
    """Returns SGD with weight decay on the weights that ``decay_groups`` names."""
    groups = decay_groups(network, weight_decay)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=True)


def adamw(
    network: nn.Module, *, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Returns AdamW (Loshchilov and Hutter, arXiv 1711.05101) with weight decay on the weights of ``decay_groups``."""
    return torch.optim.AdamW(decay_groups(network, weight_decay), lr=learning_rate, betas=betas, eps=eps, fused=True)


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns groups of parameters of which only the weights of dense convolutions and linear layers are decayed.

    Depthwise convolutions, biases and normalisation layers are not decayed, as in the authors' training. A supernet
    must be at its widest configuration, because ``select`` changes the ``groups`` of its depthwise convolutions.
    """
    decays: dict[nn.Parameter, bool] = {}  # in the order of network.parameters()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decays[parameter] = decays.get(parameter, True) and _is_decayed(module, name, parameter)
    return [
        {"params": [p for p, decay in decays.items() if decay], "weight_decay": weight_decay},
        {"params": [p for p, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]


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
    """The training parameters. ``pipeline.params.Training`` describes the fields.

    ``momentum`` and ``nesterov`` belong to the optimiser ``sgd``, ``betas`` and ``eps`` to ``adamw``.
    """

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
    optimiser_name: OptimiserName = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        """Raises ``UserError`` for values out of range."""
        if self.optimiser_name not in get_args(OptimiserName):
            raise UserError(
                f"optimiser_name {self.optimiser_name!r} does not exist; use {' or '.join(get_args(OptimiserName))}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"clip_norm {self.clip_norm} is not possible; use a norm above 0, or None for no clipping")
        if self.ema is not None:
            check_decay(self.ema)

    def plan(self, data: PreparedData, context: RunContext) -> Plan:
        return Plan(self.epochs, batches_per_epoch(data, self.batch_size), context.checkpoint_every_s)

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        if self.optimiser_name == "adamw":
            return adamw(
                network,
                learning_rate=self.learning_rate,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
            )
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
