"""Figures of the search's trajectory, the channels of each network and the training curves."""

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

from autoslim.errors import UserError, first_line
from autoslim.files import write_atomically
from autoslim.report.table import Result
from autoslim.resources.budgets import TITLES, format_amount, format_named_amount
from autoslim.tasks.measure import TOP1, Measure, named_scores

_STYLE_OF = {"autoslim": ("#D55E00", "o"), "uniform": ("#0072B2", "s"), "default": ("#000000", "*")}
_OTHER_STYLES = (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
DEFAULT_COLOUR = "#DDDDDD"
INK = "#333333"

_RC_PARAMS = {
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
    "text.parse_math": False,  # a dollar sign in the name of a layer is no formula
    "xtick.color": INK,
    "ytick.color": INK,
}


def method_styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns the colour and marker of each method, from Okabe and Ito's palette for colour-blind readers.

    Every figure of the same methods uses the same styles. The styles of ``autoslim``, ``uniform`` and ``default``
    are always the same.
    """
    others = [method for method in methods if method not in _STYLE_OF]
    style_of_other = {method: _OTHER_STYLES[index % len(_OTHER_STYLES)] for index, method in enumerate(others)}
    return {method: _STYLE_OF.get(method) or style_of_other[method] for method in methods}


def write_figure(path: Path, draw: Callable[[], Figure], dpi: int) -> Path:
    """Writes the figure that ``draw`` returns as a PNG. Its bytes do not depend on the user's matplotlib settings."""
    with matplotlib.style.context(["default", _RC_PARAMS]):
        figure = draw()
        write_atomically(path, lambda to: figure.savefig(to, dpi=dpi, format="png", metadata={"Software": None}))
    return path


Columns = Mapping[str, Sequence[float]]
"""Column name -> values, one per row. An empty cell is NaN."""


@dataclass(frozen=True)
class Band:
    """The mean, lowest and highest value of a quantity over the seeds, for each epoch."""

    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def read_curves(path: Path) -> dict[str, list[float]]:
    """Reads the columns of ``curves.csv``. All values are numbers; an empty cell is NaN.

    Raises:
        UserError: the file is missing, empty or damaged.
    """
    columns: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    columns.setdefault(name, []).append(float(cell) if cell else math.nan)
        if "epoch" not in columns:
            raise ValueError("it has no column 'epoch'")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); delete it and run `dvc repro`") from error
    return columns


def last_by_seed(curves: Columns, quantity: str) -> dict[int, float]:
    """Returns ``quantity`` at the last epoch of each seed."""
    seeds = (int(seed) for seed in curves["seed"])
    return dict(zip(seeds, curves[quantity], strict=True))  # rows are ordered by epoch: later ones overwrite


def band_over_seeds(curves: Columns, quantity: str) -> Band:
    """Summarises ``quantity`` over the seeds for each epoch. Epochs without any value are left out."""
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
    """Plots the score, such as top-1, against a resource: of subnets on the search split, and of retrained networks.

    The score is the one of the search, on the test split for retrained networks.

    Args:
        trajectory: the contents of ``trajectory.json``; without steps, only retrained networks are drawn.
        resource: a resource that the trajectory records.
        budgets: label of each budget -> its value in the resource's unit.
    """
    steps = trajectory["steps"]
    default = trajectory["default"][resource]
    score, _ = named_scores(trajectory)

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        amounts = [step[resource] for step in steps]
        scores = [score.factor * score.of_error(step["error"]) for step in steps]
        marker = "." if len(steps) <= 80 else ""
        if steps:
            axes.plot(amounts, scores, marker=marker, color="#555555", label="subnets of the supernet (search split)")
        styles = method_styles([result.method for result in results])
        for result in results:
            colour, marker = styles[result.method]
            mean, std = result.summary(score)
            axes.errorbar(
                result.costs[resource],
                score.factor * mean,
                yerr=None if std is None else score.factor * std,
                fmt=marker,
                color=colour,
                markersize=7,
                capsize=4,
                zorder=3,
                label=f"{result.method}, {'as it is' if result.start == 'trained' else 'retrained'} "
                f"(test split{_spread(result)})",
            )
        axes.set_xlim(left=0)
        axes.set_xlabel(TITLES[resource])
        axes.set_ylabel(score.header())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda amount, _: format_amount(amount, resource) if amount else "0")
        )
        axes.legend(loc="best")
        lines = [(f"budget {label}", limit, "--") for label, limit in budgets.items()]
        _mark(axes, [*lines, (f"default {format_named_amount(default, resource)}", default, ":")])
        return figure

    return write_figure(path, draw, dpi)


def channels_figure(
    path: Path, default: Mapping[str, int], configurations: Mapping[str, Mapping[str, int]], dpi: int = 150
) -> Path:
    """Plots the channels of each group, absolute and relative to the default network, from input (top) to output.

    Args:
        default: group -> channels of the default network. The figure has the groups in this order.
        configurations: method -> its channel configuration.
    """
    groups = list(default)
    styles = method_styles(list(configurations))

    def draw() -> Figure:
        figure = Figure(figsize=(9.5, 1.3 + 0.27 * len(groups)), layout="constrained")
        bars, shares = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4))
        rows = range(len(groups))
        bars.barh(rows, [default[group] for group in groups], height=0.84, color=DEFAULT_COLOUR, label="default")
        end = _column(shares, 0, "default", default.values(), INK)
        height = 0.7 / max(1, len(configurations))
        for index, (method, channels) in enumerate(configurations.items()):
            offsets = [row + (index - (len(configurations) - 1) / 2) * height for row in rows]
            colour, marker = styles[method]
            counts = [channels[group] for group in groups]
            bars.barh(offsets, counts, height=height, color=colour, label=method)
            percent = [100 * count / default[group] for group, count in zip(groups, counts, strict=True)]
            shares.plot(percent, offsets, linestyle="", marker=marker, color=colour, markersize=4.5)
            end = _column(shares, end, method, counts, colour)
        shares.axvline(100, color=INK, linewidth=1, linestyle=":", zorder=1)
        shares.set_xlim(left=0)
        bars.set_ylim(len(groups) - 0.4, -0.6)
        bars.set_yticks(rows, groups)
        bars.grid(axis="y", visible=False)
        for axes in (bars, shares):
            axes.tick_params(axis="y", length=0)
        bars.set_xlabel("channels")
        shares.set_xlabel("channels relative to the default network (%)")
        figure.legend(loc="outside upper left", ncols=1 + len(configurations))
        return figure

    return write_figure(path, draw, dpi)


def curves_figure(
    path: Path, supernet: Columns, retrained: Mapping[str, Columns], dpi: int = 150, score: Measure = TOP1
) -> Path:
    """Plots the score on the search split by epoch, for three subnets of the supernet and for the retrained networks.

    Args:
        supernet: columns of the supernet's ``curves.csv``. The widest, default and narrowest subnet are drawn. Empty:
            there is no supernet.
        retrained: method -> columns of its ``curves.csv``. The mean over seeds is drawn, with the range as a band.
        score: what the columns contain.
    """

    def written(values: Sequence[float]) -> list[float]:
        return [score.factor * value for value in values]

    def draw() -> Figure:
        figure = Figure(figsize=(8.5 if supernet else 5.0, 3.6), layout="constrained")
        both = figure.subplots(1, 2 if supernet else 1, squeeze=False)[0]
        left, right = both[0], both[-1]
        for name, line in (("widest", "-"), ("default", "--"), ("narrowest", ":")) if supernet else ():
            band = band_over_seeds(supernet, f"{name}_{score.name}")
            left.plot(band.epochs, written(band.mean), line, color="#555555", label=name)
        for method, (colour, marker) in method_styles(list(retrained)).items():
            band = band_over_seeds(retrained[method], f"search_{score.name}")
            points = marker if len(band.epochs) == 1 else ""  # a line of one epoch cannot be seen
            right.plot(band.epochs, written(band.mean), marker=points, color=colour, label=method)
            right.fill_between(band.epochs, written(band.low), written(band.high), color=colour, alpha=0.2, linewidth=0)
        left.set_title("supernet")
        seeds = {seed for columns in retrained.values() for seed in columns["seed"]}
        spread = f": mean and range over {len(seeds)} seeds" if len(seeds) > 1 else ""
        right.set_title(f"retrained networks{spread}")
        for axes in both:
            axes.set_xlabel("epoch")
            axes.set_ylabel(score.header(f"{score.title} on the search split"))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
            axes.legend(loc="best")
        return figure

    return write_figure(path, draw, dpi)


def _mark(axes: Axes, marks: Sequence[tuple[str, float, str]]) -> None:
    """Draws vertical lines, given as (label, x, line style), with labels above the axes.

    Labels that would overlap are stacked.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    ends: list[float] = []  # right end of each row of labels in pixels, lowest row first
    for label, amount, line in sorted(marks, key=lambda mark: mark[1]):
        axes.axvline(amount, color=INK, linestyle=line, linewidth=1, zorder=1)
        text = axes.annotate(
            label,
            (amount, 1),
            (0, 3),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
        figure.draw_without_rendering()
        box = text.get_window_extent()
        row = next((index for index, end in enumerate(ends) if end < box.x0), len(ends))
        ends[row : row + 1] = [box.x1 + figure.dpi / 10]
        text.xyann = (0, 3 + 13 * row)  # points


def _column(axes: Axes, end: float, name: str, values: Iterable[int], colour: str) -> float:
    """Writes a column of numbers to the right of the axes, one per row, under a heading.

    The column starts ``end`` points to the right of the axes. Returns its right end in points.
    """
    end += 6.0 * max(4, len(name)) + 6
    for row, value in enumerate(values):
        position = (1, row), (end, 0), axes.get_yaxis_transform()
        axes.annotate(str(value), *position, textcoords="offset points", ha="right", va="center", color=colour)
    axes.annotate(name, (1, 1), (end, 2), "axes fraction", "offset points", ha="right", va="bottom", color=colour)
    return end


def _spread(result: Result) -> str:
    return "" if result.std is None else f", mean ± std over {len(result.top1)} seeds"
