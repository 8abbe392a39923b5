"""A training recipe: everything that both trainings share, as plain values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoslim.engine.data import Augmentation, PreparedData, batches_per_epoch, train_batches
from autoslim.engine.optimisation import Schedule, learning_rate_at, sgd
from autoslim.engine.runtime import Machine, Precision, autocast
from autoslim.engine.training import Batches, Plan


@dataclass(frozen=True)
class Recipe:
    """See ``shell.params.Training`` for the fields."""

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

    def plan(self, data: PreparedData, machine: Machine) -> Plan:
        return Plan(self.epochs, batches_per_epoch(data, self.batch_size), machine.checkpoint_every_s)

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        return sgd(
            network,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )

    def rate(self, plan: Plan) -> Callable[[int], float]:
        """The learning rate of each step of ``plan``."""
        warmup = round(self.warmup_epochs * plan.steps_per_epoch)
        return lambda step: learning_rate_at(
            step, plan.steps, base=self.learning_rate, schedule=self.schedule, warmup=warmup, milestones=self.milestones
        )

    def batches(self, data: PreparedData, seed: int, machine: Machine) -> Batches:
        return lambda epoch, skip: train_batches(
            data,
            batch_size=self.batch_size,
            augmentation=self.augmentation,
            seed=seed,
            epoch=epoch,
            device=machine.device,
            workers=machine.workers,
            rank=machine.processes.rank,
            world_size=machine.processes.size,
            skip=skip,
        )

    def autocast(self, machine: Machine) -> Callable[[], torch.autocast]:
        return autocast(machine.device, self.precision)
