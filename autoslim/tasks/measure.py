"""Names and units of what a task measures, as files, tables, figures and messages show them."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autoslim.errors import UserError


@dataclass(frozen=True)
class Measure:
    """How a quantity is named and written.

    Attributes:
        name: its name in files and in MLflow, such as ``mean_iou``: lower-case letters, digits and underscores.
        title: its name in tables, figures and messages, such as ``mean IoU``.
        unit: ``%`` for fractions in [0, 1], which are written in percent; otherwise the unit of the values, such as
            ``years``, or "" if they have none.
        higher_is_better: whether a higher value is better.
    """

    name: str
    title: str
    unit: str = "%"
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise UserError(
                f"the name of the measure {self.title!r} is {self.name!r}; use lower-case letters, digits and "
                "underscores, because it becomes a part of names in files"
            )

    @property
    def factor(self) -> float:
        """The factor from a value to the number that is written."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def unit_of_differences(self) -> str:
        return "points" if self.unit == "%" else self.unit

    def number(self, value: float, sign: str = "") -> str:
        """Formats a value or, with ``+`` as ``sign``, a difference, without the unit: ``97.62``, ``+0.15``, ``4.31``.

        Percents have two decimals, and other values four significant digits.
        """
        return f"{100 * value:{sign}.2f}" if self.unit == "%" else f"{value:{sign}.4g}"

    def short(self, value: float) -> str:
        """Formats a value with its unit for a message: ``97.6%``, ``4.31 years``."""
        return f"{value:.1%}" if self.unit == "%" else f"{value:.4g} {self.unit}".rstrip()

    def header(self, title: str | None = None) -> str:
        """Returns a column's header: the title, followed by the unit in parentheses."""
        return f"{title or self.title} ({self.unit})" if self.unit else title or self.title

    def of_error(self, error: float) -> float:
        """Returns the value for a mean error: 1 - error if higher is better."""
        return 1 - error if self.higher_is_better else error


TOP1 = Measure("top1", "top-1")
CROSS_ENTROPY = "cross_entropy"


def scores_entry(score: Measure, loss_name: str) -> dict[str, Any]:
    """Returns an entry for files with scores that names these. It is empty for those of classification."""
    return (
        {} if (score, loss_name) == (TOP1, CROSS_ENTROPY) else {"scores": {"error": asdict(score), "loss": loss_name}}
    )


def named_scores(values: Mapping[str, Any]) -> tuple[Measure, str]:
    """Returns what the errors of a file with ``scores_entry`` measure, and the name of its losses."""
    scores = values.get("scores")
    return (Measure(**scores["error"]), scores["loss"]) if scores else (TOP1, CROSS_ENTROPY)
