"""The report's figures: trajectory, channel numbers and training curves."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from autoslim.report.table import Result
from autoslim.resources.budgets import TITLES, format_amount, format_named_amount

_FIXED = {"autoslim": ("#D55E00", "o"), "uniform": ("#0072B2", "s")}
_OTHERS = (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
DEFAULT_COLOUR = "#DDDDDD"
INK = "#333333"

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "font.size": 9.0,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.edgecolor": "none",
    "legend.framealpha": 1.0,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def method_styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Method -> its colour and its marker, from a palette that the colour-blind can tell apart (Okabe and Ito's).

    The same in every picture of the same methods; ``autoslim`` and ``uniform`` look the same in all pictures.
    """
    others = [method for method in methods if method not in _FIXED]
    rest = {method: _OTHERS[number % len(_OTHERS)] for number, method in enumerate(others)}
    return {method: _FIXED.get(method) or rest[method] for method in methods}


def write_figure(path: Path, draw: Callable[[], Figure], dpi: int) -> Path:
    """The figure that ``draw`` makes, as a PNG: the same bytes for the same figure, whatever the user's own style."""
    with matplotlib.style.context(["default", _STYLE]):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(path, dpi=dpi, format="png", metadata={"Software": None})
    return path


Columns = Mapping[str, Sequence[float]]
"""Column name -> its values, line by line; NaN where a cell is empty."""


@dataclass(frozen=True)
class Band:
    """A quantity over the seeds, epoch by epoch: its mean, and the lowest and the highest seed."""

    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def read_curves(path: Path) -> dict[str, list[float]]:
    """The columns of a curves file. All of them hold numbers; an empty cell is NaN."""
    columns: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                columns.setdefault(name, []).append(float(cell) if cell else math.nan)
    return columns


def last_by_seed(curves: Columns, quantity: str) -> dict[int, float]:
    """Seed -> ``quantity`` at its last epoch."""
    seeds = (int(seed) for seed in curves["seed"])
    return dict(zip(seeds, curves[quantity], strict=True))  # in the order of epochs: the last one stays


def over_seeds(curves: Columns, quantity: str) -> Band:
    """``quantity`` by epoch over the seeds that have it; an epoch in which none has it is left out."""
    by_epoch: dict[float, list[float]] = defaultdict(list)
    for epoch, value in zip(curves["epoch"], curves[quantity], strict=True):
        if not math.isnan(value):
            by_epoch[epoch].append(value)
    epochs = sorted(by_epoch)
    values = [by_epoch[epoch] for epoch in epochs]
    return Band(epochs, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def trajectory_figure(
    path: Path,
    trajectory: Mapping[str, Any],
    results: Sequence[Result],
    resource: str,
    budgets: Mapping[str, float],
    dpi: int = 150,
) -> Path:
    """Top-1 against a resource searched: the supernet's subnets on the search split, retrained networks on test.

    Args:
        trajectory: what ``trajectory.json`` holds.
        resource: one that the trajectory has recorded.
        budgets: as they are to be told -> in the resource's unit.
    """
    steps = trajectory["steps"]
    default = trajectory["default"][resource]

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        amounts = [step[resource] for step in steps]
        accuracies = [100 * (1 - step["error"]) for step in steps]
        marker = "." if len(steps) <= 80 else ""
        axes.plot(amounts, accuracies, marker=marker, color="#555555", label="subnets of the supernet, search split")
        for result in results:
            colour, shape = method_styles([r.method for r in results])[result.method]
            axes.errorbar(
                result.costs[resource],
                100 * result.mean,
                yerr=None if result.std is None else 100 * result.std,
                fmt=shape,
                color=colour,
                markersize=7,
                capsize=4,
                zorder=3,
                label=f"{result.method} retrained, test split{_spread(result)}",
            )
        axes.set_xlim(left=0)
        axes.set_xlabel(TITLES[resource])
        axes.set_ylabel("top-1 (%)")
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda amount, _: format_amount(amount, resource) if amount else "0")
        )
        axes.legend(loc="best")
        lines = [(f"budget {text}", limit, "--") for text, limit in budgets.items()]
        _mark(axes, [*lines, (f"default {format_named_amount(default, resource)}", default, ":")])
        return figure

    return write_figure(path, draw, dpi)


def channels_figure(
    path: Path, default: Mapping[str, int], found: Mapping[str, Mapping[str, int]], dpi: int = 150
) -> Path:
    """Channels of each group, from the input (top) to the output, and their share of the default network's.

    Args:
        default: group -> channels of the default network; its order is the picture's.
        found: method -> the configuration it gives.
    """
    groups = list(default)
    look = method_styles(list(found))

    def draw() -> Figure:
        figure = Figure(figsize=(9.5, 1.3 + 0.27 * len(groups)), layout="constrained")
        bars, shares = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4))
        rows = range(len(groups))
        bars.barh(rows, [default[group] for group in groups], height=0.84, color=DEFAULT_COLOUR, label="default")
        end = _column(shares, 0, "default", default.values(), INK)
        height = 0.7 / len(found)
        for index, (method, channels) in enumerate(found.items()):
            offsets = [row + (index - (len(found) - 1) / 2) * height for row in rows]
            colour, shape = look[method]
            own = [channels[group] for group in groups]
            bars.barh(offsets, own, height=height, color=colour, label=method)
            percent = [100 * number / default[group] for group, number in zip(groups, own, strict=True)]
            shares.plot(percent, offsets, linestyle="", marker=shape, color=colour, markersize=4.5)
            end = _column(shares, end, method, own, colour)
        shares.axvline(100, color=INK, linewidth=1, linestyle=":", zorder=1)
        shares.set_xlim(left=0)
        bars.set_ylim(len(groups) - 0.4, -0.6)
        bars.set_yticks(rows, groups)
        bars.grid(axis="y", visible=False)
        for axes in (bars, shares):
            axes.tick_params(axis="y", length=0)
        bars.set_xlabel("channels")
        shares.set_xlabel("share of the default's channels (%)")
        figure.legend(loc="outside upper left", ncols=1 + len(found))
        return figure

    return write_figure(path, draw, dpi)


def curves_figure(path: Path, supernet: Columns, retrained: Mapping[str, Columns], dpi: int = 150) -> Path:
    """Top-1 on the search split by epoch: of the supernet's widest, default and narrowest, and of each method's seeds.

    Args:
        supernet: the columns of the supernet's ``curves.csv``.
        retrained: method -> the columns of its ``curves.csv``.
    """

    def draw() -> Figure:
        figure = Figure(figsize=(8.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, line in (("widest", "-"), ("default", "--"), ("narrowest", ":")):
            band = over_seeds(supernet, f"{name}_top1")
            left.plot(band.epochs, _percent(band.mean), line, color="#555555", label=name)
        for method, (colour, _) in method_styles(list(retrained)).items():
            band = over_seeds(retrained[method], "search_top1")
            right.plot(band.epochs, _percent(band.mean), color=colour, label=method)
            right.fill_between(
                band.epochs, _percent(band.low), _percent(band.high), color=colour, alpha=0.2, linewidth=0
            )
        left.set_title("supernet")
        seeds = {seed for columns in retrained.values() for seed in columns["seed"]}
        right.set_title("retrained" + (f": mean, lowest and highest of {len(seeds)} seeds" if len(seeds) > 1 else ""))
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.set_ylabel("top-1 on the search split (%)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            axes.legend(loc="best")
        return figure

    return write_figure(path, draw, dpi)


def _mark(axes: Axes, marks: Sequence[tuple[str, float, str]]) -> None:
    """Vertical lines (name, place, style), named above the axes; names that would touch stand one above another."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    ends: list[float] = []  # where each row of names ends, in pixels, from the axes upwards
    for name, amount, line in sorted(marks, key=lambda mark: mark[1]):
        axes.axvline(amount, color=INK, linestyle=line, linewidth=1, zorder=1)
        text = axes.annotate(
            name,
            (amount, 1),
            (0, 3),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
        figure.draw_without_rendering()
        box = text.get_window_extent()
        row = next((number for number, end in enumerate(ends) if end < box.x0), len(ends))
        ends[row : row + 1] = [box.x1 + figure.dpi / 10]
        text.xyann = (0, 3 + 13 * row)  # points


def _column(axes: Axes, end: float, name: str, values: Iterable[int], colour: str) -> float:
    """Numbers beside the axes, a row each, under a name; from ``end`` on, in points. Returns where the column ends."""
    end += 6.0 * max(4, len(name)) + 6
    for row, value in enumerate(values):
        at = (1, row), (end, 0), axes.get_yaxis_transform()
        axes.annotate(str(value), *at, textcoords="offset points", ha="right", va="center", color=colour)
    axes.annotate(name, (1, 1), (end, 2), "axes fraction", "offset points", ha="right", va="bottom", color=colour)
    return end


def _percent(fractions: Sequence[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]


def _spread(result: Result) -> str:
    return "" if result.std is None else f", mean ± std of {len(result.top1)} seeds"
