"""Traces the operations of a network with torch.fx."""

import functools
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from autoslim.channels.inputs import Arguments, Inputs
from autoslim.errors import UserError, first_sentence
from autoslim.tracing.attributes import SIZED, AttributeNumber, followed_attributes
from autoslim.tracing.interpreter import GraphRunner, for_shapes
from autoslim.tracing.operations import FUNCTIONAL_CONVOLUTIONS, LEAVES, operation
from autoslim.tracing.subclasses import computes_more

_FRAME = re.compile(r'File "(.+)", line (\d+)')
_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
_TORCH = _LIBRARIES[0]


def user_line(frames: Iterable[tuple[str, int]]) -> str:
    """Returns the innermost frame of the user's code as ``net.py:12``, or '' if there is none.

    Args:
        frames: (file, line) of each frame, outermost first.
    """
    user_frames = [(file, line) for file, line in frames if not file.startswith(_LIBRARIES)]
    return f"{Path(user_frames[-1][0]).name}:{user_frames[-1][1]}" if user_frames else ""


def error_line(error: Exception) -> str:
    """Returns the line of the user's code that raised ``error``, as ``net.py:12``, or ''."""
    return user_line((frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__))


Origin = tuple[str, int]
"""The name of an operation and an axis of its output."""


class Number(int):
    """A tensor size in the user's code that records which axes it depends on.

    Sums, products and quotients of sizes have the origins of their operands. If the code compares a size or converts it
    to another type, the result is no longer tracked, and ``on_use`` is called with the origins.
    """

    origins: frozenset[Origin]
    on_use: Callable[[frozenset[Origin]], None]

    def __new__(cls, value: int, origins: frozenset[Origin], on_use: Callable[[frozenset[Origin]], None]) -> "Number":
        number = super().__new__(cls, value)
        number.origins, number.on_use = origins, on_use
        return number

    __hash__ = int.__hash__


def plain(value: Any) -> Any:
    """Returns a ``Number`` as a plain int, and any other value unchanged."""
    return int.__pos__(value) if isinstance(value, Number) else value


def _tracked(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def compute(self: Number, *others: Any) -> Any:
        result = operation(self, *others)
        if result is NotImplemented:  # the other operand is a float: Python tries its reflected method
            self.on_use(self.origins)
            return result
        return Number(result, self.origins.union(*(getattr(other, "origins", ()) for other in others)), self.on_use)

    return compute


def _untracked(name: str) -> Callable[..., Any]:
    operation = getattr(int, name)

    def compute(self: Number, *others: Any) -> Any:
        self.on_use(self.origins.union(*(getattr(other, "origins", ()) for other in others)))
        return operation(plain(self), *others)

    return compute


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod", "neg")
_CHOICES = ("eq", "ne", "lt", "le", "gt", "ge", "bool", "and", "rand", "or", "ror")
_CONVERSIONS = ("int", "float", "truediv", "rtruediv", "pow", "rpow", "divmod", "rdivmod", "round", "ceil", "floor")
for _name in _ARITHMETIC:
    setattr(Number, f"__{_name}__", _tracked(f"__{_name}__"))
for _name in (*_CHOICES, *_CONVERSIONS):
    setattr(Number, f"__{_name}__", _untracked(f"__{_name}__"))


class _RandomChoiceError(Exception):
    """Raised if random numbers may decide what ``forward`` does in evaluation mode."""


class _AssignmentError(Exception):
    """Raised if ``forward`` assigns to elements of a tensor."""


def symbolic_graph(
    network: nn.Module, leaf_modules: frozenset[str], images: Arguments | Tensor | None = None
) -> fx.Graph:
    """Returns the graph of ``network`` in its current mode (training or evaluation), valid for all input sizes.

    Args:
        network: The network to trace.
        leaf_modules: Paths of modules that are traced as one operation.
        images: A batch of inputs, of any size; by default, ``forward`` gets one tensor.

    Raises:
        UserError: If ``forward`` depends on data or on shapes. The message names the module and the line.
    """
    tracer = ModuleTracer(leaf_modules, images)
    with followed_attributes(network):
        return traced_by(tracer, network)


def traced_by(tracer: "ModuleTracer", network: nn.Module) -> fx.Graph:
    """Returns the graph that ``tracer`` records, and raises its errors as ``UserError``."""
    try:
        if network.training:
            with _restored(network):
                return tracer.trace(network)
        with seeded() as drawn, _RandomChoices(), _restored(network):
            graph = tracer.trace(network)
            if "random" in drawn():
                raise _RandomChoiceError("forward draws random numbers with Python's random module")
            return graph
    except Exception as error:  # the user's code may raise anything when it runs on proxies
        where, module, name = error_line(error), tracer.current_module, type(network).__name__
        raise UserError(
            f"torch.fx cannot trace module {module or name!r} of {name}{f' ({where})' if where else ''}: "
            f"{first_sentence(error)}; {_remedy(error, module)}"
        ) from error


def _remedy(error: Exception, module: str) -> str:
    """Returns what to do about an error in tracing ``module``, which is "" for the network itself."""
    as_leaf = (
        "name the module in model.leaves to keep its size"
        if module
        else "move this code to a module inside the network and name that in model.leaves, so that it keeps its size"
    )
    if isinstance(error, _RandomChoiceError):
        return f"choose at random in training mode only, or {as_leaf}"
    if isinstance(error, _AssignmentError):
        return f"use torch.where or torch.cat instead, or {as_leaf}"
    if isinstance(error, fx.proxy.TraceError):
        return f"{as_leaf}, or remove what depends on data from its forward"
    return as_leaf


@contextmanager
def _restored(network: nn.Module) -> Iterator[None]:
    """Undoes the assignments of ``forward`` to attributes and buffers of modules, which would keep proxies there."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in network.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            present = module.__dict__
            for name in present.keys() - attributes.keys():
                if _has_proxies(present[name]):  # torch.fx stores constants
                    del present[name]
            present.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def assigned_buffers(network: nn.Module) -> Iterator[set[str]]:
    """Yields a set to which the names of those buffers are added that are assigned to, as in ``self.mean = mean``.

    The buffers of a supernet are views of shared ones, which an assignment would replace by a tensor of another size.
    """
    paths = {module: f"{path}." if path else "" for path, module in network.named_modules()}
    assigned: set[str] = set()

    def record(module: nn.Module, name: str, _: Tensor) -> None:
        if module in paths:
            assigned.add(f"{paths[module]}{name}")

    handle = register_module_buffer_registration_hook(record)
    try:
        yield assigned
    finally:
        handle.remove()


@contextmanager
def seeded() -> Iterator[Callable[[], set[str]]]:
    """Seeds the random generators, so that no trace depends on them, and restores their states afterwards.

    Yields:
        A function that returns the modules whose generators have drawn numbers since: ``torch``, ``random``.
    """
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        torch_state, seeded_state = torch.get_rng_state(), random.getstate()

        def drawn() -> set[str]:
            modules = set() if torch.equal(torch.get_rng_state(), torch_state) else {"torch"}
            return modules if random.getstate() == seeded_state else modules | {"random"}

        try:
            yield drawn
        finally:
            random.setstate(python_state)


class _RandomChoices(TorchFunctionMode):
    """Raises if the code converts a random tensor to a number, because it then branches at random."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        is_random = any(id(argument) in self._drawn for argument in args)
        if is_random and name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            raise _RandomChoiceError("a random number decides what forward does")
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and (is_random or name in _RANDOM):
            self._drawn[id(result)] = result
        return result


_DISTRIBUTIONS = ("uniform", "normal", "exponential", "geometric", "log_normal", "cauchy", "bernoulli", "random")
_RANDOM = frozenset(
    ["rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "multinomial", "poisson"]
    + [f"{name}{end}" for name in _DISTRIBUTIONS for end in ("", "_")]
)
"""Functions and methods that return or fill in random numbers."""


class ModuleTracer(fx.Tracer):
    """Records layers and leaf modules as one operation each, and tracks the module that is being traced."""

    proxy_buffer_attributes = True  # buffers may have channels, as those of a frozen batch norm

    def __init__(self, leaf_modules: frozenset[str], images: Arguments | Tensor | None = None) -> None:
        super().__init__()
        self.leaf_modules = leaf_modules
        self._computing_more: set[nn.Module] = set()
        self.images = Arguments.of(torch.empty(1, device="meta") if images is None else images)
        self.current_module = ""
        self.record_stack_traces = True
        self.properties: set[fx.Node] = set()  # operations that return sizes or other properties, not tensors
        self.is_sized = False  # whether an operation of ``SIZED`` is being created
        self.values: dict[fx.Node, Any] = {}  # of operations that ran to get shapes
        self.running = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Creates a placeholder for each input. Other arguments of ``forward`` have their default values."""
        inputs = Inputs.of(self.root, self.images)
        names = iter(["images"] if inputs.is_single else [tensor.name for tensor in inputs.tensors])
        proxies = self.images.map(lambda _: self.create_proxy("placeholder", next(names), (), {}))

        def forward(network: nn.Module) -> Any:
            return proxies.run(functools.partial(root_fn, network))

        return forward, [self.root]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        inputs = node.all_input_nodes
        if node.op in ("call_function", "call_method") and (
            operation(node) in SIZES or (inputs and self.properties.issuperset(inputs))
        ):
            self.properties.add(node)
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):  # before torch.fx takes it for a tensor
            return a.node
        if isinstance(a, fx.Node):
            return a
        if isinstance(a, AttributeNumber):
            return a.node(self.graph) if self.is_sized else int(a)
        return super().create_arg(a)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self._computing_more = {module for module in root.modules() if computes_more(module)}
        with self._compiled_functions():
            return super().trace(root, concrete_args)

    @contextmanager
    def _compiled_functions(self) -> Iterator[None]:
        """Replaces two functions in C, which would take proxies for tensors and crash.

        A function compiled by ``torch.jit.script`` is recorded as one operation. Of an ``autograd.Function``, the
        forward function is traced.
        """
        scripted: Any = torch.jit.ScriptFunction
        custom: Any = torch.autograd.Function
        call_script, apply = scripted.__call__, custom.__dict__["apply"]

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            if not _has_proxies(args, kwargs):
                return call_script(function, *args, **kwargs)

            def operation(*values: Any, **named: Any) -> Any:
                return call_script(function, *values, **named)

            operation.__name__ = str(getattr(function, "name", "scripted"))
            return self.create_proxy("call_function", operation, args, kwargs)

        def forward(function: Any, *args: Any, **kwargs: Any) -> Any:
            if not _has_proxies(args, kwargs):
                return apply.__func__(function, *args, **kwargs)
            own_context = function.setup_context is custom.setup_context
            return function.forward(*([_Context()] if own_context else []), *args, **kwargs)

        scripted.__call__ = call
        custom.apply = classmethod(forward)
        try:
            yield
        finally:
            scripted.__call__ = call_script
            custom.apply = apply

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        self.is_sized = kind in ("call_function", "call_method") and name in SIZED
        if name in FUNCTIONAL_CONVOLUTIONS:
            args, kwargs = self._with_groups(args, kwargs)
        try:
            return super().create_proxy(kind, target, args, kwargs, *rest, **options)
        finally:
            self.is_sized = False

    def _with_groups(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Returns the arguments of a functional convolution with the attribute that its number of groups comes from."""

        def read(groups: Any) -> Any:
            return groups.node(self.graph) if isinstance(groups, AttributeNumber) else groups

        return (*args[:6], *map(read, args[6:7]), *args[7:]), {
            name: read(value) if name == "groups" else value for name, value in kwargs.items()
        }

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Called where the code iterates over an operation's output without unpacking it."""
        pieces = self.pieces(obj.node)
        return super().iter(obj) if pieces is None else (obj[index] for index in range(pieces))  # type: ignore[index]

    def pieces(self, node: fx.Node) -> int | None:
        """Returns the number of tensors that an operation returns, or of sizes, or None if it is not fixed."""
        if node not in self.properties:
            return _pieces(node)
        for each in self.graph.nodes:  # the number of a tensor's sizes does not depend on their values
            if each not in self.values:
                self.values[each] = self._value(each)
            if each is node:
                break
        value = self.values[node]
        return len(value) if isinstance(value, tuple) else None

    @functools.cached_property
    def _runner(self) -> GraphRunner:  # the tracer has a root and a graph only once ``trace`` has begun
        runner = GraphRunner(self.root, self.graph, self.images.device)
        runner.args_iter = iter(self.images.tensors)
        runner.env = self.values
        return runner

    def _value(self, node: fx.Node) -> Any:
        for constant in node.all_input_nodes:  # torch.fx creates no proxies for constants
            if constant not in self.values:
                self.values[constant] = self._value(constant)
        self.running = True
        try:
            with for_shapes(self.images.device):
                return self._runner.run_node(node)
        finally:
            self.running = False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaf_modules:
            return True
        if isinstance(m, LEAVES):
            return m not in self._computing_more
        if isinstance(m, ParametrizationList):
            return False
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Runs the module if this tracer called it to get shapes, because torch.fx intercepts all calls of modules."""
        if self.running:
            return forward(*args, **kwargs)
        outer, self.current_module = self.current_module, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.current_module = outer  # not restored after an error, so that it names the module that raised it
        return result


SIZES = frozenset({"size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "stride", "getattr"})
"""Functions and methods that return numbers or other properties of a tensor, not tensors."""


def _has_proxies(*values: Any) -> bool:
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(values))


class _Context:
    """Stands for the context of an ``autograd.Function``: what it stores for the backward pass is not used."""

    needs_input_grad = ()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _TensorProxy(fx.Proxy):
    """A proxy that ``isinstance`` takes for a tensor, unless it stands for a size or another property of a tensor."""

    tracer: ModuleTracer
    _is_param = _is_buffer = False  # nn.Parameter and nn.Buffer check these attributes of tensors

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance asks for it after it has compared the type
        return type(self) if self.node in self.tracer.properties or _asked_by_torch() else Tensor

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _AssignmentError("forward assigns to elements of a tensor")

    def __len__(self) -> int:  # list() asks for it
        pieces = self.tracer.pieces(self.node)
        return super().__len__() if pieces is None else pieces


def _asked_by_torch() -> bool:
    """Returns whether ``__class__`` is read by torch, whose C code would read a proxy that claims to be a tensor.

    Assigning to a module is an exception: it accepts only tensors as buffers.
    """
    code = sys._getframe(2).f_code
    return code.co_filename.startswith(_TORCH) and code.co_name != "__setattr__"


def _pieces(node: fx.Node) -> int | None:
    """Returns the number of tensors that an operation splits its input into, or None if it depends on their sizes.

    ``chunk`` may return fewer; the graph then does not run.
    """
    argument = [
        *node.args[1:2],
        *(node.kwargs.get(name) for name in ("chunks", "split_size_or_sections", "split_size")),
    ]
    given = next((value for value in argument if value is not None), None)
    if operation(node) == "chunk" and isinstance(given, int):
        return given
    return len(given) if operation(node) == "split" and isinstance(given, list | tuple) else None


Choices = dict[Origin, str]
"""Sizes that the code branches on, with the line where it first does so."""


def shaped_graph(
    network: nn.Module, leaf_modules: frozenset[str], images: Arguments | Tensor
) -> tuple[fx.Graph, Choices]:
    """Returns the graph of ``network`` for ``images``, and the sizes that its code branches on.

    The graph contains sizes as numbers: channels can be followed through it, but it runs only on this input size.

    Args:
        network: The network to trace, in its current mode.
        leaf_modules: Paths of modules that are traced as one operation.
        images: A batch of inputs, usually on the meta device.

    Raises:
        UserError: If ``forward`` depends on data. The message names the module and the line.
    """
    tracer = _ShapedTracer(leaf_modules, images)
    return traced_by(tracer, network), tracer.choices


class _ShapedTracer(ModuleTracer):
    """Runs every operation while tracing it, so that the user's code gets sizes as numbers and tensors as proxies."""

    def __init__(self, leaf_modules: frozenset[str], images: Arguments | Tensor) -> None:
        super().__init__(leaf_modules, images)
        self.choices: Choices = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Shaped(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        value = self.values[proxy.node] = self._value(proxy.node)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            return proxy
        inputs = proxy.node.all_input_nodes
        if kind != "placeholder":
            self.graph.erase_node(proxy.node)
        if target == "size":
            sizes = self.sizes(inputs[0])
            return sizes if isinstance(value, tuple) else sizes[[*args[1:], *kwargs.values()][0]]
        for node in inputs:  # any other property of a tensor may depend on any of its sizes
            self.record_choices(frozenset((node.name, axis) for axis in range(_rank(self.values[node]))))
        return value

    def create_arg(self, a: Any) -> Any:
        return super().create_arg(plain(a))

    def sizes(self, node: fx.Node) -> tuple[Number, ...]:
        shape = self.values[node].shape
        return tuple(
            Number(size, frozenset({(node.name, axis)}), self.record_choices) for axis, size in enumerate(shape)
        )

    def record_choices(self, origins: frozenset[Origin]) -> None:
        for origin in origins - self.choices.keys():
            stack = traceback.extract_stack()
            self.choices[origin] = user_line((frame.filename, frame.lineno or 0) for frame in stack)


class _Shaped(_TensorProxy):
    """A proxy of one or several tensors that also has their sizes."""

    tracer: _ShapedTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        value = self.tracer.values.get(self.node)
        if _asked_by_torch():
            return type(self)
        return next((kind for kind in (Tensor, tuple, list, dict) if isinstance(value, kind)), type(self))

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
            self.tracer.record_choices(frozenset({(self.node.name, 0)}))
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        value = self.tracer.values[self.node]
        return super().__iter__() if isinstance(value, Tensor) else self._pieces(len(value))

    def _pieces(self, count: int) -> Iterator[Any]:
        return (self[index] for index in range(count))  # type: ignore[index]


_TensorProxy.__name__ = _Shaped.__name__ = "Proxy"  # in Python's error messages


def _rank(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0
