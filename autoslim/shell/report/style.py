"""How all pictures look: a colour and a marker for each method, one style, files that depend on the data alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

_FIXED = {"autoslim": ("#D55E00", "o"), "uniform": ("#0072B2", "s")}
_OTHERS = (("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
DEFAULT_COLOUR = "#DDDDDD"
INK = "#333333"

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "font.size": 9.0,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.edgecolor": "none",
    "legend.framealpha": 1.0,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Method -> its colour and its marker, from a palette that the colour-blind can tell apart (Okabe and Ito's).

    The same in every picture of the same methods; ``autoslim`` and ``uniform`` look the same in all pictures.
    """
    others = [method for method in methods if method not in _FIXED]
    rest = {method: _OTHERS[number % len(_OTHERS)] for number, method in enumerate(others)}
    return {method: _FIXED.get(method) or rest[method] for method in methods}


def write_picture(path: Path, draw: Callable[[], Figure], dpi: int) -> Path:
    """The figure that ``draw`` makes, as a PNG: the same bytes for the same figure, whatever the user's own style."""
    with matplotlib.style.context(["default", _STYLE]):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw().savefig(path, dpi=dpi, format="png", metadata={"Software": None})
    return path
