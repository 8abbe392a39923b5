"""BN recalibration: running statistics for weights that were trained without them."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from autoslim.networks.modes import evaluation_mode
from autoslim.networks.supernet import Supernet
from autoslim.vocabulary.errors import UserError


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Re-estimates the running statistics of all batch norms, in place, with fixed weights; returns the batches used.

    The statistics become the plain average over ``batches`` (momentum None) of each batch's mean and unbiased variance:
    US-Nets' "post-statistics". Batches of equal size, drawn from the training images, are expected.
    Other layers run in evaluation mode. The modules' modes and momenta are given back as they were.

    Raises:
        UserError: there is no batch, or the network is a supernet, which has no running statistics. It is as it was.
    """
    if isinstance(network, Supernet):
        raise UserError(
            "a supernet uses the statistics of each batch and has none to recalibrate; recalibrate a network cut out "
            "of it, recalibrate(supernet.extract(channels), ...)"
        )
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise UserError("BN recalibration got no batch of images; give at least one")
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
            for images in chain([first], stream):
                network(images)
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return count
