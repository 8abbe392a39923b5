"""Records what a network computes when it runs: its multiply-adds, and the operations that depend on its input."""

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from autoslim.channels.copying import named_tensors
from autoslim.tracing.interpreter import concatenated

_CONVOLUTIONS = ("aten::convolution", "aten::_convolution")
_FACTORS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::dot": (0, 1),
    "aten::addmm": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::addmv": (1, 2),
}
"""Matrix products, with the positions of their factors among the arguments."""
_BY_PTFLOPS = frozenset({"aten::mm", "aten::bmm", "aten::addmm"})
"""Matrix products that ptflops counts."""
_REARRANGING = frozenset({"aten::clone", "aten::_unsafe_view", "aten::_to_copy", "aten::add"})
"""Operations that torch adds or leaves out depending on sizes; a bias is added by ``add`` or within ``addmm``."""
_NOT_COUNTED = ("aten::_cdist_forward",)
"""Operations of torch with products that have no formula here."""


def _deformable(_: Tensor, weight: Tensor, *__: Any, out: Tensor) -> int:
    return out[:, 0].numel() * weight.numel()


def _recurrent(inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, *_: Any, out: Any) -> int:
    return inputs.shape[0] * inputs.shape[1] * (weight_ih.numel() + weight_hh.numel())


def _trilinear(first: Tensor, weight: Tensor, *_: Any, out: Tensor) -> int:
    return first.shape[0] * weight.numel()


_FORMULAS: dict[str, Callable[..., int]] = {
    "torchvision::deform_conv2d": _deformable,
    "aten::mkldnn_rnn_layer": _recurrent,
    "aten::_trilinear": _trilinear,
}
"""Multiply-adds of layers for which torch has no formula; each function gets the arguments and the output."""


class Execution(TorchDispatchMode):
    """While active, records the operations that run on tensors. Run the network in ``for_shapes``.

    One multiply-add is one MAC. Convolutions are counted, and products of a matrix that depends on parameters only with
    one that does not, as in a linear layer. Products of two activations (as in attention) and of two parameters (which
    could be computed once) are recorded separately; all other operations are not counted.

    Args:
        network: The network whose parameters and buffers are the weights.
        inputs: The tensors that the network is run on.
        leaves: Paths of modules whose operations are counted but not recorded.
        locate: The index of an operation whose place in the code is wanted (see ``stack``).

    Attributes:
        macs: The multiply-adds of the layers, for the whole batch.
        other_products: The multiply-adds of products of activations.
        weight_products: The multiply-adds of products of weights, without products of vectors.
        biases: The outputs of layers with a bias that is added within the operation.
        operations: Each operation that depends on the input: its name and its arguments (see ``describe``).
        names: The names of these operations without those that torch chooses by size: copies, views and the kind of a
            matrix product.
        not_counted: The names of operations that use parameters and whose multiply-adds are not known.
        stack: The frames that led to operation ``locate``.
    """

    def __init__(
        self, network: nn.Module, inputs: Iterable[Tensor], leaves: Iterable[str] = (), locate: int | None = None
    ) -> None:
        super().__init__()
        self.macs = self.other_products = self.weight_products = self.biases = 0
        self.operations: list[tuple[str, tuple[Any, ...]]] = []
        self.names: list[str] = []
        self.not_counted: set[str] = set()
        self.stack: list[tuple[str, int]] = []
        self._locate = locate
        self._weights = {_storage(tensor): name for name, tensor in named_tensors(network).items()}
        self._data: dict[StorageWeakRef, dict[_Place, Any]] = {}  # views of tensors that depend on the input -> value
        self._clock = 0
        for tensor in inputs:
            self._data.setdefault(_storage(tensor), {})[_place(tensor)] = f"input {len(self._data)}"
        self._leaves = [network.get_submodule(path) for path in leaves]
        self._inside = 0
        self._depth = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> "Execution":
        if self._depth == 0:
            for leaf in self._leaves:
                self._hooks += [
                    leaf.register_forward_pre_hook(lambda *_: self._enter_leaf(1)),
                    leaf.register_forward_hook(lambda *_: self._enter_leaf(-1)),
                ]
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def _enter_leaf(self, change: int) -> None:
        self._inside += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, torch does not decompose operations before they arrive here
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        flat = tree_leaves((args, kwargs))
        storages = [_storage(leaf) for leaf in flat if isinstance(leaf, Tensor)]
        name = _name(func)
        depends = any(storage in self._data for storage in storages)
        if depends and not self._inside:
            if len(self.operations) == self._locate:
                self.stack = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_stack()]
            self.operations += self._described(name, args, kwargs, flat)
            if not (func.is_view or name in _FACTORS or name in _REARRANGING):
                self.names.append(name)
        are_weights = [storage in self._weights for storage in storages]
        # The shape function of torch takes most of the time of a DenseNet.
        result = concatenated(*args) if name == "aten::cat" and not kwargs else NotImplemented
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self._count(func, args, kwargs, are_weights, result)
        self._clock += depends
        separate = name == "aten::unbind"  # as many operations as there are outputs
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in _written(func, args, kwargs):
            self._overwrite(tensor)
            if not any(tensor is output for output in outputs):
                outputs.append(tensor)
        for index, tensor in enumerate(outputs):
            self._clock += depends and separate and index > 0
            self._follow(tensor, 0 if separate else index, depends, bool(are_weights) and all(are_weights))
        return result

    def _described(self, name: str, args: Any, kwargs: Any, flat: list[Any]) -> list[tuple[str, tuple[Any, ...]]]:
        """Returns what is recorded. torch.fx traces ``a, b = x`` as ``x[0]`` and ``x[1]``; torch runs ``unbind``."""
        if name != "aten::unbind":
            return [(name, tuple(map(self.describe, flat)))]
        tensor, dimension = args[0], int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
        described = self.describe(tensor)
        return [("aten::select", (described, dimension, index)) for index in range(tensor.shape[dimension])]

    def _follow(self, tensor: Tensor, index: int, depends: bool, of_weights: bool) -> None:
        """Records what an output depends on."""
        storage = _storage(tensor)
        if depends:
            self._data.setdefault(storage, {})[_place(tensor)] = (self._clock, index)
        if not of_weights:
            self._weights.pop(storage, None)
        else:
            self._weights.setdefault(storage, "")

    def _overwrite(self, tensor: Tensor) -> None:
        """Records that the elements of ``tensor`` have changed in all views that overlap it."""
        place = _place(tensor)
        views = self._data.get(_storage(tensor), {})
        for other in views.keys() - {place}:
            if _overlap(place, other):
                views[other] = ("overwritten", self._clock)

    def _count(self, func: Any, args: Any, kwargs: Any, are_weights: list[bool], result: Any) -> None:
        name, formula = _name(func), flop_registry.get(func._overloadpacket)
        if name in _FACTORS:
            factors = [args[position] for position in _FACTORS[name]]
            macs = result.numel() * factors[0].shape[-1]
            self.biases += result.numel() * (name == "aten::addmm")
            weights = sum(_storage(factor) in self._weights for factor in factors)
            if weights == 1:
                self.macs += macs
            elif weights == 0:
                self.other_products += macs
            elif name in _BY_PTFLOPS:
                self.weight_products += macs
        elif name in _CONVOLUTIONS:
            assert formula is not None
            macs = formula(*args, **kwargs, out_val=result) // 2
            bias = args[2]
            if bias is not None and bias.numel() != result.shape[1]:  # torch does not check it on the meta device
                raise RuntimeError(f"a bias of {bias.numel()} numbers for {result.shape[1]} channels")
            self.biases += result.numel() * (bias is not None)
            if all(are_weights):
                self.weight_products += macs
            else:
                self.macs += macs
        elif name in _FORMULAS:
            self.macs += _FORMULAS[name](*args, out=result)
        elif formula is not None:  # fused attention
            self.other_products += formula(*args, **kwargs, out_val=result) // 2
        elif any(are_weights) and not all(are_weights) and (name in _NOT_COUNTED or not name.startswith("aten::")):
            self.not_counted.add(name)

    def describe(self, value: Any) -> Any:
        """Returns a description of an argument or output, which is equal for equal computations.

        A tensor is described by the operation that computed it, or by the name of the weight, and its shape and dtype.
        Devices are left out, because a trace may hold constants on another device.
        """
        if not isinstance(value, Tensor):
            return None if isinstance(value, torch.device) else value
        storage = _storage(value)
        if storage in self._data:
            place = _place(value)
            return self._data[storage].get(place, place), tuple(value.shape), value.dtype
        return self._weights.get(storage, ""), tuple(value.shape), value.dtype


_Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Where the elements of a tensor lie in its storage: offset, shape and strides."""


def _place(tensor: Tensor) -> _Place:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _overlap(one: _Place, other: _Place) -> bool:
    """Returns whether two views of a storage have an element in common."""
    ends = [
        offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
        for offset, shape, strides in (one, other)
    ]
    touched = torch.zeros(max(ends), dtype=torch.bool, device="cpu")
    touched.as_strided(one[1], one[2], one[0]).fill_(True)
    return bool(touched.as_strided(other[1], other[2], other[0]).any())


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _name(func: Any) -> str:
    """Returns the name of an operation without its overload. Operations in place have the name of the others.

    torch.fx traces ``x += y`` as ``x + y``.
    """
    return str(func.name()).partition(".")[0].removesuffix("_")


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Returns the arguments that an operation changes in place."""
    if not func._schema.is_mutable:
        return []
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return written
