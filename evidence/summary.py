"""What evidence/results holds, as tables and pictures for RESULTS.md.

    python evidence/summary.py mobilenet_v2

Intervals are of 95 %, and hold for one split of the images. A supernet counts once, with the mean of its trainings:
networks that start from a supernet, and those of a changed factor, are compared within it (paired t); networks from
scratch with all trainings of the uniform one (Welch). Supernets that lack a training are left out. Correlations have
bootstrap intervals over networks.
"""

from collections.abc import Callable, Iterable, Sequence
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
PICTURES = Path(__file__).parent.parent / "docs"
DPI = 130
FEW = 5  # networks, below which ranks mean nothing
Interval = tuple[float, float]


def main(network: Annotated[str, typer.Argument(help="A params file of this folder, without .yaml.")]) -> None:
    """Prints the tables of a network's studies, and draws their pictures."""
    told = {"table": _table, "longer": _longer, "ranking": _ranking, "scores": _scores, "factors": _factors}
    for study, tell in told.items():
        path = RESULTS / f"{study}-{network}.csv"
        if path.exists():
            tell(_read(path), PICTURES / f"{study}-{network}.png")
            print()


def _read(path: Path) -> pd.DataFrame:
    """The rows, accuracies in percent."""
    rows = pd.read_csv(path)
    return rows.assign(**{name: 100 * rows[name] for name in rows.columns if name.endswith("top1")})


# The table


def _table(rows: pd.DataFrame, picture: Path) -> None:
    gains: dict[str, dict[str, list[tuple[int, list[float], Interval | None]]]] = {}
    budgets, searches = list(rows["budget"].unique()), list(rows["search"].dropna().unique())
    heads = ("regime", "budget", "MACs", "parameters", "uniform (%)", "autoslim (%)", "gain (points)", "by supernet")
    print(f"| search | {' | '.join((*heads, 'gain of the choice'))} |\n|---|---|{'---:|' * 6}---|---:|")
    cells = [(search, *cell) for search in searches for cell in rows.groupby(["regime", "budget"], sort=False)]
    for search, (regime, budget), own in cells:
        paired = own["start"].iloc[0] == "supernet"
        uniform, found = own[own["method"] == "uniform"], own[own["search"] == search]
        by_supernet, interval = _gain(found, uniform, paired=paired)
        ahead, _ = _gain(found, uniform, paired=paired, score="search_top1")
        if not by_supernet:
            continue
        shown = gains.setdefault(search, {}).setdefault(regime, [])
        shown.append((budgets.index(budget), by_supernet, interval))
        choice = fmean(gain * (on_search > 0) for gain, on_search in zip(by_supernet, ahead, strict=True))
        macs, params = (
            " / ".join(f"{each[cost].mean() / 1000:,.0f}k" for each in (uniform, found)) for cost in ("macs", "params")
        )
        print(
            f"| {search} | {regime} | {budget} | {macs} | {params} "
            f"| {_spread(uniform['top1'])} | {_spread(found['top1'])} "
            f"| {_told(by_supernet, interval)} | {_listed(by_supernet)} | {choice:+.2f} |"
        )
    _print_searches(rows, searches)

    def draw() -> Figure:
        figure = Figure(figsize=(2.2 + 4.2 * len(gains), 3.6), layout="constrained")
        regimes = looks(list(dict.fromkeys(regime for shown in gains.values() for regime in shown)))
        panels = figure.subplots(1, len(gains), sharey=True, squeeze=False)[0]
        for axes, (search, shown) in zip(panels, gains.items(), strict=True):
            axes.axhline(0, color="#999999", linewidth=1)
            for number, (regime, (colour, shape)) in enumerate(regimes.items()):
                for place, by_supernet, interval in shown.get(regime, []):
                    at = place + 0.2 * (number - (len(regimes) - 1) / 2)
                    bars = _bars(by_supernet, interval)
                    axes.plot([at] * len(by_supernet), by_supernet, "_", color=colour, markersize=9)
                    axes.errorbar(at, fmean(by_supernet), bars, fmt=shape, color=colour, capsize=4)
            axes.set_title(f"search by {search}")
            axes.set_xticks(range(len(budgets)), budgets)
            axes.set_xlabel("budget: share of the default network's MACs")
            axes.margins(x=0.15)
        for regime, (colour, shape) in regimes.items():
            panels[0].plot([], [], shape, color=colour, label=regime)
        panels[0].plot([], [], "_", color="#666666", markersize=9, label="one supernet")
        panels[0].set_ylabel("gain over uniform (points of top-1)")
        figure.legend(loc="outside upper center", ncols=len(regimes) + 1, frameon=False)
        return figure

    write_picture(picture, draw, DPI)


def _print_searches(rows: pd.DataFrame, searches: Sequence[str]) -> None:
    """What the other searches gain over the first, within each supernet."""
    for search in searches[1:]:
        print(f"\n| {search}: over {searches[0]} | budget | gain (points) | by supernet |\n|---|---:|---:|---|")
        for (regime, budget), own in rows.groupby(["regime", "budget"], sort=False):
            by_supernet, interval = _gain(*(own[own["search"] == each] for each in (search, searches[0])), paired=True)
            if by_supernet:
                print(f"| {regime} | {budget} | {_told(by_supernet, interval)} | {_listed(by_supernet)} |")


def _gain(
    found: pd.DataFrame, uniform: pd.DataFrame, *, paired: bool, score: str = "top1"
) -> tuple[list[float], Interval | None]:
    """Of each supernet, over the uniform network; and the interval of their mean."""
    means = _means(found, score)
    if paired:
        gains = (means - _means(uniform, score)).dropna()
        return list(gains), _interval(stats.ttest_1samp, gains, 0)
    gains = means - uniform[score].mean()
    return list(gains.dropna()), _interval(stats.ttest_ind, means, uniform[score], equal_var=False)


def _means(rows: pd.DataFrame, score: str) -> pd.Series:
    """Of each supernet that has all trainings."""
    by_supernet = rows.groupby("supernet")[score]
    counts = by_supernet.count()
    return by_supernet.mean()[counts == counts.max()]


def _longer(rows: pd.DataFrame, _: Path) -> None:
    for (budget, epochs), own in rows.groupby(["budget", "epochs"]):
        print(f"uniform, {budget}, {epochs} epochs from scratch: {_spread(own['top1'])}")


# Does the supernet rank networks as training does?


def _kinds(rows: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return list(rows[[*columns]].drop_duplicates().itertuples(index=False, name=None))


def _ranking(rows: pd.DataFrame, _: Path) -> None:
    drawn = rows[rows["kind"] == "random"]
    truth = rows.groupby(["kind", "network"])["top1"].mean()
    top1 = truth.loc["random"]
    print(f"{len(top1)} random networks, retrained: top-1 {top1.min():.1f} to {top1.max():.1f} %\n")
    print("| ranked by | Spearman | Kendall | Spearman along the search | |\n|---|---:|---:|---:|---|")
    for cost in ("macs", "params"):
        _print_ranks(cost, rows.groupby(["kind", "network"])[[cost]].first(), truth)
    by_seed = drawn.pivot_table(index="network", columns="seed", values="top1").dropna()
    if by_seed.shape[1] > 1:
        one, other = by_seed.columns[:2]
        known = by_seed[other].to_numpy(), by_seed[[one]].to_numpy()
        cells = " | ".join(_correlation(of, *known) for of in (stats.spearmanr, stats.kendalltau))
        print(f"| one training, against one of another seed | {cells} | |")


def _scores(rows: pd.DataFrame, picture: Path) -> None:
    path = picture.name.replace("scores", "ranking").replace(".png", ".csv")
    truth = _read(RESULTS / path).groupby(["kind", "network"])["top1"].mean()
    most = rows["images"].max()
    ways = [(factor, most, "batch") for factor in rows["factor"].unique()]
    ways += [("base", images, statistics) for images, statistics in _kinds(rows, "images", "statistics")]
    heads = ("supernet", "images", "statistics", "ranked by", "Spearman", "Kendall", "Spearman along the search")
    print(f"| {' | '.join((*heads, 'Spearman less that of base'))} |\n|---|---:|---|---|---:|---:|---:|---:|")
    for factor, images, statistics in dict.fromkeys(ways):
        for score in ("top1", "nats"):
            scores, base = (_by_supernet(rows, each, images, statistics, score) for each in (factor, "base"))
            less = "" if factor == "base" else _correlation(stats.spearmanr, *_common(truth, scores, base))
            _print_ranks(f"{factor} | {images} | {statistics} | {score}", scores, truth, less)

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        kinds = {"top1": "top-1 in the supernet (%)", "nats": "cross-entropy in the supernet (nats)"}
        for axes, (score, label) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
            shown = _by_supernet(rows, "base", most, "batch", score).loc["random"].abs()
            for supernet, (colour, shape) in looks(list(shown)).items():
                axes.plot(
                    shown[supernet], truth.loc["random"].reindex(shown.index), shape, color=colour, label=supernet
                )
            axes.set_xlabel(label)
        axes.legend(frameon=False, title="supernet")
        figure.axes[0].set_ylabel("top-1 retrained (%)")
        return figure

    write_picture(picture, draw, DPI)


def _by_supernet(rows: pd.DataFrame, factor: str, images: int, statistics: str, score: str) -> pd.DataFrame:
    """Scores by (kind, network), a column a supernet; the larger the better."""
    way = (rows["factor"] == factor) & (rows["images"] == images) & (rows["statistics"] == statistics)
    sign = -1 if score == "nats" else 1
    return sign * rows[way].pivot_table(index=["kind", "network"], columns="supernet", values=score)


def _print_ranks(name: str, scores: pd.DataFrame, truth: pd.Series, less: str = "") -> None:
    """A line: the correlations of scores with the truth over random networks, and over those along the search."""
    at_random = _common(truth, scores)
    known = [_correlation(of, *at_random) for of in (stats.spearmanr, stats.kendalltau)]
    along = truth.index[truth.index.get_level_values("kind") == "trajectory"].intersection(scores.index)
    enough = len(along) >= FEW
    told = f"{scores.loc[along].corrwith(truth.loc[along], method='spearman').mean():.2f}" if enough else ""
    print(f"| {name} | {' | '.join(known)} | {told} | {less} |")


def _common(truth: pd.Series, *scores: pd.DataFrame) -> list[np.ndarray]:
    """The truth and the scores of the random networks that have all of them."""
    known = [truth.loc["random"], *(each.loc["random"] for each in scores)]
    index = known[0].index
    for each in known[1:]:
        index = index.intersection(each.index)
    return [each.loc[index].to_numpy() for each in known]


def _correlation(of: Callable[..., Any], truth: np.ndarray, scores: np.ndarray, base: np.ndarray | None = None) -> str:
    """The mean over the columns (supernets) of scores; less that of ``base``."""
    if len(truth) < FEW:
        return "too few"
    if (np.ptp(scores, axis=0) == 0).any():
        return "equal"

    def mean(pick: np.ndarray) -> float:
        values = [
            fmean(of(column, truth[pick]).statistic for column in s[pick].T) for s in (scores, base) if s is not None
        ]
        return values[0] - sum(values[1:])

    draw = np.random.default_rng(0)
    picks = [draw.integers(0, len(truth), len(truth)) for _ in range(1000)]
    low, high = np.nanquantile([mean(pick) for pick in picks], [0.025, 0.975])
    return f"{mean(np.arange(len(truth))):.2f} [{low:.2f}, {high:.2f}]"


# One factor at a time


def _factors(rows: pd.DataFrame, picture: Path) -> None:
    budgets = list(rows["budget"].unique())
    factors = [factor for factor in rows["factor"].unique() if factor != "base"]
    effects: dict[tuple[str, str], tuple[list[float], Interval | None]] = {}
    for (factor, budget), own in rows.groupby(["factor", "budget"]):
        base = rows[(rows["factor"] == "base") & (rows["budget"] == budget)]
        if factor != "base" and not base.empty:
            effects[factor, budget] = _gain(own, base, paired=True)
    print(f"| factor | {' | '.join(f'{budget} (%) | effect (points)' for budget in budgets)} |")
    print(f"|---|{'---:|---:|' * len(budgets)}")
    for factor in ("base", *factors):
        cells = []
        for budget in budgets:
            own = rows[(rows["factor"] == factor) & (rows["budget"] == budget)]
            by_supernet, interval = effects.get((factor, budget), ([], None))
            effect = f"{_told(by_supernet, interval)} ({_listed(by_supernet)})" if by_supernet else ""
            cells += [_spread(own["top1"]) if len(own) else "", effect]
        print(f"| {factor} | {' | '.join(cells)} |")
    print(f"\n{len(effects)} comparisons: by chance one in twenty intervals misses what it is of.")

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 0.4 * len(factors) + 1.4), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color="#999999", linewidth=1)
        for number, (budget, (colour, shape)) in enumerate(looks(budgets).items()):
            for (factor, at), (by_supernet, interval) in effects.items():
                if at == budget and by_supernet:
                    place = factors.index(factor) + 0.24 * (number - (len(budgets) - 1) / 2)
                    axes.plot(by_supernet, [place] * len(by_supernet), "|", color=colour, markersize=8)
                    bars = _bars(by_supernet, interval)
                    axes.errorbar(fmean(by_supernet), place, xerr=bars, fmt=shape, color=colour, capsize=3)
            axes.plot([], [], shape, color=colour, label=f"budget {budget}")
        axes.plot([], [], "|", color="#666666", markersize=8, label="one supernet")
        axes.set_yticks(range(len(factors)), factors)
        axes.invert_yaxis()
        axes.set_xlabel("effect on top-1 (points)")
        axes.legend(frameon=False)
        return figure

    write_picture(picture, draw, DPI)


def _interval(test: Callable[..., Any], values: Sequence[float], *others: Any, **settings: Any) -> Interval | None:
    """Of the mean over supernets; one supernet has none."""
    if len(values) < 2:
        return None
    low, high = test(values, *others, **settings).confidence_interval(0.95)
    return float(low), float(high)


def _bars(values: Sequence[float], interval: Interval | None) -> list[list[float]] | None:
    return None if interval is None else [[fmean(values) - interval[0]], [interval[1] - fmean(values)]]


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") + f" (n {len(values)})"


def _told(gains: Sequence[float], interval: Interval | None) -> str:
    return f"{fmean(gains):+.2f}" + ("" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]")


def _listed(gains: Iterable[float]) -> str:
    return ", ".join(f"{gain:+.2f}" for gain in gains)


if __name__ == "__main__":
    typer.run(main)
