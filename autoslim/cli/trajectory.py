"""``autoslim trajectory``: what greedy slimming passed on its way, and what a budget gets."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from autoslim.cli.terminal import Resource, amounts, percent, print_facts, print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import SEARCH, enter_project, read_output
from autoslim.resources.budgets import TITLES, UNITS, format_amount, format_named_amount, parse_budgets


@with_clear_errors
def trajectory_cli(
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="BUDGET",
            help="Show what this budget gets: 305M, 25%, ...; or several limits at once: macs=305M,params=3.5M. "
            "Repeat it.",
        ),
    ] = None,
    resource: Annotated[
        Resource | None,
        typer.Option("--resource", "-r", help="What budgets bound. Default: the resource that was searched."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the budgets get as JSON.")] = False,
) -> None:
    """Show the search's steps or, with --budget, the channels that budgets get. One search serves all budgets.

    Budgets of any resource can be read off, whichever was searched: each step has recorded all of them (latency where
    it was known). top-1 is on the search split, of the supernet's own weights: it ranks, but retraining gives other
    numbers.

    Examples:

    autoslim trajectory

    autoslim trajectory --budget 25% --budget 50%

    autoslim trajectory --budget 20MB --resource memory

    autoslim trajectory --budget macs=305M,params=3.5M
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
    found = {text: within(trajectory, text, resource or trajectory["resource"]) for text in budget}
    if as_json:
        kept = ("step", *recorded(trajectory), "channels")
        print(json.dumps({t: {k: s[k] for k in kept} | {"top1": 1 - s["error"]} for t, s in found.items()}, indent=1))
    else:
        print_budgets(trajectory, found)


def recorded(trajectory: Mapping[str, Any]) -> list[str]:
    """The resources that the steps have recorded: latency where there was a table of it."""
    return [resource.value for resource in Resource if resource in trajectory["default"]]


def within(trajectory: dict[str, Any], text: str, resource: str) -> dict[str, Any]:
    """The step of ``trajectory`` that a budget gets.

    Args:
        text: an amount of ``resource``, or amounts by resource: ``macs=305M,params=3.5M``.

    Raises:
        UserError: the budget cannot be read, bounds what has not been recorded, or lies outside of the trajectory.
    """
    from autoslim.search.methods import from_trajectory

    budgets = parse_budgets(_by_resource(text) if "=" in text else text, resource)
    for name in budgets:
        _check_recorded(trajectory, name)
    limits = {name: budget.absolute(trajectory["default"][name]) for name, budget in budgets.items()}
    steps: Sequence[dict[str, Any]] = trajectory["steps"]
    _check_reached(trajectory, text, limits)
    costs = {id(step["channels"]): step for step in steps}
    chosen = from_trajectory(
        [step["channels"] for step in steps],
        lambda channels: all(costs[id(channels)][name] <= limit for name, limit in limits.items()),
    )
    return costs[id(chosen)]


def _by_resource(text: str) -> dict[str, str]:
    budgets: dict[str, str] = {}
    for part in text.split(","):
        name, equals, amount = (piece.strip() for piece in part.partition("="))
        if not equals or name not in UNITS or name in budgets:
            raise UserError(
                f"--budget {text!r} is not RESOURCE=AMOUNT,...; write it like macs=305M,params=3.5M, each of "
                f"{', '.join(UNITS)} at most once"
            )
        budgets[name] = amount
    return budgets


def _check_recorded(trajectory: Mapping[str, Any], resource: str) -> None:
    there = recorded(trajectory)
    if resource in there:
        return
    remedy = (
        "give a table of it by latency.table (see `autoslim latency measure`) and run `dvc repro search`"
        if resource == "latency"
        else "run `dvc repro search`"
    )
    raise UserError(
        f"the search has not recorded {TITLES[resource]}, only {', '.join(TITLES[name] for name in there)}; {remedy}"
    )


def _check_reached(trajectory: Mapping[str, Any], text: str, limits: Mapping[str, float]) -> None:
    """Each limit is one that some step holds, and one of them at least says more than the widest subnet does."""
    widest = trajectory["widest"]
    for name, limit in limits.items():
        least = min(step[name] for step in trajectory["steps"])
        if limit < least or all(limits[other] > widest[other] for other in limits):
            raise UserError(
                f"budget {text} ({format_named_amount(limit, name)}) is outside of the trajectory, from "
                f"{format_amount(least, name)} to {format_named_amount(widest[name], name)}; choose one between, or "
                "change search.stop or supernet.width and search again"
            )


def print_steps(trajectory: dict[str, Any]) -> None:
    steps = trajectory["steps"]
    several = bool(trajectory.get("limits"))  # the cost is then the share of the limit that binds
    default = 1.0 if several else trajectory["default"][trajectory["resource"]]
    shown = recorded(trajectory)
    rows = []
    for before, step in zip([None, *steps], steps, strict=False):
        group = step["slimmed"]
        change = f"{before['channels'][group]} -> {step['channels'][group]}" if before and group else ""
        costs = [format_amount(step[resource], resource) for resource in shown]
        share = percent(step["cost" if several else trajectory["resource"]] / default, 1)
        rows.append([step["step"], *costs, share, percent(1 - step["error"]), group or "(widest)", change])
    titles = [TITLES[resource] for resource in shown]
    share = "% of the limits" if several else f"{TITLES[trajectory['resource']]} (% of default)"
    print_table(["step", *titles, share, "top-1 (%)", "slimmed", "channels"], rows, left=["slimmed", "channels"])
    if several:
        limits = ", ".join(format_named_amount(limit, resource) for resource, limit in trajectory["limits"].items())
        print(f"\nlimits: {limits}; the share is of the one that binds")
    print(f"\n{len(steps) - 1} steps; `autoslim trajectory --budget 50%` shows the channels that a budget gets")


def print_budgets(trajectory: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    default = trajectory["default"]
    facts = [
        (
            f"budget {text}",
            f"step {step['step']}: {amounts(step)}, top-1 {percent(1 - step['error'])} % in the supernet",
        )
        for text, step in found.items()
    ]
    print_facts([("default", amounts(default)), *facts])
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
