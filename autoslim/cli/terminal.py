"""Options, tables and project lookups that several commands share."""

import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim.channels.groups import Channels
from autoslim.errors import UserError
from autoslim.resources.budgets import format_named_amount

if TYPE_CHECKING:
    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.params import Params


ParamsFile = Annotated[Path, typer.Argument(help="The parameters.", show_default=True)]
Classes = Annotated[int | None, typer.Option("--classes", min=2, help="Classes there are. Default: as prepared.")]

_INPUT = re.compile(r"(\d+)x(\d+)x(\d+)")


def input_shape(image: str | None, size: int | None) -> tuple[int, int, int] | None:
    """(C, H, W) of ``--input 3x224x224`` or ``--size 224``; None where neither is given."""
    if image is not None and size is not None:
        raise UserError("--input and --size both give the images' size; give one of them")
    if image is None:
        return None if size is None else (3, size, size)
    match = _INPUT.fullmatch(image)
    if match is None or "0" in match.groups():
        raise UserError(f"--input {image!r} is no image size; write channels x height x width, such as 3x224x224")
    return int(match[1]), int(match[2]), int(match[3])


def keyword_values(pairs: Sequence[str]) -> dict[str, Any]:
    """``["depth=3", "act=relu"]`` -> ``{"depth": 3, "act": "relu"}``; values are read as in ``params.yaml``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--kwargs {pair!r} is not KEY=VALUE; write it like --kwargs depth=3")
        try:
            values[key] = YAML(typ="safe").load(text)
        except YAMLError as error:
            raise UserError(f"--kwargs {pair!r}: the value cannot be read; write it as in params.yaml") from error
    return values


def read_channels(path: Path) -> Channels:
    """Channels by group, alone or under "channels" as in ``outputs/channels/METHOD.json``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--channels {path} cannot be read ({error.strerror}); give a JSON file") from error
    except ValueError as error:
        raise UserError(f'--channels {path} is not JSON ({error}); write it like {{"features.0.0": 24}}') from error
    channels = values.get("channels", values) if isinstance(values, dict) else values
    if not isinstance(channels, dict) or not all(type(count) is int for count in channels.values()):
        raise UserError(f'--channels {path} holds no numbers by group; write it like {{"features.0.0": 24, ...}}')
    return channels


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", left: Collection[str] = ()
) -> None:
    """``rows`` below ``headers``. The first column and those named in ``left`` are flush left, numbers flush right.

    In a pipe nothing is cut off or wrapped, whatever the width; columns stand two spaces apart.
    """
    flush_left = [number == 0 or header in left for number, header in enumerate(headers)]
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(headers, cells, title, flush_left)
        return
    if title:
        print(title)
    widths = [max(len(line[number]) for line in (headers, *cells)) for number in range(len(headers))]
    for line in (headers, *cells):
        places = zip(line, widths, flush_left, strict=True)
        print("  ".join(c.ljust(w) if flush else c.rjust(w) for c, w, flush in places).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and what is to be said of them, one a line."""
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        print(f"{name:<{width}}  {text}")


class Resource(StrEnum):
    """For options, and in the order that they are shown in."""

    MACS = "macs"
    PARAMS = "params"
    MEMORY = "memory"
    LATENCY = "latency"


def amounts(costs: Mapping[str, float]) -> str:
    """What a configuration takes, of the resources among ``costs``: ``305M MACs, 3.4M parameters, 14.2MB, 12ms``."""
    return ", ".join(format_named_amount(costs[resource], resource) for resource in Resource if resource in costs)


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f}"


def _draw(headers: Sequence[str], cells: Sequence[Sequence[str]], title: str, flush_left: Sequence[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for header, flush in zip(headers, flush_left, strict=True):
        table.add_column(header, justify="left" if flush else "right", overflow="fold")
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    Console(highlight=False).print(table)


def prepared_info(params: "Params") -> "DataInfo | None":
    """What the prepared data say of themselves, or None where there are none, or others, as far as can be seen."""
    from autoslim.data.prepared import FILE_NAME, read_info
    from autoslim.pipeline.project import PREPARED

    if not (PREPARED / FILE_NAME).is_file():
        return None
    info = read_info(PREPARED)
    data = params.data
    asked = (data.source, data.image_size or info.image_size, data.channels or info.channels)
    there = info.counts
    same = asked == (info.source, info.image_size, info.channels) and data.search_images == there["search"]
    more = there["train"] > (data.train_images or math.inf) or there.get("test", 0) > (data.test_images or math.inf)
    return info if same and not more else None


def described_data(
    params: "Params", *, classes: int, size: int | None, channels: int | None, counts: Mapping[str, int], remedy: str
) -> "DataInfo":
    """Data of so many classes with images of ``size`` pixels and ``channels``, which nobody has prepared.

    Args:
        counts: images by split.
        remedy: what to do where size or channels are not known.

    Raises:
        UserError: they are not.
    """
    from autoslim.data.prepared import DataInfo

    source = params.data.source
    if size is None or channels is None:
        raise UserError(
            f"data.image_size is {size} and data.channels {channels}: as the source has them, which only prepared data "
            f"tell; {remedy}"
        )
    return DataInfo(source, tuple(map(str, range(classes))), channels, size, (), (), dict(counts), storage="files")
