"""``autoslim trajectory``: shows the steps of the search, and the channels within a budget."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from autoslim.cli.terminal import Resource, amounts, percent, print_facts, print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import SEARCH, check_trajectory_format, enter_project, read_output
from autoslim.resources.budgets import TITLES, UNITS, format_amount, format_named_amount, parse_budgets
from autoslim.tasks.measure import named_scores


@with_clear_errors
def trajectory_cli(
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="BUDGET",
            help="Show the channels within this budget, such as 305M or 25%; or within several limits, such as "
            "macs=305M,params=3.5M. May be repeated.",
        ),
    ] = None,
    resource: Annotated[
        Resource | None,
        typer.Option("--resource", "-r", help="Resource that the budgets limit. Default: that of the search."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the channels within the budgets as JSON.")] = False,
) -> None:
    """Show the steps of the search or, with --budget, the channels within budgets. One search serves all budgets.

    A budget can limit any resource, because each step records all resources (latency only if there was a latency
    table). The score, such as top-1, is measured on the search split with the supernet's weights. It serves to rank
    the networks; their scores after retraining differ.

    Examples:

    autoslim trajectory

    autoslim trajectory --budget 25% --budget 50%

    autoslim trajectory --budget 20MB --resource memory

    autoslim trajectory --budget macs=305M,params=3.5M
    """
    enter_project()
    trajectory = read_output(SEARCH / "trajectory.json", "search")
    check_trajectory_format(trajectory)
    if not budget:
        if as_json:
            raise UserError(
                f"--json needs a budget; set one with --budget (the steps are in {SEARCH / 'trajectory.json'})"
            )
        print_steps(trajectory)
        return
    chosen = {text: within(trajectory, text, resource or trajectory["resource"]) for text in budget}
    if as_json:
        keys, score = ("step", *recorded(trajectory), "channels"), named_scores(trajectory)[0]
        shown = {t: {k: s[k] for k in keys} | {score.name: score.of_error(s["error"])} for t, s in chosen.items()}
        print(json.dumps(shown, indent=1))
    else:
        print_budgets(trajectory, chosen)


def recorded(trajectory: Mapping[str, Any]) -> list[str]:
    """Returns the resources that the steps record. Latency is one of them if the search had a latency table."""
    return [resource.value for resource in Resource if resource in trajectory["default"]]


def within(trajectory: dict[str, Any], text: str, resource: str) -> dict[str, Any]:
    """Returns the first step of ``trajectory`` that is within a budget.

    Args:
        text: An amount of ``resource``, or amounts by resource: ``macs=305M,params=3.5M``.

    Raises:
        UserError: The budget cannot be parsed, limits a resource that was not recorded, or is outside the trajectory.
    """
    from autoslim.search.methods import from_trajectory

    budgets = parse_budgets(_by_resource(text) if "=" in text else text, resource)
    for name in budgets:
        _check_recorded(trajectory, name)
    limits = {name: budget.absolute(trajectory["default"][name]) for name, budget in budgets.items()}
    steps: Sequence[dict[str, Any]] = trajectory["steps"]
    _check_reached(trajectory, text, limits)
    costs = {id(step["channels"]): step for step in steps}
    channels = from_trajectory(
        [step["channels"] for step in steps],
        lambda candidate: all(costs[id(candidate)][name] <= limit for name, limit in limits.items()),
    )
    return costs[id(channels)]


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
    known = recorded(trajectory)
    if resource in known:
        return
    remedy = (
        "set latency.table (see `autoslim latency measure`) and run `dvc repro search`"
        if resource == "latency"
        else "run `dvc repro search`"
    )
    raise UserError(
        f"the search did not record {TITLES[resource]}, only {', '.join(TITLES[name] for name in known)}; {remedy}"
    )


def _check_reached(trajectory: Mapping[str, Any], text: str, limits: Mapping[str, float]) -> None:
    """Raises ``UserError`` if no step meets one of the limits, or if the widest subnet is below all of them."""
    widest = trajectory["widest"]
    for name, limit in limits.items():
        least = min(step[name] for step in trajectory["steps"])
        if limit < least or all(limits[other] > widest[other] for other in limits):
            raise UserError(
                f"budget {text} ({format_named_amount(limit, name)}) is outside the trajectory, which spans "
                f"{format_amount(least, name)} to {format_named_amount(widest[name], name)}; choose a budget in "
                "this range, or change search.stop or supernet.width and search again"
            )


def print_steps(trajectory: dict[str, Any]) -> None:
    steps, score = trajectory["steps"], named_scores(trajectory)[0]
    several = bool(trajectory.get("limits"))  # the cost is then the largest share of a limit
    default = 1.0 if several else trajectory["default"][trajectory["resource"]]
    shown = recorded(trajectory)
    rows = []
    for before, step in zip([None, *steps], steps, strict=False):
        costs = [format_amount(step[resource], resource) for resource in shown]
        share = percent(step["cost" if several else trajectory["resource"]] / default, 1)
        cells = [step["step"], *costs, share, score.number(score.of_error(step["error"]))]
        if not before:
            rows.append([*cells, "(widest)", ""])
        for group in step["slimmed"]:
            rows.append([*cells, group, f"{before['channels'][group]} -> {step['channels'][group]}"])
            cells = [""] * len(cells)
    titles = [TITLES[resource] for resource in shown]
    share = "% of the limits" if several else f"{TITLES[trajectory['resource']]} (% of default)"
    print_table(["step", *titles, share, score.header(), "slimmed", "channels"], rows, left=["slimmed", "channels"])
    if several:
        limits = ", ".join(format_named_amount(limit, resource) for resource, limit in trajectory["limits"].items())
        print(f"\nlimits: {limits}; the share is that of the binding limit")
    print(f"\n{len(steps) - 1} steps; `autoslim trajectory --budget 50%` shows the channels within a budget")


def print_budgets(trajectory: dict[str, Any], chosen: dict[str, dict[str, Any]]) -> None:
    default, score = trajectory["default"], named_scores(trajectory)[0]
    facts = []
    for text, step in chosen.items():
        value = f"{score.title} {score.number(score.of_error(step['error']))} {score.unit}".rstrip()
        facts.append((f"budget {text}", f"step {step['step']}: {amounts(step)}, {value} in the supernet"))
    print_facts([("default", amounts(default)), *facts])
    print()
    rows = [
        [
            group,
            size,
            *(
                f"{step['channels'][group]} ({percent(step['channels'][group] / size, 0)} %)"
                for step in chosen.values()
            ),
        ]
        for group, size in default["channels"].items()
    ]
    print_table(["group", "default", *chosen], rows, title="Channels by group")
    print("\nIf allocate.refine is true, the stage allocate continues from these channels.")
