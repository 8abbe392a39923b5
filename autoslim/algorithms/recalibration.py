"""BN recalibration: running statistics for weights that were trained without them."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from autoslim.vocabulary.errors import UserError


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Re-estimates the running statistics of all batch norms, in place, with fixed weights; returns the batches used.

    The statistics become the plain average over ``batches`` (momentum None) of each batch's mean and unbiased variance:
    US-Nets' "post-statistics". Batches of equal size, drawn from the training images, are expected.
    Other layers run in evaluation mode. The modules' modes and momenta are given back as they were.

    Raises:
        UserError: there is no batch. The network is as it was.
    """
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise UserError("BN recalibration got no batch of images; give at least one")
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    count = 0
    try:
        for images in chain([first], stream):
            network(images)
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return count
