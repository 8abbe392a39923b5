"""What evidence/results holds, as tables and pictures for RESULTS.md.

    python evidence/summary.py mobilenet_v2 resnet

Intervals are of 95 %, and hold for one split of the images. A supernet counts once, with the mean of its trainings:
networks that start from a supernet are compared within it (paired t); networks from scratch with all trainings of the
uniform one (Welch). What each of several factors does is told by least squares. Supernets that lack a training are left
out. The figure of the table to look at is the mean over budgets and networks, supernets varying within each network
(Satterthwaite's degrees of freedom). Intervals of correlations are over networks (bootstrap), those of factors' effects
on correlations over supernets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib.figure import Figure
from scipy import stats
from studies import load_yaml

from autoslim.report.figures import method_styles, write_figure

STUDIES = Path(__file__).parent / "studies.yaml"
RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs"
DPI = 130
UNIFORM = "uniform"
ALL = "all"  # budgets
FEW = 5  # networks, below which ranks mean nothing
Interval = tuple[float, float]


@dataclass(frozen=True)
class Gain:
    """Of networks over others.

    Attributes:
        by_supernet: points.
        samples: (weight, independent values); the gain is the sum of the weighted means.
    """

    by_supernet: list[float]
    samples: list[tuple[float, list[float]]]

    @property
    def mean(self) -> float:
        return sum(weight * fmean(values) for weight, values in self.samples)

    @property
    def interval(self) -> Interval | None:
        """Of the mean (Welch, Satterthwaite); that of two supernets would say nothing."""
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


def main(networks: Annotated[list[str], typer.Argument(help="Params files of this folder, without .yaml.")]) -> None:
    """Prints the tables of the networks' studies, and draws their pictures."""
    told = {"table": _table, "longer": _longer, "ranking": _ranking, "scores": _scores, "factors": _factors}
    for network in networks:
        for study, tell in told.items():
            path = RESULTS / f"{study}-{network}.csv"
            if path.exists():
                tell(_read(path), PICTURES / f"{study}-{network}.png")
                print()
    tables = [_read(path) for network in networks if (path := RESULTS / f"table-{network}.csv").exists()]
    if len(tables) > 1:
        _over_networks([_whole(rows) for rows in tables])


def _read(path: Path) -> pd.DataFrame:
    """The rows, accuracies in percent."""
    rows = pd.read_csv(path)
    if "search" in rows:
        rows = rows.fillna({"search": UNIFORM})
    return rows.assign(**{name: 100 * rows[name] for name in rows.columns if name.endswith("top1")})


# The table


def _table(given: pd.DataFrame, picture: Path) -> None:
    rows = _whole(given)
    gains, on_search = _gains(rows), _gains(rows, "search_top1")
    heads = ("regime", "budget", "MACs", "parameters", "uniform (%)", "autoslim (%)", "gain (points)", "by supernet")
    print(f"| search | {' | '.join((*heads, 'gain of the choice'))} |\n|---|---|{'---:|' * 6}---|---:|")
    for (search, over, regime, budget), gain in gains.items():
        if over == UNIFORM:
            ahead = on_search[search, over, regime, budget].by_supernet
            choice = fmean(own * (seen > 0) for own, seen in zip(gain.by_supernet, ahead, strict=True))
            both = _pair(rows, over, search, regime, budget)
            macs, params = (
                " / ".join(f"{each[cost].mean() / 1000:,.0f}k" for each in both) for cost in ("macs", "params")
            )
            top1 = " | ".join(_spread(each["top1"]) for each in both)
            told = f"{macs} | {params} | {top1} | {gain} | {_listed(gain)} | {choice:+.2f}"
            print(f"| {search} | {regime} | {budget} | {told} |")
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
            for number, (regime, (colour, shape)) in enumerate(regimes.items()):
                for place, budget in enumerate(budgets):
                    if gain := gains.get((search, UNIFORM, regime, budget)):
                        at = place + 0.2 * (number - (len(regimes) - 1) / 2)
                        axes.plot([at] * len(gain.by_supernet), gain.by_supernet, "_", color=colour, markersize=9)
                        axes.errorbar(at, gain.mean, gain.bars, fmt=shape, color=colour, capsize=4)
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

    write_figure(picture, draw, DPI)


def _over_networks(tables: Sequence[pd.DataFrame]) -> None:
    """The mean of the networks' gains, a column a budget, these in their order."""
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
        if not all((*compared, place) in each for each in gains for place in range(len(budgets))):
            continue
        means = [_mean([each[*compared, place] for each in gains]) for place in range(len(budgets))]
        print(f"| {' | '.join([*compared, *map(str, means)])} | {_listed(means[budgets.index(ALL)])} |")


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the supernets that have all trainings; and the means over budgets."""
    by_training = rows.groupby(["regime", "start", "method", "search", "supernet", "seed"], sort=False)
    means = by_training[["macs", "params", "top1", "search_top1"]].mean()[
        by_training.size() == rows["budget"].nunique()
    ]
    return _complete(pd.concat([rows, means.reset_index().assign(budget=ALL)]), "regime", "search", "budget")


def _complete(rows: pd.DataFrame, *cell: str) -> pd.DataFrame:
    """Of each cell, the supernets that have as many trainings as any."""
    counts = rows.groupby([*cell, "supernet"])["top1"].transform("count")
    return rows[counts == counts.groupby([rows[name] for name in cell]).transform("max")]


def _searches(rows: pd.DataFrame) -> list[str]:
    """Uniform, which has none, first."""
    return [UNIFORM, *(each for each in rows["search"].unique() if each != UNIFORM)]


def _budgets(rows: pd.DataFrame) -> list[str]:
    return list(rows["budget"].unique())


def _gains(rows: pd.DataFrame, score: str = "top1") -> dict[tuple[str, str, str, str], Gain]:
    """By (search, over which other, regime, budget): each search over uniform, and over the first search."""
    searches = _searches(rows)
    gains = {}
    for over in searches[:2]:
        for search in searches[searches.index(over) + 1 :]:
            for regime in rows["regime"].unique():
                for budget in _budgets(rows):
                    other, found = _pair(rows, over, search, regime, budget)
                    if len(other) and len(found):
                        paired = not _same_for_all(rows, over, regime)
                        gains[search, over, regime, budget] = _gain(found, other, paired=paired, score=score)
    return gains


def _pair(rows: pd.DataFrame, over: str, search: str, regime: str, budget: str) -> list[pd.DataFrame]:
    """The trainings to compare: of the supernets that both have, where the other networks differ by supernet."""
    cell = rows[(rows["regime"] == regime) & (rows["budget"] == budget)]
    both = [cell[cell["search"] == each] for each in (over, search)]
    if _same_for_all(rows, over, regime):
        return both
    common = set(both[0]["supernet"]) & set(both[1]["supernet"])
    return [each[each["supernet"].isin(common)] for each in both]


def _same_for_all(rows: pd.DataFrame, search: str, regime: str) -> bool:
    """Uniform from scratch has nothing of a supernet."""
    return search == UNIFORM and set(rows[rows["regime"] == regime]["start"]) == {"scratch"}


def _gain(found: pd.DataFrame, other: pd.DataFrame, *, paired: bool, score: str = "top1") -> Gain:
    """Of each supernet's trainings over the others: those of the same supernet, or all."""
    means = _means(found, score)
    gains = (means - (_means(other, score) if paired else other[score].mean())).dropna()
    return Gain(list(gains), [(1, list(gains))] if paired else [(1, list(means)), (-1, list(other[score]))])


def _mean(gains: Sequence[Gain]) -> Gain:
    return Gain(
        [each for gain in gains for each in gain.by_supernet],
        [(weight / len(gains), values) for gain in gains for weight, values in gain.samples],
    )


def _means(rows: pd.DataFrame, score: str) -> pd.Series:
    return rows.groupby("supernet")[score].mean()


def _longer(rows: pd.DataFrame, picture: Path) -> None:
    table = _whole(_read(RESULTS / picture.with_suffix(".csv").name.replace("longer", "table")))
    for (budget, epochs), own in rows.groupby(["budget", "epochs"]):
        uniform = own[own["search"] == UNIFORM]
        print(f"uniform, {budget}, {epochs} epochs from scratch: {_spread(uniform['top1'])}\n")
        heads = ("search", "regime", "autoslim (%)", "gain over uniform for as long (points)", "by supernet")
        print(f"| {' | '.join(heads)} |\n|---|---|---:|---:|---|")
        for search in _searches(table)[1:]:
            found = {regime: _pair(table, UNIFORM, search, regime, budget)[1] for regime in table["regime"].unique()}
            for regime, each in (found | {f"scratch, {epochs} epochs": own[own["search"] == search]}).items():
                if len(each):
                    gain = _gain(each, uniform, paired=False)
                    print(f"| {search} | {regime} | {_spread(each['top1'])} | {gain} | {_listed(gain)} |")


# Does the supernet rank networks as training does?


def _kinds(rows: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return list(rows[[*columns]].drop_duplicates().itertuples(index=False, name=None))


def _ranking(rows: pd.DataFrame, picture: Path) -> None:
    truth = _truth(picture)
    top1 = truth.loc["random"]
    print(f"{len(top1)} random networks, retrained: top-1 {top1.min():.1f} to {top1.max():.1f} %\n")
    print("| ranked by | Spearman | Kendall | Spearman along the search | |\n|---|---:|---:|---:|---|")
    for cost in ("macs", "params"):
        _print_ranks(cost, rows.groupby(["kind", "network"])[[cost]].first(), truth)
    path = RESULTS / picture.with_suffix(".csv").name.replace("ranking", "table")
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
    """The variance within groups, pooled."""
    return float(groups.apply(lambda each: each.var() * (len(each) - 1)).sum() / (groups.size() - 1).sum())


def _scores(rows: pd.DataFrame, picture: Path) -> None:
    truth = _truth(picture)
    if not len(truth):
        return
    own = rows[rows["study"] == "ranking"]
    best = (own["images"].max(), "batch")
    heads = ("images", "statistics", "ranked by", "Spearman", "Kendall", "Spearman along the search")
    print(f"| {' | '.join((*heads, 'Spearman less that of the first'))} |\n|---:|---|---|---:|---:|---:|---:|")
    for way in dict.fromkeys([best, *_kinds(own, "images", "statistics")]):
        for score in ("top1", "nats"):
            scores, first = (_by_supernet(own, images, of, score) for images, of in (way, best))
            less = "" if way == best else _correlation(stats.spearmanr, *_common(truth, scores, first))
            _print_ranks(f"{way[0]} | {way[1]} | {score}", scores, truth, less)
    params = _retrained(picture).groupby(["kind", "network"])["params"].first().loc["random"]
    given = _by_supernet(own, best[0], best[1], "top1").loc["random"]
    told = (f"{_partial(given[name], truth.loc['random'], params)} (supernet {name})" for name in given)
    print(f"\nSpearman of top-1 on {best[0]} images with the number of parameters held constant: {', '.join(told)}")

    def draw() -> Figure:
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        kinds = {"top1": "top-1 in the supernet (%)", "nats": "cross-entropy in the supernet (nats)"}
        for axes, (score, label) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
            shown = _by_supernet(own, best[0], best[1], score).loc["random"].abs()
            for supernet, (colour, shape) in method_styles(list(shown)).items():
                axes.plot(
                    shown[supernet], truth.loc["random"].reindex(shown.index), shape, color=colour, label=supernet
                )
            axes.set_xlabel(label)
        axes.legend(frameon=False, title="supernet")
        figure.axes[0].set_ylabel("top-1 retrained (%)")
        return figure

    write_figure(picture, draw, DPI)


def _retrained(picture: Path) -> pd.DataFrame:
    """What the study ``ranking`` has of the network that a picture is named after; nothing if it is not done."""
    path = RESULTS / f"ranking-{picture.stem.partition('-')[2]}.csv"
    return _read(path) if path.exists() else pd.DataFrame({"kind": [], "network": [], "top1": []})


def _truth(picture: Path) -> pd.Series:
    """Top-1 retrained by (kind, network)."""
    return _retrained(picture).groupby(["kind", "network"])["top1"].mean()


def _partial(one: pd.Series, other: pd.Series, held: pd.Series) -> str:
    """The partial correlation of ranks, and how likely one as large is by chance (t)."""
    known = pd.DataFrame({"one": one, "other": other, "held": held}).dropna()
    ranks = known.rank().corr()
    direct, first, second = ranks.loc["one", "other"], ranks.loc["one", "held"], ranks.loc["other", "held"]
    if max(abs(first), abs(second)) > 1 - 1e-9:
        return "not to be told from it"
    value = (direct - first * second) / math.sqrt((1 - first**2) * (1 - second**2))
    freedom = len(known) - 3
    return f"{value:.2f}, p {2 * stats.t.sf(abs(value) * math.sqrt(freedom / (1 - value**2)), freedom):.2f}"


def _by_supernet(rows: pd.DataFrame, images: int, statistics: str, score: str) -> pd.DataFrame:
    """Scores by (kind, network), a column a supernet; the larger the better."""
    way = (rows["images"] == images) & (rows["statistics"] == statistics)
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
    known = [truth.loc["random"], *(each.loc["random"].dropna() for each in scores)]
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


# What matters


def _factors(rows: pd.DataFrame, picture: Path) -> None:
    """The effects of factors: a supernet counts once, with the mean of its searches, which are told within it."""
    study = load_yaml(STUDIES)["factors"]
    training, search = (
        {name: two for name, two in study[part].items() if name in rows} for part in ("supernet", "search")
    )
    counts = rows.groupby("supernet")["top1"].transform("count")
    whole = rows[counts == 3 * rows["budget"].nunique() * rows["seed"].nunique()]  # two searches and uniform
    found, uniform = (whole[whole["method"] == method] for method in ("autoslim", UNIFORM))
    most = found["budget"].map(uniform.groupby("budget")["macs"].first())
    found = found.assign(filled=100 * (found["macs"] / most - 1))
    own, base = found.groupby("supernet")[["top1", "filled"]].mean(), _means(uniform, "top1")
    outcomes = {
        "top-1 of autoslim": own["top1"],
        "top-1 of uniform": base,
        "gain over uniform": own["top1"] - base,
        "MACs over uniform's (%)": own["filled"],
    }
    if len(ranks := _ranks(picture)):
        outcomes["Spearman by cross-entropy"] = ranks.reindex(own.index).dropna()
    settings = _levels(found.groupby("supernet")[[*training]].first(), training)
    ways = found.groupby(["supernet", *search])[["top1", "filled"]].mean().reset_index()
    change = _levels(ways, search).join(ways[["top1", "filled"]]).groupby(ways["supernet"]).diff().dropna()
    effects = {name: _effects(settings.loc[each.index], each, intercept=True) for name, each in outcomes.items()}
    within = {name: _effects(change[[*search]], change[name], intercept=False) for name in ("top1", "filled")}
    if not all([*effects.values(), *within.values()]):
        print(f"factors: {len(own)} supernets are done, too few to tell the effects from one another")
        return
    print(f"{len(own)} supernets; means and standard deviations over them:\n")
    for name, each in outcomes.items():
        print(f"- {name}: {_spread(list(each))}")
    _print_effects(training, effects)
    _print_effects(search, {"top-1 of autoslim": within["top1"], "MACs over uniform's (%)": within["filled"]})
    count = len(training) * len(effects) + len(search) * len(within)
    print(f"\n{count} intervals: by chance one in twenty misses what it is of.")

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

    write_figure(picture, draw, DPI)


def _ranks(picture: Path) -> pd.Series:
    """How each supernet of the study ranks the random networks that all of them have scored; empty if not known."""
    path, truth = RESULTS / picture.with_suffix(".csv").name.replace("factors", "scores"), _truth(picture)
    scores = _read(path) if path.exists() else pd.DataFrame({"study": []})
    own = scores[scores["study"] == "factors"]
    if not len(own) or not len(truth):
        return pd.Series(dtype=float)
    given = _by_supernet(own, own["images"].max(), "batch", "nats").loc["random"].dropna()
    return given.corrwith(truth.loc["random"], method="spearman") if len(given) >= FEW else pd.Series(dtype=float)


def _levels(rows: pd.DataFrame, factors: dict[str, list[Any]]) -> pd.DataFrame:
    """-1/2 at the first value of a factor, 1/2 at the second."""
    return pd.DataFrame({name: (rows[name] == two[1]) - 0.5 for name, two in factors.items()}, index=rows.index)


def _effects(levels: pd.DataFrame, outcome: pd.Series, *, intercept: bool) -> dict[str, tuple[float, float]]:
    """By factor: how much more the outcome is at the second value, and half of the 95 % interval (least squares).

    Empty where there are too few rows for that.
    """
    design = levels.to_numpy(dtype=float)
    if intercept:
        design = np.column_stack([design, np.ones(len(outcome))])
    freedom = len(outcome) - design.shape[1]
    if freedom < 3 or np.linalg.matrix_rank(design) < design.shape[1]:
        return {}
    inverse = np.linalg.inv(design.T @ design)
    estimate = inverse @ design.T @ outcome.to_numpy()
    rest = outcome.to_numpy() - design @ estimate
    halves = stats.t.ppf(0.975, freedom) * np.sqrt(np.diag(inverse) * (rest @ rest) / freedom)
    return {factor: (estimate[n], halves[n]) for n, factor in enumerate(levels)}


def _print_effects(factors: dict[str, list[Any]], effects: dict[str, dict[str, tuple[float, float]]]) -> None:
    print(f"\n| factor | from, to | {' | '.join(effects)} |\n|---|---|{'---:|' * len(effects)}")
    for factor, two in factors.items():
        told = ("{:+.2f} ± {:.2f}".format(*each[factor]) for each in effects.values())
        print(f"| {factor} | {', '.join(map(str, two))} | {' | '.join(told)} |")


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") + f" (n {len(values)})"


def _listed(gain: Gain) -> str:
    return ", ".join(f"{each:+.2f}" for each in gain.by_supernet)


if __name__ == "__main__":
    typer.run(main)
