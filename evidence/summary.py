"""What evidence/results holds, as tables and pictures for RESULTS.md.

    python evidence/summary.py mobilenet_v2

Intervals are of 95 %. From scratch a supernet counts once, with the mean of its trainings, against the trainings of the
uniform network (Welch): they speak of other supernets and other seeds, not of another test set. Networks that start
from a supernet are compared within it (paired t). The choice is the network that is ahead on the search split.
Correlations have bootstrap intervals over networks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib.figure import Figure
from scipy import stats

from autoslim.shell.report.style import looks, write_picture

RESULTS = Path(__file__).parent / "results"
DPI = 130
Interval = tuple[float, float]


def main(network: Annotated[str, typer.Argument(help="A params file of this folder, without .yaml.")]) -> None:
    """Prints the tables of a network's studies, and draws their pictures."""
    for study, told in (("table", _table), ("ranking", _ranking), ("scores", _scores), ("factors", _factors)):
        path = RESULTS / f"{study}-{network}.csv"
        if path.exists():
            told(pd.read_csv(path), path.with_suffix(".png"))
            print()


# The table


def _table(rows: pd.DataFrame, picture: Path) -> None:
    gains: dict[str, list[tuple[int, float, Interval | None]]] = {}
    budgets = list(rows["budget"].unique())
    heads = ("regime", "MACs", "params, uniform / autoslim", "uniform (%)", "autoslim (%)", "gain (points)")
    print(f"| {' | '.join((*heads, 'by supernet', 'gain of the choice'))} |\n|---|{'---:|' * 5}---|---:|")
    for (regime, budget), own in rows.groupby(["regime", "budget"], sort=False):
        uniform, found = (own[own["method"] == method] for method in ("uniform", "autoslim"))
        if uniform.empty or found.empty:
            continue
        paired = uniform["supernet"].nunique() > 1
        by_supernet, interval = _gain(found, uniform, paired=paired)
        ahead, _ = _gain(found, uniform, paired=paired, score="search_top1")
        choice = fmean(gain * (on_search > 0) for gain, on_search in zip(by_supernet, ahead, strict=True))
        gain = fmean(by_supernet)
        gains.setdefault(regime, []).append((budgets.index(budget), gain, interval))
        params = " / ".join(f"{each['params'].mean() / 1e3:.1f}k" for each in (uniform, found))
        print(
            f"| {regime} | {budget} | {params} | {_spread(uniform['top1'])} | {_spread(found['top1'])} "
            f"| {_told(gain, interval)} | {', '.join(f'{each:+.2f}' for each in by_supernet)} | {choice:+.2f} |"
        )

    def draw() -> Figure:
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="#999999", linewidth=1)
        for number, (regime, (colour, shape)) in enumerate(looks(list(gains)).items()):
            for place, gain, interval in gains[regime]:
                bars = None if interval is None else [[gain - interval[0]], [interval[1] - gain]]
                at = place + 0.16 * (number - (len(gains) - 1) / 2)
                axes.errorbar(at, gain, bars, fmt=shape, color=colour, capsize=4)
            axes.plot([], [], shape, color=colour, label=regime)
        axes.set_xticks(range(len(budgets)), budgets)
        axes.set_xlabel("budget: share of the default network's MACs")
        axes.set_ylabel("gain over uniform (points of top-1)")
        axes.legend(frameon=False)
        return figure

    write_picture(picture, draw, DPI)


def _gain(
    found: pd.DataFrame, uniform: pd.DataFrame, *, paired: bool, score: str = "top1"
) -> tuple[list[float], Interval | None]:
    """Of each supernet, over the uniform network; and the interval of their mean."""
    means = found.groupby("supernet")[score].mean()
    if paired:
        gains = (means - uniform.groupby("supernet")[score].mean()).dropna()
        return list(gains), _interval(stats.ttest_1samp(gains, 0)) if len(gains) > 1 else None
    gains = means - uniform[score].mean()
    return list(gains), _interval(stats.ttest_ind(means, uniform[score], equal_var=False)) if len(means) > 1 else None


# Does the supernet rank networks as training does?


def _ranking(rows: pd.DataFrame, _: Path) -> None:
    drawn = rows[rows["kind"] == "random"]
    truth = drawn.groupby("network")["top1"].mean()
    print(f"{len(truth)} random networks, retrained: top-1 {truth.min():.1f} to {truth.max():.1f} %\n")
    print("| ranked by | Spearman | Kendall |\n|---|---:|---:|")
    for cost in ("macs", "params"):
        print(f"| {cost} | {_correlations(drawn.groupby('network')[[cost]].first(), truth)} |")
    by_seed = drawn.pivot_table(index="network", columns="seed", values="top1").dropna()
    if by_seed.shape[1] == 2:
        print(f"| another seed's training | {_correlations(by_seed[[0]], by_seed[1])} |")


def _scores(rows: pd.DataFrame, picture: Path) -> None:
    trained = pd.read_csv(picture.with_name(picture.name.replace("scores", "ranking")).with_suffix(".csv"))
    truth = trained.groupby(["kind", "network"])["top1"].mean()
    most, first = rows["images"].max(), rows["factor"].iloc[0]
    told = rows[(rows["factor"] == first) | ((rows["images"] == most) & (rows["statistics"] == "batch"))]
    print("| supernet | images | statistics | ranked by | Spearman | Kendall | Spearman along the search |")
    print("|---|---:|---|---|---:|---:|---:|")
    for (factor, images, statistics), own in told.groupby(["factor", "images", "statistics"], sort=False):
        for score, sign in (("top1", 1), ("nats", -1)):
            by_supernet = sign * own.pivot_table(index=["kind", "network"], columns="supernet", values=score)
            along = by_supernet.loc["trajectory"].corrwith(truth.loc["trajectory"], method="spearman").mean()
            known = _correlations(by_supernet.loc["random"], truth.loc["random"])
            print(f"| {factor} | {images} | {statistics} | {score} | {known} | {along:.2f} |")

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        shown = rows[(rows["factor"] == first) & (rows["images"] == most) & (rows["statistics"] == "batch")]
        shown = shown[shown["kind"] == "random"]
        kinds = {"top1": "top-1 in the supernet (%)", "nats": "cross-entropy in the supernet (nats)"}
        for axes, (kind, label) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
            named = {f"seed {supernet}": own for supernet, own in shown.groupby("supernet")}
            for name, (colour, shape) in looks(list(named)).items():
                retrained = truth.loc["random"][named[name]["network"]]
                axes.plot(named[name][kind], retrained, shape, color=colour, label=name)
            axes.set_xlabel(label)
        axes.legend(frameon=False, title="supernet")
        figure.axes[0].set_ylabel("top-1 retrained (%)")
        return figure

    write_picture(picture, draw, DPI)


def _correlations(scores: pd.DataFrame, truth: pd.Series) -> str:
    """Spearman's and Kendall's: the mean over the columns (supernets) of ``scores``."""
    values, expected = scores.loc[truth.index].to_numpy(), truth.to_numpy()
    return " | ".join(_correlation(of, values, expected) for of in (stats.spearmanr, stats.kendalltau))


def _correlation(of: Callable[..., Any], scores: np.ndarray, truth: np.ndarray) -> str:
    if (np.ptp(scores, axis=0) == 0).any():
        return "equal"

    def mean(pick: np.ndarray) -> float:
        return fmean(of(column, truth[pick]).statistic for column in scores[pick].T)

    draw = np.random.default_rng(0)
    picks = [draw.integers(0, len(truth), len(truth)) for _ in range(1000)]
    low, high = np.nanquantile([mean(pick) for pick in picks], [0.025, 0.975])
    return f"{mean(np.arange(len(truth))):.2f} [{low:.2f}, {high:.2f}]"


# One factor at a time


def _factors(rows: pd.DataFrame, picture: Path) -> None:
    factors, budgets = list(rows["factor"].unique()), list(rows["budget"].unique())
    top1 = {key: list(own["top1"]) for key, own in rows.groupby(["factor", "budget"])}
    effects: dict[tuple[str, str], tuple[float, Interval]] = {}
    print(f"| factor | {' | '.join(f'{budget} of the MACs' for budget in budgets)} |\n|---|{'---:|' * len(budgets)}")
    for factor in factors:
        cells = []
        for budget in budgets:
            own, base = top1.get((factor, budget), []), top1[factors[0], budget]
            cells.append(_spread(own) if own else "")
            if len(own) > 1 and factor != factors[0]:
                interval = _interval(stats.ttest_ind(own, base, equal_var=False))
                effects[factor, budget] = fmean(own) - fmean(base), interval
                cells[-1] += f", {_told(*effects[factor, budget])}"
        print(f"| {factor} | {' | '.join(cells)} |")

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 0.4 * len(factors) + 1.2), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#999999", linewidth=1)
        for number, (budget, (colour, shape)) in enumerate(looks(budgets).items()):
            for (factor, at), (effect, (low, high)) in effects.items():
                if at == budget:
                    place = factors.index(factor) + 0.2 * (number - (len(budgets) - 1) / 2)
                    bars = [[effect - low], [high - effect]]
                    axes.errorbar(effect, place, xerr=bars, fmt=shape, color=colour, capsize=3)
            axes.plot([], [], shape, color=colour, label=f"{budget} of the MACs")
        axes.set_yticks(range(1, len(factors)), factors[1:])
        axes.invert_yaxis()
        axes.set_xlabel(f"effect on top-1 against '{factors[0]}' (points)")
        axes.legend(frameon=False)
        return figure

    write_picture(picture, draw, DPI)


def _interval(test: Any) -> Interval:
    low, high = test.confidence_interval(0.95)
    return float(low), float(high)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _told(gain: float, interval: Interval | None) -> str:
    return f"{gain:+.2f}" + ("" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]")


if __name__ == "__main__":
    typer.run(main)
