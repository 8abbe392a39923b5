"""Executes traced graphs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def for_shapes(device: torch.device, *, recorded: bool = False) -> Iterator[None]:
    """Creates new tensors on ``device`` without gradients. On the meta device, common operations only check shapes.

    With ``recorded``, only batch norm does, because a dispatch mode is to see all other operations. Attention blocks
    run one operation at a time: their fast path is a single one, which hides their linear layers.
    """
    shapes_only = _ShapesOnly(recorded) if device.type == "meta" else contextlib.nullcontext()
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), device, shapes_only:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)


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
        return getattr(self, n.op)(n.target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.to(self.device) if isinstance(value, Tensor) and self.device is not None else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.submodules[target](*args, **kwargs)  # faster than following the path from the root


class _ShapesOnly(TorchFunctionMode):
    """Computes only shapes for functions that torch decomposes, in Python, into many operations on the meta device.

    Without it, they take nine tenths of the time of a run. Uses that the shape functions do not cover run as usual.
    """

    def __init__(self, recorded: bool) -> None:
        super().__init__()
        self._functions = {F.batch_norm: _batch_norm} if recorded else _SHAPE_FUNCTIONS

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = self._functions.get(func)
        result = NotImplemented if function is None else function(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _batch_norm(
    _: object,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *__: Any,
    **___: Any,
) -> Tensor:
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and tensor.numel() != input.shape[1]:
            raise RuntimeError(f"batch norm for {tensor.numel()} channels got {input.shape[1]} channels")
    return torch.empty_like(input)


def _layer_norm(
    _: object,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *__: Any,
    **___: Any,
) -> Any:
    sizes = (tuple(normalized_shape), *(tensor.shape for tensor in (weight, bias) if tensor is not None))
    fits = all(input.shape[input.dim() - len(size) :] == size for size in sizes)
    return torch.empty(input.shape, dtype=input.dtype, device="meta") if fits and _is_real(input) else NotImplemented


def _activation(_: object, input: Tensor, *__: Any, inplace: bool = False, **___: Any) -> Any:
    return (input if inplace else torch.empty_like(input)) if _is_real(input) else NotImplemented


def _linear(func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _is_real(input) or (bias is not None and bias.shape != weight.shape[:1]):
        return NotImplemented
    # Without a bias, it is a single operation. It is run, because its multiply-adds are counted.
    return func(input.reshape(-1, input.shape[-1]), weight).view(*input.shape[:-1], -1)


def _arithmetic(_: object, input: Any, other: Any, **options: Any) -> Any:
    operands = [operand for operand in (input, other) if isinstance(operand, Tensor)]
    if options or not all(map(_is_real, operands)):
        return NotImplemented
    dtype = torch.result_type(input, other)
    largest = max(operands, key=Tensor.dim)
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    if largest.shape == shape and all(_follows(operand, largest) for operand in operands):
        return torch.empty_like(largest, dtype=dtype)
    if all(operand.is_contiguous() for operand in operands):
        return torch.empty(shape, dtype=dtype, device="meta")
    return NotImplemented


def concatenated(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Returns an empty tensor of the shape and strides of ``torch.cat``, or NotImplemented unless they are simple.

    Args:
        tensors: Tensors on any device.
        dim: The dimension along which they are concatenated.
    """
    first = tensors[0]
    shape, rank = list(first.shape), first.dim()
    if not -rank <= dim < rank:
        return NotImplemented
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors if tensor.dim() == rank)
    for tensor in tensors:
        sizes = list(tensor.shape)
        if len(sizes) != rank or sizes[:dim] + sizes[dim:][1:] != shape[:dim] + shape[dim:][1:]:
            return NotImplemented
        if tensor.dtype != first.dtype or not tensor.is_meta or not tensor.is_contiguous():
            return NotImplemented
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _concatenation(_: object, tensors: Any, dim: Any = 0, **options: Any) -> Any:
    simple = not options and isinstance(dim, int) and isinstance(tensors, list | tuple)
    return concatenated(tensors, dim) if simple and tensors else NotImplemented


def _follows(operand: Tensor, leader: Tensor) -> bool:
    """Returns whether the result of an elementwise operation has the strides of ``leader``."""
    same = operand.shape == leader.shape and operand.stride() == leader.stride()
    return same or sum(size > 1 for size in operand.shape) < 2


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_meta and tensor.is_floating_point()


_ACTIVATIONS = (F.relu, F.gelu, F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish, F.silu, F.mish, F.elu, F.leaky_relu)
_SHAPE_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    torch.cat: _concatenation,
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **{
        getattr(home, name): _arithmetic
        for home, names in (
            (torch, "add sub mul div"),
            (Tensor, "add sub mul div __radd__ __rmul__ __rsub__"),
        )
        for name in names.split()
    },
}
