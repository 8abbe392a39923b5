"""Code that several commands share: options, tables, and access to the project's data and latency table."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim.channels.groups import Channels
from autoslim.errors import UserError
from autoslim.files import parse_json
from autoslim.resources.budgets import format_named_amount

if TYPE_CHECKING:
    from torch import nn

    from autoslim.channels.graph import ChannelGraph
    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.params import Params
    from autoslim.resources.latency.table import LatencyTable


ParamsFile = Annotated[Path, typer.Argument(help="Parameter file.", show_default=True)]
Classes = Annotated[int | None, typer.Option("--classes", min=2, help="Number of classes. Default: as prepared.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print all values as JSON.")]
Method = Annotated[str, typer.Argument(help="A method of params.yaml, such as autoslim.")]

_MAX_VALUES = 2**28  # of an input: 1 GiB in fp32
_INPUT = re.compile(r"(?:(\w+)=)?(\d+(?:x\d+)*)(?::(\w+))?")


def example_inputs(texts: Sequence[str], size: int | None) -> Any:
    """Returns an example of a network's input, with a batch of one, from ``--input`` and ``--size``.

    ``3x224x224`` is a tensor of that shape; several are a tuple, and several with names (``image=3x64x64``) a mapping.
    ``:int64`` at the end sets the dtype. The result is None if neither option is used.
    """
    import torch

    if texts and size is not None:
        raise UserError("--input and --size both set the image size; use only one of them")
    if size is not None:
        return torch.zeros(1, 3, size, size)
    named: dict[str, torch.Tensor] = {}
    unnamed: list[torch.Tensor] = []
    for text in texts:
        match = _INPUT.fullmatch(text)
        shape = [int(number) for number in match[2].split("x")] if match else []
        dtype = getattr(torch, (match and match[3]) or "float32", None)
        if match is None or 0 in shape or not isinstance(dtype, torch.dtype) or (len(shape) < 2 and text.isdigit()):
            raise UserError(
                f"--input {text!r} is not the size of an input; write channels x height x width, such as 3x224x224, or "
                "1x16000 for a signal; for one of several inputs, add its name in front (image=3x64x64), and for "
                "integers the dtype at the end (tokens=128:int64)"
            )
        if match[1] in named:
            raise UserError(f"--input {match[1]} is given twice; give each input once")
        if math.prod(shape) > _MAX_VALUES:
            raise UserError(f"--input {text!r} has more than {_MAX_VALUES:,} values; write a smaller size")
        example = torch.zeros(1, *shape, dtype=dtype)
        if match[1] is None:
            unnamed.append(example)
        else:
            named[match[1]] = example
    if named and unnamed:
        raise UserError("some of the --input options have a name and some have none; give each a name, or none")
    return named or (tuple(unnamed) if len(unnamed) > 1 else (unnamed[0] if unnamed else None))


def image_size(text: str) -> tuple[int, int]:
    """Returns (height, width) from ``224`` or ``128x64``."""
    height, _, width = text.partition("x")
    sides = height, width or height
    if not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--size {text!r} is not an image size; write a number of pixels, or height x width: 128x64")
    return int(sides[0]), int(sides[1])


def keyword_values(pairs: Sequence[str]) -> dict[str, Any]:
    """Parses ``["depth=3", "act=relu"]`` into ``{"depth": 3, "act": "relu"}``, with values as in ``params.yaml``."""
    from ruamel.yaml import YAML

    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--kwargs {pair!r} is not KEY=VALUE; write it like --kwargs depth=3")
        try:
            values[key] = YAML(typ="safe").load(text)
        except Exception as error:  # ruamel raises errors of many classes, see read_yaml
            raise UserError(f"--kwargs {pair!r}: the value is not valid YAML; write it as in params.yaml") from error
    return values


def read_channels(path: Path) -> Channels:
    """Reads channels by group from a JSON file: a mapping, or a file such as ``outputs/channels/METHOD.json``."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--channels {path} cannot be read ({error.strerror}); name a JSON file") from error
    except ValueError as error:
        raise UserError(f'--channels {path} is not JSON ({error}); write it like {{"features.0.0": 24}}') from error
    channels = values.get("channels", values) if isinstance(values, dict) else values
    if not isinstance(channels, dict) or not all(type(count) is int for count in channels.values()):
        raise UserError(
            f'--channels {path} does not map groups to numbers of channels; write it like {{"features.0.0": 24, ...}}'
        )
    return channels


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", left: Collection[str] = ()
) -> None:
    """Prints a table. The first column and those in ``left`` are left-aligned, all others right-aligned.

    Output to a pipe or a file is neither truncated nor wrapped, and columns are two spaces apart.
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
        columns = zip(line, widths, flush_left, strict=True)
        print("  ".join(c.ljust(w) if flush else c.rjust(w) for c, w, flush in columns).rstrip())


def print_json(values: Any) -> None:
    print(json.dumps(values, indent=1))


@contextmanager
def without_output(active: bool) -> Iterator[None]:
    """If ``active``, what a network, a data set or a task of the user's prints goes to stderr, for ``print_json``."""
    with redirect_stdout(sys.stderr) if active else nullcontext():
        yield


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Prints names and their descriptions in two columns."""
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        print(f"{name:<{width}}  {text}")


class Resource(StrEnum):
    """Values of ``--resource``, in the order in which resources are shown."""

    MACS = "macs"
    PARAMS = "params"
    MEMORY = "memory"
    LATENCY = "latency"


def amounts(costs: Mapping[str, float]) -> str:
    """Formats costs, for example as ``305M MACs, 3.4M parameters, 14.2MB, 12ms``."""
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
    """Returns the description of the prepared data; None if there are none, or if they do not match ``params.data``."""
    from autoslim.data.prepared import FILE_NAME, read_info
    from autoslim.files import sha256
    from autoslim.pipeline.project import PREPARED

    if not (PREPARED / FILE_NAME).is_file():
        return None
    info = read_info(PREPARED)
    data = params.data
    expected = (data.source, data.size or info.image_size, data.channels or info.channels)
    counts = info.counts
    held_out = data.search_images if info.search_limit is None else min(data.search_images, info.search_limit)
    same = expected == (info.source, info.image_size, info.channels) and held_out == counts["search"]
    if (own := data.own_file) is not None:
        same = same and Path(own).is_file() and info.origin.get("file") == sha256(Path(own))
    more = counts["train"] > (data.train_images or math.inf) or counts.get("test", 0) > (data.test_images or math.inf)
    return info if same and not more else None


def data_in_words(info: "DataInfo") -> str:
    """Returns a description of the inputs, and the number of classes or the targets."""
    from autoslim.data.structure import in_words

    targets = f"{len(info.classes)} classes" if info.classes else f"targets {in_words(info.targets)}"
    return f"{in_words(info.inputs)}, {targets}"


def described_data(
    params: "Params",
    *,
    classes: int,
    size: tuple[int, int] | None,
    channels: int | None,
    counts: Mapping[str, int],
    remedy: str,
) -> "DataInfo":
    """Returns a description of data that are not prepared.

    Args:
        counts: Number of images in each split.
        remedy: Text for the error message that says how to set ``size`` and ``channels``.

    Raises:
        UserError: ``size`` or ``channels`` is None.
    """
    from autoslim.data.prepared import DataInfo

    source = params.data.source
    if size is None or channels is None:
        raise UserError(
            f"data.image_size is {size} and data.channels is {channels}; the source's values are not known until the "
            f"data are prepared; {remedy}"
        )
    return DataInfo(source, tuple(map(str, range(classes))), channels, size, (), (), dict(counts), storage="files")


def known_table(params: "Params", network: "nn.Module", graph: "ChannelGraph") -> "LatencyTable | None":
    """Returns the network's latency table: the file ``latency.table``, or the one that the stage ``resources`` wrote.

    Returns None if neither exists, or if the stage's table is out of date: it belongs to another network, or was
    measured on another device or with other settings than the parameters.

    Raises:
        UserError: ``latency.table`` cannot be read, or belongs to another network.
    """
    from autoslim.pipeline.assembly import grid_spec
    from autoslim.pipeline.checks import check_kernels
    from autoslim.pipeline.costs import latency_target, load_costs, read_table
    from autoslim.pipeline.project import RESOURCES

    latency, grid = params.latency, graph.grid(grid_spec(params.supernet))
    if latency.table is not None:
        table = read_table(Path(latency.table))
        check_kernels(table, network, graph, grid)
        return table
    if not (RESOURCES / "latency.json").is_file():
        return None
    try:
        measured = load_costs(graph).table
        if measured is None:
            return None
        check_kernels(measured, network, graph, grid)
    except UserError:
        return None
    target = latency_target(latency)
    return measured if dataclasses.replace(measured.target, versions=target.versions) == target else None
