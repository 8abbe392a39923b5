"""Figures of predicted and measured latency and memory."""

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

_PREDICTED_STYLE: dict[str, Any] = {
    "linestyle": "",
    "marker": "D",
    "markersize": 6,
    "markerfacecolor": "white",
    "markeredgecolor": INK,
    "markeredgewidth": 1.3,
}


def prediction_figure(path: Path, table: LatencyTable, results: Sequence[Result] = (), dpi: int = 150) -> Path:
    """Plots predicted against measured latency for the table's random networks and for the methods' networks.

    Args:
        table: a table with a check.
        results: those with both a predicted and a measured latency are drawn. Both must refer to the table's target.
    """

    def draw() -> Figure:
        figure = Figure(figsize=(4.6, 4.8), layout="constrained")
        _scatter(figure.subplots(), table, results)
        return figure

    return write_figure(path, draw, dpi)


def resources_figure(
    path: Path, results: Sequence[Result], table: LatencyTable | None, target: Target, dpi: int = 150
) -> Path:
    """Plots the measured and predicted latency and memory of each method, and the accuracy of a latency table.

    Args:
        table: the table that latency was predicted from, if any.
        target: what the results' latency was measured on. If the table is for another target, the legend states this
            and the methods are not drawn among the table's random networks.
    """
    checked = table is not None and table.check is not None
    same_target = table is not None and table.target == target

    def draw() -> Figure:
        height = max(1.6 + 0.5 * len(results), 3.9 if checked else 0)
        figure = Figure(figsize=(13.0 if checked else 9.0, height), layout="constrained")
        panels = figure.subplots(1, 3 if checked else 2, width_ratios=(4, 4, 3.6) if checked else (1, 1))
        latency, memory = panels[0], panels[1]
        _bars(latency, results, "latency")
        _bars(memory, results, "memory")
        memory.set_yticklabels([])
        images = "one image" if target.batch == 1 else f"{target.batch} images"
        latency.set_title(f"latency of a forward pass, {images}")
        memory.set_title("peak memory, one image")
        elsewhere = "" if same_target or table is None else " (latency on another target)"
        handles = [
            Patch(color="#999999", label="measured (latency: median and quartiles)"),
            Line2D([], [], **_PREDICTED_STYLE, label=f"predicted{elsewhere}"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
        if table is not None and checked:
            _scatter(panels[2], table, results if same_target else (), named=False)
        return figure

    return write_figure(path, draw, dpi)


def _bars(axes: Axes, results: Sequence[Result], resource: str) -> None:
    """Draws a row per result: a bar with quartiles for the measured value, an open marker for the predicted one."""
    styles = method_styles([result.method for result in results])
    for row, result in enumerate(results):
        labels, end = [], 0.0
        if (measured := result.measured) is not None:
            amount = end = float(getattr(measured, resource))
            axes.barh(row, amount, height=0.5, color=styles[result.method][0], alpha=0.85)
            labels.append(format_amount(amount, resource))
            if resource == "latency":
                whiskers = [[amount - measured.latency_low], [measured.latency_high - amount]]
                axes.errorbar(amount, row, xerr=whiskers, fmt="none", ecolor=INK, capsize=4, linewidth=1.2)
                end = measured.latency_high
        if resource in result.costs:
            amount = result.costs[resource]
            axes.plot(amount, row + 0.17, **_PREDICTED_STYLE, zorder=3)  # does not cover the whiskers
            labels.append(f"predicted {format_amount(amount, resource)}")
            end = max(end, amount)
        axes.annotate(", ".join(labels), (end, row), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [result.method.replace("/", "/\n") for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    predicted = any(resource in result.costs for result in results)
    axes.set_xlim(left=0, right=axes.get_xlim()[1] * (1.8 if predicted else 1.2))  # room for the labels
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_amounts(resource))


def _scatter(axes: Axes, table: LatencyTable, results: Sequence[Result], *, named: bool = True) -> None:
    """Plots predicted against measured latency. Without ``named``, the legend leaves out the methods."""
    check = table.check
    assert check is not None
    latencies = {
        result.method: (result.measured.latency, result.costs["latency"])
        for result in results
        if result.measured is not None and "latency" in result.costs
    }
    values = [*check.measured, *check.predicted, *(ms for pair in latencies.values() for ms in pair)]
    margin = 0.12 * (max(values) - min(values))
    low, high = min(values) - margin, max(values) + margin
    if low < high / 3:  # otherwise starting at zero would leave most of the panel empty
        low = 0.0
    axes.plot([low, high], [low, high], color=INK, linewidth=1, linestyle=":", zorder=1, label="predicted = measured")
    axes.plot(check.measured, check.predicted, ".", color="#777777", label=f"{len(check.measured)} random networks")
    for method, (colour, marker) in method_styles([result.method for result in results]).items():
        if method in latencies:
            axes.plot(
                *latencies[method],
                marker,
                color=colour,
                markersize=7,
                linestyle="",
                label=method if named else "_",
                zorder=3,
            )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(_amounts("latency"))
    axes.set_xlabel("measured latency")
    axes.set_ylabel("predicted latency")
    axes.set_title(f"median error {check.median_error:.1%}, rank correlation {check.rank_correlation:.3f}")
    axes.legend(loc="lower right").set_zorder(0.5)  # behind the points


def _amounts(resource: str) -> FuncFormatter:
    return FuncFormatter(lambda amount, _: format_amount(amount, resource) if amount else "0")
