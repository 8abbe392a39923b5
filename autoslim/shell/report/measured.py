"""What a plain network takes on the machine at hand."""

from dataclasses import dataclass

import torch
from torch import nn

from autoslim.algorithms.latency import Target
from autoslim.engine.latency import latency_of
from autoslim.engine.memory_use import memory_of


@dataclass(frozen=True)
class Measured:
    """A plain network on the machine at hand: milliseconds of a forward pass (median and quartiles), and the bytes that
    it holds at once."""

    latency: float
    latency_low: float
    latency_high: float
    memory: int


def measure_network(network: nn.Module, input_shape: tuple[int, ...], target: Target) -> Measured:
    """A plain network's latency and memory on the machine at hand, which ``target`` is."""
    images = torch.ones(target.batch, *input_shape)
    time = latency_of(network, [images], target)
    device = next(network.parameters()).device
    held = memory_of(network.float(), torch.ones(1, *input_shape, device=device))
    return Measured(time.median, time.low, time.high, held)
