"""One file with several widths of a network, of which one is chosen at run time.

The widths share their weights, and each has batch-norm statistics of its own: the switchable networks of Yu et al.
(2019, "Slimmable neural networks", section 3.3), with the statistics of US-Nets (recalibrated, section 3.2).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.groups import Channels
from autoslim.channels.resize import resize
from autoslim.data.structure import tensor_structure, zeros
from autoslim.errors import UserError, first_line
from autoslim.export.runtimes import ABOUT
from autoslim.files import write_bytes
from autoslim.supernet.supernet import Supernet
from autoslim.tracing import trace

_WEIGHTS, _STATISTICS = "weights/", "statistics/"


class ElasticNetwork(nn.Module):
    """A network in evaluation mode whose width is chosen at run time. ``load_elastic`` makes one.

    Attributes:
        widths: the names of the widths, such as ``25%``.
        width: the selected one.
        about: the file's description: ``widths`` maps each width to its ``channels``, its ``costs`` and, in
            ``test``, the task's measures on the test split (``top1`` is a fraction); see also ``formats.description``.
    """

    def __init__(
        self, supernet: Supernet, statistics: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.about = about
        self.widths: tuple[str, ...] = tuple(about["widths"])
        self._supernet = supernet
        self._statistics = {width: dict(tensors) for width, tensors in statistics.items()}
        self.eval()
        self.select(self.widths[-1])

    def select(self, width: str) -> None:
        """Makes ``forward`` run this width, with views of the shared weights (see ``Supernet.select``).

        Raises:
            UserError: the file has no such width.
        """
        if width not in self.widths:
            raise UserError(f"there is no width {width!r}; the widths are {', '.join(self.widths)}")
        self.width = width
        self._supernet.select(self.about["widths"][width]["channels"])
        for name, tensor in self._statistics[width].items():
            path, _, attribute = name.rpartition(".")
            setattr(self._supernet.network.get_submodule(path), attribute, tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._supernet(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ElasticNetwork":
        super()._apply(fn, recurse)
        self._statistics = {
            width: {name: fn(tensor) for name, tensor in tensors.items()} for width, tensors in self._statistics.items()
        }
        self.select(self.width)
        return self


def save_elastic(
    file: Path, supernet: Supernet, networks: Mapping[str, tuple[Channels, nn.Module]], about: Mapping[str, Any]
) -> None:
    """Writes widths of a supernet to a safetensors file. Weights that no width uses are left out.

    Args:
        networks: name of each width -> its channels, and the network extracted from the supernet with recalibrated
            batch norms.
        about: the description, with an entry for each width in ``widths``.
    """
    widest = _widest(channels for channels, _ in networks.values())
    shared = supernet.extract(widest)
    own = _statistics(shared)
    tensors = {_WEIGHTS + name: tensor for name, tensor in named_tensors(shared).items() if name not in own}
    for width, (_, network) in networks.items():
        tensors |= {f"{_STATISTICS}{width}/{name}": tensor for name, tensor in _statistics(network).items()}
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_bytes(file, safetensors.torch.save(plain, metadata={ABOUT: json.dumps(about)}))


def load_elastic(
    build: Callable[[], nn.Module], file: str | Path, *, leaves: Iterable[str] = (), part: str = ""
) -> ElasticNetwork:
    """Returns the network in a file that ``autoslim export --elastic`` wrote, on the CPU, at its last width.

    Args:
        build: returns the network that was traced before slimming, such as ``lambda: MyNetwork(num_classes=10)``. Its
            weights are replaced.
        leaves: as in ``trace``.
        part: as in ``trace``.

    Raises:
        UserError: the file is missing or damaged, or belongs to another network.
    """
    about, tensors = _read(Path(file))
    network = build()
    described = about["input"]
    structure = described.get("structure") or tensor_structure(*described["shape"])
    graph = trace(network, zeros(structure, 1), leaves=leaves, part=part)
    configurations = [width["channels"] for width in about["widths"].values()]
    for channels in configurations:
        if channels.keys() != graph.groups.keys():
            raise _other_network(file, network)
    shared = resize(network, graph, _widest(configurations), seed=None)
    weights = {name.removeprefix(_WEIGHTS): t for name, t in tensors.items() if name.startswith(_WEIGHTS)}
    own = _statistics(shared)
    expected = {name: tensor.shape for name, tensor in named_tensors(shared).items() if name not in own}
    if expected != {name: tensor.shape for name, tensor in weights.items()}:
        raise _other_network(file, network)
    statistics: dict[str, dict[str, Tensor]] = {width: {} for width in about["widths"]}
    for name, tensor in tensors.items():
        if name.startswith(_STATISTICS):
            width, _, statistic = name.removeprefix(_STATISTICS).partition("/")
            statistics[width][statistic] = tensor
    loaded = copy_with(shared, lambda name, tensor: weights.get(name, tensor))
    return ElasticNetwork(Supernet(loaded, graph), statistics, about)


def _widest(configurations: Iterable[Channels]) -> Channels:
    """Returns the largest number of channels of each group."""
    widest: Channels = {}
    for channels in configurations:
        widest = {name: max(count, widest.get(name, 0)) for name, count in channels.items()}
    return widest


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    """Returns the running means and variances of the batch norms, and their counters."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, tensor in module.named_buffers(recurse=False)
    }


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no network at {file}; write it with `autoslim export --elastic`") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(
            f"{file} is damaged ({first_line(error)}); write it with `autoslim export --elastic`"
        ) from error
    if "widths" not in about:
        raise UserError(f"{file} has no widths; write it with `autoslim export --elastic`")
    return about, tensors


def _other_network(file: str | Path, network: nn.Module) -> UserError:
    return UserError(
        f"{file} belongs to another network than {type(network).__name__}; pass the constructor of the network that "
        "was slimmed"
    )
