"""torch.fx with the shapes at hand, for networks whose code chooses by sizes or hands them to other functions."""

import operator
import traceback
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from autoslim.networks.tracing.carrying import leaves
from autoslim.networks.tracing.shapes import for_shapes
from autoslim.networks.tracing.sizes import Number, Origin, plain
from autoslim.networks.tracing.source import place
from autoslim.networks.tracing.symbolic import ModuleTracer, traced_by

Choices = dict[Origin, str]
"""Sizes that the code chose by, and the line where it first did."""


def shaped_graph(network: nn.Module, whole: frozenset[str], images: Tensor) -> tuple[fx.Graph, Choices]:
    """The operations of ``network`` on images of one size, and the sizes that it depends on that they are these.

    The graph has sizes written in as numbers: channels can be followed through it, but it runs at no other size.

    Raises:
        UserError: ``forward`` depends on data. The message names the module and the line.
    """
    tracer = _ShapedTracer(whole, images)
    return traced_by(tracer, network), tracer.choices


class _ShapedTracer(ModuleTracer):
    """Runs every operation for its shapes as it is traced. Sizes are numbers to the user's code, tensors proxies."""

    def __init__(self, whole: frozenset[str], images: Tensor) -> None:
        super().__init__(whole)
        self.images = images
        self.choices: Choices = {}
        self.values: dict[fx.Node, Any] = {}
        self.running = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Shaped(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        value = self.values[proxy.node] = self._value(proxy.node)
        if any(isinstance(leaf, Tensor) for leaf in leaves(value)):
            return proxy
        read = proxy.node.all_input_nodes
        if kind != "placeholder":
            self.graph.erase_node(proxy.node)
        if target == "size":
            sizes = self.sizes(read[0])
            return sizes if isinstance(value, tuple) else sizes[[*args[1:], *kwargs.values()][0]]
        for node in read:  # what else is asked of a tensor may follow from any of its sizes
            self.note(frozenset((node.name, axis) for axis in range(_rank(self.values[node]))))
        return value

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(plain(a))

    def sizes(self, node: fx.Node) -> tuple[Number, ...]:
        shape = self.values[node].shape
        return tuple(Number(size, frozenset({(node.name, axis)}), self.note) for axis, size in enumerate(shape))

    def note(self, origins: frozenset[Origin]) -> None:
        for origin in origins - self.choices.keys():
            stack = traceback.extract_stack()
            self.choices[origin] = place((frame.filename, frame.lineno or 0) for frame in stack)

    def _value(self, node: fx.Node) -> Any:
        for constant in node.all_input_nodes:  # torch.fx makes no proxies for tensors that the code has at hand
            if constant not in self.values:
                self.values[constant] = self._value(constant)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        self.running = True
        try:
            with for_shapes(self.images.device):
                if node.op == "placeholder":
                    return args[0] if args else self.images
                if node.op == "get_attr":
                    return operator.attrgetter(str(node.target))(self.root).to(self.images.device)
                if node.op == "call_module":
                    return self.root.get_submodule(str(node.target))(*args, **kwargs)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.running = False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """torch.fx puts itself into every module's call, those that run for their shapes too."""
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)


class _Shaped(fx.Proxy):
    """A tensor, or several, that the user's code may ask for its sizes."""

    tracer: _ShapedTracer

    def __getattr__(self, k: str) -> Any:
        value = self.tracer.values[self.node]
        if isinstance(value, Tensor):
            if k == "shape":
                return self.tracer.sizes(self.node)
            if k in ("ndim", "dtype", "device", "layout", "is_cuda", "is_meta"):
                return getattr(value, k)
        return super().__getattr__(k)

    def __len__(self) -> int:
        value = self.tracer.values[self.node]
        if isinstance(value, Tensor):
            self.tracer.note(frozenset({(self.node.name, 0)}))
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        value = self.tracer.values[self.node]
        return super().__iter__() if isinstance(value, Tensor) else self._pieces(len(value))

    def _pieces(self, count: int) -> Iterator[Any]:
        return (self[index] for index in range(count))  # type: ignore[index]


def _rank(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0
