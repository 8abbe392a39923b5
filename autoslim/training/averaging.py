"""The exponential moving average of a network's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from autoslim.errors import UserError


def check_decay(decay: float) -> None:
    """Raises ``UserError`` unless ``decay`` is between 0 and 1: with 1, the average would stay at the first weights."""
    if not 0 < decay < 1:
        raise UserError(f"ema {decay} is not possible; use a decay between 0 and 1, such as 0.999, or None for none")


class AveragedWeights:
    """The exponential moving average of the parameters and floating-point buffers of ``network``.

    After step n (from 1), average = d * average + (1 - d) * weights with d = min(``decay``, (1 + n) / (10 + n)), as in
    TensorFlow's ExponentialMovingAverage, so that the average of a short training is not that of its first weights.
    Buffers of other dtypes, such as the numbers of batches that batch norms have seen, are copied.

    torch's AveragedModel is not used, because it copies the network, and a supernet has views of its weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        check_decay(decay)
        self.decay, self.steps = decay, 0
        self.tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Adds the current weights of ``network``, after a step of its optimiser."""
        self.steps += 1
        current = network.state_dict()
        averaged = [name for name, tensor in current.items() if tensor.is_floating_point()]
        average = get_ema_multi_avg_fn(min(self.decay, (1 + self.steps) / (10 + self.steps)))
        average([self.tensors[name] for name in averaged], [current[name] for name in averaged], self.steps)
        for name in current.keys() - {*averaged}:
            self.tensors[name].copy_(current[name])

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Replaces the weights of ``network`` by the average, in place."""
        for name, tensor in network.state_dict().items():
            tensor.copy_(self.tensors[name])

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Replaces the weights of ``network`` by the average within the context."""
        weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.copy_to(network)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in network.state_dict().items():
                    tensor.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        """Returns what ``load`` restores."""
        return {"steps": self.steps, "tensors": self.tensors}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Restores the average.

        Raises:
            ValueError: ``state`` belongs to another network. Nothing is changed.
        """
        tensors: Mapping[str, Tensor] = state["tensors"]
        shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (tensors, self.tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError("its averaged weights are those of another network")
        self.steps = int(state["steps"])
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
