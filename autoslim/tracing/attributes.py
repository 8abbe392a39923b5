"""Follows sizes that the code of ``forward`` reads from attributes of its modules, as in ``x.split(self.width, 1)``."""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import fx, nn

SIZED = frozenset(
    {"split", "getitem", "view", "reshape", "expand", "repeat", "new_zeros", "new_ones", "new_full", "new_empty"}
)
"""Operations whose sizes are followed to the attributes that they come from."""


@dataclass(frozen=True)
class Source:
    """Where a number comes from: ``factor`` times an attribute of a module, or times one entry of a list in it."""

    module: str
    name: str
    index: int | None = None  # of the entry
    factor: Fraction = Fraction(1)


class AttributeNumber(int):
    """An attribute's value that records where it comes from, also after multiplication and exact division.

    The result of any other operation is a plain number.
    """

    source: Source

    def __new__(cls, value: int, source: Source) -> "AttributeNumber":
        number = super().__new__(cls, value)
        number.source = source
        return number

    __hash__ = int.__hash__

    def __getnewargs__(self) -> tuple[int, Source]:  # type: ignore[override]
        return int(self), self.source  # for copies, which forward may make

    def _times(self, value: int, factor: Fraction) -> "AttributeNumber":
        source = self.source
        return AttributeNumber(value, Source(source.module, source.name, source.index, source.factor * factor))

    def __mul__(self, other: Any) -> Any:
        result = int.__mul__(self, other)
        return self._times(result, Fraction(int(other))) if isinstance(other, int) and other > 0 else result

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        result = int.__floordiv__(self, other)
        exact = isinstance(other, int) and other > 0 and int.__mod__(self, other) == 0
        return self._times(result, Fraction(1, int(other))) if exact else result

    def node(self, graph: fx.Graph) -> fx.Node:
        """Adds operations to ``graph`` that read the attribute when the graph runs; the last one has this value."""
        source = self.source
        path = f"{source.module}.{source.name}" if source.module else source.name
        node = first = graph.create_node("get_attr", path)
        steps: tuple[tuple[Callable[..., Any], int | None, int], ...] = (
            (operator.getitem, source.index, -1),
            (operator.mul, source.factor.numerator, 1),
            (operator.floordiv, source.factor.denominator, 1),
        )
        for function, operand, neutral in steps:
            if operand is not None and operand != neutral:
                node = graph.create_node("call_function", function, (node, operand))
        node.meta.update(source=source, first=first)
        return node


@contextmanager
def followed_attributes(network: nn.Module) -> Iterator[None]:
    """Replaces whole numbers in attributes of modules by ``AttributeNumber``, and restores them afterwards.

    Args:
        network: The network to be traced.
    """
    replaced: list[tuple[nn.Module, str, Any, Any]] = []
    for path, module in network.named_modules():
        for name, value in list(vars(module).items()):
            if (numbers := _numbers(value, path, name)) is not None:
                replaced.append((module, name, value, numbers))
                module.__dict__[name] = numbers
    try:
        yield
    finally:
        for module, name, value, numbers in replaced:
            if module.__dict__.get(name) is numbers:  # forward may have changed it
                module.__dict__[name] = value


def _numbers(value: Any, path: str, name: str) -> Any:
    if type(value) is int:
        return AttributeNumber(value, Source(path, name))
    if type(value) in (list, tuple) and value and all(type(item) is int for item in value):
        return type(value)(AttributeNumber(item, Source(path, name, index)) for index, item in enumerate(value))
    return None
