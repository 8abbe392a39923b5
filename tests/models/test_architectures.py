"""Compares the paper's four families with the authors' MACs and parameters (with pooling, 224x224, 1000 classes)."""

import hashlib
import json
from functools import cache

import pytest
import torch
from paths import ROOT
from ruamel.yaml import YAML
from torch import nn
from torchvision.models import mobilenet_v2

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.resize import resize
from autoslim.errors import UserError
from autoslim.models.architectures import mobilenet_v2 as cifar_mobilenet_v2
from autoslim.models.architectures import resnet
from autoslim.models.building import build_network
from autoslim.models.released import FAMILIES, released, released_lists
from autoslim.pipeline.assembly import grid_spec
from autoslim.pipeline.params import load_params
from autoslim.tracing import on_meta, trace


@cache
def family(name: str) -> tuple[nn.Module, ChannelGraph]:
    network = on_meta(build_network(FAMILIES[name], {}))
    return network, trace(network, torch.empty(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("name", "groups", "macs_m", "params_m"),
    [
        ("mobilenet_v1", 14, 568.79, 4.23),
        ("mobilenet_v2", 25, 300.84, 3.50),
        ("mnasnet", 25, 314.48, 4.38),
        ("resnet50", 37, 4089.28, 25.56),
    ],
)
def test_macs_and_parameters_at_width_1(name: str, groups: int, macs_m: float, params_m: float) -> None:
    _, graph = family(name)
    assert len(graph.groups) == groups
    assert round(graph.macs(pooling=True) / 1e6, 2) == macs_m
    assert round(graph.params() / 1e6, 2) == params_m


@pytest.mark.parametrize(("width", "macs_m"), [(0.75, 209.13), (1.3, 509.46), (1.5, 672.93)])
def test_mobilenet_v2_at_other_widths(width: float, macs_m: float) -> None:
    graph = trace(on_meta(mobilenet_v2(width_mult=width)), torch.empty(1, 3, 224, 224))
    assert round(graph.macs(pooling=True) / 1e6, 2) == macs_m


def test_scaled_graph_is_the_constructors_wider_network() -> None:
    wide = trace(on_meta(mobilenet_v2(width_mult=1.5)), torch.empty(1, 3, 224, 224))
    assert family("mobilenet_v2")[1].scaled(1.5, 8) == wide.default


def test_cifar_mobilenet_v2() -> None:
    graph = trace(cifar_mobilenet_v2(), torch.empty(1, 3, 32, 32))
    assert round(graph.macs(pooling=True) / 1e6, 2) == 88.00
    assert round(graph.params() / 1e6, 2) == 2.24


def test_cifar_resnet20_has_the_published_parameters_and_the_macs_of_its_layers() -> None:
    """0.27M parameters (He et al. 2015, table 6), to which our projections add 2.8K."""
    graph = trace(resnet(blocks=(3, 3, 3), width=16), torch.empty(1, 3, 32, 32))
    stages = [(16, 16, 32), (16, 32, 16), (32, 64, 8)]
    macs = 3 * 16 * 9 * 32**2 + 64 * 10
    for number, (before, channels, side) in enumerate(stages):
        first = 9 * before + (before if number else 0)  # the second term is the projection
        macs += (first + 5 * 9 * channels) * channels * side**2
    assert graph.macs() == macs == 40_813_184
    assert round(graph.params() / 1e6, 2) == 0.27


@pytest.mark.parametrize("name", sorted(released_lists()))
def test_a_released_list_has_the_listed_macs_and_parameters(name: str) -> None:
    listed = released(name)
    network, graph = family(listed.family)
    channels = listed.channels(graph)
    assert round(graph.macs(channels, pooling=True) / 1e6, 2) == listed.macs_m
    assert round(graph.params(channels) / 1e6, 2) == listed.params_m
    plain = resize(network, graph, channels)
    assert sum(parameter.numel() for parameter in plain.parameters()) == graph.params(channels)
    with torch.no_grad():
        assert plain.eval()(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_narrow_list_gains_no_skip_connection() -> None:
    """The 207M list has 8 channels before and after MobileNetV2's first block, which has no skip."""
    network, graph = family("mobilenet_v2")
    plain = resize(network, graph, released("mobilenet_v2-207M").channels(graph))
    default = [module.use_res_connect for module in network.modules() if hasattr(module, "use_res_connect")]
    assert [module.use_res_connect for module in plain.modules() if hasattr(module, "use_res_connect")] == default


@pytest.mark.parametrize("name", sorted(released_lists()))
def test_released_channels_are_on_the_presets_grid(name: str) -> None:
    listed = released(name)
    graph = family(listed.family)[1]
    supernet = load_params(ROOT / f"presets/imagenet-{listed.family}.yaml").supernet
    levels = graph.grid(grid_spec(supernet))
    channels = listed.channels(graph)
    assert {group: count for group, count in channels.items() if count not in levels[group]} == {}


def test_unknown_lists_and_other_networks_raise() -> None:
    with pytest.raises(UserError, match=r"no released list 'mobilenet_v2-1G'.*mobilenet_v2-305M"):
        released("mobilenet_v2-1G")
    with pytest.raises(UserError, match=r"resnet50-1G .*torchvision\.models:resnet50"):
        released("resnet50-1G").channels(family("mobilenet_v2")[1])


def test_thirteen_lists_with_readable_names() -> None:
    assert len(released_lists()) == 13
    assert {"mobilenet_v1-325M", "mobilenet_v2-305M", "mnasnet-217M", "resnet50-2.01G"} <= set(released_lists())


def test_the_lists_are_the_released_ones() -> None:
    """Pins the digest of the lists, which were compared with the authors' files."""
    values = YAML(typ="safe").load((ROOT / "autoslim/models/released.yaml").read_text())
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert digest == "84156e9e0db91789fa5d6a7cacfee0747a0c90e4ebbc3e6603d20d9604f97c57"
