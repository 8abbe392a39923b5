"""``autoslim evaluate``: computes the accuracy of retrained networks again."""

from enum import StrEnum
from statistics import fmean, stdev
from typing import Annotated

import typer

from autoslim.cli.terminal import Method, percent, print_table
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project


class Split(StrEnum):
    SEARCH = "search"
    TEST = "test"


@with_clear_errors
def evaluate_cli(
    method: Method,
    seed: Annotated[int | None, typer.Option("--seed", help="Evaluate only this seed. Default: all seeds.")] = None,
    split: Annotated[Split, typer.Option("--split", help="Images to evaluate on.")] = Split.SEARCH,
) -> None:
    """Evaluate a method's retrained networks again, on the search or the test split.

    Use the search split to choose between networks, and the test split only to report results.

    Example:

    autoslim evaluate autoslim --split test
    """
    enter_project()
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import load_retrained, score, seeds_of

    params = load_params()
    rows, accuracies = [], []
    for number in [seed] if seed is not None else seeds_of(method):
        result = score(load_retrained(params, method, number), params, split)
        accuracies.append(1 - result.error)
        rows.append([number, percent(1 - result.error), f"{result.cross_entropy:.4f}"])
    if len(rows) > 1:
        rows.append(["all", f"{percent(fmean(accuracies))} ± {percent(stdev(accuracies))}", ""])
    print_table(["seed", f"top-1 on {split} (%)", "cross-entropy"], rows, title=f"method {method}")
