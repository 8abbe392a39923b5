"""Networks cut out of a supernet, their files, and latency tables."""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoslim.channels.batches import Batch, device_of, on_device
from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.channels.resize import current_channels
from autoslim.errors import UserError, first_line
from autoslim.files import DamagedError, parse_json, unsealed, write_atomically, write_sealed
from autoslim.resources.latency.backends import check_runtime
from autoslim.resources.latency.measure import current_target, measure_table
from autoslim.resources.latency.table import LatencyTable
from autoslim.supernet.recalibration import recalibrate
from autoslim.supernet.supernet import Supernet

FORMAT = "1"


def extract_network(
    supernet: Supernet, channels: Mapping[str, int], batches: Iterable[Batch], *, count: int | None = None
) -> nn.Module:
    """Returns a plain network with ``channels`` of the supernet, with recalibrated batch norms.

    It is in evaluation mode, on the supernet's device, and shares no memory with the supernet (see ``Supernet.extract``
    and ``recalibrate``).

    Args:
        batches: pairs (inputs, targets) of training data; targets are not used.
        count: number of batches to use. By default, all are used; about 2,000 samples are enough.

    Raises:
        UserError: ``channels`` do not fit the supernet, or there is no batch.
    """
    network = supernet.extract(channels)
    pairs = on_device(islice(batches, count), device_of(network))
    recalibrate(network, (inputs for inputs, _ in pairs))
    return network.eval()


def save_network(network: nn.Module, graph: ChannelGraph, file: str | Path) -> None:
    """Writes the weights and the channels of a slimmed network to a safetensors file.

    Args:
        network: a network that ``resize``, ``extract_network`` or ``slim`` returned, possibly trained further.
        graph: the graph of the network that was traced.

    Raises:
        UserError: ``network`` does not fit the graph.
    """
    channels = current_channels(network, graph)
    attributes = [[item.module, item.name, item.value(channels)] for item in graph.attributes]
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in named_tensors(network).items()
    }
    content = {"format": FORMAT, "channels": json.dumps(channels), "attributes": json.dumps(attributes)}
    write_atomically(Path(file), lambda temporary: save_file(tensors, temporary, metadata=content))


def load_network(build: Callable[[], nn.Module], file: str | Path) -> nn.Module:
    """Returns the slimmed network that ``save_network`` wrote, on the CPU and in evaluation mode.

    Args:
        build: returns the network that was traced before slimming, such as ``lambda: MyNetwork(num_classes=10)``. Its
            weights are replaced.

    Raises:
        UserError: the file is missing or damaged, or belongs to another network.
    """
    content, tensors = _read(Path(file))
    network = build()
    present = named_tensors(network)
    if different := sorted(present.keys() ^ tensors.keys()):
        raise UserError(
            f"{file} belongs to another network: {different[0]} is only in "
            f"{'the file' if different[0] in tensors else type(network).__name__}; pass the constructor of the network "
            "that was slimmed"
        )

    def replace(name: str, tensor: Tensor) -> Tensor:
        if name not in tensors:
            return tensor  # a plain attribute of a module
        if tensor.dim() != tensors[name].dim():
            raise UserError(
                f"{file} belongs to another network: {name} has {tensors[name].dim()} dimensions there, and "
                f"{tensor.dim()} in {type(network).__name__}; pass the constructor of the network that was slimmed"
            )
        return tensors[name]

    network = copy_with(network, replace)
    for module, name, value in content["attributes"]:
        setattr(network.get_submodule(module), name, tuple(value) if isinstance(value, list) else value)
    return network.eval()


def saved_channels(file: str | Path) -> Channels:
    """Returns the channels of the slimmed network that ``save_network`` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    channels: Channels = _read(Path(file))[0]["channels"]
    return channels


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise UserError(f"{file} is not a network of this version of autoslim; write it with save_network")
        return {name: parse_json(metadata[name]) for name in ("channels", "attributes")}, tensors
    except FileNotFoundError as error:
        raise UserError(f"there is no network at {file}; write it with save_network") from error
    except (SafetensorError, KeyError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{file} is not a network of autoslim ({reason}); write it with save_network") from error


def measure_latency_table(
    network: nn.Module,
    graph: ChannelGraph,
    grid: Grid,
    *,
    file: str | Path | None = None,
    device: str | torch.device = "cpu",
    runtime: str = "eager",
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    channels_last: bool = False,
    points: int | None = 6,
    check_networks: int = 30,
) -> LatencyTable:
    """Measures the latency of the network's kernels over the grid on this machine (see ``autoslim.resources.latency``).

    Do not run anything else at the same time. ``table.summary()`` describes the accuracy of the predictions, and
    ``table.reliable`` is False if they do not rank networks as measured.

    Args:
        network: the network that was traced.
        file: a JSON file to write the table to.
        device: the device that runs the network.
        runtime: ``eager``, ``compile``, ``onnxruntime``, ``openvino`` or ``tensorrt`` (not tested).
        threads: threads of the CPU.
        batch: samples in a forward pass.
        precision: ``fp32``, ``bf16`` (eager, compile) or ``int8`` (onnxruntime, openvino).
        channels_last: memory format of tensors.
        points: numbers of channels measured on each axis of a kernel; None: all numbers of the grid.
        check_networks: number of random networks to which predictions are compared.

    Raises:
        UserError: the network cannot be split into kernels, or the runtime cannot run it.
    """
    check_runtime(runtime, torch.device(device).type, precision, channels_last)
    target = current_target(
        device=torch.device(device),
        runtime=runtime,
        threads=threads,
        batch=batch,
        precision=precision,
        channels_last=channels_last,
    )
    with TemporaryDirectory() as folder:
        table = measure_table(
            network,
            graph,
            grid,
            target,
            name=type(network).__name__,
            points=points,
            check_networks=check_networks,
            cache=Path(folder) / "kernels.json",
        )
    if file is not None:
        write_sealed(Path(file), table.to_dict())
    return table


def load_latency_table(file: str | Path) -> LatencyTable:
    """Reads a table that ``measure_latency_table`` or ``autoslim latency measure`` wrote.

    Raises:
        UserError: the file is missing or is not a latency table.
    """
    try:
        values = parse_json(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"there is no latency table at {file}; make one with measure_latency_table") from error
    except ValueError as error:
        raise UserError(f"{file} is not a latency table ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a latency table")
    try:
        return LatencyTable.from_dict(unsealed(values), str(file))
    except DamagedError as error:
        raise UserError(f"{file} is damaged ({error}); make the table again with measure_latency_table") from error
