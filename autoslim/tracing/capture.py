"""Captures the operations of a user's network with torch.fx."""

import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.errors import UserError, first_line
from autoslim.tracing.interpreter import GraphRunner, for_shapes
from autoslim.tracing.operations import LEAVES

_FRAME = re.compile(r'File "(.+)", line (\d+)')
_MACHINERY = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


def place(frames: Iterable[tuple[str, int]]) -> str:
    """The innermost of the frames (file, line), outermost first, that is not torch's or ours: ``net.py:12``, or ''."""
    own = [(file, line) for file, line in frames if not file.startswith(_MACHINERY)]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def error_line(error: Exception) -> str:
    """The line that an error comes from."""
    return place((frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__))


Origin = tuple[str, int]
"""An operation's name, and an axis of its output."""


class Number(int):
    """A size that the user's code computes with.

    Sums, products and quotients of it are numbers of the same origins. Where the code compares one, or turns it into
    something else, it does by it what cannot be followed: ``note`` is told the origins.
    """

    origins: frozenset[Origin]
    note: Callable[[frozenset[Origin]], None]

    def __new__(cls, value: int, origins: frozenset[Origin], note: Callable[[frozenset[Origin]], None]) -> "Number":
        number = super().__new__(cls, value)
        number.origins, number.note = origins, note
        return number

    __hash__ = int.__hash__


def plain(value: Any) -> Any:
    """The number without its origins; anything else as it is."""
    return int.__pos__(value) if isinstance(value, Number) else value


def _carrying(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def carry(self: Number, *others: Any) -> Any:
        result = operation(self, *others)
        if result is NotImplemented:  # a float: Python tries it the other way round
            self.note(self.origins)
            return result
        return Number(result, self.origins.union(*(getattr(other, "origins", ()) for other in others)), self.note)

    return carry


def _noting(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def noted(self: Number, *others: Any) -> Any:
        self.note(self.origins.union(*(getattr(other, "origins", ()) for other in others)))
        return operation(plain(self), *others)

    return noted


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "neg")
_CHOICES = ("eq", "ne", "lt", "le", "gt", "ge", "bool", "and", "rand", "or", "ror")
_CONVERSIONS = ("int", "float", "truediv", "rtruediv", "pow", "rpow", "divmod", "rdivmod", "round", "ceil", "floor")
for _name in _ARITHMETIC:
    setattr(Number, f"__{_name}__", _carrying(f"__{_name}__"))
for _name in (*_CHOICES, *_CONVERSIONS):
    setattr(Number, f"__{_name}__", _noting(f"__{_name}__"))


def symbolic_graph(network: nn.Module, leaves: frozenset[str]) -> fx.Graph:
    """The operations of ``network``, in the mode (training or evaluation) that it is in.

    Raises:
        UserError: its ``forward`` depends on data. The message names the module and the line.
    """
    return traced_by(ModuleTracer(leaves), network)


def traced_by(tracer: "ModuleTracer", network: nn.Module) -> fx.Graph:
    """What a tracer finds, and its errors in the user's terms."""
    try:
        return tracer.trace(network)
    except Exception as error:  # whatever the user's code raises when it is given proxies
        where = error_line(error)
        raise UserError(
            f"torch.fx cannot trace module {tracer.inside or type(network).__name__!r} of {type(network).__name__}"
            f"{f' ({where})' if where else ''}: {first_line(error)}; take the choice that depends on data out of its "
            "forward, or name the module in model.leaves to keep its size"
        ) from error


class ModuleTracer(fx.Tracer):
    """Stops at layers and leaves, and knows which module it is inside."""

    def __init__(self, leaves: frozenset[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.inside = ""
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or isinstance(m, LEAVES):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        outer, self.inside = self.inside, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.inside = outer  # not restored after an error: it then names the module at fault
        return result


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
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
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

    @cached_property
    def _runner(self) -> GraphRunner:  # the tracer has a root and a graph only once ``trace`` has begun
        runner = GraphRunner(self.root, self.graph, self.images.device)
        runner.args_iter = iter([self.images])
        runner.env = self.values
        return runner

    def _value(self, node: fx.Node) -> Any:
        for constant in node.all_input_nodes:  # torch.fx makes no proxies for tensors that the code has at hand
            if constant not in self.values:
                self.values[constant] = self._value(constant)
        self.running = True
        try:
            with for_shapes(self.images.device):
                return self._runner.run_node(node)
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
