"""``autoslim evaluate``: computes the measures of retrained networks again."""

import json
from enum import StrEnum
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

from autoslim.cli.terminal import Method, print_table
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project
from autoslim.tasks.measure import Measure


class Split(StrEnum):
    SEARCH = "search"
    TEST = "test"


@with_clear_errors
def evaluate_cli(
    method: Method,
    seed: Annotated[int | None, typer.Option("--seed", help="Evaluate only this seed. Default: all seeds.")] = None,
    split: Annotated[Split, typer.Option("--split", help="Images to evaluate on.")] = Split.SEARCH,
    as_json: Annotated[bool, typer.Option("--json", help="Print the unrounded values by seed as JSON.")] = False,
) -> None:
    """Evaluate a method's retrained networks again, on the search or the test split.

    Use the search split to choose between networks, and the test split only to report results.

    Example:

    autoslim evaluate autoslim --split test
    """
    enter_project()
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import evaluate, load_retrained, seeds_of
    from autoslim.tasks.building import find_task

    params = load_params()
    task = find_task(params.task)
    rows: list[list[Any]] = []
    by_seed: dict[str, dict[str, float]] = {}
    all_values: list[list[float]] = []
    measures: list[Measure] = []
    for number in [seed] if seed is not None else seeds_of(method):
        retrained = load_retrained(params, method, number)
        found = evaluate(retrained, params, split)
        measures = measures or task.measures(retrained.info)
        all_values.append([found.values[measure.name] for measure in measures])
        by_seed[str(number)] = dict(found.values) | {task.loss_name: found.score.loss}
        numbers = [measure.number(value) for measure, value in zip(measures, all_values[-1], strict=True)]
        rows.append([number, *numbers, f"{found.score.loss:.4f}"])
    if as_json:
        print(json.dumps({"method": method, "split": split, "seeds": by_seed}, indent=2))
        return
    if len(rows) > 1:
        columns = zip(measures, zip(*all_values, strict=True), strict=True)
        spread = [f"{measure.number(fmean(each))} ± {measure.number(stdev(each))}" for measure, each in columns]
        rows.append(["all", *spread, ""])
    titles = [measure.header(f"{measure.title} on {split}") for measure in measures]
    print_table(["seed", *titles, task.loss_name.replace("_", "-")], rows, title=f"method {method}")
