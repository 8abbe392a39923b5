"""``autoslim evaluate``: a retrained network's accuracy, computed again."""

from enum import StrEnum
from statistics import fmean, stdev
from typing import Annotated

import typer

from autoslim.cli.terminal import percent, print_table
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project


class Split(StrEnum):
    SEARCH = "search"
    TEST = "test"


@with_clear_errors
def evaluate_cli(
    method: Annotated[str, typer.Argument(help="autoslim, uniform or released/NAME.")],
    seed: Annotated[int | None, typer.Option("--seed", help="Of this seed alone. Default: all seeds.")] = None,
    split: Annotated[Split, typer.Option("--split", help="The images to look at.")] = Split.SEARCH,
) -> None:
    """Evaluate a method's retrained networks again, on the test or the search split.

    The search split is there to choose by; the test split, which the report looks at, should not choose anything.

    Example:

    autoslim evaluate autoslim --split test
    """
    enter_project()
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import load_retrained, score, seeds_of

    params = load_params()
    rows, accuracies = [], []
    for number in [seed] if seed is not None else seeds_of(method):
        figures = score(load_retrained(params, method, number), params, split)
        accuracies.append(1 - figures.error)
        rows.append([number, percent(1 - figures.error), f"{figures.cross_entropy:.4f}"])
    if len(rows) > 1:
        rows.append(["all", f"{percent(fmean(accuracies))} ± {percent(stdev(accuracies))}", ""])
    print_table(["seed", f"top-1 on {split} (%)", "cross-entropy"], rows, title=f"method {method}")
