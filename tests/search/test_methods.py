"""Compares the channels that methods choose within a budget with brute force."""

import random
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from specimens import specimen

from autoslim import trace
from autoslim.channels.groups import ChannelGroup
from autoslim.errors import UserError
from autoslim.models.architectures import mobilenet_v2
from autoslim.resources.costs import Costs
from autoslim.search.methods import allocate, from_trajectory, uniform


def groups_of(sizes: Mapping[str, tuple[int, int]]) -> dict[str, ChannelGroup]:
    return {name: ChannelGroup(name, size, unit, (name,)) for name, (size, unit) in sizes.items()}


def all_uniform(groups: Mapping[str, ChannelGroup], widest: float) -> list[dict[str, int]]:
    """Returns every configuration of a width up to ``widest``. They change where the rounding of a group changes."""
    breaks = {0.0, widest}
    for group in groups.values():
        units = group.size // group.unit
        breaks |= {(k + 0.5) / units for k in range(int(widest * units) + 1)}
    widths = sorted(width for width in breaks if width <= widest)
    middles = [(a + b) / 2 for a, b in pairwise(widths)] + [widest]
    return [{n: max(1, int(w * g.size / g.unit + 0.5)) * g.unit for n, g in groups.items()} for w in middles]


def product(channels: Mapping[str, int]) -> int:
    names = list(channels)
    return sum(channels[a] * channels[b] for a, b in pairwise(names)) + 7


def test_uniform_is_the_best_of_all_widths() -> None:
    draw = random.Random(0)
    for _ in range(60):
        sizes = {str(index): (draw.randint(1, 30), draw.choice([1, 1, 1, 4])) for index in range(4)}
        groups = groups_of({name: (count * unit, unit) for name, (count, unit) in sizes.items()})
        widest = draw.choice([0.7, 1.0, 1.5, 2.0])
        configurations = all_uniform(groups, widest)
        costs = [product(channels) for channels in configurations]
        budget = draw.uniform(min(costs), 1.1 * max(costs))
        fitting = [channels for channels, price in zip(configurations, costs, strict=True) if price <= budget]
        assert uniform(groups, lambda c, most=budget: product(c) <= most, widest) == fitting[-1]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("resource", ["macs", "params", "memory"])
def test_uniform_on_a_network(resource: str, share: float) -> None:
    """It is within the budget, and one more channel in every group exceeds it."""
    graph = specimen("mobilenet_v2").graph
    budget = share * graph.cost(graph.default, resource)
    channels = uniform(graph.groups, lambda c: graph.cost(c, resource) <= budget, 1.5)
    assert graph.cost(channels, resource) <= budget
    assert graph.cost({name: count + 1 for name, count in channels.items()}, resource) > budget
    widths = [(count / graph.groups[name].size, 0.5 / graph.groups[name].size) for name, count in channels.items()]
    low, high = max(w - half for w, half in widths), min(w + half for w, half in widths if w > 0)
    assert low <= high + 1e-9 or min(channels.values()) == 1  # one width explains all


def test_uniform_at_the_budget_of_the_default_network_is_the_default_network() -> None:
    graph = specimen("resnet50").graph
    assert uniform(graph.groups, lambda c: graph.macs(c) <= graph.macs(), 1.5) == graph.default


def test_uniform_is_bounded_by_the_widest_and_by_one_unit() -> None:
    groups = groups_of({"a": (10, 1), "b": (8, 4)})
    one = product({"a": 1, "b": 4})
    assert uniform(groups, lambda _: True, 1.5) == {"a": 15, "b": 12}
    assert uniform(groups, lambda c: product(c) <= one, 1.5) == {"a": 1, "b": 4}
    with pytest.raises(UserError, match="no uniform width multiplier is within the budget; raise budget"):
        uniform(groups, lambda c: product(c) < one, 1.5)


def test_uniform_if_narrower_networks_may_be_slower() -> None:
    """The widest that fits is chosen although a narrower one does not fit, in multiples that the table contains."""
    groups = groups_of({"a": (64, 1), "b": (32, 4)})
    slow = {(56, 32), (48, 24)}

    def fits(channels: Mapping[str, int]) -> bool:
        return channels["a"] <= 64 and (channels["a"], channels["b"]) not in slow

    assert uniform(groups, fits, 1.5, 8, monotone=False) == {"a": 64, "b": 32}
    slow.add((64, 32))
    found = uniform(groups, fits, 1.5, 8, monotone=False)
    assert found == {"a": 56, "b": 24} or found == {"a": 64, "b": 24}
    assert fits(found)
    assert all(count % 8 == 0 for count in found.values())
    assert uniform(groups_of({"a": (12, 1)}), lambda _: True, 1.0, 8) == {"a": 16}
    assert uniform(groups_of({"a": (12, 1)}), lambda _: True, 1.0, 8, bounds={"a": (1, 12)}) == {"a": 12}


def test_uniform_has_no_more_channels_than_the_supernet() -> None:
    """The supernet's groups are rounded separately, so no single width multiplier reaches all of them."""
    network = mobilenet_v2(stem=12, stages=((1, 8, 1, 1), (4, 12, 2, 2)), tail=36)
    graph = trace(network, torch.empty(1, 3, 8, 8))
    widest = graph.scaled(1.25, 8)
    assert len({widest[name] / group.size for name, group in graph.groups.items()}) > 1
    for budget in (graph.macs(widest), 0.97 * graph.macs(widest)):
        found = allocate("uniform", Costs(graph), [widest], {"macs": budget})
        assert all(found[name] <= most for name, most in widest.items())


def test_uniform_is_bounded_by_the_measured_channels() -> None:
    """Below the grid's narrowest, a table has no measurements, and predictions may be wrong, such as zero."""
    groups = groups_of({"a": (64, 1), "b": (32, 1)})
    bounds = {"a": (16, 96), "b": (8, 48)}
    with pytest.raises(UserError, match="no uniform width multiplier is within the budget"):
        uniform(groups, lambda channels: channels["a"] < 16, 1.5, 8, bounds=bounds, monotone=False)
    least = uniform(groups, lambda channels: channels["a"] <= 16, 1.5, 8, bounds=bounds, monotone=False)
    assert least == {"a": 16, "b": 8}


def test_the_first_on_the_trajectory_within_the_limits() -> None:
    configurations = [{"a": n} for n in (9, 7, 7, 4, 2)]
    configurations[2] = {"a": 7, "later": 0}
    for most, expected in ((10, 0), (9, 0), (8, 1), (7, 1), (4, 3), (2, 4)):
        chosen = from_trajectory(configurations, lambda c, most=most: c["a"] <= most)
        assert chosen is configurations[expected]
    with pytest.raises(UserError, match=r"no configuration within the budget; lower search\.stop or raise budget"):
        from_trajectory(configurations, lambda _: False)


def test_methods_by_name() -> None:
    graph = specimen("resnet18").graph
    wide = graph.scaled(1.5, 8)
    half = {name: count // 2 for name, count in wide.items()}
    budget = graph.macs()
    costs = Costs(graph)
    assert allocate("autoslim", costs, [wide, half], {"macs": budget}) == half
    assert allocate("uniform", costs, [wide, half], {"macs": 10 * budget}) == uniform(
        graph.groups, lambda c: graph.macs(c) <= 10 * budget, 1.5
    )
    with pytest.raises(
        UserError, match="'best' is unknown; methods are default, uniform, autoslim, random, evolution, l1, "
    ):
        allocate("best", costs, [wide], {"macs": budget})
    for method, message in (
        ("autoslim", r"the trajectory has no.*\(the budget is 100 MACs, the search ended at .*M MACs\)"),
        ("uniform", r"no uniform width multiplier is.*\(the budget is 100 MACs\)"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            allocate(method, costs, [wide, half], {"macs": 100})


@pytest.mark.parametrize("method", ["autoslim", "uniform"])
def test_all_limits_are_satisfied(method: str) -> None:
    graph = specimen("mobilenet_v2").graph
    costs = Costs(graph)
    widths = [1.5 - 0.05 * number for number in range(26)]
    trajectory = [graph.scaled(width, 1) for width in widths]
    default = costs.all(graph.default)
    for shares in ({"macs": 0.5, "params": 0.9}, {"macs": 0.9, "params": 0.5}, {"params": 0.8, "memory": 0.6}):
        limits = {resource: share * default[resource] for resource, share in shares.items()}
        channels = allocate(method, costs, trajectory, limits)
        assert all(costs.of(channels, resource) <= limit for resource, limit in limits.items())
        one_limit = [allocate(method, costs, trajectory, {resource: limit}) for resource, limit in limits.items()]
        assert channels in one_limit  # the tighter limit decides
