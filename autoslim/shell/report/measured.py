"""What a plain network takes on the machine at hand."""

from dataclasses import dataclass

import torch
from torch import nn

from autoslim.engine.latency import latency_of
from autoslim.engine.memory_use import memory_of
from autoslim.shell.params import Latency
from autoslim.shell.targets import latency_target


@dataclass(frozen=True)
class Measured:
    """A plain network on the machine at hand: milliseconds of a forward pass (median and quartiles), and the bytes that
    it holds at once."""

    latency: float
    latency_low: float
    latency_high: float
    memory: int


def measure_network(network: nn.Module, input_shape: tuple[int, ...], asked: Latency) -> Measured:
    """A plain network's latency and memory on the machine at hand."""
    target = latency_target(asked)
    images = torch.ones(target.batch, *input_shape)
    time = latency_of(network, [images], target)
    device = next(network.parameters()).device
    held = memory_of(network.float(), torch.ones(1, *input_shape, device=device))
    return Measured(time.median, time.low, time.high, held)
