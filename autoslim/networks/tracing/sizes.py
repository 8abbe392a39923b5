"""Sizes of tensors, as numbers that remember what they follow from."""

from collections.abc import Callable
from typing import Any

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
