"""How methods choose channels within a budget, against brute force."""

import random
from collections.abc import Mapping
from itertools import pairwise

import pytest
from specimens import specimen

from autoslim.algorithms.allocation import allocate, from_trajectory, uniform
from autoslim.vocabulary.channels import ChannelGroup
from autoslim.vocabulary.errors import UserError


def groups_of(sizes: Mapping[str, tuple[int, int]]) -> dict[str, ChannelGroup]:
    return {name: ChannelGroup(name, size, unit, (name,)) for name, (size, unit) in sizes.items()}


def all_uniform(groups: Mapping[str, ChannelGroup], widest: float) -> list[dict[str, int]]:
    """Every configuration that a width up to ``widest`` gives: they change where some group's rounding does."""
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
        assert uniform(groups, product, budget, widest) == fitting[-1]


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("resource", ["macs", "params"])
def test_uniform_on_a_network(resource: str, share: float) -> None:
    """Within the budget, and one channel more in every group is beyond it."""
    graph = specimen("mobilenet_v2").graph
    budget = share * graph.cost(graph.default, resource)
    channels = uniform(graph.groups, lambda c: graph.cost(c, resource), budget, 1.5)
    assert graph.cost(channels, resource) <= budget
    assert graph.cost({name: count + 1 for name, count in channels.items()}, resource) > budget
    widths = [(count / graph.groups[name].size, 0.5 / graph.groups[name].size) for name, count in channels.items()]
    low, high = max(w - half for w, half in widths), min(w + half for w, half in widths if w > 0)
    assert low <= high + 1e-9 or min(channels.values()) == 1  # one width explains all


def test_uniform_at_the_budget_of_the_default_network_is_the_default_network() -> None:
    graph = specimen("resnet50").graph
    assert uniform(graph.groups, graph.macs, graph.macs(), 1.5) == graph.default


def test_uniform_is_bounded_by_the_widest_and_by_one_unit() -> None:
    groups = groups_of({"a": (10, 1), "b": (8, 4)})
    assert uniform(groups, product, 1e9, 1.5) == {"a": 15, "b": 12}
    assert uniform(groups, product, product({"a": 1, "b": 4}), 1.5) == {"a": 1, "b": 4}
    with pytest.raises(UserError, match="no uniform width multiplier is within the budget; raise budget"):
        uniform(groups, product, product({"a": 1, "b": 4}) - 1, 1.5)


def test_the_trajectorys_costliest_within_the_budget() -> None:
    configurations = [{"a": n} for n in (9, 7, 7, 4, 2)]
    configurations[2] = {"a": 7, "later": 0}
    cost = {9: 90, 7: 70, 4: 40, 2: 20}
    for budget, expected in ((100, 0), (90, 0), (89, 1), (70, 1), (41, 3), (20, 4)):
        chosen = from_trajectory(configurations, lambda c: cost[c["a"]], budget)
        assert chosen is configurations[expected]
    with pytest.raises(UserError, match=r"no configuration within the budget; lower search\.stop or raise budget"):
        from_trajectory(configurations, lambda c: cost[c["a"]], 19)


def test_the_trajectory_need_not_fall_in_this_resource() -> None:
    """Searched by MACs, bounded by parameters: the best may come before or after another that fits."""
    configurations = [{"a": n} for n in (5, 3, 4, 1)]
    assert from_trajectory(configurations, lambda c: c["a"], 4.5) == {"a": 4}


def test_methods_by_name() -> None:
    graph = specimen("resnet18").graph
    wide = graph.scaled(1.5, 8)
    half = {name: count // 2 for name, count in wide.items()}
    budget = graph.macs()
    assert allocate("autoslim", graph, [wide, half], "macs", budget) == half
    assert allocate("uniform", graph, [wide, half], "macs", 10 * budget) == uniform(
        graph.groups, graph.macs, 10 * budget, 1.5
    )
    with pytest.raises(UserError, match="method 'best' is unknown; methods are autoslim, uniform, and released/"):
        allocate("best", graph, [wide], "macs", budget)
