"""The comparison: resources and top-1 on the test split of each method, and its gain over the baseline."""

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from autoslim.errors import UserError
from autoslim.models.released import released_method
from autoslim.resources.budgets import TITLES, Budget, format_amount, format_budgets, format_named_amount
from autoslim.resources.measure import Measured

BASELINE = "uniform"
SAME_COST = 0.05
LARGER = 0.03


@dataclass(frozen=True)
class Result:
    """A method's retrained network: its costs by resource (latency as predicted, where there is a table), what was
    measured of them and, seed by seed, its top-1 (a fraction in [0, 1]) on the test split and on the search split."""

    method: str
    costs: Mapping[str, float]
    top1: Mapping[int, float]
    measured: Measured | None = None
    search_top1: Mapping[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return fmean(self.top1.values())

    @property
    def std(self) -> float | None:
        """The sample standard deviation over seeds (divided by n - 1); None for one seed."""
        return stdev(self.top1.values()) if len(self.top1) > 1 else None


@dataclass(frozen=True)
class Gain:
    """How much more top-1 than the baseline (a fraction), with its 95 % interval where the seeds allow one."""

    top1: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """The results within budgets (resource -> as the user wrote it), and what these are in the resource's unit.

    ``resource`` is the one that decides whether a released list is comparable.
    """

    budgets: Mapping[str, Budget]
    resource: str
    limits: Mapping[str, float]
    results: tuple[Result, ...]
    gains: Mapping[str, Gain]
    predicted_on: str = ""  # where latency was predicted for another target than it was measured on
    from_supernet: bool = False  # where training started, of all networks

    @property
    def choice(self) -> tuple[str, int] | None:
        """The method that is ahead on the search split, and its best seed there: a choice that has not seen the test
        split, and need not be a gain over the baseline. Released lists, which have budgets of their own, are among
        these where they are comparable, or where there is nothing else; None where there is no score.
        """
        scored = [result for result in self.results if result.search_top1]
        within = [r for r in scored if released_method(r.method) is None or r.method in self.gains]
        known = within or scored
        if not known:
            return None
        best = max(known, key=lambda result: fmean(result.search_top1.values()))
        return best.method, max(best.search_top1, key=best.search_top1.__getitem__)


def compare(
    results: Sequence[Result],
    *,
    budgets: Mapping[str, Budget],
    resource: str,
    limits: Mapping[str, float],
    predicted_on: str = "",
    from_supernet: bool = False,
) -> Comparison:
    """The comparison of ``results``, with the gain of each over the baseline where that is among them.

    A released list has a budget of its own; it has a gain where its cost is within 5 % of the baseline's.

    Raises:
        UserError: a method has no seed at all.
    """
    for result in results:
        if not result.top1:
            raise UserError(f"method {result.method} has no retrained seed to compare; give retrain.seeds at least one")
    baseline = next((result for result in results if result.method == BASELINE), None)
    gains = {
        r.method: gain(r, baseline)
        for r in results
        if baseline is not None and r is not baseline and _comparable(r, baseline, resource)
    }
    return Comparison(budgets, resource, limits, tuple(results), gains, predicted_on, from_supernet)


def _comparable(result: Result, baseline: Result, resource: str) -> bool:
    off = abs(result.costs[resource] / baseline.costs[resource] - 1)
    return released_method(result.method) is None or off <= SAME_COST


def gain(result: Result, baseline: Result) -> Gain:
    """The difference of the means, with Welch's 95 % interval over the seeds.

    Welch's, and not the paired t interval, although both methods have the same seeds: networks of different shapes draw
    different weights from one seed and share no more than the order of the images, so pairs are hardly correlated, and
    pairing would halve the few degrees of freedom (with 3 seeds t = 4.30 instead of 2.78). The interval speaks of
    retraining with other seeds; it does not cover another search, nor another test set. There is none for one seed, nor
    where no seed differs from another.
    """
    difference = result.mean - baseline.mean
    if result.std is None or baseline.std is None or result.std == baseline.std == 0:
        return Gain(difference, None)

    from scipy.stats import ttest_ind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # raised where the seeds of one method do not differ
        test = ttest_ind([*result.top1.values()], [*baseline.top1.values()], equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Gain(difference, (float(low), float(high)))


def describe_budgets(budgets: Mapping[str, Budget], limits: Mapping[str, float]) -> str:
    """As written, with the value where that is written otherwise: ``305M MACs``, ``25% = 1.42M MACs, 20MB``."""
    told = []
    for resource, budget in budgets.items():
        value = format_named_amount(limits[resource], resource)
        same = budget.text == format_amount(limits[resource], resource)
        told.append(value if same else f"{budget.text} = {value}")
    return ", ".join(told)


def terminal_table(comparison: Comparison) -> Table:
    """For ``rich.print``, narrow enough for 80 columns: without predictions and the spread of latency."""
    table = Table(
        title=f"budget {_budget(comparison)}",
        caption=_caption(comparison),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    header = _header(comparison)
    shown = [number for number, name in enumerate(header) if "predicted" not in name]
    for number in shown:
        table.add_column(header[number], justify="right" if number else "left", no_wrap=True)
    for row in _rows(comparison):
        table.add_row(*(row[number].partition("s ±")[0] + "s" * ("s ±" in row[number]) for number in shown))
    return table


def markdown_table(comparison: Comparison) -> str:
    header = [name.replace("\n", " ") for name in _header(comparison)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *_rows(comparison)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"Budget {_budget(comparison)}\n\n{table}\n\n{_caption(comparison)}\n"


def csv_table(comparison: Comparison) -> str:
    """One line a method, numbers as they are (fractions, MACs), cells empty where there is no such number."""
    costs = ["macs", "params", "memory", "latency", *(f"measured_{field.name}" for field in fields(Measured))]
    header = ["method", *costs, "top1", "top1_std", "seeds", "gain", "gain_low", "gain_high"]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for result in comparison.results:
        row: dict[str, Any] = {"method": result.method, "seeds": len(result.top1), **_numbers(result)}
        if found := comparison.gains.get(result.method):
            row |= {"gain" + key.removeprefix("top1"): value for key, value in _gain_numbers(found).items()}
        writer.writerow(row)
    return text.getvalue()


def metrics(comparison: Comparison) -> dict[str, Any]:
    """For ``dvc metrics show``: the budget, each method's numbers, and the gains; what does not exist is left out."""
    return {
        "budget": format_budgets(comparison.budgets),
        **{f"budget_{resource}": limit for resource, limit in comparison.limits.items()},
        **{result.method: _numbers(result) for result in comparison.results},
        "gain": {method: _gain_numbers(found) for method, found in comparison.gains.items()},
        **({"choice": dict(zip(("method", "seed"), choice, strict=True))} if (choice := comparison.choice) else {}),
    }


def _numbers(result: Result) -> dict[str, Any]:
    numbers: dict[str, Any] = dict(result.costs)
    if result.measured is not None:
        numbers |= {f"measured_{name}": value for name, value in asdict(result.measured).items()}
    numbers["top1"] = result.mean
    return numbers if result.std is None else {**numbers, "top1_std": result.std}


def _gain_numbers(found: Gain) -> dict[str, float]:
    if found.interval is None:
        return {"top1": found.top1}
    return {"top1": found.top1, "top1_low": found.interval[0], "top1_high": found.interval[1]}


def _header(comparison: Comparison) -> list[str]:
    costs = ["MACs", "parameters", "memory"]
    if _predicted(comparison):
        costs.append("latency\npredicted")
    if _measured(comparison):
        costs.append("latency\nmeasured")
    return ["method", *costs, "top-1 on test\n(%)", f"gain over {BASELINE}\n(points)"]


def _predicted(comparison: Comparison) -> bool:
    return any("latency" in result.costs for result in comparison.results)


def _measured(comparison: Comparison) -> bool:
    return any(result.measured for result in comparison.results)


def _rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for result in comparison.results:
        spread = "" if result.std is None else f" ± {100 * result.std:.2f}"
        found = comparison.gains.get(result.method)
        interval = (
            ""
            if found is None or found.interval is None
            else "  [{:+.2f}, {:+.2f}]".format(*(100 * end for end in found.interval))
        )
        costs = [format_amount(result.costs[resource], resource) for resource in ("macs", "params", "memory")]
        if _predicted(comparison):
            costs.append(format_amount(result.costs["latency"], "latency"))
        if _measured(comparison):
            costs.append(_latency(result.measured))
        difference = "" if found is None else f"{100 * found.top1:+.2f}{interval}"
        rows.append([result.method, *costs, f"{100 * result.mean:.2f}{spread}", difference])
    return rows


def _latency(measured: Measured | None) -> str:
    """The median and half the distance of the quartiles."""
    if measured is None:
        return ""
    spread = (measured.latency_high - measured.latency_low) / 2
    return f"{format_amount(measured.latency, 'latency')} ± {format_amount(spread, 'latency')}"


def _too_slow(result: Result, comparison: Comparison) -> bool:
    """Measured over the budget although predicted within, on the target that the table is of."""
    if "latency" not in comparison.limits or comparison.predicted_on or result.measured is None:
        return False
    return result.measured.latency_low > comparison.limits["latency"]


def _larger(comparison: Comparison) -> dict[str, float]:
    """Method -> by how much it is larger than the baseline, where that counts."""
    costs = {result.method: result.costs[comparison.resource] for result in comparison.results}
    more = {method: costs[method] / costs[BASELINE] - 1 for method in comparison.gains}
    return {method: share for method, share in more.items() if share > LARGER}


def _budget(comparison: Comparison) -> str:
    return describe_budgets(comparison.budgets, comparison.limits)


def _caption(comparison: Comparison) -> str:
    seeds = sorted({len(result.top1) for result in comparison.results})
    count = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    text = "one seed: no spread and no interval" if seeds == [1] else f"mean ± std over {count}"
    if any(found.interval for found in comparison.gains.values()):
        text += "; in brackets the 95 % interval of the gain over seeds (Welch)"
    for method, more in _larger(comparison).items():
        why = "" if released_method(method) else ", whose widths come in large steps"
        text += f"; {method} takes {more:.0%} more {TITLES[comparison.resource]} than {BASELINE}{why}"
        if comparison.gains[method].top1 > 0:
            text += ": part of its gain may be size"
    if comparison.from_supernet:
        text += "; all networks started from the supernet's weights"
    if choice := comparison.choice:
        scores = {r.method: fmean(r.search_top1.values()) for r in comparison.results if r.search_top1}
        told = ", ".join(f"{method} {100 * score:.2f}" for method, score in scores.items())
        text += f"; the search split, which chooses, has {told}: {choice[0]}, seed {choice[1]}, is ahead there"
    if _measured(comparison):
        text += "; latency is the median ± half the distance of the quartiles"
    if over := [r.method for r in comparison.results if _too_slow(r, comparison)]:
        text += (
            f"; measured over the budget of {format_amount(comparison.limits['latency'], 'latency')}: {', '.join(over)}"
            " (the machine is busier than when the table was made, or the table is off)"
        )
    if comparison.predicted_on:
        text += f", measured on this machine and predicted for another target: {comparison.predicted_on}"
    if any(released_method(result.method) for result in comparison.results):
        text += (
            f"; released lists have budgets of their own: a gain where they are within {SAME_COST:.0%} of {BASELINE}"
        )
    return text
