"""A trained supernet on disk, and networks extracted from it."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from autoslim.channels.copying import evaluation_mode
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.channels.resize import resize
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError, first_line
from autoslim.supernet.supernet import Supernet
from autoslim.training.checkpoints import load_weights, read_json, write_json
from autoslim.training.device import RunContext, to_device


@dataclass(frozen=True)
class SupernetFile:
    """What ``supernet.json`` says beside the weights."""

    network: str
    input_shape: tuple[int, ...]
    grid: dict[str, tuple[int, ...]]
    default: Channels

    def write(self, folder: Path) -> None:
        write_json(folder / "supernet.json", {"format": 1, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "SupernetFile":
        """Reads what ``write`` wrote.

        Raises:
            UserError: there is no supernet, or its file is damaged.
        """
        path = folder / "supernet.json"
        if not path.exists():
            raise UserError(f"there is no supernet at {folder}; run `dvc repro supernet`")
        values = read_json(path, "supernet")
        try:
            return cls(
                values["network"],
                tuple(values["input_shape"]),
                {name: tuple(levels) for name, levels in values["grid"].items()},
                values["default"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not the file of a supernet ({first_line(error)}); run `dvc repro supernet`"
            ) from error


def load_supernet(folder: Path, network: nn.Module, graph: ChannelGraph) -> tuple[Supernet, SupernetFile]:
    """The supernet that the stage wrote, for the network that the parameters name.

    Raises:
        UserError: there is none, or it is of another network.
    """
    file = SupernetFile.read(folder)
    if file.default != graph.default or file.input_shape != graph.input_shape:
        raise UserError(
            f"{folder} holds a supernet of another network ({file.network}, {len(file.default)} groups, "
            f"input {list(file.input_shape)}); the parameters name one with {len(graph.groups)} groups and input "
            f"{list(graph.input_shape)}{_difference(file.default, graph.default)}: run `dvc repro supernet`"
        )
    supernet = Supernet(resize(network, graph, {name: levels[0] for name, levels in file.grid.items()}), graph)
    load_weights(supernet.network, folder / "weights.safetensors")
    return supernet, file


def _difference(there: Channels, here: Channels) -> str:
    """The first group that two default networks have at different sizes, for a message."""
    for name, size in there.items():
        if here.get(name, size) != size:
            return f" ({name} has {size} channels there and {here[name]} here)"
    return ""


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


STATISTICS_IMAGES = 2048  # of the search split: training images with the evaluation transform
STATISTICS_CHUNK = 256


def subnet_extractor(
    supernet: Supernet, data: PreparedData, context: RunContext, *, seed: int
) -> Callable[[Channels], nn.Module]:
    """A function that cuts networks out of ``supernet`` (moved to the device), with running statistics of their own."""
    to_device(supernet, context.device, channels_last=True)
    chunks = search_chunks(
        data,
        images=STATISTICS_IMAGES,
        chunk=STATISTICS_CHUNK,
        seed=seed,
        device=context.device,
        workers=context.workers,
    )

    def cut(channels: Channels) -> nn.Module:
        network = supernet.extract(channels)
        recalibrate(network, (images for images, _ in chunks))
        return network

    return cut
