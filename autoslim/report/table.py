"""The comparison of the methods as tables: resources, top-1 on the test split, and what it gains and loses."""

import csv
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from autoslim.errors import UserError
from autoslim.models.released import released_method
from autoslim.resources.budgets import TITLES, Budget, format_amount, format_budgets, format_named_amount
from autoslim.resources.measure import MeasuredCosts
from autoslim.search.methods import DEFAULT, is_within_budget
from autoslim.tasks.measure import TOP1, Measure

BASELINE = "uniform"
SAME_COST = 0.05
"""Released lists have a gain if their cost differs from the baseline's by at most this fraction."""

LARGER = 0.03
"""The caption names methods whose cost is above the baseline's by more than this fraction."""

WIDE = 0.2
"""The caption names methods whose measured latency has an interquartile range above this fraction of the median."""


@dataclass(frozen=True)
class Result:
    """The retrained network of a method.

    Attributes:
        costs: resource -> amount. Latency is the predicted one and missing without a latency table.
        top1: seed -> the task's main measure on the test split, such as top-1, a fraction in [0, 1].
        measured: measured latency and memory.
        search_top1: seed -> the same on the search split.
        start: what the training started from; ``trained``: the network was evaluated as it is, under one seed.
        others: name of each other measure -> seed -> its value on the test split.
    """

    method: str
    costs: Mapping[str, float]
    top1: Mapping[int, float]
    measured: MeasuredCosts | None = None
    search_top1: Mapping[int, float] = field(default_factory=dict)
    start: str = "scratch"
    others: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def summary(self, measure: Measure) -> tuple[float, float | None]:
        """Returns mean and standard deviation (see ``std``) of a measure on the test split."""
        values = [*self.others.get(measure.name, self.top1).values()]
        return fmean(values), stdev(values) if len(values) > 1 else None

    @property
    def mean(self) -> float:
        return fmean(self.top1.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (divided by n - 1), or None for one seed."""
        return stdev(self.top1.values()) if len(self.top1) > 1 else None


@dataclass(frozen=True)
class Gain:
    """By how much a method is better than another, with its 95 % confidence interval if the seeds allow one.

    ``top1`` is the difference in the main measure, such as top-1 (a fraction). It is positive if the method is better.
    """

    top1: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """The results of all methods.

    Attributes:
        budgets: resource -> budget as the user wrote it.
        resource: the resource that decides whether a released list is comparable.
        limits: resource -> budget in the resource's unit.
        gains: method -> gain over the baseline, for comparable methods.
        predicted_on: the target that latency was predicted for, if it is not the one that latency was measured on.
        from_supernet: whether all networks were fine-tuned from the supernet's weights, if this was possible.
        differences: method -> difference in the main measure from the default network, if that is among the methods.
        warning: text that is shown above the table; "" for none.
        measures: the task's measures, the main one first.
    """

    budgets: Mapping[str, Budget]
    resource: str
    limits: Mapping[str, float]
    results: tuple[Result, ...]
    gains: Mapping[str, Gain]
    predicted_on: str = ""
    from_supernet: bool = False
    differences: Mapping[str, Gain] = field(default_factory=dict)
    warning: str = ""
    measures: Sequence[Measure] = (TOP1,)

    @property
    def measure(self) -> Measure:
        """The main measure."""
        return self.measures[0]

    @property
    def default(self) -> Result | None:
        return next((result for result in self.results if result.method == DEFAULT), None)

    @property
    def choice(self) -> tuple[str, int] | None:
        """The method with the best mean of the main measure on the search split, and its best seed on that split.

        The choice does not use the test split, and its gain over the baseline may be negative. Released lists have
        their own budgets; they are considered only if they are comparable, or if there are no other methods. The
        default network is never chosen. It is None if no other method has a score on the search split.
        """
        scored = [result for result in self.results if result.search_top1 and result.method != DEFAULT]
        comparable = [r for r in scored if released_method(r.method) is None or r.method in self.gains]
        candidates = comparable or scored
        if not candidates:
            return None
        choose = max if self.measure.higher_is_better else min
        best = choose(candidates, key=lambda result: fmean(result.search_top1.values()))
        return best.method, choose(best.search_top1, key=best.search_top1.__getitem__)


def compare(
    results: Sequence[Result],
    *,
    budgets: Mapping[str, Budget],
    resource: str,
    limits: Mapping[str, float],
    predicted_on: str = "",
    from_supernet: bool = False,
    warning: str = "",
    measures: Sequence[Measure] = (TOP1,),
) -> Comparison:
    """Compares ``results`` with the baseline and with the default network, if these are among them.

    A released list has its own budget. It has a gain if its cost is within 5 % of the baseline's.

    Raises:
        UserError: a method has no seed.
    """
    for result in results:
        if not result.top1:
            raise UserError(f"method {result.method} has no retrained seed; set retrain.seeds to at least one seed")
    baseline = next((result for result in results if result.method == BASELINE), None)
    gains = {
        r.method: gain(r, baseline, measures[0])
        for r in results
        if baseline is not None and r is not baseline and _comparable(r, baseline, resource)
    }
    default = next((result for result in results if result.method == DEFAULT), None)
    differences = {r.method: gain(r, default, measures[0]) for r in results if default is not None and r is not default}
    return Comparison(
        budgets, resource, limits, tuple(results), gains, predicted_on, from_supernet, differences, warning, measures
    )


def _comparable(result: Result, baseline: Result, resource: str) -> bool:
    difference = abs(result.costs[resource] / baseline.costs[resource] - 1)
    return is_within_budget(result.method) or (result.method != DEFAULT and difference <= SAME_COST)


def gain(result: Result, baseline: Result, measure: Measure = TOP1) -> Gain:
    """Returns by how much ``result`` is better than ``baseline`` (see ``_difference``)."""
    found = _difference(result, baseline)
    if measure.higher_is_better:
        return found
    return Gain(-found.top1, None if found.interval is None else (-found.interval[1], -found.interval[0]))


def _difference(result: Result, baseline: Result) -> Gain:
    """Returns the difference of the means with Welch's 95 % confidence interval over the seeds.

    The samples are not paired although both methods use the same seeds: networks of different shapes draw different
    weights from the same seed and share only the order of the images. Pairs are therefore hardly correlated, and
    pairing would halve the few degrees of freedom (with 3 seeds t = 4.30 instead of 2.78).

    The interval covers retraining with other seeds. It covers neither another search nor another test set. It is None
    if a method has one seed only, or if the seeds of neither method differ. A baseline that was not retrained is a
    constant: the interval is then Student's, of ``result`` alone.
    """
    difference = result.mean - baseline.mean
    fixed = baseline.start == "trained"
    if result.std is None or (baseline.std is None and not fixed) or not (result.std or baseline.std):
        return Gain(difference, None)

    from scipy.stats import ttest_1samp, ttest_ind

    if fixed:
        low, high = ttest_1samp([*result.top1.values()], baseline.mean).confidence_interval(0.95)
        return Gain(difference, (float(low) - baseline.mean, float(high) - baseline.mean))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # if all seeds of one method are equal
        test = ttest_ind([*result.top1.values()], [*baseline.top1.values()], equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Gain(difference, (float(low), float(high)))


def describe_budgets(budgets: Mapping[str, Budget], limits: Mapping[str, float]) -> str:
    """Formats budgets as written, with their values if these differ: ``305M MACs``, ``25% = 1.42M MACs, 20MB``."""
    descriptions = []
    for resource, budget in budgets.items():
        value = format_named_amount(limits[resource], resource)
        same = budget.text == format_amount(limits[resource], resource)
        descriptions.append(value if same else f"{budget.text} = {value}")
    return ", ".join(descriptions)


def answer(comparison: Comparison) -> str:
    """Returns the result in words: what the found network has, gains over the baseline and loses to the default one."""
    found = next((r for r in comparison.results if r.method not in (BASELINE, DEFAULT)), None)
    found = next((r for r in comparison.results if r.method == "autoslim"), found)
    measure = comparison.measure
    if found is None:
        return f"There is no answer: the methods are {' and '.join(r.method for r in comparison.results)}."
    mean, _ = found.summary(measure)
    unit = f" {measure.unit}".rstrip()
    value = f"{measure.number(mean)}{unit}"
    sentences = [f"The network of {found.method} has a {measure.title} of {value} on the test split."]
    for name, differences in ((BASELINE, comparison.gains), (DEFAULT, comparison.differences)):
        if (difference := differences.get(found.method)) is not None:
            sentences.append(_verdict(difference, found.method, name, measure))
    if found.method not in comparison.gains:
        known = any(result.method == BASELINE for result in comparison.results)
        why = "needs another amount of resources" if known else "is not among the methods"
        sentences.append(f"There is no comparison with {BASELINE}, which {why}.")
    return " ".join(sentences)


def _verdict(difference: Gain, method: str, other: str, measure: Measure) -> str:
    """Returns a sentence that says whether ``method`` is better than ``other``, and by how much."""
    unit = f" {measure.unit_of_differences}".rstrip()
    amount = f"{measure.number(abs(difference.top1))}{unit}"
    relation = "better" if difference.top1 > 0 else "worse"
    if difference.interval is None:
        if difference.top1 == 0:
            return f"It is as good as {other}."
        return f"It is {amount} {relation} than {other}; without an interval, this may be chance."
    low, high = difference.interval
    interval = f"95 % confidence interval {measure.number(low, '+')} to {measure.number(high, '+')}{unit}"
    if low <= 0 <= high:
        signed = f"{measure.number(difference.top1, '+')}{unit}"
        return f"No difference from {other} was found: {signed}, {interval}."
    return f"It is {amount} {relation} than {other} ({interval})."


def html_table(comparison: Comparison) -> tuple[list[str], list[list[str]], str]:
    """Returns the header, the rows and the caption of the table for a page, as plain text that is not escaped."""
    header = [name.replace("\n", " ") for name in _header(comparison)]
    return header, _rows(comparison), _caption(comparison)


def terminal_table(comparison: Comparison) -> Table:
    """Returns the table for ``rich.print``. To fit 80 columns, it omits the spread of latency, and the columns of
    predictions and of all measures but the main one.

    The differences from the default network are below it.
    """
    table = Table(
        title=escape(f"budget {_budget(comparison)}"),
        caption=escape(" ".join([*_differences(comparison), _caption(comparison)])),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    header = _header(comparison)
    first = header[: len(header) - len(comparison.measures[1:])]  # the other measures are last
    columns = [index for index, name in enumerate(first) if "predicted" not in name and DEFAULT not in name]
    for index in columns:
        table.add_column(
            header[index].replace(" on test\n", "\non test "), justify="right" if index else "left", no_wrap=True
        )
    for row in _rows(comparison):
        table.add_row(*(row[index].partition("s ±")[0] + "s" * ("s ±" in row[index]) for index in columns))
    return table


def markdown_table(comparison: Comparison) -> str:
    header = [name.replace("\n", " ") for name in _header(comparison)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *_rows(comparison)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    # The name of a target is read from a file. It must be text in Markdown, and in the HTML that is made of it.
    target = re.sub(r"[\\`*_{}\[\]<>|&]", r"\\\g<0>", " ".join(comparison.predicted_on.split()))
    text = f"Budget {_budget(comparison)}\n\n{table}\n\n{_caption(replace(comparison, predicted_on=target))}\n"
    return f"**Warning:** {comparison.warning}\n\n{text}" if comparison.warning else text


def csv_table(comparison: Comparison) -> str:
    """Returns one row per method, with unscaled values (fractions, MACs). Cells without a value are empty."""
    costs = ["macs", "params", "memory", "latency", *(f"measured_{field.name}" for field in fields(MeasuredCosts))]
    names = [name for measure in comparison.measures for name in (measure.name, f"{measure.name}_std")]
    header = ["method", *costs, *names, "seeds"]
    header += [f"{name}{end}" for name in ("gain", "difference") for end in ("", "_low", "_high")]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    for result in comparison.results:
        row: dict[str, Any] = {"method": result.method, "seeds": len(result.top1), **_numbers(result, comparison)}
        for name, gains in (("gain", comparison.gains), ("difference", comparison.differences)):
            if difference := gains.get(result.method):
                row |= _gain_numbers(difference, name)
        writer.writerow(row)
    return text.getvalue()


def metrics(comparison: Comparison) -> dict[str, Any]:
    """Returns the budget, each method's numbers, gains and differences from the default, without missing values."""
    name = comparison.measure.name
    differences = {method: _gain_numbers(difference, name) for method, difference in comparison.differences.items()}
    return {
        "budget": format_budgets(comparison.budgets),
        **{f"budget_{resource}": limit for resource, limit in comparison.limits.items()},
        **{result.method: _numbers(result, comparison) for result in comparison.results},
        "gain": {method: _gain_numbers(difference, name) for method, difference in comparison.gains.items()},
        **({"difference": differences} if differences else {}),
        **({} if comparison.measures == (TOP1,) else {"measures": [asdict(each) for each in comparison.measures]}),
        **({"choice": dict(zip(("method", "seed"), choice, strict=True))} if (choice := comparison.choice) else {}),
    }


def _numbers(result: Result, comparison: Comparison) -> dict[str, Any]:
    numbers: dict[str, Any] = dict(result.costs)
    if result.measured is not None:
        numbers |= {f"measured_{name}": value for name, value in asdict(result.measured).items()}
    for measure in comparison.measures:
        mean, std = result.summary(measure)
        numbers[measure.name] = mean
        if std is not None:
            numbers[f"{measure.name}_std"] = std
    return numbers


def _gain_numbers(difference: Gain, name: str) -> dict[str, float]:
    if difference.interval is None:
        return {name: difference.top1}
    return {name: difference.top1, f"{name}_low": difference.interval[0], f"{name}_high": difference.interval[1]}


def _header(comparison: Comparison) -> list[str]:
    costs = ["MACs", "parameters", "memory"]
    if _predicted(comparison):
        costs.append("latency\npredicted")
    if _measured(comparison):
        costs.append("latency\nmeasured")
    main, *others = comparison.measures
    titles = [_two_lines(measure.header(f"{measure.title} on test")) for measure in (main, *others)]
    unit = f"\n({main.unit_of_differences})" if main.unit_of_differences else ""
    gains = [f"difference from {DEFAULT}{unit}"] if comparison.differences else []
    return ["method", *costs, titles[0], *gains, f"gain over {BASELINE}{unit}", *titles[1:]]


def _two_lines(header: str) -> str:
    """Returns a header with its unit on a second line."""
    return header.replace(" (", "\n(")


def _predicted(comparison: Comparison) -> bool:
    return any("latency" in result.costs for result in comparison.results)


def _measured(comparison: Comparison) -> bool:
    return any(result.measured for result in comparison.results)


def _rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for result in comparison.results:
        values = []
        for measure in comparison.measures:
            mean, std = result.summary(measure)
            values.append(measure.number(mean) + ("" if std is None else f" ± {measure.number(std)}"))
        costs = [format_amount(result.costs[resource], resource) for resource in ("macs", "params", "memory")]
        if _predicted(comparison):
            costs.append(format_amount(result.costs["latency"], "latency"))
        if _measured(comparison):
            costs.append(_latency(result.measured))
        gains = [
            _points(each.get(result.method), comparison.measure) for each in (comparison.differences, comparison.gains)
        ]
        if not comparison.differences:
            del gains[0]
        rows.append([result.method, *costs, values[0], *gains, *values[1:]])
    return rows


def _points(difference: Gain | None, measure: Measure) -> str:
    if difference is None:
        return ""
    text = measure.number(difference.top1, "+")
    if difference.interval is not None:
        low, high = (measure.number(end, "+") for end in difference.interval)
        text += f"  [{low}, {high}]"
    return text


def _differences(comparison: Comparison) -> list[str]:
    """Returns a sentence with the differences from the default network, if it is among the methods."""
    texts = {method: _points(difference, comparison.measure) for method, difference in comparison.differences.items()}
    listed = ", ".join(f"{method} {text}".replace("  ", " ") for method, text in texts.items())
    unit = comparison.measure.unit_of_differences
    return [f"Difference from {DEFAULT}{f' in {unit}' if unit else ''}: {listed}."] if listed else []


def _latency(measured: MeasuredCosts | None) -> str:
    """Formats the median and half the interquartile range."""
    if measured is None:
        return ""
    spread = (measured.latency_high - measured.latency_low) / 2
    return f"{format_amount(measured.latency, 'latency')} ± {format_amount(spread, 'latency')}"


def _is_wide(measured: MeasuredCosts | None) -> bool:
    return measured is not None and measured.latency_high - measured.latency_low > WIDE * measured.latency


def _quartiles(measured: MeasuredCosts) -> str:
    low, high = (format_amount(ms, "latency") for ms in (measured.latency_low, measured.latency_high))
    return f"{low} to {high}"


def _too_slow(result: Result, comparison: Comparison) -> bool:
    """Returns whether the measured latency exceeds the budget although the prediction for this target does not."""
    if "latency" not in comparison.limits or comparison.predicted_on or result.measured is None:
        return False
    if result.method == DEFAULT:  # it has no budget
        return False
    return result.measured.latency_low > comparison.limits["latency"]


def _larger(comparison: Comparison) -> dict[str, float]:
    """Returns the fraction by which methods cost more than the baseline, for those above ``LARGER``."""
    costs = {result.method: result.costs[comparison.resource] for result in comparison.results}
    excess = {method: costs[method] / costs[BASELINE] - 1 for method in comparison.gains}
    return {method: fraction for method, fraction in excess.items() if fraction > LARGER}


def _budget(comparison: Comparison) -> str:
    return describe_budgets(comparison.budgets, comparison.limits)


def _listed(methods: Sequence[str]) -> str:
    """Returns the subject of a sentence and its verb, such as ``l1 and taylor were``."""
    *others, last = methods
    return f"{', '.join(others)} and {last} were" if others else f"{last} was"


def _caption(comparison: Comparison) -> str:
    """Returns the caption of the table, in sentences."""
    retrained = [result for result in comparison.results if result.start != "trained"]
    numbers = sorted({len(result.top1) for result in retrained})
    sentences = []
    if numbers == [1]:
        sentences = ["Each method has one seed, so there is no standard deviation and no confidence interval."]
    elif numbers:
        seeds = f"{numbers[0]} seeds" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} seeds"
        sentences = [f"Mean ± standard deviation over {seeds}."]
    default = comparison.default
    kept = default is not None and default.start == "trained"
    tests = {"gain": "Welch", "difference": "Student" if kept else "Welch"}
    for name, gains in (("gain", comparison.gains), ("difference", comparison.differences)):
        if not any(each.interval for each in gains.values()):
            del tests[name]
    if tests:
        listed, names = " and of the ".join(tests), ", ".join(dict.fromkeys(tests.values()))
        sentences.append(f"In brackets: the 95 % confidence interval of the {listed} over seeds ({names}).")
    for method, excess in _larger(comparison).items():
        reason = "" if released_method(method) else ", whose widths change in large steps"
        sentences.append(f"{method} has {excess:.0%} more {TITLES[comparison.resource]} than {BASELINE}{reason}.")
        if comparison.gains[method].top1 > 0:
            sentences.append("Part of its gain may be due to its size.")
    if kept:
        sentences.append(f"{DEFAULT} is the network of model.weights as it is, without retraining.")
    pruned = [result.method for result in retrained if result.start == "weights"]
    if pruned:
        sentences.append(f"{_listed(pruned)} fine-tuned from model.weights.")
    if comparison.from_supernet and len(pruned) < len(retrained):
        other = default is not None and default.start != "supernet"
        which = f"All {'other ' if other else ''}networks were"
        if pruned:
            which = _listed([result.method for result in retrained if result.start == "supernet"])
        sentences.append(f"{which} fine-tuned from the supernet's weights.")
        if default is not None and default.start == "scratch":
            sentences.append(f"{DEFAULT} was trained from scratch, because the supernet has fewer channels.")
    if choice := comparison.choice:
        scores = {r.method: fmean(r.search_top1.values()) for r in comparison.results if r.search_top1}
        measure = comparison.measure
        listed = ", ".join(f"{method} {measure.number(score)}" for method, score in scores.items())
        title = measure.title[0].upper() + measure.title[1:]
        sentences.append(
            f"{title} on the search split: {listed}. By this split, the choice is {choice[0]}, seed {choice[1]}."
        )
    if _measured(comparison):
        sentences.append("Latency is the median ± half the interquartile range; the networks were measured in turns.")
    if wide := [result for result in comparison.results if _is_wide(result.measured)]:
        quartiles = ", ".join(f"{result.method} {_quartiles(result.measured)}" for result in wide if result.measured)
        sentences.append(
            f"The measured latency varied: its quartiles are {quartiles}. Other processes may have used the machine; "
            "differences within these ranges are noise."
        )
    if slow := [result.method for result in comparison.results if _too_slow(result, comparison)]:
        sentences.append(
            f"The measured latency of {', '.join(slow)} exceeds the budget of "
            f"{format_amount(comparison.limits['latency'], 'latency')}: the machine is busier than when the latency "
            "table was measured, or the table is inaccurate."
        )
    if comparison.predicted_on:
        sentences.append(
            f"Latency was measured on this machine and predicted for another target: {comparison.predicted_on}."
        )
    if any(released_method(result.method) for result in comparison.results):
        sentences.append(
            "Released lists have their own budgets; a gain is reported for those within "
            f"{SAME_COST:.0%} of {BASELINE}'s {TITLES[comparison.resource]}."
        )
    return " ".join(sentences)
