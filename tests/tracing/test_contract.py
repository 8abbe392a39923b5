"""Contract tests on every classification CNN of torchvision and some of timm's most used.

The list is in benchmarks/networks.py. Costs are compared at full size, on the meta device. Outputs are compared at a
quarter of the width and on the smallest images that the network accepts, because one has 645 million parameters.
"""

import warnings

import pytest
import torch
import torchvision
from independent_counts import counted
from networks import TABLE, TORCHVISION, all_names, row, torchvision_names, traced
from specimens import Specimen, batch_statistics, random_channels
from torch import nn

from autoslim import Supernet, resize

WIDTH = 0.25
SIDES = {"alexnet": 63, "inception_v3": 75, "inception_v4": 75, "legacy_xception": 71}
"""The smallest image size of a network; 32 for all others."""
STANDARDISED = ("timm:eca_nfnet_l0",)
"""These standardise their weights at each call; a sum over a view is rounded differently than one over a copy."""


@pytest.fixture(scope="module", params=all_names())
def sample(request: pytest.FixtureRequest) -> Specimen:
    """Returns a network with its graph. The tests of one network run together."""
    network, graph = traced(request.param)
    return Specimen(request.param, network, graph, SIDES.get(request.param.partition(":")[2], 32))


@pytest.fixture(scope="module")
def supernet(sample: Specimen) -> Supernet:
    network = sample.real(random_channels(sample.graph, 0, WIDTH, WIDTH))
    for name, _ in network.named_buffers():
        assert name.endswith(("running_mean", "running_var", "num_batches_tracked")), f"{name} is not a statistic"
    return Supernet(network, sample.graph).eval()


def test_costs_equal_an_independent_count(sample: Specimen) -> None:
    groups, not_widenable = sample.graph.groups, sample.graph.not_widenable
    drawn = random_channels(sample.graph, 1, 0.1, 1.5)
    for channels in (
        sample.graph.default,
        {name: min(count, groups[name].size) if name in not_widenable else count for name, count in drawn.items()},
    ):
        network = resize(sample.network, sample.graph, channels)
        assert sample.graph.macs(channels) == counted(network, sample.graph.input_shape)
        assert sample.graph.params(channels) == sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def test_an_extracted_network_computes_the_same_as_the_supernet(sample: Specimen, supernet: Supernet) -> None:
    images = sample.images(2)
    channels = random_channels(sample.graph, 2, 0.05, WIDTH)
    cut = batch_statistics(supernet.extract(channels))
    supernet.select(channels)
    if sample.name in STANDARDISED:
        torch.testing.assert_close(supernet(images), cut(images))
    else:
        assert torch.equal(supernet(images), cut(images))
    assert supernet(images).std() > 0


@torch.no_grad()
def test_a_widened_network_computes_the_same_as_before(sample: Specimen, supernet: Supernet) -> None:
    """Weights that read new channels are zero, so the output does not change if layers read the same channels.

    Unlike the previous test, this detects channels that are stored in another order than they are produced in.
    """
    cut = supernet.extract(random_channels(sample.graph, 2, 0.05, WIDTH)).double().eval()
    if any(_mixes_channels(module) for module in cut.modules()):
        pytest.skip("more channels change the output: the network normalises over them or slides along them")
    grown = resize(cut, sample.graph, supernet.widest)
    images = sample.images(2).double()
    torch.testing.assert_close(grown(images), cut(images), rtol=1e-10, atol=1e-10)


def _mixes_channels(module: nn.Module) -> bool:
    standardises = isinstance(module, nn.Conv2d) and type(module).__name__.startswith("ScaledStdConv")
    return isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Conv1d) or standardises


def test_the_table_agrees_with_the_code(sample: Specimen) -> None:
    """All columns except the seconds are compared. For networks of a later torchvision, see the next test."""
    table = TABLE.read_text()
    name = sample.name.removeprefix(TORCHVISION)
    if f"\n| {name} |" in table:
        assert f"\n{row(sample.name, sample.graph)} " in table, "run python benchmarks/networks.py"


def test_the_table_is_complete() -> None:
    """torchvision 0.29 has 68 networks that are not transformers; a later version may have more."""
    listed = [line.split("|")[1].strip() for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    known = [name.removeprefix(TORCHVISION) for name in all_names()]
    assert len(listed) - sum(name.startswith("timm:") for name in listed) == 68
    assert set(listed) <= set(known)
    if new := [name for name in known if name not in listed]:
        warnings.warn(
            f"torchvision {torchvision.__version__} has {', '.join(new)}: run python benchmarks/networks.py",
            stacklevel=1,
        )


def test_most_of_torchvision_can_be_slimmed_completely() -> None:
    rows = [line.split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    whole = [cells[0] for cells in rows if cells[6] == "none" and "timm:" not in cells[0]]
    assert len(whole) >= 55
    assert len(torchvision_names()) - len(whole) == 4  # ShuffleNetV2 interleaves its channels
