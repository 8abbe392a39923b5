"""Measurement of the latency and memory of plain networks on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoslim.channels.inputs import Arguments, Inputs
from autoslim.resources.latency.backends import prepare_forward
from autoslim.resources.latency.table import Target
from autoslim.resources.latency.turns import latencies_in_turns


@dataclass(frozen=True)
class MeasuredCosts:
    """Measured costs of a plain network.

    Attributes:
        latency: milliseconds of a forward pass, the median.
        latency_low: lower quartile.
        latency_high: upper quartile.
        memory: peak memory in bytes.
    """

    latency: float
    latency_low: float
    latency_high: float
    memory: int


def measure_networks(networks: Sequence[nn.Module], inputs: Inputs, target: Target) -> list[MeasuredCosts]:
    """Measures plain networks' latency on ``target``, which has to be this machine, and their memory for one image.

    Their latency is measured in turns, so that a change of the machine's load does not favour one of them. ``inputs``
    are those of their graph. The networks are moved to the target's device.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)  # set first, because a network is compiled for this number of threads
    try:
        runs = [prepare_forward(network, inputs.ones(target.batch), target) for network in networks]
        finish = (lambda: None) if target.device == "cpu" else torch.accelerator.synchronize
        latencies = latencies_in_turns(runs, finish)
    finally:
        torch.set_num_threads(before)
    measured = []
    for network, latency in zip(networks, latencies, strict=True):
        memory = measure_memory(network.float(), inputs.ones(1, next(network.parameters()).device))
        measured.append(MeasuredCosts(latency.median, latency.low, latency.high, memory))
    return measured


def measure_memory(network: nn.Module, images: Arguments | Tensor) -> int:
    """Returns the peak bytes of weights, buffers, ``images`` and live activations during a forward pass.

    On CUDA, this is the peak reported by the allocator and includes the workspaces of kernels. On other devices, live
    tensors are counted. The result is larger than the graph requires, because Python keeps every tensor that a variable
    refers to.
    """
    network.eval()
    images = Arguments.of(images)
    inputs = [*network.parameters(), *network.buffers(), *images.tensors]
    if images.device.type == "cuda":
        others = torch.cuda.memory_allocated(images.device) - sum(tensor.nbytes for tensor in inputs)
        with torch.inference_mode():
            images.run(network)  # libraries create their handles during the first pass
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            images.run(network)
        return torch.cuda.max_memory_allocated(images.device) - others
    live = _LiveStorages()
    for tensor in inputs:
        live.add(tensor)
    with torch.inference_mode(), live:
        images.run(network)
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all live storages that operations have created."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
            finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._bytes -= size
