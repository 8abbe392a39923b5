"""What a retraining starts from, where that is the supernet's weights."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from autoslim.algorithms.recalibration import recalibrate
from autoslim.engine.artifacts import save_weights
from autoslim.engine.checkpoints import write_atomically
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


def write_start(path: Path, network: nn.Module | None) -> None:
    """Writes the weights that a retraining starts from; for new ones, a file that holds none: DVC looks for it."""
    if network is None:
        write_atomically(path, lambda to: save_file({}, to))
    else:
        save_weights(network, path)
