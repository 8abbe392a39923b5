"""Figures of the search's trajectory, the channels of each network and the training curves."""

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from autoslim.errors import UserError, first_line
from autoslim.files import write_atomically
from autoslim.report.table import Result
from autoslim.resources.budgets import TITLES, format_amount, format_named_amount
from autoslim.tasks.measure import TOP1, Measure, named_scores

_STYLE_OF = {"autoslim": ("#D55E00", "o"), "uniform": ("#0072B2", "s"), "default": ("#000000", "*")}
_OTHER_STYLES = (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
DEFAULT_COLOUR = "#DDDDDD"
INK = "#333333"
LINE = "#666666"

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


_VARIABLES = {INK: "ink", "#000000": "ink", LINE: "line", "#E6E6E6": "grid", "#888888": "edge"}
"""Colours in a figure -> variables of a page's style sheet, which depend on its colour scheme."""


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


def svg(name: str, draw: Callable[[], Figure]) -> str:
    """Returns the figure that ``draw`` returns as an ``<svg>`` element for a page, without a background.

    Its text is text, in the font of the page. Ink, lines and grid have the colours of the page's CSS variables
    ``--ink``, ``--line``, ``--grid`` and ``--edge``, so that they follow its light or dark scheme. All ids begin with
    ``name``, because they have to be unique in the page.
    """
    buffer = io.StringIO()
    settings = _RC_PARAMS | {"svg.fonttype": "none", "svg.hashsalt": name, "legend.framealpha": 0.0}
    with matplotlib.style.context(["default", settings]):
        draw().savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    return re.sub(r"<[^<>]+>", lambda tag: _tag_for_a_page(tag[0], name), text[text.index("<svg") :]).strip()


def _tag_for_a_page(tag: str, name: str) -> str:
    """Returns a tag of a figure for ``svg``. Text between tags, such as names of groups, has no < and >."""
    if tag.startswith("<!--"):
        return ""
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="[^"]*"', tag)
        assert box is not None
        return f'<svg {box[0]} role="img">'
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", tag)
    for colour, variable in _VARIABLES.items():
        tag = re.sub(rf"(?<=: ){colour}(?=[;\"])", f"var(--{variable})", tag, flags=re.I)
    return tag


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
    default_score: float | None = None,
) -> Path:
    """Plots the score, such as top-1, against a resource. See ``draw_trajectory``."""
    return write_figure(path, lambda: draw_trajectory(trajectory, results, resource, budgets, default_score), dpi)


def draw_trajectory(
    trajectory: Mapping[str, Any],
    results: Sequence[Result],
    resource: str,
    budgets: Mapping[str, float],
    default_score: float | None = None,
    size: tuple[float, float] = (7.2, 5.4),
) -> Figure:
    """Draws the score, such as top-1, against a resource: of retrained networks, and of subnets of the supernet.

    The two have separate panels, because they are not comparable: the retrained networks have weights of their own and
    are evaluated on the test split; the subnets share the supernet's weights and are evaluated on the search split.
    Networks with about the same cost are drawn side by side.

    Args:
        trajectory: the contents of ``trajectory.json``; without steps, only retrained networks are drawn.
        resource: a resource that the trajectory records.
        budgets: label of each budget -> its value in the resource's unit.
        default_score: the score of the default network's configuration in the supernet, if the supernet has it.
        size: width and height in inches.
    """
    steps = trajectory["steps"]
    default = trajectory["default"][resource]
    score, _ = named_scores(trajectory)
    width, height = size
    figure = Figure(figsize=size if steps else (width, height / 2 + 0.5), layout="constrained")
    panels = list(figure.subplots(2, sharex=True, height_ratios=(5, 6))) if steps else [figure.subplots()]
    retrained, subnets = panels[0], panels[-1]
    amounts = [step[resource] for step in steps]
    scores = [score.factor * score.of_error(step["error"]) for step in steps]
    marker = "." if len(steps) <= 80 else ""
    if steps:
        subnets.plot(amounts, scores, marker=marker, color=LINE)
        subnets.set_title("the search: subnets with the supernet's weights, search split")
    if steps and default_score is not None:
        colour, marker = _STYLE_OF["default"]
        subnets.plot(default, score.factor * default_score, color=colour, **_open(marker), label="default network")
        subnets.legend(loc="lower right")
    styles = method_styles([result.method for result in results])
    spread = max([*amounts, *(result.costs[resource] for result in results)])
    offsets = side_by_side([result.costs[resource] for result in results], spread / 20)
    for result, offset in zip(results, offsets, strict=True):
        colour, marker = styles[result.method]
        mean, std = result.summary(score)
        moved = ScaledTranslation(9 * offset / 72, 0, figure.dpi_scale_trans)
        cost, value, half = result.costs[resource], score.factor * mean, score.factor * (std or 0)
        retrained.update_datalim([(cost, value - half), (cost, value + half)])  # not done for a moved artist
        retrained.errorbar(
            cost,
            value,
            yerr=None if std is None else half,
            color=colour,
            **_open(marker),
            capsize=4,
            zorder=3,
            label=f"{result.method}{', as it is' if result.start == 'trained' else ''}: {score.number(mean)}"
            + ("" if std is None else f" ± {score.number(std)}"),
            transform=retrained.transData + moved,
        )
    numbers = {len(result.top1) for result in results if result.std is not None}
    over = f", mean ± std over {max(numbers)} seeds" if numbers else ""
    kept = all(result.start == "trained" for result in results)
    title = f"{'trained' if kept else 'retrained'} networks, test split{over}"
    for axes in panels:
        axes.set_ylabel(score.header())
        axes.margins(y=0.15)
        axes.autoscale_view()
    subnets.set_xlim(left=0)
    subnets.set_xlabel(TITLES[resource])
    subnets.xaxis.set_major_formatter(
        FuncFormatter(lambda amount, _: format_amount(amount, resource) if amount else "0")
    )
    if results:
        retrained.legend(loc="best")
    lines = [(f"budget {label}", limit, "--") for label, limit in budgets.items()]
    lines.append((f"default {format_named_amount(default, resource)}", default, ":"))
    retrained.set_title(title, loc="left", pad=6 + _mark(retrained, lines))
    for _, amount, line in lines if steps else ():
        subnets.axvline(amount, color=INK, linestyle=line, linewidth=1, zorder=1)
    return figure


def side_by_side(values: Sequence[float], near: float) -> list[float]:
    """Returns offsets that put values next to each other if they differ by at most ``near`` from a neighbour.

    The offsets of each group of such values are 1 apart and keep the order of the values. The largest value keeps its
    place, so that no network seems to be beyond its budget.
    """
    offsets = [0.0] * len(values)
    order = sorted(range(len(values)), key=lambda index: values[index])
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] - values[order[end - 1]] > near:
            for position, index in enumerate(order[start:end]):
                offsets[index] = position - (end - start - 1.0)
            start = end
    return offsets


def _open(marker: str) -> dict[str, Any]:
    """Returns the style of an open marker, through which what is below it can be seen."""
    return {
        "marker": marker,
        "markersize": 10 if marker == "*" else 7,
        "markerfacecolor": "none",
        "markeredgewidth": 1.5,
        "linestyle": "",
    }


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
        supernet: columns of the supernet's ``curves.csv``. Empty: there is no supernet.
        retrained: method -> columns of its ``curves.csv``.
        score: what the columns contain.

    See ``draw_supernet_curves`` and ``draw_retrained_curves``.
    """

    def draw() -> Figure:
        figure = Figure(figsize=(8.5 if supernet else 5.0, 3.6), layout="constrained")
        both = figure.subplots(1, 2 if supernet else 1, squeeze=False)[0]
        if supernet:
            draw_supernet_curves(both[0], supernet, score)
        draw_retrained_curves(both[-1], retrained, score)
        return figure

    return write_figure(path, draw, dpi)


def draw_supernet_curves(axes: Axes, supernet: Columns, score: Measure) -> None:
    """Draws the score on the search split by epoch for the widest, default and narrowest subnet.

    Args:
        supernet: columns of the supernet's ``curves.csv``.
        score: what the columns contain.
    """
    for name, line in (("widest", "-"), ("default", "--"), ("narrowest", ":")):
        band = band_over_seeds(supernet, f"{name}_{score.name}")
        axes.plot(band.epochs, _written(band.mean, score), line, color=LINE, label=name)
    axes.set_title("supernet")
    _finish_curves(axes, score)


def draw_retrained_curves(axes: Axes, retrained: Mapping[str, Columns], score: Measure) -> None:
    """Draws the score on the search split by epoch for the retrained networks.

    Args:
        retrained: method -> columns of its ``curves.csv``. The mean over seeds is drawn, with the range as a band.
        score: what the columns contain.
    """
    for method, (colour, marker) in method_styles(list(retrained)).items():
        band = band_over_seeds(retrained[method], f"search_{score.name}")
        points = marker if len(band.epochs) == 1 else ""  # a line of one epoch cannot be seen
        axes.plot(band.epochs, _written(band.mean, score), marker=points, color=colour, label=method)
        low, high = _written(band.low, score), _written(band.high, score)
        axes.fill_between(band.epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    seeds = {seed for columns in retrained.values() for seed in columns["seed"]}
    spread = f": mean and range over {len(seeds)} seeds" if len(seeds) > 1 else ""
    axes.set_title(f"retrained networks{spread}")
    _finish_curves(axes, score)


def _finish_curves(axes: Axes, score: Measure) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(score.header(f"{score.title} on the search split"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.legend(loc="best")


def _written(values: Sequence[float], score: Measure) -> list[float]:
    return [score.factor * value for value in values]


def candidate_increases(trajectory: Mapping[str, Any]) -> np.ndarray | None:
    """Returns (groups, steps), the numbers that the search ranked its candidates by, in display units.

    They are the increases of the score that each candidate causes, on the images that it was scored on; with
    ``per_cost``, for each percent of the default network's cost that it saves. NaN: the group was not a candidate.
    Returns None if the trajectory is from a version that did not record them, or has no candidates.
    """
    score, loss_name = named_scores(trajectory)
    groups = list(trajectory["default"]["channels"])
    steps = trajectory["steps"]
    values = np.full((len(groups), len(steps)), math.nan)
    by, factor = ("error", score.factor) if trajectory["score"] == "error" else (loss_name, 1.0)
    percent = _searched_cost(trajectory["default"], trajectory) / 100
    for number, step in enumerate(steps):
        for group, option in step["options"].items():
            if "increase" in option:
                value = factor * option["increase"][by]
                values[groups.index(group), number] = value / (
                    option["saved"] / percent if trajectory["per_cost"] else 1
                )
    last = np.flatnonzero(~np.isnan(values).all(axis=0))
    return values[:, : last[-1] + 1] if len(last) else None


def _searched_cost(costs: Mapping[str, Any], trajectory: Mapping[str, Any]) -> float:
    """Returns the cost in the unit of the search: of its resource, or the share of the limit that binds."""
    limits = trajectory["limits"]
    return max(costs[r] / limit for r, limit in limits.items()) if limits else float(costs[trajectory["resource"]])


def draw_candidates(trajectory: Mapping[str, Any], values: np.ndarray, width: float = 5.2) -> Figure:
    """Draws a heat map of the candidates' scores: groups from input (top) to output, steps from left to right.

    Args:
        trajectory: the contents of ``trajectory.json``.
        values: ``candidate_increases`` of it.
        width: of the figure, in inches.
    """
    score, loss_name = named_scores(trajectory)
    groups = list(trajectory["default"]["channels"])
    steps = trajectory["steps"][: values.shape[1]]
    figure = Figure(figsize=(width, 1.5 + 0.19 * len(groups)), layout="constrained")
    axes = figure.subplots()
    # Few candidates at the end of a search are so much worse than all others that these would have one colour.
    low, high = np.nanquantile(values, (0.02, 0.95))
    low, high = (low, high) if low < high else (low - 1e-12, low + 1e-12)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=low, vmax=high)
    taken = [(number, groups.index(group)) for number, step in enumerate(steps) for group in step["taken"]]
    columns, rows = [number for number, _ in taken], [row for _, row in taken]
    axes.scatter(columns, rows, s=7, color="#FFFFFF", edgecolors="#111111", linewidths=0.5)
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.set_xlabel("step of the search")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    name = (
        score.header("error" if score.higher_is_better else score.title)
        if trajectory["score"] == "error"
        else loss_name
    )
    cost = "cost" if trajectory["limits"] else TITLES[trajectory["resource"]]
    per = f" per % of the default's {cost} saved" if trajectory["per_cost"] else ""
    label = f"increase of {name}{per}"
    figure.colorbar(image, ax=axes, location="top", aspect=40, extend="both", label=label, ticks=MaxNLocator(5))
    return figure


def _mark(axes: Axes, marks: Sequence[tuple[str, float, str]]) -> float:
    """Draws vertical lines, given as (label, x, line style), with labels above the axes.

    Labels that would overlap are stacked. Returns the height of the stack in points.
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
    return 13.0 * len(ends)


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
