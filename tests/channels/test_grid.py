"""Channel numbers, grids and budgets: arithmetic without torch."""

import math
import random

import pytest
from specimens import specimen

from autoslim.channels.grid import Grid, GridSpec, make_divisible, make_grid, scaled, slimming_step
from autoslim.channels.groups import ChannelGroup
from autoslim.errors import UserError
from autoslim.resources.budgets import UNITS, format_amount, parse_budget


def group(name: str, size: int, unit: int = 1, expansion: tuple[str, int] | None = None) -> ChannelGroup:
    return ChannelGroup(name, size, unit, (name,), expansion)


# Rounding and width multipliers


@pytest.mark.parametrize("divisor", [1, 2, 8, 32])
def test_make_divisible_is_the_nearest_multiple_that_loses_at_most_a_tenth(divisor: int) -> None:
    for value in (x / 7 for x in range(1, 7 * 400, 13)):
        rounded = make_divisible(value, divisor)
        assert rounded % divisor == 0
        assert rounded >= max(divisor, 0.9 * value)
        smaller = rounded - divisor
        # No smaller allowed multiple is as near, and the result is at most one divisor away.
        assert smaller < 0.9 * value or smaller < divisor or abs(smaller - value) >= abs(rounded - value)
        assert rounded - value <= max(divisor, 1)


def test_make_divisible_on_known_values() -> None:
    # torchvision's MobileNetV2 has these channels at 0.35 and 1.4.
    assert [make_divisible(0.35 * c, 8) for c in (32, 16, 24, 96, 1280)] == [16, 8, 8, 32, 448]
    assert [make_divisible(1.4 * c, 8) for c in (32, 16, 24, 96, 1280)] == [48, 24, 32, 136, 1792]


def test_an_expansion_follows_the_rounded_width_when_scaled() -> None:
    groups = {
        g.name: g for g in (group("hidden", 144, expansion=("narrow", 6)), group("narrow", 24), group("odd", 15, 5))
    }
    assert scaled(groups, 0.35, 8) == {"hidden": 48, "narrow": 8, "odd": 40}
    assert scaled(groups, 1.0, 8) == {"hidden": 144, "narrow": 24, "odd": 15}


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.3, 1.5, 2.0])
def test_scaled_gives_multiples_of_divisor_and_unit(width: float) -> None:
    groups = specimen("resnext50_32x4d").graph.groups
    for name, channels in scaled(groups, width, 8).items():
        assert channels % math.lcm(8, groups[name].unit) == 0


# Grids


def test_slimming_step_is_the_nearest_multiple_and_ties_go_to_the_even_one() -> None:
    assert slimming_step(1920, 12, 8) == 160
    assert slimming_step(48, 12, 8) == 8  # 4 would be nearer to 0
    assert slimming_step(240, 12, 8) == 16  # 20 lies between 16 and 24
    assert slimming_step(336, 12, 8) == 32  # 28 lies between 24 and 32
    assert slimming_step(100, 10, 1) == 10


@pytest.mark.parametrize("anchor", ["widest", "zero"])
def test_grid_by_its_definition(anchor: str) -> None:
    draw = random.Random(0)
    for _ in range(300):
        unit, steps, divisor = draw.choice([1, 1, 4, 6]), draw.randint(2, 15), draw.choice([1, 2, 8])
        top = unit * draw.randint(1, 200)
        floor = draw.randint(1, 2 * top)
        groups = {"g": group("g", top, unit)}
        levels = make_grid(groups, {"g": top}, {"g": floor}, steps, divisor, anchor)["g"]  # type: ignore[arg-type]
        step = slimming_step(top, steps, math.lcm(divisor, unit))
        start = top if anchor == "widest" else 0
        lowest = max(unit, min(top, floor))
        expected = {n for n in range(1, top) if n >= lowest and (n - start) % step == 0} | {top}
        assert levels == tuple(sorted(expected, reverse=True))
        assert all(level % unit == 0 for level in levels)


def test_grid_of_mobilenet_v2_contains_the_released_lists() -> None:
    """The lists and how to read them: paper sections 3.1 and 3.2."""
    lists = [
        "8 8 96 16 96 16 96 24 144 24 144 24 144 48 288 48 288 48 288 48 288 64 432 64 432 64 648 176 720 176 720 176 "
        "1440 280 1920",
        "8 8 96 16 96 16 96 24 144 24 144 24 144 56 288 56 288 56 288 56 288 96 432 96 432 96 864 240 1440 240 960 240 "
        "1440 480 1920",
        "32 16 144 24 176 24 192 48 240 48 144 48 264 88 288 88 336 88 432 88 576 144 576 144 648 144 864 240 1440 240 "
        "1440 240 1440 480 1920",
    ]
    graph = specimen("mobilenet_v2").graph
    levels = graph.grid(GridSpec(width=1.5, narrowest=0.15, steps=12, divisor=8))
    owner = {member: name for name, g in graph.groups.items() for member in g.members}
    blocks = [f"features.{n + 1}.conv.{part}" for n in range(1, 17) for part in ("0.0", "2")]
    layers = ["features.0.0", "features.1.conv.1", *blocks, "features.18.0"]
    for text in lists:
        for layer, number in zip(layers, text.split(), strict=True):
            assert int(number) in levels[owner[layer]], layer


def test_span_reaches_from_the_widest_to_the_trained_minimum() -> None:
    graph = specimen("mobilenet_v2").graph
    levels = graph.grid(GridSpec(width=1.5, narrowest=0.15, steps=12, divisor=8))
    assert levels.widest == graph.scaled(1.5, 8)
    assert levels.narrowest == {name: min(options) for name, options in levels.items()}
    for name, options in levels.items():
        assert options[-1] >= round(0.15 * graph.groups[name].size)
        step = slimming_step(options[0], 12, 8)
        assert options[-1] - step < round(0.15 * graph.groups[name].size)


def test_a_grid_steps_down_one_group_at_a_time_until_nothing_is_left() -> None:
    grid = Grid({"a": (6, 4, 2), "b": (5, 3)})
    assert (grid.widest, grid.narrowest, grid.steps) == ({"a": 6, "b": 5}, {"a": 2, "b": 3}, 3)
    assert grid.narrower({"a": 6, "b": 5}) == {"a": 4, "b": 3}
    assert grid.narrower({"a": 4, "b": 3}) == {"a": 2}
    assert grid.narrower(grid.narrowest) == {}
    with pytest.raises(ValueError, match="not in tuple"):
        grid.narrower({"a": 5, "b": 5})


# Budgets


@pytest.mark.parametrize(
    ("text", "resource", "amount", "relative"),
    [
        ("305M", "macs", 305e6, False),
        ("305m", "macs", 305e6, False),
        ("0.57G", "macs", 0.57e9, False),
        (" 2 g ", "macs", 2e9, False),
        ("570K", "macs", 570e3, False),
        (305_000_000, "macs", 305e6, False),
        (3.05e8, "macs", 305e6, False),
        ("1e3M", "macs", 1e9, False),
        (".5G", "macs", 5e8, False),
        ("50%", "macs", 0.5, True),
        ("12.5 %", "params", 0.125, True),
        ("150%", "latency", 1.5, True),
        ("3.4M", "params", 3.4e6, False),
        ("12ms", "latency", 12.0, False),
        ("250us", "latency", 0.25, False),
        ("1.5s", "latency", 1500.0, False),
        ("20MB", "memory", 20e6, False),
        ("20MiB", "memory", 20 * 2**20, False),
        ("1GiB", "memory", 2**30, False),
        ("512B", "memory", 512.0, False),
    ],
)
def test_budgets_are_parsed_as_people_write_them(
    text: str | float, resource: str, amount: float, relative: bool
) -> None:
    budget = parse_budget(text, resource)
    assert math.isclose(budget.amount, amount, rel_tol=1e-12)
    assert budget.relative is relative
    assert budget.absolute(200.0) == (pytest.approx(amount * 200) if relative else pytest.approx(amount))


@pytest.mark.parametrize(
    ("text", "resource", "message"),
    [
        ("much", "macs", "budget 'much' is not an amount of macs; write it like 305M, 0.57G or 50%"),
        ("", "macs", "budget '' is not an amount of macs"),
        ("-5M", "macs", "budget '-5M' is not an amount of macs"),
        ("1,000M", "macs", "budget '1,000M' is not an amount of macs"),
        ("nan", "params", "budget 'nan' is not an amount of params; write it like 3.4M or 50%"),
        (True, "macs", "budget True is not an amount of macs"),
        ("0", "macs", "budget '0' is not a positive number; write it like 305M"),
        ("0%", "latency", "budget '0%' is not a positive number; write it like 12ms or 50%"),
        ("12ms", "macs", "budget '12ms' has no unit of macs (ms measures latency: set resource); write it like 305M"),
        ("20MB", "params", "has no unit of params (MB measures memory: set resource)"),
        ("305M", "latency", "has no unit of latency (M measures macs and params: set resource); write it like 12ms"),
        ("20", "memory", "budget '20' has no unit of memory; write it like 20MB or 50%"),
        ("20mb", "memory", "budget '20mb' has no unit of memory; write it like 20MB"),
        ("5X", "macs", "budget '5X' has no unit of macs; write it like"),
    ],
)
def test_invalid_budgets_are_errors(text: str | float, resource: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_budget(text, resource)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "resource", "text"),
    [
        (305_171_234, "macs", "305M"),
        (1_415_000, "params", "1.42M"),
        (999_600, "macs", "1M"),
        (999.4, "macs", "999"),
        (1000, "macs", "1K"),
        (0, "macs", "0"),
        (4_089_284_608, "macs", "4.09G"),
        (12.34, "latency", "12.3ms"),
        (0.25, "latency", "250us"),
        (1500, "latency", "1.5s"),
        (20e6, "memory", "20MB"),
    ],
)
def test_amounts_are_formatted_to_three_digits(value: float, resource: str, text: str) -> None:
    assert format_amount(value, resource) == text


@pytest.mark.parametrize("resource", UNITS)
def test_formatted_amounts_are_parsed_back_to_three_digits(resource: str) -> None:
    draw = random.Random(1)
    smallest = min(UNITS[resource].values())
    for _ in range(500):
        value = smallest * 10 ** draw.uniform(0, 9)
        assert math.isclose(parse_budget(format_amount(value, resource), resource).amount, value, rel_tol=5.1e-3)
