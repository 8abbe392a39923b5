"""What evidence/results holds, as tables and pictures for RESULTS.md.

    python evidence/summary.py mobilenet_v2

Intervals are of 95 %. From scratch a supernet counts once, with the mean of its trainings, against the trainings of the
uniform network (Welch): they speak of other supernets and other seeds, not of another test set. Fine-tuned networks are
compared within their supernet (paired t).
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from scipy import stats

from autoslim.shell.report.style import looks, write_picture

RESULTS = Path(__file__).parent / "results"
DPI = 130
Row = dict[str, str]
Interval = tuple[float, float]


def main(network: Annotated[str, typer.Argument(help="A params file of this folder, without .yaml.")]) -> None:
    """Prints the tables of a network's studies, and draws their pictures."""
    for study, told in (("table", _table), ("ranking", _ranking), ("factors", _factors)):
        path = RESULTS / f"{study}-{network}.csv"
        if path.exists():
            with path.open(newline="") as file:
                told(list(csv.DictReader(file)), path.with_suffix(".png"))
            print()


# The table


def _table(rows: Sequence[Row], picture: Path) -> None:
    regimes, budgets = _kinds(rows, "regime"), _kinds(rows, "budget")
    gains = {}
    print("| regime | MACs | uniform (%) | autoslim (%) | gain (points) | by supernet |\n|---|---:|---:|---:|---:|---|")
    for regime in regimes:
        for budget in budgets:
            own = [row for row in rows if (row["regime"], row["budget"]) == (regime, budget)]
            uniform, found = ([row for row in own if row["method"] == method] for method in ("uniform", "autoslim"))
            if not uniform or not found:
                continue
            by_supernet, interval = _gain(found, uniform, paired=len(_kinds(uniform, "supernet")) > 1)
            gains[regime, budget] = fmean(by_supernet), interval
            print(
                f"| {regime} | {budget} | {_spread(_top1(uniform))} | {_spread(_top1(found))} "
                f"| {_told(fmean(by_supernet), interval)} | {', '.join(f'{gain:+.2f}' for gain in by_supernet)} |"
            )

    def draw() -> Figure:
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="#999999", linewidth=1)
        for regime, (colour, shape) in looks(regimes).items():
            known = [(budgets.index(b), *gain) for (r, b), gain in gains.items() if r == regime]
            shift = 0.16 * (regimes.index(regime) - (len(regimes) - 1) / 2)
            for place, gain, interval in known:
                bars = None if interval is None else [[gain - interval[0]], [interval[1] - gain]]
                label = regime if place == known[0][0] else None
                axes.errorbar(place + shift, gain, bars, fmt=shape, color=colour, capsize=4, label=label)
        axes.set_xticks(range(len(budgets)), budgets)
        axes.set_xlabel("budget: share of the default network's MACs")
        axes.set_ylabel("gain over uniform (points of top-1)")
        axes.legend(frameon=False)
        return figure

    write_picture(picture, draw, DPI)


def _gain(found: Sequence[Row], uniform: Sequence[Row], *, paired: bool) -> tuple[list[float], Interval | None]:
    """Of each supernet, over the uniform network; and the interval of their mean."""
    supernets = _kinds(found, "supernet")
    means = [fmean(_top1(found, supernet)) for supernet in supernets]
    if paired:
        gains = [mean - fmean(_top1(uniform, supernet)) for mean, supernet in zip(means, supernets, strict=True)]
        return gains, _interval(stats.ttest_1samp(gains, 0)) if len(gains) > 1 else None
    gains = [mean - fmean(_top1(uniform)) for mean in means]
    return gains, _interval(stats.ttest_ind(means, _top1(uniform), equal_var=False)) if len(means) > 1 else None


# Does the supernet rank networks as training does?


def _ranking(rows: Sequence[Row], picture: Path) -> None:
    networks = _kinds(rows, "network")
    first = {number: next(row for row in rows if row["network"] == number) for number in networks}
    trained = np.array([fmean(_top1([row for row in rows if row["network"] == number])) for number in networks])
    scores = [name for name in rows[0] if name.startswith("supernet_")]
    print(f"{len(networks)} networks, top-1 {trained.min():.1f} to {trained.max():.1f} %\n")
    print("| score | Spearman | Kendall |\n|---|---:|---:|")
    by_score = {}
    for name in scores:
        score = np.array([float(first[number][name]) for number in networks]) * (-1 if "nats" in name else 1)
        by_score[name] = score
        print(f"| {name} | {_correlation(_spearman, score, trained)} | {_correlation(_kendall, score, trained)} |")
    for cost in ("macs", "params"):
        score = np.array([float(first[number][cost]) for number in networks])
        print(f"| {cost} | {_correlation(_spearman, score, trained)} | {_correlation(_kendall, score, trained)} |")
    halves = [[_top1([r for r in rows if (r["network"], r["seed"]) == (n, s)]) for n in networks] for s in ("0", "1")]
    if all(all(half) for half in halves):
        one, other = (np.array([value for [value] in half]) for half in halves)
        cells = " | ".join(_correlation(of, one, other) for of in (_spearman, _kendall))
        print(f"| another seed's training | {cells} |")

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        kinds = {"top1": "top-1 in the supernet (%)", "nats": "cross-entropy in the supernet (nats)"}
        for axes, (kind, label) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
            named = [name for name in scores if kind in name]
            for name, (colour, shape) in looks(named).items():
                axes.plot(abs(by_score[name]), trained, shape, color=colour, label=f"seed {name.rpartition('_')[2]}")
            axes.set_xlabel(label)
        axes.legend(frameon=False, title="supernet")
        figure.axes[0].set_ylabel("top-1 retrained (%)")
        return figure

    write_picture(picture, draw, DPI)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.spearmanr(one, other).statistic)


def _kendall(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.kendalltau(one, other).statistic)


def _correlation(of: Callable[[np.ndarray, np.ndarray], float], one: np.ndarray, other: np.ndarray) -> str:
    """With its bootstrap interval over networks."""
    draw = np.random.default_rng(0)
    picks = (draw.integers(0, len(one), len(one)) for _ in range(2000))
    low, high = np.nanquantile([of(one[pick], other[pick]) for pick in picks], [0.025, 0.975])
    return f"{of(one, other):.2f} [{low:.2f}, {high:.2f}]"


# One factor at a time


def _factors(rows: Sequence[Row], picture: Path) -> None:
    factors, budgets = _kinds(rows, "factor"), _kinds(rows, "budget")
    effects: dict[tuple[str, str], tuple[float, Interval | None]] = {}
    print(f"| factor | {' | '.join(f'{budget} of the MACs' for budget in budgets)} |\n|---|{'---:|' * len(budgets)}")
    for factor in factors:
        cells = []
        for budget in budgets:
            own, base = (
                _top1([row for row in rows if (row["factor"], row["budget"]) == (name, budget)])
                for name in (factor, factors[0])
            )
            cells.append(_spread(own) if own else "")
            if own and factor != factors[0]:
                interval = _interval(stats.ttest_ind(own, base, equal_var=False))
                effects[factor, budget] = fmean(own) - fmean(base), interval
                cells[-1] += f", {_told(*effects[factor, budget])}"
        print(f"| {factor} | {' | '.join(cells)} |")

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 0.4 * len(factors) + 1.2), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#999999", linewidth=1)
        for budget, (colour, shape) in looks(budgets).items():
            shift = 0.2 * (budgets.index(budget) - (len(budgets) - 1) / 2)
            for (factor, at), (effect, interval) in effects.items():
                if at == budget and interval is not None:
                    bars = [[effect - interval[0]], [interval[1] - effect]]
                    axes.errorbar(effect, factors.index(factor) + shift, xerr=bars, fmt=shape, color=colour, capsize=3)
            axes.plot([], [], shape, color=colour, label=f"{budget} of the MACs")
        axes.set_yticks(range(1, len(factors)), factors[1:])
        axes.invert_yaxis()
        axes.set_xlabel(f"effect on top-1 against '{factors[0]}' (points)")
        axes.legend(frameon=False)
        return figure

    write_picture(picture, draw, DPI)


def _kinds(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _top1(rows: Sequence[Row], supernet: str | None = None) -> list[float]:
    return [float(row["top1"]) for row in rows if supernet is None or row["supernet"] == supernet]


def _interval(test: Any) -> Interval:
    low, high = test.confidence_interval(0.95)
    return float(low), float(high)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _told(gain: float, interval: Interval | None) -> str:
    return f"{gain:+.2f}" + ("" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]")


if __name__ == "__main__":
    typer.run(main)
