"""Resources, their units and budgets such as ``305M``, ``0.57G``, ``12ms``, ``20MB`` or ``50%``."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoslim.errors import UserError

_COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}

UNITS: dict[str, dict[str, float]] = {"macs": _COUNT, "params": _COUNT, "latency": _MILLISECONDS, "memory": _BYTES}
"""Resource -> accepted units -> their size in the resource's own unit (1 MAC, 1 parameter, 1 ms, 1 byte)."""

EXAMPLES = {"macs": "305M, 0.57G or 50%", "params": "3.4M or 50%", "latency": "12ms or 50%", "memory": "20MB or 50%"}

NAMES = {"macs": "MACs", "params": "parameters", "latency": "", "memory": ""}
"""Resource -> noun that follows an amount. It is empty if the unit already identifies the resource."""

TITLES = {"macs": "MACs", "params": "parameters", "latency": "latency", "memory": "memory"}

Amount = str | int | float
"""A budget as it is written in params.yaml."""

_AMOUNT = re.compile(r"((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Budget:
    """An upper bound of a resource.

    Attributes:
        text: the budget as the user wrote it.
        amount: the bound in the resource's own unit or, if ``relative``, as a fraction of the default network's cost.
        relative: whether the budget is a share of the default network's cost.
    """

    text: str
    amount: float
    relative: bool

    def absolute(self, default: float) -> float:
        """Returns the bound in the resource's unit, given the cost of the default network."""
        return self.amount * default if self.relative else self.amount


def parse_budget(text: str | float, resource: str = "macs", *, several: bool = False) -> Budget:
    """Parses a budget of ``resource``.

    Args:
        several: whether the budget is one of several. It changes only the remedy in an error message.

    Raises:
        UserError: the budget is not a positive number with a unit of the resource.
    """
    units = UNITS[resource]
    match = _AMOUNT.fullmatch(str(text).strip())
    if match is None:
        raise UserError(f"budget {text!r} is not an amount of {resource}; write it like {EXAMPLES[resource]}")
    number, unit = float(match[1]), match[2]
    if number <= 0 or not math.isfinite(number):
        raise UserError(f"budget {text!r} is not a positive number; write it like {EXAMPLES[resource]}")
    if unit == "%":
        return Budget(str(text), number / 100, relative=True)
    if unit == "" and units is _COUNT and number < 1:
        raise UserError(f"budget {text!r} is less than 1; write a share of the default network like {100 * number:g}%")
    # Counts accept lower case ("305m"), which is unambiguous. For bytes and seconds, case matters.
    sizes = {name.lower(): size for name, size in units.items()} if units is _COUNT else units
    unit_key = unit.lower() if units is _COUNT else unit
    if unit_key not in sizes:
        matches = [name for name, others in UNITS.items() if unit and unit in others]
        remedy = f"name {'that' if len(matches) == 1 else 'one of these'} in budget" if several else "set resource"
        hint = f" ({unit} measures {' and '.join(matches)}: {remedy})" if matches else ""
        raise UserError(f"budget {text!r} has no unit of {resource}{hint}; write it like {EXAMPLES[resource]}")
    if not 0 < (amount := number * sizes[unit_key]) < math.inf:
        raise UserError(f"budget {text!r} is not a positive number; write it like {EXAMPLES[resource]}")
    return Budget(str(text), amount, relative=False)


def format_amount(value: float, resource: str = "macs") -> str:
    """Formats ``value``, given in the resource's own unit, to three digits: ``305M``, ``1.42M``, ``12.3ms``."""
    units = UNITS[resource]
    names = [name for name in units if not name.endswith("iB")]
    name = next((n for n in reversed(names) if abs(value) >= units[n]), names[0])
    number = value / units[name]
    if abs(number) >= 999.5 and name != names[-1]:
        name = names[names.index(name) + 1]
        number = value / units[name]
    digits = max(0, 3 - len(str(int(abs(number)))))
    text = f"{number:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{name}"


def format_named_amount(value: float, resource: str = "macs") -> str:
    """Formats ``value`` with the name of the resource: ``305M MACs``, ``3.4M parameters``, ``12.3ms``."""
    return f"{format_amount(value, resource)} {NAMES[resource]}".rstrip()


def parse_budgets(budget: Amount | Mapping[Any, Amount], resource: str) -> dict[str, Budget]:
    """Parses one budget of ``resource``, or a mapping of several resources to budgets.

    Raises:
        UserError: a budget is invalid, a resource is unknown, or the mapping is empty.
    """
    if not isinstance(budget, Mapping):
        return {resource: parse_budget(budget, resource)}
    if not budget:
        raise UserError("budget is an empty mapping; write it like {macs: 305M, params: 3.5M}")
    for name in budget:
        if name not in UNITS:
            raise UserError(f"budget bounds {name!r}; the resources are {', '.join(UNITS)}")
    return {name: parse_budget(amount, name, several=True) for name, amount in budget.items()}


def format_budgets(budgets: Mapping[str, Budget]) -> str:
    """Formats budgets as the user wrote them: ``305M``, or for several resources ``305M MACs, 3.5M parameters``."""
    if len(budgets) == 1:
        return next(iter(budgets.values())).text
    return ", ".join(
        f"{budget.text} {'of ' if budget.relative else ''}{NAMES[name] or TITLES[name]}"
        for name, budget in budgets.items()
    )
