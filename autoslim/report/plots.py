"""Data of curves as CSV, for ``dvc plots``. The columns are the same for every task, as is the scale of a figure."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoslim.tasks.measure import Measure, named_scores

if TYPE_CHECKING:
    from autoslim.report.figures import Columns  # which imports matplotlib


def supernet_csv(curves: "Columns", score: Measure) -> str:
    """Returns the score on the search split by epoch of the widest, default and narrowest subnet.

    Args:
        curves: columns of the supernet's ``curves.csv``; none if there is no supernet.
    """
    names = ("widest", "default", "narrowest")
    if not curves:
        return _csv(("epoch", *names), ())
    columns = [curves[f"{name}_{score.name}"] for name in names]
    rows = zip(curves["epoch"], *columns, strict=True)
    return _csv(
        ("epoch", *names), ([int(epoch), *_written(values, score)] for epoch, *values in rows if _known(values))
    )


def retrained_csv(means: Mapping[str, Mapping[float, float]], score: Measure) -> str:
    """Returns the score on the search split by epoch, one column for each method.

    Args:
        means: method -> epoch -> mean over the seeds. A network that was not trained has epoch 0 only, and its value in
            every row.
    """
    epochs = sorted({epoch for values in means.values() for epoch in values if epoch > 0}) or [0]
    rows = ([values.get(epoch, values.get(0, math.nan)) for values in means.values()] for epoch in epochs)
    numbered = ([int(epoch), *_written(row, score)] for epoch, row in zip(epochs, rows, strict=True) if _known(row))
    return _csv(("epoch", *means), numbered)


def trajectory_csv(trajectory: Mapping[str, Any], resource: str) -> str:
    """Returns the cost and the score on the search split of each step of the search."""
    score, _ = named_scores(trajectory)
    rows = ([s["step"], s[resource], *_written([score.of_error(s["error"])], score)] for s in trajectory["steps"])
    return _csv(("step", "cost", "score"), rows)


def _written(values: Sequence[float], measure: Measure) -> list[float]:
    return [round(measure.factor * value, 6) for value in values]


def _known(values: Sequence[float]) -> bool:
    return not any(math.isnan(value) for value in values)


def _csv(header: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
