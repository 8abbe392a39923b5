"""Training with a teacher: a trained network whose outputs are a part of the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoslim.channels.batches import call
from autoslim.errors import UserError
from autoslim.tasks.classification import soft_cross_entropy
from autoslim.training.loop import Step


@dataclass(frozen=True)
class Teacher:
    """A trained network and how much of it the loss contains (Hinton et al., arXiv 1503.02531, section 2).

    The loss of a batch is (1 - w) * loss(output, labels) + w * T**2 * distillation(output / T, teacher output / T) with
    w = ``weight`` and T = ``temperature``. The teacher, in evaluation mode, sees the same augmented images as the
    network (Beyer et al., arXiv 2106.05237).

    Attributes:
        network: the trained network. It is not trained.
        weight: share of the teacher in the loss, in (0, 1].
        temperature: both networks' outputs are divided by it.
    """

    network: nn.Module
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raises ``UserError`` for values out of range."""
        if not 0 < self.weight <= 1:
            raise UserError(f"teacher weight {self.weight} is not possible; use a share above 0 and up to 1")
        if not self.temperature > 0:
            raise UserError(f"teacher temperature {self.temperature} is not possible; use a number above 0, such as 1")


def taught_step(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    teacher: Teacher,
    autocast: Callable[[], torch.autocast],
    distillation: Callable[[Any, Any], Tensor] = soft_cross_entropy,
) -> Step:
    """Returns the step function of training with a teacher. The teacher must be on the device of ``network``.

    Args:
        loss: returns a scalar for (output, targets).
        distillation: returns a scalar for (output, output of the teacher).
    """
    weight, temperature = teacher.weight, teacher.temperature
    teaching = teacher.network.eval()

    def softened(outputs: Any) -> Any:
        return tree_map(lambda value: value / temperature if isinstance(value, Tensor) else value, outputs)

    def step(inputs: Any, targets: Any, _: int) -> Tensor:
        with autocast():
            with torch.no_grad():
                taught = softened(call(teaching, inputs))
            output = call(network, inputs)
            learned = temperature**2 * distillation(softened(output), taught)
            value = weight * learned + (1 - weight) * loss(output, targets)
        value.backward()
        return value.detach()

    return step
