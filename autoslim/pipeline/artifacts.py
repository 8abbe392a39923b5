"""Files that one stage writes and another reads: each method's channels, its budget and its initial weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from autoslim.channels.groups import Channels
from autoslim.errors import UserError, first_line
from autoslim.files import read_json, write_sealed
from autoslim.pipeline.params import check_method
from autoslim.training.checkpoints import check_described, save_weights

Start = Literal["scratch", "supernet", "weights", "trained"]


@dataclass(frozen=True)
class Allocation:
    """The channels that a method chose, their costs in closed form, and the weights that the network starts from.

    Attributes:
        method: name of the method.
        channels: the configuration.
        costs: resource -> amount in its unit.
        start: networks that start from ``scratch``, the ``supernet`` or the ``weights`` of ``model.weights`` are
            retrained; ``trained`` is the user's network with ``model.weights``, which is not retrained.
        weights: the digest of the initial weights (see ``weights_digest``). "" in files of earlier versions.
    """

    method: str
    channels: Channels
    costs: dict[str, float]
    start: Start
    weights: str = ""

    def origin(self, data: str) -> dict[str, str]:
        """Returns what identifies retrained networks besides their seed, for the metadata of their files.

        Args:
            data: ``data_digest`` of the prepared data.
        """
        return {"data": data} | ({"initial weights": self.weights} if self.weights else {})

    def write(self, folder: Path) -> None:
        write_sealed(folder / f"{self.method}.json", dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path, method: str) -> "Allocation":
        """Reads the file that ``write`` wrote.

        Raises:
            UserError: there is no such method, or the file is missing or damaged.
        """
        check_method(method)  # it becomes a part of paths
        path = folder / f"{method}.json"
        if not path.exists():
            raise UserError(f"there are no channels of method {method!r} at {path}; run `dvc repro allocate`")
        content = read_json(path, "allocate")
        try:
            allocation = cls(**content)
            if allocation.method != method:
                raise TypeError(f"it contains the channels of {allocation.method!r}")
            for values, kinds in ((allocation.channels, {int}), (allocation.costs, {int, float})):
                for name, value in values.items():
                    if type(value) not in kinds:
                        raise TypeError(f"{name} is {value!r}")
            if allocation.start not in get_args(Start):
                raise TypeError(f"start is {allocation.start!r}")
            if not isinstance(allocation.weights, str):
                raise TypeError(f"weights is {allocation.weights!r}")
        except (TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); run `dvc repro allocate` again") from error
        return allocation


@dataclass(frozen=True)
class RequestedBudget:
    """The budget for which a method's channels were chosen, as the user wrote it, and the resources that it limits."""

    budget: str
    resource: str

    @staticmethod
    def write(folder: Path, methods: Mapping[str, "RequestedBudget"]) -> None:
        """Writes the budgets to a separate file, so that channels that fit a new budget too are not retrained."""
        write_sealed(
            folder / "budgets.json", {method: dataclasses.asdict(requested) for method, requested in methods.items()}
        )

    @classmethod
    def read(cls, folder: Path, method: str) -> "RequestedBudget":
        """Reads the file that ``write`` wrote.

        Raises:
            UserError: the file is missing, damaged, or lacks the method.
        """
        path = folder / "budgets.json"
        if not path.exists():
            raise UserError(f"there are no budgets at {path}; run `dvc repro allocate`")
        budgets = read_json(path, "allocate")
        if method not in budgets:
            raise UserError(
                f"the channels of method {method!r} were not chosen for the latest budget; run `dvc repro allocate`"
            )
        try:
            return cls(**budgets[method])
        except TypeError as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); run `dvc repro allocate` again") from error


def write_initial_weights(folder: Path, method: str, network: nn.Module | None) -> str:
    """Writes the weights that retraining starts from, and returns their digest (see ``weights_digest``).

    From scratch the file is empty: DVC requires it to exist.
    """
    return save_weights(network, folder / f"{method}.safetensors")


def initial_weights_file(folder: Path, method: str, digest: str = "") -> Path:
    """Returns the file that ``write_initial_weights`` wrote.

    Args:
        digest: ``Allocation.weights`` of the method.

    Raises:
        UserError: the file does not exist, or is not that of the method's channels.
    """
    path = folder / f"{method}.safetensors"
    if not path.exists():
        raise UserError(f"the initial weights of method {method!r} do not exist ({path}); run `dvc repro allocate`")
    check_described(path, digest, folder / f"{method}.json")
    return path
