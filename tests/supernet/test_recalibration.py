"""Compares BN recalibration with averages computed by NumPy."""

import numpy as np
import pytest
import torch
from specimens import specimen
from torch import Tensor, nn

from autoslim import Supernet, recalibrate, trace
from autoslim.errors import UserError


@pytest.fixture
def network() -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return network


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 8, 8, generator=generator) * (index + 1) for index in range(count)]


def test_statistics_are_the_average_of_the_batches(network: nn.Sequential) -> None:
    """Means and unbiased variances are averaged, as in US-Nets. The second norm's input has batch statistics."""
    assert recalibrate(network, batches()) == 4
    first, second = network[1], network[5]
    seen: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {1: [], 5: []}
    for images in batches():
        maps = network[0](images).detach().double().numpy()
        seen[1].append((maps.mean((0, 2, 3)), maps.var((0, 2, 3), ddof=1)))
        spread = np.sqrt(maps.var((0, 2, 3), keepdims=True) + first.eps)
        normal = (maps - maps.mean((0, 2, 3), keepdims=True)) / spread
        scale, shift = (p.detach().double().numpy()[None, :, None, None] for p in (first.weight, first.bias))
        inner = torch.from_numpy(np.maximum(normal * scale + shift, 0))
        maps = nn.functional.conv2d(inner, network[4].weight.double(), network[4].bias.double()).detach().numpy()
        seen[5].append((maps.mean((0, 2, 3)), maps.var((0, 2, 3), ddof=1)))
    for norm, index in ((first, 1), (second, 5)):
        np.testing.assert_allclose(
            norm.running_mean.numpy(), np.mean([m for m, _ in seen[index]], 0), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(norm.running_var.numpy(), np.mean([v for _, v in seen[index]], 0), rtol=1e-4)


def test_nothing_else_changes(network: nn.Sequential) -> None:
    network.train()
    network[2].eval()
    network[1].momentum = None
    weights = [parameter.detach().clone() for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    recalibrate(network, batches())
    assert [module.training for module in network.modules()] == modes
    assert network[1].momentum is None
    assert network[5].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_it_does_not_depend_on_earlier_statistics(network: nn.Sequential) -> None:
    recalibrate(network, batches())
    once = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network[5].running_var.fill_(100)
    network.train()
    recalibrate(network, iter(batches()))
    assert all(torch.equal(tensor, once[name]) for name, tensor in network.state_dict().items())


def test_modes_are_restored_after_an_error(network: nn.Sequential) -> None:
    network.train()
    with pytest.raises(RuntimeError):
        recalibrate(network, [batches()[0], torch.zeros(2, 7, 8, 8)])
    assert all(module.training for module in network.modules())
    assert network[5].momentum == 0.3


def test_no_batch_is_an_error_and_changes_nothing(network: nn.Sequential) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match="needs at least one batch"):
        recalibrate(network, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_recalibrated_network_is_close_to_its_batch_statistics() -> None:
    """With the same batch, only Bessel's correction differs: about 1 / (2 n) of a standard deviation."""
    sample = specimen("small_mobilenet_v2")
    network = sample.real(sample.graph.default)
    images = sample.images(64)
    recalibrate(network, [images])
    with torch.no_grad():
        running, batch = network.eval()(images), network.train()(images)
    assert float((running - batch).norm() / batch.norm()) < 0.05


def test_a_supernet_has_nothing_to_recalibrate(network: nn.Sequential) -> None:
    """This is an error, because the user would otherwise rely on its statistics."""
    supernet = Supernet(network, trace(network, torch.empty(1, 3, 8, 8)))
    with pytest.raises(UserError, match=r"recalibrate\(supernet\.extract\(channels\)"):
        recalibrate(supernet, batches())
    plain = supernet.extract(supernet.widest)
    assert recalibrate(plain, batches()) == 4
