"""Figures of latency and memory, predicted and measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from autoslim.report.figures import INK, method_styles, write_figure
from autoslim.report.table import Result
from autoslim.resources.budgets import format_amount
from autoslim.resources.latency.table import LatencyTable, Target

_OPEN: dict[str, Any] = {
    "linestyle": "",
    "marker": "D",
    "markersize": 6,
    "markerfacecolor": "white",
    "markeredgecolor": INK,
    "markeredgewidth": 1.3,
}


def prediction_figure(path: Path, table: LatencyTable, results: Sequence[Result] = (), dpi: int = 150) -> Path:
    """Predicted against measured latency of the table's random networks and, marked, of the methods'.

    Args:
        table: one that has been checked.
        results: of which those are marked whose latency is predicted and measured: on the table's target.
    """

    def draw() -> Figure:
        figure = Figure(figsize=(4.6, 4.8), layout="constrained")
        _scatter(figure.subplots(), table, results)
        return figure

    return write_figure(path, draw, dpi)


def resources_figure(
    path: Path, results: Sequence[Result], table: LatencyTable | None, target: Target, dpi: int = 150
) -> Path:
    """Each method's latency and memory, measured and predicted; and how good a latency table's predictions are.

    Args:
        table: what latency was predicted from, if it was.
        target: what the results' latency was measured on; where the table is of another one, its predictions are of
            another thing, which is told, and the methods are not marked among its random networks.
    """
    checked = table is not None and table.check is not None
    same = table is not None and table.target == target

    def draw() -> Figure:
        height = max(1.6 + 0.5 * len(results), 3.9 if checked else 0)
        figure = Figure(figsize=(13.0 if checked else 9.0, height), layout="constrained")
        panels = figure.subplots(1, 3 if checked else 2, width_ratios=(4, 4, 3.6) if checked else (1, 1))
        times, sizes = panels[0], panels[1]
        _bars(times, results, "latency")
        _bars(sizes, results, "memory")
        sizes.set_yticklabels([])
        images = "one image" if target.batch == 1 else f"{target.batch} images"
        times.set_title(f"latency of a forward pass, {images}")
        sizes.set_title("memory at the peak, one image")
        handles = [
            Patch(color="#999999", label="measured; of latency the median and quartiles"),
            Line2D([], [], **_OPEN, label=f"predicted{'' if same or table is None else ', latency on another target'}"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
        if table is not None and checked:
            _scatter(panels[2], table, results if same else (), named=False)
        return figure

    return write_figure(path, draw, dpi)


def _bars(axes: Axes, results: Sequence[Result], resource: str) -> None:
    """A row for each result: a bar and quartiles as measured, an open mark as predicted, and both in figures."""
    look = method_styles([result.method for result in results])
    for row, result in enumerate(results):
        told, end = [], 0.0
        if (measured := result.measured) is not None:
            amount = end = float(getattr(measured, resource))
            axes.barh(row, amount, height=0.5, color=look[result.method][0], alpha=0.85)
            told.append(format_amount(amount, resource))
            if resource == "latency":
                whiskers = [[amount - measured.latency_low], [measured.latency_high - amount]]
                axes.errorbar(amount, row, xerr=whiskers, fmt="none", ecolor=INK, capsize=4, linewidth=1.2)
                end = measured.latency_high
        if resource in result.costs:
            amount = result.costs[resource]
            axes.plot(amount, row + 0.17, **_OPEN, zorder=3)  # beside the whiskers
            told.append(f"predicted {format_amount(amount, resource)}")
            end = max(end, amount)
        axes.annotate(", ".join(told), (end, row), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [result.method.replace("/", "/\n") for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    predicted = any(resource in result.costs for result in results)
    axes.set_xlim(left=0, right=axes.get_xlim()[1] * (1.8 if predicted else 1.2))  # room for the figures
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_amounts(resource))


def _scatter(axes: Axes, table: LatencyTable, results: Sequence[Result], *, named: bool = True) -> None:
    """``named``: the legend has the methods; else other panels tell whose a colour is."""
    check = table.check
    assert check is not None
    marked = {
        result.method: (result.measured.latency, result.costs["latency"])
        for result in results
        if result.measured is not None and "latency" in result.costs
    }
    xs, ys = zip(*marked.values(), strict=True) if marked else ((), ())
    seen = (*check.measured, *check.predicted, *xs, *ys)
    room = 0.12 * (max(seen) - min(seen))
    least, most = min(seen) - room, max(seen) + room
    if least < most / 3:  # from zero, but not where a heap in the corner would be all there is to see
        least = 0.0
    axes.plot(
        [least, most], [least, most], color=INK, linewidth=1, linestyle=":", zorder=1, label="predicted as measured"
    )
    axes.plot(check.measured, check.predicted, ".", color="#777777", label=f"{len(check.measured)} random networks")
    for method, (colour, shape) in method_styles([result.method for result in results]).items():
        if method in marked:
            axes.plot(
                *marked[method],
                shape,
                color=colour,
                markersize=7,
                linestyle="",
                label=method if named else "_",
                zorder=3,
            )
    axes.set_xlim(least, most)
    axes.set_ylim(least, most)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(_amounts("latency"))
    axes.set_xlabel("latency measured")
    axes.set_ylabel("latency predicted")
    axes.set_title(f"median error {check.median_error:.1%}, rank correlation {check.rank_correlation:.3f}")
    axes.legend(loc="lower right").set_zorder(0.5)  # hides no network


def _amounts(resource: str) -> FuncFormatter:
    return FuncFormatter(lambda amount, _: format_amount(amount, resource) if amount else "0")
