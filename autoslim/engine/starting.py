"""Networks cut out of the supernet, for retraining to start from."""

from collections.abc import Callable

from torch import nn

from autoslim.algorithms.recalibration import recalibrate
from autoslim.engine.chunks import search_chunks
from autoslim.engine.data import PreparedData
from autoslim.engine.runtime import Machine, to_device
from autoslim.networks.supernet import Supernet
from autoslim.vocabulary.channels import Channels

STATISTICS_IMAGES = 2048  # of the search split: training images with the evaluation transform
STATISTICS_CHUNK = 256


def subnets_of(
    supernet: Supernet, data: PreparedData, machine: Machine, *, seed: int
) -> Callable[[Channels], nn.Module]:
    """A function that cuts networks out of ``supernet`` (moved to the device), with running statistics of their own."""
    to_device(supernet, machine.device, channels_last=True)
    chunks = search_chunks(data, machine, images=STATISTICS_IMAGES, chunk=STATISTICS_CHUNK, seed=seed)

    def cut(channels: Channels) -> nn.Module:
        network = supernet.extract(channels)
        recalibrate(network, (images for images, _ in chunks))
        return network

    return cut
