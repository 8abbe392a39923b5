"""Measures the latency and memory of a plain network on this device."""

from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoslim.resources.latency.measure import measure_latency
from autoslim.resources.latency.table import Target


@dataclass(frozen=True)
class Measured:
    """A plain network on the machine at hand: milliseconds of a forward pass (median and quartiles), and the bytes that
    it holds at once."""

    latency: float
    latency_low: float
    latency_high: float
    memory: int


def measure_network(network: nn.Module, input_shape: tuple[int, ...], target: Target) -> Measured:
    """A plain network's latency and memory on the machine at hand, which ``target`` is."""
    images = torch.ones(target.batch, *input_shape)
    time = measure_latency(network, [images], target)
    device = next(network.parameters()).device
    held = measure_memory(network.float(), torch.ones(1, *input_shape, device=device))
    return Measured(time.median, time.low, time.high, held)


def measure_memory(network: nn.Module, images: Tensor) -> int:
    """Bytes of weights, buffers, ``images`` (N, C, H, W) and of the activations alive at once, at the peak of a pass.

    On CUDA the allocator's own peak, with kernels' workspaces; elsewhere the tensors that the pass holds, which are
    more than a graph needs: Python keeps what it has a name for.
    """
    network.eval()
    given = [*network.parameters(), *network.buffers(), images]
    if images.device.type == "cuda":
        others = torch.cuda.memory_allocated(images.device) - sum(tensor.nbytes for tensor in given)
        with torch.inference_mode():
            network(images)  # libraries make their handles at the first pass
            torch.cuda.synchronize(images.device)
            torch.cuda.reset_peak_memory_stats(images.device)
            network(images)
        return torch.cuda.max_memory_allocated(images.device) - others
    held = _Held()
    for tensor in given:
        held.add(tensor)
    with torch.inference_mode(), held:
        network(images)
    return held.peak


class _Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are alive."""

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
        place, size = storage._cdata, storage.nbytes()
        if place not in self._known:
            self._known.add(place)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
            finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._bytes -= size
