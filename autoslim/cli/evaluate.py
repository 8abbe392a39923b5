"""``autoslim evaluate``: computes the measures of retrained networks again."""

from enum import StrEnum
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

from autoslim.cli.terminal import Method, print_json, print_table, without_output
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
    from autoslim.training.progress import Progress

    params = load_params()
    numbers = [seed] if seed is not None else seeds_of(method)
    rows: list[list[Any]] = []
    by_seed: dict[str, dict[str, float]] = {}
    all_values: list[list[float]] = []
    measures: list[Measure] = []
    with without_output(as_json), Progress("evaluate", len(numbers), "network", brief=True) as progress:
        task = find_task(params.task)
        for number in numbers:
            retrained = load_retrained(params, method, number)
            found = evaluate(retrained, params, split)
            measures = measures or task.measures(retrained.info)
            all_values.append([found.values[measure.name] for measure in measures])
            by_seed[str(number)] = dict(found.values) | {task.loss_name: found.score.loss}
            cells = [measure.number(value) for measure, value in zip(measures, all_values[-1], strict=True)]
            rows.append([number, *cells, f"{found.score.loss:.4f}"])
            progress.advance()
    if as_json:
        print_json({"method": method, "split": split, "seeds": by_seed})
        return
    if len(rows) > 1:
        columns = zip(measures, zip(*all_values, strict=True), strict=True)
        spread = [f"{measure.number(fmean(each))} ± {measure.number(stdev(each))}" for measure, each in columns]
        rows.append(["all", *spread, ""])
    titles = [measure.header(f"{measure.title} on {split}") for measure in measures]
    print_table(["seed", *titles, task.loss_name.replace("_", "-")], rows, title=f"method {method}")
