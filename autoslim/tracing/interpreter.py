"""Executes traced graphs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def for_shapes(device: torch.device) -> Iterator[None]:
    """Creates new tensors on ``device`` without gradients; on the meta device, batch norm only checks its shapes.

    Attention blocks run one operation at a time: their fast path is a single one, which hides their linear layers.
    """
    shapes_only = _BatchNormByShape() if device.type == "meta" else contextlib.nullcontext()
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), device, shapes_only:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)


class StoredSize(int):
    """An integer attribute of a module of the user, such as half of its channels, while the network is traced.

    A number that is computed from it is a plain one.
    """

    module: str  # its path
    attribute: str

    def __new__(cls, value: int, module: str, attribute: str) -> "StoredSize":
        size = super().__new__(cls, value)
        size.module, size.attribute = module, attribute
        return size


class GraphRunner(fx.Interpreter):
    """Executes a torch.fx graph, as a whole with ``run`` or one operation at a time with ``step``.

    Args:
        module: The module whose parameters, buffers and submodules the graph uses.
        graph: The graph to execute. By default it is the graph of ``module``, which must then be an ``fx.GraphModule``.
        device: The device that tensors read by ``get_attr`` nodes are moved to, because torch.fx leaves constants on
            the device on which they were created. By default they are not moved.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph | None = None, device: torch.device | None = None) -> None:
        super().__init__(module, graph=graph)
        self.device = device
        self.args_iter: Iterator[Any] = iter(())
        self._sized = {node for node in self.graph.nodes if _has_stored_size(node)}

    def step(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Executes one operation on ``values``, stores its output there, and deletes what no later operation reads."""
        self.env = values
        values[node] = self.run_node(node)
        self.env = {}  # do not keep values between steps
        for read in self.user_to_last_uses.get(node, ()):
            del values[read]
        if not node.users and node.op != "output":
            del values[node]

    def run_node(self, n: fx.Node) -> Any:
        # fx.Interpreter.run_node without logging and checks, which take a tenth of the search time on small images.
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self.env.__getitem__)
        if n in self._sized:
            args, kwargs = fx.node.map_aggregate((args, kwargs), self._current)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _current(self, leaf: Any) -> Any:
        """Returns the present value of an attribute that the graph contains as a number."""
        return getattr(self.submodules[leaf.module], leaf.attribute) if isinstance(leaf, StoredSize) else leaf

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.to(self.device) if isinstance(value, Tensor) and self.device is not None else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.submodules[target](*args, **kwargs)  # faster than following the path from the root


def _has_stored_size(node: fx.Node) -> bool:
    return any(isinstance(leaf, StoredSize) for leaf in tree_leaves((node.args, node.kwargs)))


class _BatchNormByShape(TorchFunctionMode):
    """Replaces batch norm, which torch decomposes into a dozen operations and which dominates a CNN's meta run."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and tensor.numel() != input.shape[1]:
            raise RuntimeError(f"batch norm for {tensor.numel()} channels got {input.shape[1]} channels")
    return torch.empty_like(input)
