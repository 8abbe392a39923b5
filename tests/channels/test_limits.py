"""Limits of channel groups on the grid, and of the uniform network."""

import pytest
import torch
from torch import nn

from autoslim import GridSpec, GroupLimits, UserError, trace
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.limits import group_ranges
from autoslim.resources.costs import Costs
from autoslim.search.methods import allocate
from autoslim.search.refinement import fine_numbers


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    layers = [nn.Conv2d(3, 48, 3), nn.Conv2d(48, 20, 1), nn.Conv2d(20, 6, 1), nn.Conv2d(6, 2, 1)]
    return trace(nn.Sequential(*layers), torch.empty(1, 3, 8, 8))


def grid(graph: ChannelGraph, width: float = 1.0, **groups: GroupLimits) -> dict[str, tuple[int, ...]]:
    limits = {name.replace("any", "*").lstrip("g"): each for name, each in groups.items()}
    return dict(graph.grid(GridSpec(width, 0.25, 6, 1, groups=limits)))


def test_each_limit_on_the_grid(graph: ChannelGraph) -> None:
    free = grid(graph)
    assert free == {"0": (48, 40, 32, 24, 16), "1": (20, 17, 14, 11, 8, 5), "2": (6, 5, 4, 3, 2)}
    assert grid(graph, g0=GroupLimits(freeze=True)) == free | {"0": (48,)}
    assert grid(graph, 1.5, g0=GroupLimits(freeze=True))["0"] == (48,)
    assert grid(graph, g0=GroupLimits(minimum=30)) == free | {"0": (48, 40, 32)}
    assert grid(graph, g0=GroupLimits(maximum=30)) == free | {"0": (30, 25, 20, 15)}
    assert grid(graph, g1=GroupLimits(max_shrink=0.5)) == free | {"1": (20, 17, 14, 11)}
    assert grid(graph, any=GroupLimits(multiple=8)) == {"0": (48, 40, 32, 24, 16), "1": (16, 8), "2": (6,)}
    # later patterns replace the limits that they set, and keep the others
    both = grid(graph, any=GroupLimits(multiple=4, max_shrink=0.5), g0=GroupLimits(max_shrink=0.25))
    assert both == {"0": (48, 40), "1": (20, 16, 12), "2": (4,)}


def test_patterns_match_the_layers_of_a_group() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = self.stem(images)
            return self.head(features + self.block(features))  # type: ignore[no-any-return]

    graph = trace(Residual(), torch.empty(1, 3, 8, 8))
    assert list(graph.groups) == ["stem"]
    assert group_ranges(graph.groups, {"bl*": GroupLimits(freeze=True)})["stem"].low == 8
    with pytest.raises(UserError, match=r"the limits of 'bl' .* apply to no channel group; the groups are stem \(see"):
        graph.grid(GridSpec(groups={"bl": GroupLimits(freeze=True)}))


def test_limits_that_cannot_be_met(graph: ChannelGraph) -> None:
    with pytest.raises(UserError, match="group 0 must have at least 50 channels, but at most 48 are possible"):
        grid(graph, g0=GroupLimits(minimum=50))
    for wrong, message in (
        ({"minimum": 0}, "minimum is 0; set it to a positive number"),
        ({"max_shrink": 1.5}, "max_shrink is 1.5; set it to a share"),
        ({"minimum": 9, "maximum": 8}, "minimum is 9, but maximum is 8; lower minimum"),
    ):
        with pytest.raises(UserError, match=message):
            GroupLimits(**wrong)  # type: ignore[arg-type]


def test_the_uniform_network_and_the_refinement_satisfy_the_limits(graph: ChannelGraph) -> None:
    limits = {"0": GroupLimits(freeze=True), "1": GroupLimits(multiple=4, max_shrink=0.5)}
    levels, ranges = graph.grid(GridSpec(1.5, 0.25, 6, 1, groups=limits)), group_ranges(graph.groups, limits)
    for share in (1.2, 1.0, 0.9, 0.84):
        channels = allocate("uniform", Costs(graph), [levels.widest], {"macs": share * graph.macs()}, ranges=ranges)
        assert graph.macs(channels) <= share * graph.macs()
        assert channels["0"] == 48
        assert channels["1"] >= 10
        assert channels["1"] % 4 == 0
    numbers = fine_numbers(levels, graph.groups, 1, ranges)
    assert numbers["0"] == [48]
    assert numbers["1"] == [12, 16, 20, 24, 28]
    assert levels.multiples == {"0": 1, "1": 4, "2": 1}
