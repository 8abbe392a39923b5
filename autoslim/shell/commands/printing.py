"""Tables as people and programs want them: drawn on a terminal, plain columns in a pipe or a file."""

import sys
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any

from autoslim.vocabulary.budgets import named_amount


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", left: Collection[str] = ()
) -> None:
    """``rows`` below ``headers``. The first column and those named in ``left`` are flush left, numbers flush right.

    In a pipe nothing is cut off or wrapped, whatever the width; columns stand two spaces apart.
    """
    flush_left = [number == 0 or header in left for number, header in enumerate(headers)]
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(headers, cells, title, flush_left)
        return
    if title:
        print(title)
    widths = [max(len(line[number]) for line in (headers, *cells)) for number in range(len(headers))]
    for line in (headers, *cells):
        places = zip(line, widths, flush_left, strict=True)
        print("  ".join(c.ljust(w) if flush else c.rjust(w) for c, w, flush in places).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and what is to be said of them, one a line."""
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        print(f"{name:<{width}}  {text}")


class Resource(StrEnum):
    """For options, and in the order that they are shown in."""

    MACS = "macs"
    PARAMS = "params"
    MEMORY = "memory"
    LATENCY = "latency"


def amounts(costs: Mapping[str, float]) -> str:
    """What a configuration takes, of the resources among ``costs``: ``305M MACs, 3.4M parameters, 14.2MB, 12ms``."""
    return ", ".join(named_amount(costs[resource], resource) for resource in Resource if resource in costs)


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f}"


def _draw(headers: Sequence[str], cells: Sequence[Sequence[str]], title: str, flush_left: Sequence[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for header, flush in zip(headers, flush_left, strict=True):
        table.add_column(header, justify="left" if flush else "right", overflow="fold")
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    Console(highlight=False).print(table)
