"""The files that stages hand to one another: a supernet, and the channels that methods chose."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autoslim.engine.checkpoints import write_atomically, write_json
from autoslim.networks.graph import ChannelGraph
from autoslim.networks.resizing import resize
from autoslim.networks.supernet import Supernet
from autoslim.vocabulary.channels import Channels
from autoslim.vocabulary.errors import UserError, first_line


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes parameters and buffers as safetensors, in torch's default memory layout; shared ones under each name."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }
    write_atomically(path, lambda to: save_file(state, to))


def load_weights(network: nn.Module, path: Path) -> None:
    """Reads what ``save_weights`` wrote, in place.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise UserError(
            f"there are no weights at {path}; run `dvc repro`, or `dvc pull` if others made them"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} does not hold weights of this network: {reason[min(1, len(reason) - 1)].strip()}; run `dvc repro`"
        ) from error


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


@dataclass(frozen=True)
class Allocation:
    """The channels that a method gives, and what they take by closed form. Retraining depends on these alone."""

    method: str
    channels: Channels
    costs: dict[str, float]

    def write(self, folder: Path) -> None:
        write_json(folder / f"{self.method}.json", dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path, method: str) -> "Allocation":
        """Reads what ``write`` wrote.

        Raises:
            UserError: there is none, or its file is damaged.
        """
        path = folder / f"{method}.json"
        if not path.exists():
            raise UserError(f"there are no channels of method {method!r} at {path}; run `dvc repro allocate`")
        written = read_json(path, "allocate")
        try:
            read = cls(**written)
            for values, kinds in ((read.channels, int), (read.costs, (int, float))):
                for name, value in values.items():
                    if not isinstance(value, kinds):
                        raise TypeError(f"{name} is {value!r}")
        except (TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not the file of an allocation ({first_line(error)}); run `dvc repro allocate`"
            ) from error
        return read


@dataclass(frozen=True)
class Asked:
    """What a method's channels were chosen for: a budget as people write it, and the resources that it bounds."""

    budget: str
    resource: str

    @staticmethod
    def write(folder: Path, methods: Mapping[str, "Asked"]) -> None:
        """Beside the channels, and not in their files: the same channels for another budget are not retrained."""
        write_json(folder / "budgets.json", {method: dataclasses.asdict(asked) for method, asked in methods.items()})

    @classmethod
    def read(cls, folder: Path, method: str) -> "Asked":
        """Reads what ``write`` wrote.

        Raises:
            UserError: there is none, or its file is damaged.
        """
        path = folder / "budgets.json"
        if not path.exists():
            raise UserError(f"there are no budgets at {path}; run `dvc repro allocate`")
        known = read_json(path, "allocate")
        if method not in known:
            raise UserError(f"the channels of method {method!r} are not of the last budget; run `dvc repro allocate`")
        try:
            return cls(**known[method])
        except TypeError as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); run `dvc repro allocate` again") from error


def write_start(folder: Path, method: str, network: nn.Module | None) -> None:
    """Writes the weights that a retraining starts from; for new ones, a file that holds none: DVC looks for it."""
    path = folder / f"{method}.safetensors"
    if network is None:
        write_atomically(path, lambda to: save_file({}, to))
    else:
        save_weights(network, path)


def start_file(folder: Path, method: str) -> Path:
    """What ``write_start`` wrote.

    Raises:
        UserError: it did not.
    """
    path = folder / f"{method}.safetensors"
    if not path.exists():
        raise UserError(f"what method {method!r} starts from is not there ({path}); run `dvc repro allocate`")
    return path


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """The mapping in the file that a stage wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); run `dvc repro {stage}` again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds no mapping); run `dvc repro {stage}` again")
    return values
