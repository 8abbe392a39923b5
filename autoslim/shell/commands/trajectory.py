"""``autoslim trajectory``: what greedy slimming passed on its way, and what a budget gets."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from autoslim.algorithms.allocation import from_trajectory
from autoslim.shell.commands.printing import UNITS, percent, print_facts, print_table
from autoslim.shell.commands.project import enter_project, read_output
from autoslim.shell.exits import ending_clearly
from autoslim.shell.places import SEARCH
from autoslim.vocabulary.budgets import format_amount, parse_budget
from autoslim.vocabulary.errors import UserError


@ending_clearly
def trajectory_cli(
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", metavar="BUDGET", help="Show what this budget gets: 305M, 25%, ... Repeat it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the budgets get as JSON.")] = False,
) -> None:
    """Show the search's steps or, with --budget, the channels that budgets get. One search serves all budgets.

    top-1 is on the search split, of the supernet's own weights: it ranks, but retraining gives other numbers.

    Examples:

    autoslim trajectory

    autoslim trajectory --budget 25% --budget 50%
    """
    enter_project()
    trajectory = read_output(SEARCH / "trajectory.json", "search")
    if not budget:
        if as_json:
            raise UserError(
                "--json prints what budgets get; give one with --budget (the steps are in "
                f"{SEARCH / 'trajectory.json'})"
            )
        print_steps(trajectory)
        return
    found = {text: within(trajectory, text) for text in budget}
    if as_json:
        kept = ("step", "macs", "params", "channels")
        print(json.dumps({t: {k: s[k] for k in kept} | {"top1": 1 - s["error"]} for t, s in found.items()}, indent=1))
    else:
        print_budgets(trajectory, found)


def within(trajectory: dict[str, Any], budget: str) -> dict[str, Any]:
    """The step of ``trajectory`` that a budget gets.

    Raises:
        UserError: the budget cannot be read, or lies outside of the trajectory.
    """
    resource = trajectory["resource"]
    steps: Sequence[dict[str, Any]] = trajectory["steps"]
    limit = parse_budget(budget, resource).absolute(trajectory["default"][resource])
    if limit < min(step[resource] for step in steps) or limit > trajectory["widest"][resource]:
        least, most = steps[-1][resource], trajectory["widest"][resource]
        raise UserError(
            f"budget {budget} ({format_amount(limit, resource)} {UNITS[resource]}) is outside of the trajectory, from "
            f"{format_amount(least, resource)} to {format_amount(most, resource)}; choose one between, or change "
            "search.stop or supernet.width and search again"
        )
    cost = {id(step["channels"]): step[resource] for step in steps}
    chosen = from_trajectory([step["channels"] for step in steps], lambda channels: cost[id(channels)], limit)
    return next(step for step in steps if step["channels"] is chosen)


def print_steps(trajectory: dict[str, Any]) -> None:
    steps = trajectory["steps"]
    resource = trajectory["resource"]
    default = trajectory["default"][resource]
    rows = []
    for before, step in zip([None, *steps], steps, strict=False):
        group = step["slimmed"]
        change = f"{before['channels'][group]} -> {step['channels'][group]}" if before and group else ""
        costs = [format_amount(step["macs"]), format_amount(step["params"], "params")]
        share = percent(step[resource] / default, 1)
        rows.append([step["step"], *costs, share, percent(1 - step["error"]), group or "(widest)", change])
    print_table(
        ["step", "MACs", "parameters", f"{UNITS[resource]} (% of default)", "top-1 (%)", "slimmed", "channels"],
        rows,
        left=["slimmed", "channels"],
    )
    print(f"\n{len(steps) - 1} steps; `autoslim trajectory --budget 50%` shows the channels that a budget gets")


def print_budgets(trajectory: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    default = trajectory["default"]
    facts = [
        (
            f"budget {text}",
            f"step {step['step']}: {format_amount(step['macs'])} MACs, {format_amount(step['params'], 'params')} "
            f"parameters, top-1 {percent(1 - step['error'])} % in the supernet",
        )
        for text, step in found.items()
    ]
    costs = f"{format_amount(default['macs'])} MACs, {format_amount(default['params'], 'params')} parameters"
    print_facts([("default", costs), *facts])
    print()
    rows = [
        [
            group,
            size,
            *(f"{step['channels'][group]} ({percent(step['channels'][group] / size, 0)} %)" for step in found.values()),
        ]
        for group, size in default["channels"].items()
    ]
    print_table(["group", "default", *found], rows, title="Channels by group")
