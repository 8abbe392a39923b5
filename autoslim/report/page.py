"""The report as one HTML page, which needs no other file, no script and no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page. ``svg`` is an ``<svg>`` element; the other texts are plain."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class ChannelColumn:
    """The channels of a network by group, and the CSS colour of its bars ("" for that of the default network)."""

    name: str
    counts: Mapping[str, int]
    colour: str = ""

    @property
    def is_default(self) -> bool:
        return not self.colour


@dataclass(frozen=True)
class ChannelTable:
    """The channels of several networks. The first column is the default network."""

    columns: Sequence[ChannelColumn]

    @property
    def default(self) -> Mapping[str, int]:
        return self.columns[0].counts

    @property
    def groups(self) -> list[str]:
        return list(self.default)

    @property
    def largest(self) -> int:
        return max((count for column in self.columns for count in column.counts.values()), default=1)


@dataclass(frozen=True)
class Page:
    """What the page shows. All texts are plain: the page escapes them.

    Attributes:
        question: the network, the data and the budget.
        answer: the result in words.
        warning: a text above the answer; "" for none.
        header: the header of the table of methods.
        rows: its rows.
        caption: the text below it.
        times: (stage, time).
        command: the commands that make these results again.
        versions: of the packages, and the machine.
        parameters: the contents of ``params.yaml``.
    """

    title: str
    question: str
    answer: str
    warning: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    figures: Sequence[PageFigure]
    channels: ChannelTable
    times: Sequence[tuple[str, str]]
    command: str
    versions: str
    parameters: str


def html_page(page: Page) -> str:
    """Returns the page as the text of an HTML file."""
    environment = Environment(
        loader=PackageLoader("autoslim.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(page=page) + "\n"


def format_seconds(seconds: float) -> str:
    """Formats a duration: ``0.4 s``, ``42 s``, ``3 min 05 s``, ``2 h 05 min``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"
