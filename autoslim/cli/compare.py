"""``autoslim compare``: shows the table of the latest report."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from autoslim.cli.terminal import print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import REPORT, enter_project, read_output
from autoslim.resources.budgets import UNITS, format_amount, format_named_amount
from autoslim.tasks.measure import TOP1, Measure


@with_clear_errors
def compare_cli() -> None:
    """Show the latest report: the cost of each method's network, and its measures, such as top-1, on the test split.

    To compare different budgets, use `dvc exp show` or `mlflow ui`.

    Example:

    autoslim compare
    """
    enter_project()
    metrics = read_output(REPORT / "metrics.json", "report")
    path = REPORT / "comparison.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            results = list(csv.DictReader(file))
        remarks = (REPORT / "table.md").read_text(encoding="utf-8").strip().rpartition("\n\n")[2]
    except FileNotFoundError as error:
        raise UserError(f"there is no {error.filename}; run `dvc repro report`") from error
    try:
        measures = [Measure(**values) for values in metrics.get("measures", ())] or [TOP1]
        lines = [_line(result, measures) for result in results]
        title = f"budget {_budget(metrics)}"
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} or metrics.json in the same folder was not written by this version of autoslim ({error!r}); run "
            "`dvc repro report`"
        ) from error
    print_comparison(title, lines, remarks, _difference_headers(measures[0])[1])


def print_comparison(title: str, lines: Sequence[Mapping[str, str]], remarks: str, gain: str) -> None:
    """Prints the comparison without empty columns, except that of the gain."""
    headers = [name for name in lines[0] if name == gain or any(line[name] for line in lines)] if lines else []
    print_table(headers, [[line[name] for name in headers] for line in lines], title=title)
    print(f"\n{remarks}")


def _difference_headers(measure: Measure) -> tuple[str, str]:
    """Returns the headers of the differences from the default network and of the gains."""
    unit = f" ({measure.unit_of_differences})" if measure.unit_of_differences else ""
    return f"difference from default{unit}", f"gain over uniform{unit}"


def _line(result: Mapping[str, str], measures: Sequence[Measure]) -> dict[str, str]:
    """Returns header -> cell for a row of ``comparison.csv`` (see ``autoslim.report.table``)."""

    def amount(column: str, resource: str) -> str:
        return format_amount(float(result[column]), resource) if result[column] else ""

    measured = amount("measured_latency", "latency")
    if measured:
        spread = (float(result["measured_latency_high"]) - float(result["measured_latency_low"])) / 2
        measured += f" ± {format_amount(spread, 'latency')}"
    main = measures[0]
    values = {}
    for measure in measures:
        text = measure.number(float(result[measure.name]))
        if deviation := result[f"{measure.name}_std"]:
            text += f" ± {measure.number(float(deviation))}"
        values[measure.header(f"{measure.title} on test")] = text

    def points(name: str) -> str:
        text = main.number(float(result[name]), "+") if result[name] else ""
        if result[f"{name}_low"]:
            low, high = (main.number(float(result[f"{name}_{end}"]), "+") for end in ("low", "high"))
            text += f"  [{low}, {high}]"
        return text

    difference, gain = _difference_headers(main)
    return {
        "method": result["method"],
        "MACs": amount("macs", "macs"),
        "parameters": amount("params", "params"),
        "memory": amount("memory", "memory"),
        "latency predicted": amount("latency", "latency"),
        "latency measured": measured,
        **values,
        "seeds": result["seeds"],
        difference: points("difference"),
        gain: points("gain"),
    }


def _budget(metrics: Mapping[str, Any]) -> str:
    """Returns the budget as written in ``params.yaml``, followed by its absolute value if that differs."""
    limits = {resource: metrics[key] for resource in UNITS if (key := f"budget_{resource}") in metrics}
    named = ", ".join(format_named_amount(limit, resource) for resource, limit in limits.items())
    plain = ", ".join(format_amount(limit, resource) for resource, limit in limits.items())
    return named if metrics["budget"] in (plain, named) else f"{metrics['budget']} = {named}"
