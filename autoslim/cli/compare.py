"""``autoslim compare``: the last report's table."""

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
    """Show the last report: what each method's network takes, and its top-1 on test, at the budget.

    To compare budgets with one another, use `dvc exp show` or `mlflow ui`.

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
            f"{path} or metrics.json beside it is not a report as this version writes it ({error!r}); run "
            "`dvc repro report`"
        ) from error
    print_comparison(title, lines, remarks)


def print_comparison(title: str, lines: Sequence[Mapping[str, str]], remarks: str) -> None:
    """The lines of ``comparison.csv`` as people read them, without columns that are empty."""
    headers = [name for name in lines[0] if name == GAIN or any(line[name] for line in lines)] if lines else []
    print_table(headers, [[line[name] for name in headers] for line in lines], title=title)
    print(f"\n{remarks}")


GAIN = "gain over uniform (points)"


def _line(result: Mapping[str, str]) -> dict[str, str]:
    """Header -> cell, of a line of ``comparison.csv`` (see ``shell.report.table``)."""

    def amount(column: str, resource: str) -> str:
        return format_amount(float(result[column]), resource) if result[column] else ""

    measured = amount("measured_latency", "latency")
    if measured:
        off = (float(result["measured_latency_high"]) - float(result["measured_latency_low"])) / 2
        measured += f" ± {format_amount(off, 'latency')}"
    spread = f" ± {percent(float(result['top1_std']))}" if result["top1_std"] else ""
    gain = f"{100 * float(result['gain']):+.2f}" if result["gain"] else ""
    if result["gain_low"]:
        gain += f"  [{100 * float(result['gain_low']):+.2f}, {100 * float(result['gain_high']):+.2f}]"
    return {
        "method": result["method"],
        "MACs": amount("macs", "macs"),
        "parameters": amount("params", "params"),
        "memory": amount("memory", "memory"),
        "latency predicted": amount("latency", "latency"),
        "latency measured": measured,
        "top-1 on test (%)": f"{percent(float(result['top1']))}{spread}",
        "seeds": result["seeds"],
        GAIN: gain,
    }


def _budget(metrics: Mapping[str, Any]) -> str:
    """As written, with what it comes to where that is not the same."""
    limits = {resource: metrics[key] for resource in UNITS if (key := f"budget_{resource}") in metrics}
    told = ", ".join(format_named_amount(limit, resource) for resource, limit in limits.items())
    plain = ", ".join(format_amount(limit, resource) for resource, limit in limits.items())
    return told if metrics["budget"] in (plain, told) else f"{metrics['budget']} = {told}"
