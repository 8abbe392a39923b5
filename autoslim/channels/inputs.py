"""The inputs of a network: one or several tensors of any rank and dtype, in the structure that ``forward`` takes."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from autoslim.errors import UserError, first_line


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a network. The first dimension of each tensor in them is the batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> "Arguments":
        """Returns the arguments that ``inputs`` stands for.

        A tuple contains the positional arguments, a mapping the keyword arguments. Anything else, such as a tensor or a
        list of tensors, is the only argument.
        """
        if isinstance(inputs, Arguments):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        return cls(inputs if isinstance(inputs, tuple) else (inputs,), {})

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the arguments, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.tensors[0].device

    def __len__(self) -> int:
        """Returns the size of the batch."""
        return len(self.tensors[0])

    def map(self, change: Callable[[Tensor], Any]) -> "Arguments":
        """Returns the arguments with each tensor replaced by ``change(tensor)``."""
        args, kwargs = tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Arguments(args, kwargs)

    def to(self, dtype: torch.dtype) -> "Arguments":
        """Returns the arguments with all real numbers in ``dtype``. Integers, such as token ids, do not change."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def clone(self) -> "Arguments":
        """Returns a copy, for networks that may overwrite their inputs."""
        return self.map(Tensor.clone)

    def run(self, network: Callable[..., Any]) -> Any:
        """Returns the output of ``network`` for these arguments."""
        return network(*self.args, **self.kwargs)


@dataclass(frozen=True)
class InputTensor:
    """One tensor among the inputs of a network.

    Attributes:
        name: The parameter of ``forward``, followed by the path inside it if it is a list or a mapping.
        shape: The shape without the batch.
        dtype: The dtype. Real numbers are float32 here; they follow the network's dtype.
        low: The lowest value in the example, for integers.
        high: The highest value in the example, for integers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: int = 0
    high: int = 0

    @property
    def is_integer(self) -> bool:
        """Whether it contains integers or booleans, whose values may be indices."""
        return not (self.dtype.is_floating_point or self.dtype.is_complex)


@dataclass(frozen=True)
class Inputs:
    """Describes the inputs that a network was traced with.

    Attributes:
        args: The positional arguments, with an ``InputTensor`` in place of each tensor.
        kwargs: The keyword arguments, likewise.
        omitted: The parameters of ``forward`` that the example has no value for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    omitted: tuple[str, ...] = ()

    @classmethod
    def of(cls, network: nn.Module, example: Arguments) -> "Inputs":
        """Describes ``example``.

        Raises:
            UserError: ``forward`` cannot be called with the example, or the example has an argument that is neither
                a tensor with a batch dimension nor a plain value.
        """
        names, omitted = _parameters(network, example)
        leaves, structure = tree_flatten_with_path((dict(zip(names, example.args, strict=True)), example.kwargs))
        described = [
            _described(network, f"{getattr(path[1], 'key', '')}{keystr(path[2:])}", leaf) for path, leaf in leaves
        ]
        if not any(isinstance(leaf, InputTensor) for leaf in described):
            raise UserError(
                f"the example of {type(network).__name__}'s input contains no tensor; give a tensor, or a tuple or a "
                "mapping of tensors"
            )
        positional, named = structure.unflatten(described)
        return cls(tuple(positional.values()), named, omitted)

    @property
    def tensors(self) -> list[InputTensor]:
        """All tensors among the inputs, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, InputTensor)]

    @property
    def is_single(self) -> bool:
        """Whether the network has one tensor as its only input."""
        return len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], InputTensor)

    def zeros(self, batch: int, device: torch.device | str = "cpu") -> Arguments:
        """Returns a batch of zeros, or of the lowest values of integers."""

        def make(tensor: InputTensor) -> Tensor:
            return torch.full((batch, *tensor.shape), tensor.low, dtype=tensor.dtype, device=device)

        return self._filled(make)

    def ones(self, batch: int, device: torch.device | str = "cpu") -> Arguments:
        """Returns a batch of ones, or of the highest values of integers."""

        def make(tensor: InputTensor) -> Tensor:
            value = tensor.high if tensor.is_integer else 1
            return torch.full((batch, *tensor.shape), value, dtype=tensor.dtype, device=device)

        return self._filled(make)

    def noise(self, batch: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Arguments:
        """Returns a batch of normal noise in ``dtype``, or of random integers in the example's range, on the CPU."""

        def make(tensor: InputTensor) -> Tensor:
            shape = (batch, *tensor.shape)
            if tensor.is_integer:
                drawn = torch.randint(tensor.low, tensor.high + 1, shape, generator=generator, device="cpu")
                return drawn.to(tensor.dtype)
            kind = dtype if tensor.dtype.is_floating_point else tensor.dtype
            return torch.randn(shape, generator=generator, dtype=kind, device="cpu")

        return self._filled(make)

    def _filled(self, make: Callable[[InputTensor], Tensor]) -> Arguments:
        def fill(leaf: Any) -> Any:
            return make(leaf) if isinstance(leaf, InputTensor) else leaf

        return Arguments(*tree_map(fill, (self.args, self.kwargs)))

    def __str__(self) -> str:
        """Returns the shapes without the batch: ``3x224x224``, or ``image=3x64x64, depth=1x64x64``."""
        if self.is_single:
            return written(self.tensors[0].shape)
        return ", ".join(f"{tensor.name}={written(tensor.shape)}" for tensor in self.tensors)


def written(shape: tuple[int, ...]) -> str:
    """Returns a shape as ``3x224x224``, and that of one number for each element of the batch as ``scalar``."""
    return "x".join(map(str, shape)) or "scalar"


def _parameters(network: nn.Module, example: Arguments) -> tuple[list[str], tuple[str, ...]]:
    """Returns the parameter of ``forward`` for each positional argument, and the parameters without an argument.

    Raises:
        UserError: ``forward`` requires other arguments.
    """
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # not every callable has a signature
        return [f"input_{index}" for index in range(len(example.args))], ()
    try:
        bound = signature.bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise UserError(
            f"{type(network).__name__}.forward{signature} cannot be called with the example ({first_line(error)}); "
            "give an example of each input: a tuple of tensors, or a mapping from names to tensors (on the command "
            "line, --input NAME=CxHxW for each)"
        ) from error
    names: list[str] = []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.values()
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(example.args) - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    omitted = (p.name for p in parameters if p.kind not in variadic and p.name not in bound.arguments)
    return names[: len(example.args)], tuple(omitted)


def _described(network: nn.Module, name: str, value: Any) -> Any:
    """Returns the description of a tensor, and a plain value unchanged."""
    if not isinstance(value, Tensor):
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            return value
        raise UserError(
            f"input {name} of {type(network).__name__} is of type {type(value).__name__}; inputs can be tensors, plain "
            "values, and lists, tuples and dictionaries of them"
        )
    if value.dim() == 0:
        raise UserError(
            f"input {name} of {type(network).__name__} is a tensor without dimensions; the first dimension of each "
            "input has to be the batch, so write it as a tensor of shape (1,)"
        )
    if value.is_floating_point() or value.is_complex():
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return InputTensor(name, tuple(value.shape[1:]), dtype)
    known = value.device.type != "meta" and value.numel() > 0
    low, high = (int(value.min()), int(value.max())) if known else (0, 0)
    return InputTensor(name, tuple(value.shape[1:]), value.dtype, low, high)
