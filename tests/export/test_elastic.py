"""One file with several widths computes, at each, what the network extracted from the supernet computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoslim import Supernet, load_elastic, recalibrate, resize, trace
from autoslim.errors import UserError
from autoslim.export.elastic import save_elastic


class Concatenating(nn.Module):
    """A network with a residual sum, a depthwise convolution and a layer that reads two groups."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.inner = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.branch, self.outer = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.head = nn.Linear(20, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(images)).relu()
        x = x + self.inner(self.depthwise(x))
        y = self.outer(self.branch(x)).relu()
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, nn.Module], torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 8, 8)
    network = Concatenating()
    graph = trace(network, images[:1])
    supernet = Supernet(resize(network, graph, graph.scaled(1.5, 1)), graph)
    widths = {"small": graph.scaled(0.25, 1), "uneven": {"stem": 3, "branch": 15}, "large": graph.scaled(1.0, 1)}
    networks = {}
    for name, channels in widths.items():
        plain = supernet.extract(channels)
        recalibrate(plain, [images])
        networks[name] = (channels, plain.eval())
    about = {"input": {"shape": [3, 8, 8]}, "widths": {name: {"channels": c} for name, c in widths.items()}}
    file = tmp_path / "elastic.safetensors"
    save_elastic(file, supernet, networks, about)
    return file, {name: plain for name, (_, plain) in networks.items()}, images


def test_each_width_computes_what_the_extracted_network_computes(saved: Any) -> None:
    file, networks, images = saved
    elastic = load_elastic(Concatenating, file)
    assert elastic.widths == ("small", "uneven", "large")
    for order in (("small", "large", "uneven"), ("small", "uneven", "large", "small")):
        for name in order:
            elastic.select(name)
            with torch.inference_mode():
                torch.testing.assert_close(elastic(images), networks[name](images))
                torch.testing.assert_close(elastic(images[:1]), networks[name](images[:1]))  # not batch statistics
    double, expected = elastic.to(torch.float64), networks["uneven"].double()
    for name in ("large", "uneven"):
        double.select(name)
    with torch.inference_mode():
        torch.testing.assert_close(double(images.double()), expected(images.double()), rtol=1e-9, atol=1e-9)


def test_the_widths_share_their_weights(saved: Any) -> None:
    file, networks, _ = saved
    tensors = load_file(file)
    shared = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("weights/"))
    graph = trace(Concatenating(), torch.empty(1, 3, 8, 8))
    assert shared == graph.params({"stem": 8, "branch": 15})  # the largest of each group, not the supernet's
    statistics = {name for name in tensors if name.startswith("statistics/small/")}
    assert len(statistics) == 3 * 3  # mean, variance and counter of each batch norm
    assert len(tensors) == len(list(networks["large"].parameters())) + 3 * len(statistics)


def test_errors_of_the_loader(saved: Any, tmp_path: Path) -> None:
    file, _, _ = saved
    with pytest.raises(UserError, match="there is no width '30%'; the widths are small, uneven, large"):
        load_elastic(Concatenating, file).select("30%")
    for build in (lambda: Concatenating(7), lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))):
        with pytest.raises(UserError, match=r"elastic\.safetensors belongs to another network than \w+; pass the con"):
            load_elastic(build, file)
    with pytest.raises(UserError, match=r"there is no network at .*gone"):
        load_elastic(Concatenating, tmp_path / "gone")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"elastic\.safetensors is damaged"):
        load_elastic(Concatenating, file)
