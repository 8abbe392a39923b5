"""``autoslim profile``: shows the channel groups, layers and costs of a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim.channels.groups import Channels
from autoslim.cli.terminal import (
    AsJson,
    example_inputs,
    keyword_values,
    percent,
    print_facts,
    print_json,
    print_table,
    read_channels,
    without_output,
)
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project, find_project
from autoslim.resources.budgets import format_amount

if TYPE_CHECKING:
    from torch import nn

    from autoslim.channels.graph import ChannelGraph
    from autoslim.channels.grid import GridSpec


@with_clear_errors
def profile_cli(
    name: Annotated[
        str | None,
        typer.Argument(
            help="package.module:callable, timm:NAME, file.py:callable, or released/NAME (channels released by the "
            "paper's authors). Default: the network in params.yaml."
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]CxHxW",
            help="Shape of an input without the batch, such as 1x28x28. May be repeated. Default: 3x224x224.",
        ),
    ] = None,
    size: Annotated[int | None, typer.Option("--size", min=1, help="Height and width of colour images.")] = None,
    classes: Annotated[
        int | None,
        typer.Option("--classes", min=1, help="num_classes of the callable. Default: the callable's default."),
    ] = None,
    kwargs: Annotated[
        list[str] | None,
        typer.Option("--kwargs", "-k", metavar="KEY=VALUE", help="Keyword argument of the callable. May be repeated."),
    ] = None,
    leaves: Annotated[
        list[str] | None,
        typer.Option("--leaf", metavar="MODULE", help="Module that tracing treats as one operation. May be repeated."),
    ] = None,
    part: Annotated[
        str,
        typer.Option("--part", metavar="MODULE", help="Module to slim; the rest of the network keeps its size."),
    ] = "",
    width: Annotated[float | None, typer.Option("--width", help="Width multiplier of all channel groups.")] = None,
    divisor: Annotated[
        int | None,
        typer.Option(
            "--divisor",
            min=1,
            help="With --width: round to multiples of this number. Default: 8, or as in params.yaml.",
        ),
    ] = None,
    channels: Annotated[
        Path | None,
        typer.Option(
            "--channels",
            metavar="FILE",
            help="JSON file of channels by group, such as outputs/channels/autoslim.json.",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also list the layers.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with a run, counted by torch and by ptflops.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a network's channel groups, layers, MACs, parameters and memory, at any width or configuration.

    The command works in any folder, for any network that torch.fx can trace. One multiply-add is one MAC; convolution
    and linear layers are counted, at batch size 1. Memory is the peak of inference: weights and activations of one
    image. With --part, all costs are those of the part, at the inputs that it gets in the whole network.

    Examples:

    autoslim profile torchvision.models:mobilenet_v2 --width 0.75

    autoslim profile net.py:build --input 1x28x28 --kwargs depth=3 --layers

    autoslim profile net.py:build --input image=3x64x64 --input depth=1x64x64

    autoslim profile torchvision.models.detection:retinanet_resnet50_fpn -k weights_backbone=null --part backbone

    autoslim profile released/mobilenet_v2-305M
    """
    from autoslim.models.released import FAMILIES, released_method

    configuration = read_channels(channels) if channels else None
    released = released_method(name) if name else None
    with without_output(as_json):
        spec = None
        if name is None:
            name, network, graph, spec = _network_of_params(
                example_inputs(inputs or [], size), classes, kwargs or [], leaves or [], part
            )
        else:
            example = example_inputs(inputs or [], size)
            if example is None:
                example = example_inputs([], 224)
            arguments = {"num_classes": classes} if classes else {}
            path = FAMILIES[released.family] if released else name
            arguments |= keyword_values(kwargs or [])
            network, graph = _named_network(path, example, None, arguments, leaves or [], part)
        multiple = spec.divisor if spec else 8
        if released:
            if configuration is not None or width is not None:
                raise UserError(f"{name} sets the channels, and so does --width or --channels; use only one of them")
            configuration = released.channels(graph)
        chosen = _configuration(graph, width, divisor or multiple, configuration)
        from autoslim.resources.profile import counted_at_run_time, profile

        values = {"network": name, **profile(network, graph, chosen)}
        if spec is not None:
            grid = graph.grid(spec)
            for group in values["groups"]:
                group["grid"] = list(grid[group["name"]])
        if verify:
            values |= counted_at_run_time(network, graph, chosen)
    if as_json:
        print_json(values)
    else:
        print_profile(values, layers=layers)
    if verify:
        _check_agreement(values)


def print_profile(values: dict[str, Any], *, layers: bool) -> None:
    """Prints the values of ``autoslim.resources.profile.profile``, with the layers if ``layers`` is set."""
    totals, groups = values["totals"], values["groups"]
    resized = any(group["channels"] != group["default"] for group in groups)
    if groups:
        columns = ["channels", *(["default"] if resized else []), "unit", *(["grid"] if "grid" in groups[0] else [])]
        print_table(
            ["group", *columns, "members"],
            [
                [g["name"], *(numbers(g[c]) if c == "grid" else g[c] for c in columns), ", ".join(g["members"])]
                for g in groups
            ],
            title="Channel groups: layers that must keep the same number of channels",
            left=["members"],
        )
        print()
    if layers:
        _print_layers(values)
        print()
    pooled = f"with average pooling, as the authors count, {totals['macs_with_pooling']:,}"
    share = f"their layers take {percent(totals['slimmable_share'])} % of the MACs"
    facts = [
        ("network", f"{values['network']} on {_described_inputs(values['input'])}"),
        *([("part", f"{values['part']}; all numbers are those of the part")] if values["part"] else []),
        ("MACs", f"{format_amount(totals['macs'])} ({totals['macs']:,}; {pooled})"),
        ("parameters", f"{format_amount(totals['params'], 'params')} ({totals['params']:,})"),
        ("memory", f"{format_amount(totals['memory'], 'memory')} ({totals['memory']:,} bytes: weights, activations)"),
        ("can be slimmed", f"{len(groups)} groups; {share}" if groups else "nothing"),
    ]
    facts += [("keeps its size", f"{layer}: {reason}") for layer, reason in values["not_prunable"].items()]
    facts += [("not counted", what) for what in values["not_counted"].values()]
    if "run" in values:
        facts += [("counted in a run", _compared(values, "run")), ("by ptflops", _compared(values, "ptflops"))]
    if products := values.get("products_of_activations"):
        facts.append(("not in budgets", f"{products:,} MACs of products of activations, as in attention"))
    print_facts(facts)


def numbers(grid: Sequence[int]) -> str:
    """Returns the numbers of a grid in short: ``8 to 32 in 7`` numbers, or ``32`` if the group is not slimmed."""
    return str(grid[0]) if len(grid) == 1 else f"{grid[-1]} to {grid[0]} in {len(grid)}"


def _compared(values: dict[str, Any], counter: str) -> str:
    """Returns the counts of a counter, and whether they are equal to those of the profile."""
    counted = values[counter]
    if counted is None:
        return "ptflops fails on this network"
    equal = all(values["totals"][key] == count for key, count in counted.items())
    return f"{counted['macs']:,} MACs, {counted['params']:,} parameters: {'equal' if equal else 'different'}"


def _described_inputs(shapes: list[int] | dict[str, list[int]]) -> str:
    if isinstance(shapes, dict):
        return ", ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return f"{'x'.join(map(str, shapes))} {'images' if len(shapes) == 3 else 'inputs'}"


def _check_agreement(values: dict[str, Any]) -> None:
    run, totals = values["run"], values["totals"]
    if any(totals[key] != count for key, count in run.items()):
        raise UserError(
            f"a run has {run['macs']:,} MACs and {run['params']:,} parameters, but the profile has {totals['macs']:,} "
            f"and {totals['params']:,}: the network computes something else at this size"
        )


def _print_layers(values: dict[str, Any]) -> None:
    totals, layers = values["totals"], values["layers"]
    rows = [
        [la["name"], la["kind"], la["in"], la["out"], f"{la['macs']:,}", percent(la["share"]), f"{la['params']:,}"]
        for la in layers
    ]
    rest = totals["params"] - sum(layer["params"] for layer in layers)
    rows.append(["(normalisation and other)", "", "", "", "", "", f"{rest:,}"])
    rows.append(["(total)", "", "", "", f"{totals['macs']:,}", "100", f"{totals['params']:,}"])
    print_table(["layer", "kind", "in", "out", "MACs", "% of MACs", "parameters"], rows, title="Layers", left=["kind"])


def _named_network(
    name: str, example: Any, classes: int | None, kwargs: dict[str, Any], leaves: Sequence[str], part: str
) -> tuple["nn.Module", "ChannelGraph"]:
    from autoslim.models.building import build_network
    from autoslim.pipeline.assembly import check_leaves
    from autoslim.tracing import trace

    network = build_network(name, kwargs, classes)
    check_leaves(network, name, leaves)
    return network, trace(network, example, leaves=leaves, part=part)


def _network_of_params(
    example: Any, classes: int | None, kwargs: Sequence[str], leaves: Sequence[str], part: str
) -> tuple[str, "nn.Module", "ChannelGraph", "GridSpec"]:
    """Returns the name, network, graph and grid of ``params.yaml``, with the options applied.

    Without an ``example`` of the input, the image size is that of the prepared data; likewise the classes.
    """
    if find_project() is None:
        raise UserError(
            "no network is named, and this is not an autoslim project; name a network, such as `autoslim profile "
            "torchvision.models:mobilenet_v2`"
        )
    enter_project()
    from autoslim.data.prepared import read_info
    from autoslim.pipeline.assembly import grid_spec
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.project import PREPARED

    params = load_params()
    model = params.model
    if example is None or classes is None:
        info = read_info(PREPARED)
        if example is None:
            example = info.example()
        classes = classes or info.outputs
    arguments = model.kwargs | keyword_values(kwargs)
    network, graph = _named_network(model.name, example, classes, arguments, [*model.leaves, *leaves], part)
    return model.name, network, graph, grid_spec(params.supernet)


def _configuration(graph: "ChannelGraph", width: float | None, divisor: int, channels: Channels | None) -> Channels:
    if channels is not None and width is not None:
        raise UserError("--width and --channels both set the channels; use only one of them")
    if channels is not None:
        graph.check(channels)
        return channels
    if width is None:
        return graph.default
    if width <= 0:
        raise UserError(f"--width {width:g} is not positive; use a number above 0, such as 0.75")
    return graph.scaled(width, divisor)
