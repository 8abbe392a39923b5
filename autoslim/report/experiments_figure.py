"""Figure of several experiments: accuracy against a resource, with each method's front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from autoslim.report.figures import method_styles, write_figure
from autoslim.resources.budgets import TITLES, format_amount
from autoslim.tasks.measure import TOP1, Measure


@dataclass(frozen=True)
class Point:
    """A network: its cost, its mean measure on the test split, and the measure's standard deviation over the seeds."""

    cost: float
    value: float
    std: float | None = None


def front(points: Sequence[Point], higher_is_better: bool = True) -> list[Point]:
    """Returns the points that no other one equals or exceeds at an equal or lower cost, by rising cost."""
    sign = 1 if higher_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, -sign * each.value)):
        if not best or sign * point.value > sign * best[-1].value:
            best.append(point)
    return best


def experiments_figure(
    path: Path, series: Mapping[str, Sequence[Point]], resource: str, measure: Measure = TOP1, dpi: int = 150
) -> Path:
    """Plots all networks of each method, and joins those on the method's front.

    Args:
        series: method -> its networks in all experiments.
        resource: resource of the costs.
        measure: what ``Point.value`` is.
    """

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.subplots()
        for method, (colour, marker) in method_styles(list(series)).items():
            points = series[method]
            axes.errorbar(
                [point.cost for point in points],
                [measure.factor * point.value for point in points],
                yerr=[measure.factor * (point.std or 0.0) for point in points],
                fmt=marker,
                color=colour,
                alpha=0.75,
                markersize=6,
                capsize=3,
                label=method,
            )
            best = front(points, measure.higher_is_better)
            axes.plot([point.cost for point in best], [measure.factor * point.value for point in best], color=colour)
        axes.set_xlabel(TITLES[resource])
        axes.set_ylabel(measure.header(f"{measure.title} on test"))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda amount, _: format_amount(amount, resource) if amount > 0 else "0")
        )
        axes.legend(loc="best")
        return figure

    return write_figure(path, draw, dpi)
