"""Tables and figures of evidence/results for RESULTS.md.

    python evidence/summary.py mobilenet_v2 resnet efficientnet_lite0
    python evidence/summary.py --truth FOLDER    # evidence/macro.py

All intervals are 95 % confidence intervals of one split of the images. Each supernet contributes one value: the mean
of its trainings. Networks fine-tuned from a supernet are compared within it (paired t). Networks trained from scratch
are compared with all trainings of the uniform network (Welch). The effects of factors are estimated by least squares.
Supernets with missing trainings are left out. The main result of the table is the mean over budgets and networks,
with supernets varying within each network (Satterthwaite's degrees of freedom). Intervals of correlations are over
networks (bootstrap); those of effects on correlations are over supernets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Annotated, Any

import macro
import numpy as np
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from studies import load_yaml
from trained import served

from autoslim.report.figures import method_styles, write_figure
from autoslim.resources.budgets import parse_budget

STUDIES = Path(__file__).parent / "studies.yaml"
RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs"
DPI = 130
UNIFORM = "uniform"
ALL = "all"  # the mean over budgets
MIN_NETWORKS = 5  # rank correlations of fewer networks are meaningless
RESAMPLES = 1000  # of the networks, for intervals of correlations
NAMES = {"macs": "MACs", "params": "parameters", "memory": "memory", "latency": "latency"}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Gain:
    """The gain in top-1 of networks over others.

    Attributes:
        by_supernet: gain of each supernet in points.
        samples: (weight, independent values) pairs. The gain is the weighted sum of their means.
    """

    by_supernet: list[float]
    samples: list[tuple[float, list[float]]]

    @property
    def mean(self) -> float:
        return sum(weight * fmean(values) for weight, values in self.samples)

    @property
    def interval(self) -> Interval | None:
        """Confidence interval of the mean (Welch, Satterthwaite), or None for fewer than three supernets."""
        if len(self.by_supernet) < 3 or any(len(values) < 2 for _, values in self.samples):
            return None
        parts = [(weight**2 * variance(values) / len(values), len(values) - 1) for weight, values in self.samples]
        total = sum(part for part, _ in parts)
        freedom = total**2 / sum(part**2 / own for part, own in parts) if total else 1
        half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)
        return self.mean - half, self.mean + half

    @property
    def bars(self) -> list[list[float]] | None:
        return None if self.interval is None else [[self.mean - self.interval[0]], [self.interval[1] - self.mean]]

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.interval is None else " [{:+.2f}, {:+.2f}]".format(*self.interval))


def main(
    networks: Annotated[list[str] | None, typer.Argument(help="Params files of this folder, without .yaml.")] = None,
    truth: Annotated[Path | None, typer.Option("--truth", help="Folder with the files of Channel-Bench-Macro.")] = None,
) -> None:
    """Print the tables of the networks' studies and draw their figures."""
    networks = networks or []
    summaries = {"table": _table, "longer": _longer, "ranking": _ranking, "scores": _scores, "factors": _factors}
    for network in networks:
        for study, summarise in summaries.items():
            path = RESULTS / f"{study}-{network}.csv"
            if path.exists():
                summarise(_read(path), FIGURES / f"{study}-{network}.png")
                print()
        if paths := sorted(RESULTS.glob(f"resources-*-{network}.csv")):
            print(f"{network}:\n")
            _resources(pd.concat(map(_read, paths)))
            print()
        if (path := RESULTS / f"trained-{network}.csv").exists():
            print(f"{network}:\n")
            _trained(_read(path))
            _several_budgets(_read(path), FIGURES / f"trained-{network}.png")
            print()
    tables = [_read(path) for network in networks if (path := RESULTS / f"table-{network}.csv").exists()]
    if len(tables) > 1:
        _over_networks([_whole(rows) for rows in tables])
    if truth:
        _macro(truth, FIGURES / "macro.png")


def _read(path: Path) -> pd.DataFrame:
    """Reads the rows of a study, with accuracies in percent."""
    rows = pd.read_csv(path)
    if "search" in rows:
        rows = rows.fillna({"search": UNIFORM})
    return rows.assign(**{name: 100 * rows[name] for name in rows.columns if name.endswith("top1")})


# The table


def _table(all_rows: pd.DataFrame, figure_path: Path) -> None:
    rows = _whole(all_rows)
    gains, search_gains = _gains(rows), _gains(rows, "search_top1")
    costs = ("MACs: uniform / autoslim", "parameters: uniform / autoslim")
    heads = ("regime", "budget", *costs, "uniform (%)", "autoslim (%)", "gain (points)", "by supernet")
    print(f"| search | {' | '.join((*heads, 'gain of the choice'))} |\n|---|---|{'---:|' * 6}---|---:|")
    for (search, over, regime, budget), gain in gains.items():
        if over == UNIFORM:
            on_search = search_gains[search, over, regime, budget].by_supernet
            choice = fmean(gained * (shown > 0) for gained, shown in zip(gain.by_supernet, on_search, strict=True))
            both = _pair(rows, over, search, regime, budget)
            macs, params = (
                " / ".join(f"{each[cost].mean() / 1000:,.0f}k" for each in both) for cost in ("macs", "params")
            )
            top1 = " | ".join(_spread(each["top1"]) for each in both)
            cells = f"{macs} | {params} | {top1} | {gain} | {_listed(gain)} | {choice:+.2f}"
            print(f"| {search} | {regime} | {budget} | {cells} |")
    print("\n| search | over | regime | budget | gain (points) | by supernet |\n|---|---|---|---:|---:|---|")
    for cell, gain in gains.items():
        if UNIFORM not in cell:
            print(f"| {' | '.join(cell)} | {gain} | {_listed(gain)} |")

    def draw() -> Figure:
        searches, regimes, budgets = _searches(rows)[1:], method_styles(list(rows["regime"].unique())), _budgets(rows)
        figure = Figure(figsize=(2.2 + 4.2 * len(searches), 3.6), layout="constrained")
        panels = figure.subplots(1, len(searches), sharey=True, squeeze=False)[0]
        for axes, search in zip(panels, searches, strict=True):
            axes.axhline(0, color="#999999", linewidth=1)
            for number, (regime, (colour, marker)) in enumerate(regimes.items()):
                for position, budget in enumerate(budgets):
                    if gain := gains.get((search, UNIFORM, regime, budget)):
                        x = position + 0.2 * (number - (len(regimes) - 1) / 2)
                        axes.plot([x] * len(gain.by_supernet), gain.by_supernet, "_", color=colour, markersize=9)
                        axes.errorbar(x, gain.mean, gain.bars, fmt=marker, color=colour, capsize=4)
            axes.set_title(f"search by {search}")
            axes.set_xticks(range(len(budgets)), budgets)
            axes.set_xlabel("budget (share of the default network's MACs)")
            axes.margins(x=0.15)
        for regime, (colour, marker) in regimes.items():
            panels[0].plot([], [], marker, color=colour, label=regime)
        panels[0].plot([], [], "_", color="#666666", markersize=9, label="one supernet")
        panels[0].set_ylabel("gain over uniform (points of top-1)")
        figure.legend(loc="outside upper center", ncols=len(regimes) + 1, frameon=False)
        return figure

    write_figure(figure_path, draw, DPI)


def _over_networks(tables: Sequence[pd.DataFrame]) -> None:
    """Prints the mean gains over the networks, with a column for each budget. Budgets are matched by their order."""
    budgets = [" / ".join(dict.fromkeys(names)) for names in zip(*map(_budgets, tables), strict=True)]
    gains = [
        {(search, over, regime, _budgets(rows).index(budget)): gain for (search, over, regime, budget), gain in own}
        for rows in tables
        for own in [_gains(rows).items()]
    ]
    print(
        f"| search | over | regime | {' | '.join(budgets)} | by supernet |\n|---|---|---|{'---:|' * len(budgets)}---|"
    )
    for compared in dict.fromkeys(cell[:3] for cell in gains[0]):
        if not all((*compared, column) in each for each in gains for column in range(len(budgets))):
            continue
        means = [_mean([each[*compared, column] for each in gains]) for column in range(len(budgets))]
        print(f"| {' | '.join([*compared, *map(str, means)])} | {_listed(means[budgets.index(ALL)])} |")


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of supernets that have all trainings, and the means over budgets."""
    by_training = rows.groupby(["regime", "start", "method", "search", "supernet", "seed"], sort=False)
    means = by_training[["macs", "params", "top1", "search_top1"]].mean()[
        by_training.size() == rows["budget"].nunique()
    ]
    return _complete(pd.concat([rows, means.reset_index().assign(budget=ALL)]), "regime", "search", "budget")


def _complete(rows: pd.DataFrame, *cell: str) -> pd.DataFrame:
    """Returns, for each cell, the rows of the supernets with the largest number of trainings."""
    counts = rows.groupby([*cell, "supernet"])["top1"].transform("count")
    return rows[counts == counts.groupby([rows[name] for name in cell]).transform("max")]


def _searches(rows: pd.DataFrame) -> list[str]:
    """Returns the searches, starting with uniform, which has no search."""
    return [UNIFORM, *(each for each in rows["search"].unique() if each != UNIFORM)]


def _budgets(rows: pd.DataFrame) -> list[str]:
    return list(rows["budget"].unique())


def _gains(rows: pd.DataFrame, score: str = "top1") -> dict[tuple[str, str, str, str], Gain]:
    """Returns gains over uniform and over the first search, by (search, compared search, regime, budget)."""
    searches = _searches(rows)
    gains = {}
    for over in searches[:2]:
        for search in searches[searches.index(over) + 1 :]:
            for regime in rows["regime"].unique():
                for budget in _budgets(rows):
                    other, own = _pair(rows, over, search, regime, budget)
                    if len(other) and len(own):
                        paired = not _same_for_all(rows, over, regime)
                        gains[search, over, regime, budget] = _gain(own, other, paired=paired, score=score)
    return gains


def _pair(rows: pd.DataFrame, over: str, search: str, regime: str, budget: str) -> list[pd.DataFrame]:
    """Returns the trainings to compare, for the supernets that both have if networks depend on the supernet."""
    cell = rows[(rows["regime"] == regime) & (rows["budget"] == budget)]
    both = [cell[cell["search"] == each] for each in (over, search)]
    if _same_for_all(rows, over, regime):
        return both
    common = set(both[0]["supernet"]) & set(both[1]["supernet"])
    return [each[each["supernet"].isin(common)] for each in both]


def _same_for_all(rows: pd.DataFrame, search: str, regime: str) -> bool:
    """Returns whether the networks do not depend on the supernet, as for uniform from scratch."""
    return search == UNIFORM and set(rows[rows["regime"] == regime]["start"]) == {"scratch"}


def _gain(rows: pd.DataFrame, other: pd.DataFrame, *, paired: bool, score: str = "top1") -> Gain:
    """Returns the gain of each supernet's trainings over the others: those of the same supernet, or all."""
    means = _means(rows, score)
    gains = (means - (_means(other, score) if paired else other[score].mean())).dropna()
    return Gain(list(gains), [(1, list(gains))] if paired else [(1, list(means)), (-1, list(other[score]))])


def _mean(gains: Sequence[Gain]) -> Gain:
    return Gain(
        [each for gain in gains for each in gain.by_supernet],
        [(weight / len(gains), values) for gain in gains for weight, values in gain.samples],
    )


def _means(rows: pd.DataFrame, score: str) -> pd.Series:
    return rows.groupby("supernet")[score].mean()


def _resources(all_rows: pd.DataFrame) -> None:
    """Prints the gains over uniform within budgets of several resources, of the supernets that have all trainings."""
    rows = _complete(all_rows, "resource", "search")
    heads = ("resource", "budget", "search", "MACs", "parameters", "memory", "seconds", "top-1 (%)", "gain (points)")
    print(f"| {' | '.join((*heads, 'by supernet'))} |\n|---|---|---|{'---:|' * 6}---|")
    for (resource, budget, search), own in rows.groupby(["resource", "budget", "search"], sort=False):
        amounts = [f"{own[cost].mean() / 1000:,.0f}k" for cost in ("macs", "params", "memory")]
        cells = [resource, budget, search, *amounts, "", _spread(own["top1"]), "", ""]
        if search != UNIFORM:
            uniform = rows[(rows["resource"] == resource) & (rows["search"] == UNIFORM)]
            gain = _gain(own, uniform, paired=True)
            seconds = own.groupby("supernet")[["search_seconds", "allocate_seconds"]].first().sum(axis=1)
            cells = [*cells[:6], f"{seconds.mean():.0f}", cells[7], str(gain), _listed(gain)]
        print(f"| {' | '.join(cells)} |")


def _longer(rows: pd.DataFrame, figure_path: Path) -> None:
    table = _whole(_read(RESULTS / figure_path.with_suffix(".csv").name.replace("longer", "table")))
    for (budget, epochs), own in rows.groupby(["budget", "epochs"]):
        uniform = own[own["search"] == UNIFORM]
        print(f"uniform, {budget}, {epochs} epochs from scratch: {_spread(uniform['top1'])}\n")
        heads = ("search", "regime", "autoslim (%)", "gain over uniform for as long (points)", "by supernet")
        print(f"| {' | '.join(heads)} |\n|---|---|---:|---:|---|")
        for search in _searches(table)[1:]:
            by_regime = {
                regime: _pair(table, UNIFORM, search, regime, budget)[1] for regime in table["regime"].unique()
            }
            for regime, each in (by_regime | {f"scratch, {epochs} epochs": own[own["search"] == search]}).items():
                if len(each):
                    gain = _gain(each, uniform, paired=False)
                    print(f"| {search} | {regime} | {_spread(each['top1'])} | {gain} | {_listed(gain)} |")


# Ranking by the supernet


def _kinds(rows: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return list(rows[[*columns]].drop_duplicates().itertuples(index=False, name=None))


def _ranking(rows: pd.DataFrame, figure_path: Path) -> None:
    truth = _truth(figure_path)
    top1 = truth.loc["random"]
    print(f"{len(top1)} random networks, retrained: top-1 {top1.min():.1f} to {top1.max():.1f} %\n")
    print("| ranked by | Spearman | Kendall | Spearman along the search | |\n|---|---:|---:|---:|---|")
    for cost in ("macs", "params"):
        _print_ranks(cost, rows.groupby(["kind", "network"])[[cost]].first(), truth)
    path = RESULTS / figure_path.with_suffix(".csv").name.replace("ranking", "table")
    if path.exists():
        table = _whole(_read(path))
        scratch = table[(table["start"] == "scratch") & table["budget"].isin(rows["budget"].unique())]
        noise = _within(scratch.groupby(["search", "supernet"])["top1"]) / rows["seed"].nunique()
        ceiling = math.sqrt(max(0.0, 1 - noise / top1.var()))
        print(
            f"\nstandard deviation over networks {top1.std():.2f} points, of one network's training "
            f"{math.sqrt(noise):.2f}: scores without any error would have a correlation of about {ceiling:.2f}"
        )
        for search, own in scratch.groupby("search", sort=False):
            for supernet, reached in _means(own, "top1").items():
                of = "" if search == UNIFORM else f", supernet {supernet}"
                print(f"\n{search}{of}: {reached:.2f} %, above {(top1 < reached).sum()} of the random networks")


def _within(groups: Any) -> float:
    """Returns the pooled variance within groups."""
    return float(groups.apply(lambda each: each.var() * (len(each) - 1)).sum() / (groups.size() - 1).sum())


def _scores(rows: pd.DataFrame, figure_path: Path) -> None:
    truth = _truth(figure_path)
    if not len(truth):
        return
    own = rows[rows["study"] == "ranking"]
    best = (own["images"].max(), "batch")
    heads = ("images", "statistics", "ranked by", "Spearman", "Kendall", "Spearman along the search")
    print(f"| {' | '.join((*heads, 'Spearman, difference to the first'))} |\n|---:|---|---|---:|---:|---:|---:|")
    for way in dict.fromkeys([best, *_kinds(own, "images", "statistics")]):
        for score in ("top1", "nats"):
            scores, first = (_by_supernet(own, images, statistics, score) for images, statistics in (way, best))
            difference = "" if way == best else _correlation(stats.spearmanr, *_common(truth, scores, first))
            _print_ranks(f"{way[0]} | {way[1]} | {score}", scores, truth, difference)
    params = _retrained(figure_path).groupby(["kind", "network"])["params"].first().loc["random"]
    scores = _by_supernet(own, best[0], best[1], "top1").loc["random"]
    partial = (f"{_partial(scores[name], truth.loc['random'], params)} (supernet {name})" for name in scores)
    print(f"\nSpearman of top-1 on {best[0]} images with the number of parameters held constant: {', '.join(partial)}")

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        kinds = {"top1": "top-1 in the supernet (%)", "nats": "cross-entropy in the supernet (nats)"}
        for axes, (score, label) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
            shown = _by_supernet(own, best[0], best[1], score).loc["random"].abs()
            for supernet, (colour, marker) in method_styles(list(shown)).items():
                axes.plot(
                    shown[supernet], truth.loc["random"].reindex(shown.index), marker, color=colour, label=supernet
                )
            axes.set_xlabel(label)
        axes.legend(frameon=False, title="supernet")
        figure.axes[0].set_ylabel("top-1 after retraining (%)")
        return figure

    write_figure(figure_path, draw, DPI)


def _retrained(figure_path: Path) -> pd.DataFrame:
    """Returns the rows of the study ``ranking`` for the network of a figure, or no rows if there are none."""
    path = RESULTS / f"ranking-{figure_path.stem.partition('-')[2]}.csv"
    return _read(path) if path.exists() else pd.DataFrame({"kind": [], "network": [], "top1": []})


def _truth(figure_path: Path) -> pd.Series:
    """Returns top-1 after retraining by (kind, network)."""
    return _retrained(figure_path).groupby(["kind", "network"])["top1"].mean()


def _partial(one: pd.Series, other: pd.Series, control: pd.Series) -> str:
    """Returns the partial rank correlation and its p-value (t test)."""
    complete = pd.DataFrame({"one": one, "other": other, "control": control}).dropna()
    ranks = complete.rank().corr()
    direct, first, second = ranks.loc["one", "other"], ranks.loc["one", "control"], ranks.loc["other", "control"]
    if max(abs(first), abs(second)) > 1 - 1e-9:
        return "undefined"
    value = (direct - first * second) / math.sqrt((1 - first**2) * (1 - second**2))
    freedom = len(complete) - 3
    return f"{value:.2f}, p {2 * stats.t.sf(abs(value) * math.sqrt(freedom / (1 - value**2)), freedom):.2f}"


def _by_supernet(rows: pd.DataFrame, images: int, statistics: str, score: str) -> pd.DataFrame:
    """Returns scores by (kind, network), with a column for each supernet. Higher is better."""
    way = (rows["images"] == images) & (rows["statistics"] == statistics)
    sign = -1 if score == "nats" else 1
    return sign * rows[way].pivot_table(index=["kind", "network"], columns="supernet", values=score)


def _print_ranks(name: str, scores: pd.DataFrame, truth: pd.Series, difference: str = "") -> None:
    """Prints the correlations of scores with top-1 after retraining, over random networks and along the search."""
    at_random = _common(truth, scores)
    correlations = [_correlation(statistic, *at_random) for statistic in (stats.spearmanr, stats.kendalltau)]
    along = truth.index[truth.index.get_level_values("kind") == "trajectory"].intersection(scores.index)
    enough = len(along) >= MIN_NETWORKS
    in_search = f"{scores.loc[along].corrwith(truth.loc[along], method='spearman').mean():.2f}" if enough else ""
    print(f"| {name} | {' | '.join(correlations)} | {in_search} | {difference} |")


def _common(truth: pd.Series, *scores: pd.DataFrame) -> list[np.ndarray]:
    """Returns top-1 after retraining and the scores, for the random networks that have all of them."""
    series = [truth.loc["random"], *(each.loc["random"].dropna() for each in scores)]
    index = series[0].index
    for each in series[1:]:
        index = index.intersection(each.index)
    return [each.loc[index].to_numpy() for each in series]


def _correlation(
    statistic: Callable[..., Any], truth: np.ndarray, scores: np.ndarray, base: np.ndarray | None = None
) -> str:
    """Returns the mean correlation over supernets (columns), minus that of ``base`` if there is one."""
    if len(truth) < MIN_NETWORKS:
        return "too few"
    if (np.ptp(scores, axis=0) == 0).any():
        return "equal"

    def mean(pick: np.ndarray) -> float:
        values = [
            fmean(statistic(column, truth[pick]).statistic for column in s[pick].T)
            for s in (scores, base)
            if s is not None
        ]
        return values[0] - sum(values[1:])

    return _bootstrapped(mean, len(truth))


def _bootstrapped(statistic: Callable[[np.ndarray], float], networks: int) -> str:
    """Returns a statistic of all networks, by their numbers, and its interval over networks."""
    generator = np.random.default_rng(0)
    picks = [generator.integers(0, networks, networks) for _ in range(RESAMPLES)]
    low, high = np.nanquantile([statistic(pick) for pick in picks], [0.025, 0.975])
    return f"{statistic(np.arange(networks)):.2f} [{low:.2f}, {high:.2f}]"


# Effects of factors


def _factors(rows: pd.DataFrame, figure_path: Path) -> None:
    """Prints and draws the effects of supernet factors on the mean of both searches and of search factors."""
    study = load_yaml(STUDIES)["factors"]
    training, search = (
        {name: two for name, two in study[part].items() if name in rows} for part in ("supernet", "search")
    )
    counts = rows.groupby("supernet")["top1"].transform("count")
    whole = rows[counts == 3 * rows["budget"].nunique() * rows["seed"].nunique()]  # two searches and uniform
    autoslim, uniform = (whole[whole["method"] == method] for method in ("autoslim", UNIFORM))
    reference = autoslim["budget"].map(uniform.groupby("budget")["macs"].first())
    autoslim = autoslim.assign(filled=100 * (autoslim["macs"] / reference - 1))
    own, base = autoslim.groupby("supernet")[["top1", "filled"]].mean(), _means(uniform, "top1")
    outcomes = {
        "top-1 of autoslim": own["top1"],
        "top-1 of uniform": base,
        "gain over uniform": own["top1"] - base,
        "MACs over uniform's (%)": own["filled"],
    }
    if len(ranks := _ranks(figure_path)):
        outcomes["Spearman by cross-entropy"] = ranks.reindex(own.index).dropna()
    settings = _levels(autoslim.groupby("supernet")[[*training]].first(), training)
    searches = autoslim.groupby(["supernet", *search])[["top1", "filled"]].mean().reset_index()
    change = _levels(searches, search).join(searches[["top1", "filled"]]).groupby(searches["supernet"]).diff().dropna()
    effects = {name: _effects(settings.loc[each.index], each, intercept=True) for name, each in outcomes.items()}
    within = {name: _effects(change[[*search]], change[name], intercept=False) for name in ("top1", "filled")}
    if not all([*effects.values(), *within.values()]):
        print(f"factors: {len(own)} supernets are done, too few to estimate the effects")
        return
    print(f"{len(own)} supernets; means and standard deviations over them:\n")
    for name, each in outcomes.items():
        print(f"- {name}: {_spread(list(each))}")
    _print_effects(training, effects)
    _print_effects(search, {"top-1 of autoslim": within["top1"], "MACs over uniform's (%)": within["filled"]})
    count = len(training) * len(effects) + len(search) * len(within)
    print(f"\n{count} intervals: one in twenty is expected to miss the true effect by chance.")

    def draw() -> Figure:
        shown = {name: own for name, own in effects.items() if "MACs" not in name}
        shown["top-1 of autoslim"] = effects["top-1 of autoslim"] | within["top1"]
        shown["gain over uniform"] = effects["gain over uniform"] | within["top1"]
        factors = training | search
        figure = Figure(figsize=(3 + 2.2 * len(shown), 3.6), layout="constrained")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (outcome, own) in zip(panels, shown.items(), strict=True):
            axes.axvline(0, color="#999999", linewidth=1)
            for row, factor in enumerate(factors):
                if factor in own:
                    mean, half = own[factor]
                    axes.errorbar(mean, row, xerr=half, fmt="o", color="#1f77b4", capsize=3)
            axes.set_yticks(
                range(len(factors)), [f"{name}: {' to '.join(map(str, two))}" for name, two in factors.items()]
            )
            axes.set_xlabel(f"effect on\n{outcome}" + ("" if outcome.startswith("Spearman") else " (points)"))
        axes.invert_yaxis()
        return figure

    write_figure(figure_path, draw, DPI)


def _ranks(figure_path: Path) -> pd.Series:
    """Returns the rank correlation of each supernet of the study, for the networks that all of them have scored."""
    path, truth = RESULTS / figure_path.with_suffix(".csv").name.replace("factors", "scores"), _truth(figure_path)
    scores = _read(path) if path.exists() else pd.DataFrame({"study": []})
    own = scores[scores["study"] == "factors"]
    if not len(own) or not len(truth):
        return pd.Series(dtype=float)
    shared = _by_supernet(own, own["images"].max(), "batch", "nats").loc["random"].dropna()
    return (
        shared.corrwith(truth.loc["random"], method="spearman")
        if len(shared) >= MIN_NETWORKS
        else pd.Series(dtype=float)
    )


def _levels(rows: pd.DataFrame, factors: dict[str, list[Any]]) -> pd.DataFrame:
    """Codes the first value of each factor as -1/2 and the second as 1/2."""
    return pd.DataFrame({name: (rows[name] == two[1]) - 0.5 for name, two in factors.items()}, index=rows.index)


def _effects(levels: pd.DataFrame, outcome: pd.Series, *, intercept: bool) -> dict[str, tuple[float, float]]:
    """Returns the effect of each factor and half of its 95 % confidence interval (least squares).

    The effect is the outcome at the second value minus that at the first. It is empty if there are too few rows.
    """
    design = levels.to_numpy(dtype=float)
    if intercept:
        design = np.column_stack([design, np.ones(len(outcome))])
    freedom = len(outcome) - design.shape[1]
    if freedom < 3 or np.linalg.matrix_rank(design) < design.shape[1]:
        return {}
    inverse = np.linalg.inv(design.T @ design)
    estimate = inverse @ design.T @ outcome.to_numpy()
    residual = outcome.to_numpy() - design @ estimate
    halves = stats.t.ppf(0.975, freedom) * np.sqrt(np.diag(inverse) * (residual @ residual) / freedom)
    return {factor: (estimate[n], halves[n]) for n, factor in enumerate(levels)}


def _print_effects(factors: dict[str, list[Any]], effects: dict[str, dict[str, tuple[float, float]]]) -> None:
    print(f"\n| factor | from, to | {' | '.join(effects)} |\n|---|---|{'---:|' * len(effects)}")
    for factor, two in factors.items():
        cells = ("{:+.2f} ± {:.2f}".format(*each[factor]) for each in effects.values())
        print(f"| {factor} | {', '.join(map(str, two))} | {' | '.join(cells)} |")


# An independent truth


@dataclass(frozen=True)
class _Space:
    """A space of Channel-Bench-Macro.

    Attributes:
        rows: the rows of the study.
        trainings: top-1 of each network's three trainings, in percent: (networks, 3).
        widest: multiply-adds of the benchmark's widest network.
        amounts: multiply-adds of the supernet's networks, which the budgets limit.
    """

    rows: pd.DataFrame
    trainings: pd.DataFrame
    widest: int
    amounts: dict[str, int]

    @classmethod
    def read(cls, name: str, folder: Path) -> "_Space":
        rows = pd.read_csv(RESULTS / f"macro-{name}.csv", dtype={"network": str})
        trainings = pd.DataFrame.from_dict(macro.benchmark(folder, name), orient="index")
        graph = macro.supernet_graph(load_yaml(STUDIES.parent / f"macro_{name}.yaml"))
        return cls(rows, trainings, macro.benchmark_graph(name).macs(), macro.multiply_adds(graph))

    @property
    def top1(self) -> pd.Series:
        return self.trainings.mean(axis=1)

    @property
    def sampled(self) -> dict[str, pd.DataFrame]:
        """The rows of the networks sampled around each share of the multiply-adds."""
        sampled = self.rows[self.rows["method"] == macro.SAMPLED]
        return dict(list(sampled.groupby("budget", sort=False)))


def _macro(folder: Path, figure_path: Path) -> None:
    """Prints and draws how supernets rank networks that others trained, and prints what methods chose among them."""
    names = [name for name in macro.FILES if (RESULTS / f"macro-{name}.csv").exists()]
    spaces = {name: _Space.read(name, folder) for name in names}
    cells = [(name, share, space, cell) for name, space in spaces.items() for share, cell in space.sampled.items()]
    for statistic, title in ((stats.spearmanr, "Spearman"), (stats.kendalltau, "Kendall")):
        heads = "networks | cross-entropy | error | MACs | parameters | one training"
        print(f"{title}:\n\n| space | MACs | {heads} |\n|---|---:|{'---:|' * 6}")
        for name, share, space, cell in cells:
            print(f"| {name} | {share} | {' | '.join(_ranks_of_cell(statistic, space, cell))} |")
        print()
    heads = "standard deviation of top-1 | of one training | of a mean | a score without errors"
    print(f"| space | MACs | {heads} |\n|---|---:|{'---:|' * 4}")
    for name, share, space, cell in cells:
        own = space.trainings.loc[sorted(cell["network"].unique())]
        spread, noise = own.mean(axis=1).std(), math.sqrt(own.var(axis=1).mean())
        of_mean = noise / math.sqrt(own.shape[1])
        ceiling = math.sqrt(max(0.0, 1 - of_mean**2 / spread**2))
        print(f"| {name} | {share} | {spread:.2f} | {noise:.2f} | {of_mean:.2f} | {ceiling:.2f} |")
    print()
    for name, space in spaces.items():
        print(f"{name}:\n")
        _macro_choices(space)
        print()

    def draw() -> Figure:
        shares = max(len(space.sampled) for space in spaces.values())
        figure = Figure(figsize=(3.1 * shares, 2.9 * len(spaces)), layout="constrained")
        for panels, (name, space) in zip(
            figure.subplots(len(spaces), shares, squeeze=False), spaces.items(), strict=True
        ):
            styles = method_styles(sorted(space.rows["supernet"].unique()))
            for axes, (share, cell) in zip(panels, space.sampled.items(), strict=False):
                for supernet, (colour, marker) in styles.items():
                    own = cell[cell["supernet"] == supernet]
                    style = {"color": colour, "markersize": 3, "alpha": 0.6, "label": f"supernet {supernet}"}
                    axes.plot(own["nats"], space.top1[own["network"]], marker, **style)
                axes.set_title(f"{name}, {share} of the MACs")
                axes.set_xlabel("cross-entropy in the supernet (nats)")
            panels[0].set_ylabel("top-1 of the benchmark (%)")
        figure.axes[0].legend(frameon=False)
        return figure

    if spaces:
        write_figure(figure_path, draw, DPI)


def _ranks_of_cell(statistic: Callable[..., Any], space: _Space, cell: pd.DataFrame) -> list[str]:
    """Returns correlations with the benchmark's mean top-1, and those of one training with the mean of the others."""
    scores = cell.pivot_table(index="network", columns="supernet", values=["nats", "search_top1"]).dropna()
    costs = cell.groupby("network")[["macs", "params"]].first().loc[scores.index]
    ranked_by = [-scores["nats"], scores["search_top1"], costs[["macs"]], costs[["params"]]]
    top1, trainings = (each.loc[scores.index].to_numpy() for each in (space.top1, space.trainings))

    def one_training(pick: np.ndarray) -> float:
        return fmean(
            statistic(trainings[pick, n], np.delete(trainings[pick], n, axis=1).mean(axis=1)).statistic
            for n in range(trainings.shape[1])
        )

    ranks = [_correlation(statistic, top1, each.to_numpy()) for each in ranked_by]
    of_one = _bootstrapped(one_training, len(top1)) if len(top1) >= MIN_NETWORKS else "too few"
    return [str(len(top1)), *ranks, of_one]


def _macro_choices(space: _Space) -> None:
    """Prints the accuracy of the networks that methods chose, beside that of others within the budget."""
    top1, full = space.top1, max(space.amounts.values())
    heads = "networks | MACs (%) | top-1 (%) | over uniform | over a random one | better than (%)"
    below = "below the best of one training | below the best mean"
    print(f"| budget | method | {heads} | {below} | minutes |\n|---|---|---|{'---:|' * 8}")
    chosen = space.rows[space.rows["method"] != macro.SAMPLED]
    for budget, cell in chosen.groupby("budget", sort=False):
        limit = parse_budget(budget).absolute(full)
        fitting = [network for network, macs in space.amounts.items() if macs <= limit]
        filled = top1[macro.filling(space.amounts, limit)]
        best = _best_of_one(space.trainings.loc[fitting]), top1[fitting].max()
        distances = [f"{each - filled.mean():.2f}" for each in best]
        print(f"| {budget} | a random one | | | {_spread(list(filled))} | | | | {' | '.join(distances)} | |")
        uniform = top1[cell.loc[cell["method"] == UNIFORM, "network"]].mean()
        for method, own in cell.groupby("method", sort=False):
            reached = top1[own["network"]]
            mean = reached.mean()
            cells = [
                f"{100 * own['macs'].mean() / space.widest:.1f}",
                f"{mean:.2f}",
                "" if method == UNIFORM else f"{mean - uniform:+.2f}",
                f"{mean - filled.mean():+.2f}",
                f"{100 * fmean((filled < value).mean() for value in reached):.0f}",
                *(f"{each - mean:.2f}" for each in best),
                f"{own['choice_seconds'].mean() / 60:.1f}",
            ]
            print(f"| {budget} | {method} | {', '.join(own['network'])} | {' | '.join(cells)} |")


def _best_of_one(trainings: pd.DataFrame) -> float:
    """Returns the accuracy in the other trainings of the network that is best in one of them, as a mean over these.

    The best mean of all trainings is too high, because chance selects it.
    """
    return fmean(trainings.drop(columns=n).loc[trainings[n].idxmax()].mean() for n in trainings)


# A trained network


def _trained(rows: pd.DataFrame) -> None:
    """Prints what each method made of the trained network. Trainings are compared by seed, in both readings."""
    costs = {"macs": (1e6, "M"), "params": (1e6, "M"), "memory": (1e6, " MB")}
    heads = (
        *(NAMES[cost] for cost in costs),
        "epochs",
        "top-1 (%)",
        "over uniform (points)",
        "autoslim over it",
    )
    minutes = "processor minutes: choice, training"
    print(f"| budget | reading | method | {' | '.join(heads)} | {minutes} |\n|---|---|---|{'---:|' * 8}")
    for (resource, budget), cell in rows.groupby(["resource", "budget"], sort=False):
        autoslim = cell[(cell["method"] == "autoslim") & (cell["reading"] == "epochs")]
        for (reading, method), own in cell.groupby(["reading", "method"], sort=False):
            uniform = cell[(cell["method"] == UNIFORM) & (cell["reading"] == reading)]
            amounts = [f"{own[cost].mean() / unit:.2f}{suffix}" for cost, (unit, suffix) in costs.items()]
            epochs = f"{own['epochs'].mean():.1f}".removesuffix(".0")
            gains = [
                "" if method == UNIFORM else _by_seed(own, uniform),
                "" if method == "autoslim" else _by_seed(autoslim, own),
            ]
            took = f"{own['choice_seconds'].mean() / 60:.1f}, {own['cpu_seconds'].mean() / 60:.1f}"
            cells = [*amounts, epochs, _spread(list(own["top1"])), *gains, took]
            print(f"| {budget} {resource} | {reading} | {method} | {' | '.join(cells)} |")


def _several_budgets(rows: pd.DataFrame, figure_path: Path) -> None:
    """Draws top-1 against the processor time for one network, where other methods were given autoslim's time."""
    timed = rows[rows["reading"].map(lambda reading: served(reading) is not None)]
    panels = list(timed.groupby(["resource", "budget"], sort=False).groups)
    if not panels:
        return

    def draw() -> Figure:
        figure = Figure(figsize=(1.4 + 3.6 * len(panels), 3.8), layout="constrained")
        styles = method_styles(["autoslim", *timed["method"].unique()])
        for axes, (resource, budget) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            cell = rows[(rows["resource"] == resource) & (rows["budget"] == budget)]
            for method in timed[(timed["resource"] == resource) & (timed["budget"] == budget)]["method"].unique():
                own = cell[cell["method"] == method].groupby("reading").agg(list)
                seconds = [fmean(a) + fmean(b) for a, b in zip(own["choice_seconds"], own["cpu_seconds"], strict=True)]
                _line(axes, seconds, list(own["top1"]), method, styles[method])
            autoslim = cell[(cell["method"] == "autoslim") & (cell["reading"] == "epochs")]
            alone = (autoslim["choice_seconds"] - autoslim["shared_seconds"] + autoslim["cpu_seconds"]).mean()
            counts = sorted({served(reading) or 1 for reading in timed["reading"]})
            seconds = [alone + autoslim["shared_seconds"].mean() / count for count in counts]
            _line(axes, seconds, [list(autoslim["top1"])] * len(counts), "autoslim", styles["autoslim"])
            for count, at in zip(counts, seconds, strict=True):
                label = f"{count} budget{'s' if count > 1 else ''}"
                place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                axes.annotate(label, (at / 60, autoslim["top1"].mean()), **place)
            axes.set_xscale("log")
            axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
            axes.set_xticks([], minor=True)
            axes.set_title(f"{budget} of the {NAMES[resource]}")
            axes.set_xlabel("processor minutes for a network")
            axes.margins(0.12)
        axes = figure.axes[0]
        axes.set_ylabel("top-1 (%)")
        axes.legend(loc="lower right", frameon=False)
        return figure

    write_figure(figure_path, draw, DPI)


def _line(axes: Axes, seconds: list[float], top1: list[list[float]], name: str, style: tuple[str, str]) -> None:
    """Draws means and standard deviations over seeds against minutes."""
    points = sorted(zip(seconds, top1, strict=True))
    errors = [stdev(each) if len(each) > 1 else 0.0 for _, each in points]
    colour, marker = style
    axes.errorbar(
        [at / 60 for at, _ in points],
        [fmean(each) for _, each in points],
        errors,
        fmt=f"{marker}-",
        color=colour,
        capsize=3,
        label=name,
    )


def _by_seed(rows: pd.DataFrame, others: pd.DataFrame) -> str:
    """Returns the mean gain over the seeds that both have; nothing if they have none."""
    one, other = (each.set_index("seed")["top1"] for each in (rows, others))
    gains = list((one - other).dropna())
    return str(Gain(gains, [(1, gains)])) + f" (n {len(gains)})" if gains else ""


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") + f" (n {len(values)})"


def _listed(gain: Gain) -> str:
    return ", ".join(f"{each:+.2f}" for each in gain.by_supernet)


if __name__ == "__main__":
    typer.run(main)
