"""Contract tests on the CNNs of torchvision and some of timm's most used networks.

The list is in benchmarks/networks.py. Costs are compared at full size, on the meta device. Outputs are compared at a
quarter of the width and on the smallest images that the network accepts, because one has 645 million parameters.
"""

import warnings

import pytest
import torch
import torchvision
from independent_counts import counted, counted_with_hooks
from networks import (
    DETECTION,
    TABLE,
    VIDEO,
    all_names,
    hybrid_names,
    input_shape,
    label,
    refusal,
    refused_names,
    row,
    torchvision_names,
    traced,
)
from specimens import Specimen, batch_statistics, random_channels
from torch import nn

from autoslim import Supernet, resize
from autoslim.channels.equivalence import output_tensors

WIDTH = 0.25
SIDES = {
    "torchvision.models:alexnet": 63,
    "torchvision.models:inception_v3": 75,
    "torchvision.models.quantization:inception_v3": 75,
    "timm:inception_v4": 75,
    "timm:legacy_xception": 71,
}
"""The smallest image size of a network; 32 for all others, and 64 for backbones of detectors."""
FIXED = (
    "timm:coatnet_nano_rw_224",
    "timm:levit_conv_128s",
    "timm:visformer_tiny",
    "torchvision.models.video:s3d",
)
"""These accept only inputs of the size in the table, because of their position embeddings and pooling."""
STANDARDISED = ("timm:eca_nfnet_l0", "timm:nf_resnet26")
"""These standardise their weights at each call; a sum over a view is rounded differently than one over a copy."""


def small_shape(name: str) -> tuple[int, ...]:
    if name in FIXED:
        return input_shape(name)
    side = SIDES.get(name, 64 if name.startswith(DETECTION) else 32)
    return (3, 4, side, side) if name.startswith(VIDEO) else (3, side, side)


@pytest.fixture(scope="module", params=all_names())
def sample(request: pytest.FixtureRequest) -> Specimen:
    """Returns a network with its graph. The tests of one network run together."""
    network, graph = traced(request.param)
    shape = small_shape(request.param)
    return Specimen(request.param, network, graph, shape[-1], shape)


@pytest.fixture(scope="module")
def supernet(sample: Specimen) -> Supernet:
    return Supernet(sample.real(random_channels(sample.graph, 0, WIDTH, WIDTH)), sample.graph).eval()


def traced_part(network: nn.Module, sample: Specimen) -> nn.Module:
    """Returns the backbone of a detector, and any other network itself."""
    return network.get_submodule(sample.graph.part)


def test_costs_equal_an_independent_count(sample: Specimen) -> None:
    groups, not_widenable = sample.graph.groups, sample.graph.not_widenable
    drawn = random_channels(sample.graph, 1, 0.1, 1.5)
    for channels in (
        sample.graph.default,
        {name: min(count, groups[name].size) if name in not_widenable else count for name, count in drawn.items()},
    ):
        network = traced_part(resize(sample.network, sample.graph, channels), sample)
        count = counted_with_hooks if sample.name in hybrid_names() else counted
        assert sample.graph.macs(channels) == count(network, sample.graph.input_shape)
        assert sample.graph.params(channels) == sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def test_an_extracted_network_computes_the_same_as_the_supernet(sample: Specimen, supernet: Supernet) -> None:
    images = sample.images(2)
    channels = random_channels(sample.graph, 2, 0.05, WIDTH)
    cut = traced_part(batch_statistics(supernet.extract(channels)), sample)
    supernet.select(channels)
    expected = output_tensors(cut(images))
    selected = traced_part(supernet.network, sample) if sample.graph.part else supernet
    found = output_tensors(selected(images))
    assert expected
    for one, other in zip(found, expected, strict=True):
        if sample.name in STANDARDISED:
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)
        assert one.std() > 0


@torch.no_grad()
def test_a_widened_network_computes_the_same_as_before(sample: Specimen, supernet: Supernet) -> None:
    """Weights that read new channels are zero, so the output does not change if layers read the same channels.

    Unlike the previous test, this detects channels that are stored in another order than they are produced in.
    """
    cut = supernet.extract(random_channels(sample.graph, 2, 0.05, WIDTH)).double().eval()
    if any(_mixes_channels(module) for module in cut.modules()):
        pytest.skip("more channels change the output: the network normalises over them or slides along them")
    grown = traced_part(resize(cut, sample.graph, supernet.widest), sample)
    images = sample.images(2).double()
    found, expected = output_tensors(grown(images)), output_tensors(traced_part(cut, sample)(images))
    for one, other in zip(found, expected, strict=True):
        largest = max(1, other.abs().max().item())  # products of activations, as in StarNet, are in the thousands
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * largest)


def _mixes_channels(module: nn.Module) -> bool:
    standardises = isinstance(module, nn.Conv2d) and type(module).__name__.startswith("ScaledStdConv")
    return isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Conv1d) or standardises


def rows() -> list[list[str]]:
    """Returns the cells of all rows, without those of networks that cannot be traced."""
    lines = TABLE.read_text().partition("## Networks that cannot")[0].splitlines()
    cells = [line.removeprefix("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [row for row in cells if row[0] != "network"]


def test_the_table_agrees_with_the_code(sample: Specimen) -> None:
    """All columns except the seconds are compared. For networks of a later torchvision, see the next test."""
    table = TABLE.read_text()
    if f"\n| {label(sample.name)} |" in table:
        assert f"\n{row(sample.name, sample.graph)} " in table, "run python benchmarks/networks.py"


def test_the_table_is_complete() -> None:
    """torchvision 0.29 has 68 networks that are not transformers; a later version may have more."""
    listed = [cells[0] for cells in rows()]
    known = [label(name) for name in all_names()]
    assert sum(":" not in name for name in listed) == 68
    assert set(listed) <= set(known)
    new = [name for name in known if name not in listed]
    assert not any(":" in name for name in new), "run python benchmarks/networks.py"
    if new:
        warnings.warn(
            f"torchvision {torchvision.__version__} has {', '.join(new)}: run python benchmarks/networks.py",
            stacklevel=1,
        )


@pytest.mark.parametrize("name", refused_names())
def test_the_reason_for_a_refusal_is_in_the_table(name: str) -> None:
    assert f"\n| {label(name)} | {refusal(name)} |\n" in TABLE.read_text(), "run python benchmarks/networks.py"


def test_slimming_reaches_most_of_the_macs_in_most_cnns() -> None:
    hybrids = [label(name) for name in hybrid_names()]
    shares = [float(cells[4]) for cells in rows() if cells[0] not in hybrids]
    reached = sum(share >= 95 for share in shares)
    assert reached / len(shares) >= 0.9
    assert f"In {reached} of the {len(shares)} CNNs" in TABLE.read_text()


def test_most_of_torchvision_can_be_slimmed_completely() -> None:
    whole = [cells[0] for cells in rows() if cells[6] == "none" and ":" not in cells[0]]
    assert len(whole) >= 55
    assert len(torchvision_names()) - len(whole) == 4  # ShuffleNetV2 interleaves its channels
