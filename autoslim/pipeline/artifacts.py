"""The files that stages hand to each other: the channels of each method and the weights to start from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from autoslim.channels.groups import Channels
from autoslim.errors import UserError, first_line
from autoslim.training.checkpoints import read_json, save_weights, write_atomically, write_json


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
class RequestedBudget:
    """What a method's channels were chosen for: a budget as people write it, and the resources that it bounds."""

    budget: str
    resource: str

    @staticmethod
    def write(folder: Path, methods: Mapping[str, "RequestedBudget"]) -> None:
        """Beside the channels, and not in their files: the same channels for another budget are not retrained."""
        write_json(folder / "budgets.json", {method: dataclasses.asdict(asked) for method, asked in methods.items()})

    @classmethod
    def read(cls, folder: Path, method: str) -> "RequestedBudget":
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


def write_initial_weights(folder: Path, method: str, network: nn.Module | None) -> None:
    """Writes the weights that a retraining starts from; for new ones, a file that holds none: DVC looks for it."""
    path = folder / f"{method}.safetensors"
    if network is None:
        write_atomically(path, lambda to: save_file({}, to))
    else:
        save_weights(network, path)


def initial_weights_file(folder: Path, method: str) -> Path:
    """What ``write_initial_weights`` wrote.

    Raises:
        UserError: it did not.
    """
    path = folder / f"{method}.safetensors"
    if not path.exists():
        raise UserError(f"what method {method!r} starts from is not there ({path}); run `dvc repro allocate`")
    return path
