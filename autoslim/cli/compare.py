"""``autoslim compare``: shows the table of the latest report."""

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from autoslim.cli.terminal import percent, print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import REPORT, enter_project, read_output
from autoslim.resources.budgets import UNITS, format_amount, format_named_amount


@with_clear_errors
def compare_cli() -> None:
    """Show the latest report: the cost and the top-1 test accuracy of each method's network.

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
        lines = [_line(result) for result in results]
        title = f"budget {_budget(metrics)}"
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} or metrics.json in the same folder was not written by this version of autoslim ({error!r}); run "
            "`dvc repro report`"
        ) from error
    print_comparison(title, lines, remarks)


def print_comparison(title: str, lines: Sequence[Mapping[str, str]], remarks: str) -> None:
    """Prints the comparison without empty columns."""
    headers = [name for name in lines[0] if name == GAIN or any(line[name] for line in lines)] if lines else []
    print_table(headers, [[line[name] for name in headers] for line in lines], title=title)
    print(f"\n{remarks}")


GAIN = "gain over uniform (points)"
DIFFERENCE = "difference from default (points)"


def _line(result: Mapping[str, str]) -> dict[str, str]:
    """Returns header -> cell for a row of ``comparison.csv`` (see ``autoslim.report.table``)."""

    def amount(column: str, resource: str) -> str:
        return format_amount(float(result[column]), resource) if result[column] else ""

    measured = amount("measured_latency", "latency")
    if measured:
        spread = (float(result["measured_latency_high"]) - float(result["measured_latency_low"])) / 2
        measured += f" ± {format_amount(spread, 'latency')}"
    deviation = f" ± {percent(float(result['top1_std']))}" if result["top1_std"] else ""

    def points(name: str) -> str:
        text = f"{100 * float(result[name]):+.2f}" if result[name] else ""
        if result[f"{name}_low"]:
            text += f"  [{100 * float(result[f'{name}_low']):+.2f}, {100 * float(result[f'{name}_high']):+.2f}]"
        return text

    return {
        "method": result["method"],
        "MACs": amount("macs", "macs"),
        "parameters": amount("params", "params"),
        "memory": amount("memory", "memory"),
        "latency predicted": amount("latency", "latency"),
        "latency measured": measured,
        "top-1 on test (%)": f"{percent(float(result['top1']))}{deviation}",
        "seeds": result["seeds"],
        DIFFERENCE: points("difference"),
        GAIN: points("gain"),
    }


def _budget(metrics: Mapping[str, Any]) -> str:
    """Returns the budget as written in ``params.yaml``, followed by its absolute value if that differs."""
    limits = {resource: metrics[key] for resource in UNITS if (key := f"budget_{resource}") in metrics}
    named = ", ".join(format_named_amount(limit, resource) for resource, limit in limits.items())
    plain = ", ".join(format_amount(limit, resource) for resource, limit in limits.items())
    return named if metrics["budget"] in (plain, named) else f"{metrics['budget']} = {named}"
