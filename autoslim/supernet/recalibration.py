"""Recalibration of batch norm: running statistics for networks that leave a supernet, which keeps none."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from autoslim.channels.batches import call
from autoslim.channels.copying import evaluation_mode
from autoslim.errors import UserError
from autoslim.supernet.supernet import Supernet


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimates the running statistics of all batch norms in place, with fixed weights.

    The statistics become the plain average over ``batches`` (momentum None) of each batch's mean and unbiased variance
    (the "post-statistics" of US-Nets, section 3.2). The batches should have equal sizes and the distribution of the
    training images. Other layers run in evaluation mode. Modes and momenta are restored afterwards.

    Args:
        network: a plain network.
        batches: inputs without targets, on the network's device: a tensor such as images (N, C, H, W), a tuple or a
            list (the arguments of ``forward``) or a mapping (its keyword arguments).

    Returns:
        The number of batches used.

    Raises:
        UserError: ``batches`` is empty, or ``network`` is a supernet, which has no running statistics. The network is
            then unchanged.
    """
    if isinstance(network, Supernet):
        raise UserError(
            "a supernet uses the statistics of each batch and has no running statistics to recalibrate; recalibrate an "
            "extracted network instead: recalibrate(supernet.extract(channels), ...)"
        )
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise UserError("BN recalibration needs at least one batch of images, but batches is empty")
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    count = 0
    with evaluation_mode(network):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            for inputs in chain([first], stream):
                call(network, inputs)
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return count
