"""Networks that leave a supernet: their statistics, and files that need only the constructor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from specimens import shuffle_weights
from torch import Tensor, nn

from autoslim import (
    GridSpec,
    Supernet,
    UserError,
    extract_network,
    load_latency_table,
    load_network,
    measure_latency_table,
    recalibrate,
    resize,
    save_network,
    saved_channels,
    trace,
)
from autoslim.models.architectures import mobilenet_v2

STAGES = ((1, 8, 1, 1), (4, 12, 2, 2))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build(classes: int = 10) -> nn.Module:
    return mobilenet_v2(num_classes=classes, stem=8, stages=STAGES, tail=16)


def test_a_loaded_network_is_the_saved_one(tmp_path: Path) -> None:
    """Also with a tied weight and a buffer that is not in the state dict; tracing is not needed."""
    network = build()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    channels = graph.scaled(0.6, 2)
    narrow = resize(network, graph, channels)
    shuffle_weights(narrow)
    file = tmp_path / "new" / "slim.safetensors"
    save_network(narrow, graph, file)
    loaded = load_network(build, str(file))
    assert not loaded.training
    assert torch.equal(loaded(IMAGES), narrow.eval()(IMAGES))
    assert str(loaded) == str(narrow)
    assert saved_channels(file) == channels
    assert graph.params(channels) == sum(parameter.numel() for parameter in loaded.parameters())


def test_shared_weights_and_buffers_are_loaded(tmp_path: Path) -> None:
    class Tied(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.third.weight = self.second.weight
            self.register_buffer("scale", torch.rand(8, 1, 1), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.third(self.second(self.first(images) * self.scale))  # type: ignore[no-any-return]

    network = Tied()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    narrow = resize(network, graph, {name: 8 if "third" in graph.groups[name].members else 6 for name in graph.groups})
    save_network(narrow, graph, tmp_path / "a")
    loaded = load_network(Tied, tmp_path / "a")
    assert torch.equal(loaded(IMAGES), narrow(IMAGES))
    assert loaded.get_parameter("third.weight") is loaded.get_parameter("second.weight")


def test_files_of_other_networks(tmp_path: Path) -> None:
    network = build()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    save_network(network, graph, tmp_path / "a")
    with pytest.raises(UserError, match=r"belongs to another network: .* pass the constructor of the network"):
        load_network(lambda: nn.Conv2d(3, 3, 1), tmp_path / "a")
    with pytest.raises(UserError, match="there is no network at"):
        load_network(build, tmp_path / "missing")
    (tmp_path / "text").write_text("text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(UserError, match="is not a network of"):
            load_network(build, tmp_path / name)
    with pytest.raises(UserError, match="this is not the network that was traced"):
        save_network(nn.Conv2d(3, 3, 1), graph, tmp_path / "b")


def test_extracted_networks_are_recalibrated() -> None:
    network = build()
    graph = trace(network, torch.empty(1, 3, 8, 8))
    supernet = Supernet(resize(network, graph, graph.scaled(1.5)), graph)
    batches = [(IMAGES + shift, torch.zeros(4)) for shift in range(3)]
    cut = extract_network(supernet, graph.default, batches, count=2)
    expected = supernet.extract(graph.default)
    recalibrate(expected, [inputs for inputs, _ in batches[:2]])
    assert not cut.training
    assert torch.equal(cut(IMAGES), expected.eval()(IMAGES))


def test_a_latency_table_is_read_as_it_was_measured(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = trace(network, torch.empty(1, 3, 8, 8))
    grid = graph.grid(GridSpec(divisor=4))
    file = tmp_path / "table.json"
    table = measure_latency_table(network, graph, grid, file=file, points=2, check_networks=10)
    assert load_latency_table(file) == table
    assert table.predict(graph.default) > 0
    with pytest.raises(UserError, match="there is no latency table at"):
        load_latency_table(tmp_path / "missing")
