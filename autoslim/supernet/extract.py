"""Loads a trained supernet, and extracts networks with recalibrated batch norms from it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.channels.resize import resize
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError, first_line
from autoslim.files import read_json, write_sealed
from autoslim.supernet.recalibration import recalibrate
from autoslim.supernet.supernet import Supernet
from autoslim.training.checkpoints import check_described, load_weights, save_weights
from autoslim.training.device import RunContext, to_device

RECALIBRATION_IMAGES = 2048
RECALIBRATION_CHUNK = 256


@dataclass(frozen=True)
class SupernetFile:
    """The contents of ``supernet.json``, which describes the weights in the same folder.

    Attributes:
        network: name of the default network.
        input_shape: (C, H, W), see ``ChannelGraph.input_shape``.
        grid: the grid that the supernet spans.
        default: the configuration of the default network.
        weights: ``weights_digest`` of the weights. "" in files of earlier versions.
        data: the digest of the data that they were trained on, see ``PreparedData.digest``; "" likewise.
    """

    network: str
    input_shape: tuple[Any, ...]
    grid: Grid
    default: Channels
    weights: str = ""
    data: str = ""

    def write(self, folder: Path) -> None:
        write_sealed(folder / "supernet.json", {"format": 1, **dataclasses.asdict(self)})

    @staticmethod
    def write_none(folder: Path) -> None:
        """Writes the files of a folder without a supernet."""
        save_weights(None, folder / "weights.safetensors")
        write_sealed(folder / "supernet.json", {})

    @classmethod
    def read(cls, folder: Path) -> "SupernetFile":
        """Reads the file that ``write`` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = folder / "supernet.json"
        if not path.exists():
            raise UserError(f"there is no supernet at {folder}; run `dvc repro supernet`")
        values = read_json(path, "supernet")
        if not values:
            raise UserError(
                f"{folder} contains no supernet, because no method of params.yaml needs one; add autoslim to methods, "
                "and run `dvc repro`"
            )
        try:
            return cls(
                values["network"],
                tuple(values["input_shape"]),
                Grid(values["grid"]),
                values["default"],
                values.get("weights", ""),
                values.get("data", ""),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is not the file of a supernet ({first_line(error)}); run `dvc repro supernet`"
            ) from error


def load_supernet(
    folder: Path, network: nn.Module, graph: ChannelGraph, data: PreparedData | None = None
) -> tuple[Supernet, SupernetFile]:
    """Loads the supernet of ``network`` that the stage ``supernet`` wrote to ``folder``.

    Args:
        data: the data that it must have been trained on; None for any.

    Raises:
        UserError: there is no supernet, it belongs to another network or other data, or its files are of several runs.
    """
    file = SupernetFile.read(folder)
    if file.default != graph.default or file.input_shape != graph.input_shape:
        raise UserError(
            f"{folder} contains the supernet of another network ({file.network}, {len(file.default)} groups, "
            f"input {list(file.input_shape)}); params.yaml names one with {len(graph.groups)} groups and input "
            f"{list(graph.input_shape)}{_difference(file.default, graph.default)}: run `dvc repro supernet`"
        )
    supernet = Supernet(resize(network, graph, file.grid.widest, seed=None), graph)
    weights = folder / "weights.safetensors"
    load_weights(supernet.network, weights)
    check_described(weights, file.weights, folder / "supernet.json")
    if data is not None and (file.data or data.digest) != data.digest:
        raise UserError(
            f"{folder} contains a supernet that was trained on other data than those in {data.folder}; run `dvc repro`"
        )
    return supernet, file


def _difference(stored: Channels, current: Channels) -> str:
    """Returns a description of the first group whose size differs between two default networks; "" if none does."""
    for name, size in stored.items():
        if current.get(name, size) != size:
            return f" ({name} has {size} channels there and {current[name]} here)"
    return ""


def subnet_extractor(
    supernet: Supernet, data: PreparedData, context: RunContext, *, seed: int
) -> Callable[[Channels], nn.Module]:
    """Returns a function that extracts networks from ``supernet`` and recalibrates their batch norms.

    The supernet is moved to the device.
    """
    to_device(supernet, context.device, channels_last=True)
    recalibrated = recalibrator(data, context, seed=seed)
    return lambda channels: recalibrated(supernet.extract(channels))


def recalibrator(data: PreparedData, context: RunContext, *, seed: int) -> Callable[[nn.Module], nn.Module]:
    """Returns a function that recalibrates the batch norms of a network on the device, in place, and returns it.

    It uses images of the search split, which are training images under the evaluation transform.
    """
    chunks = search_chunks(
        data,
        images=RECALIBRATION_IMAGES,
        chunk=RECALIBRATION_CHUNK,
        seed=seed,
        device=context.device,
        workers=context.workers,
    )

    def recalibrated(network: nn.Module) -> nn.Module:
        recalibrate(network, (images for images, _ in chunks))
        return network

    return recalibrated
