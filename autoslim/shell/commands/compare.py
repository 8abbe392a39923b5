"""``autoslim compare``: the last report's table."""

import csv
from collections.abc import Mapping
from typing import Any

from autoslim.shell.commands.printing import UNITS, percent, print_table
from autoslim.shell.commands.project import enter_project, read_output
from autoslim.shell.exits import ending_clearly
from autoslim.shell.places import REPORT
from autoslim.vocabulary.budgets import format_amount
from autoslim.vocabulary.errors import UserError


@ending_clearly
def compare_cli() -> None:
    """Show the last report: MACs, parameters and top-1 on test of each method at the budget.

    To compare budgets with one another, use `dvc exp show` or `mlflow ui`.

    Example:

    autoslim compare
    """
    enter_project()
    metrics = read_output(REPORT / "metrics.json", "report")
    try:
        with (REPORT / "comparison.csv").open(newline="", encoding="utf-8") as file:
            results = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise UserError(f"there is no {REPORT / 'comparison.csv'}; run `dvc repro report`") from error
    print_comparison(metrics, results)


def print_comparison(metrics: Mapping[str, Any], results: list[dict[str, str]]) -> None:
    """The numbers of ``metrics.json`` and the lines of ``comparison.csv`` (see ``shell.report.table``)."""
    resource = next(key for key in metrics if key.startswith("budget_")).removeprefix("budget_")
    limit = format_amount(metrics[f"budget_{resource}"], resource)
    written = metrics["budget"] if metrics["budget"] == limit else f"{metrics['budget']} = {limit}"
    rows = []
    for result in results:
        spread = f" ± {percent(float(result['top1_std']))}" if result["top1_std"] else ""
        gain = f"{100 * float(result['gain']):+.2f}" if result["gain"] else ""
        if result["gain_low"]:
            gain += f"  [{100 * float(result['gain_low']):+.2f}, {100 * float(result['gain_high']):+.2f}]"
        costs = [format_amount(int(result["macs"])), format_amount(int(result["params"]), "params")]
        rows.append([result["method"], *costs, f"{percent(float(result['top1']))}{spread}", result["seeds"], gain])
    print_table(
        ["method", "MACs", "parameters", "top-1 on test (%)", "seeds", "gain over uniform (points)"],
        rows,
        title=f"budget {written} {UNITS.get(resource, resource)}",
    )
    if any(result["top1_std"] for result in results):
        print("\nmean ± std over seeds; in brackets the 95 % interval of the gain")
