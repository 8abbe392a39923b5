"""A network slimmed in one call: the result against its parts and the budget."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autoslim import GridSpec, GroupLimits, Slimmed, UserError, extract_network, slim
from autoslim.tasks.regression import Regression


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)),
    )


def loader(count: int, batch: int) -> DataLoader[Any]:
    """Images of noise with or without a gradient from left to right."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 2
    images = torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None] * torch.arange(8.0)
    return DataLoader(TensorDataset(images, labels), batch, shuffle=True, generator=generator)


def slimmed(budget: Any, **settings: Any) -> Slimmed:
    spec = settings.pop("spec", GridSpec(divisor=1))
    training, scoring = loader(128, 32), loader(64, 32)
    return slim(network(), torch.empty(1, 1, 8, 8), training, scoring, budget, epochs=2, spec=spec, **settings)


@pytest.mark.parametrize(
    ("budget", "resource"), [("50%", "macs"), ("2kB", "memory"), ({"macs": "60%", "params": "40%"}, "macs")]
)
def test_the_result_is_within_the_budget(budget: Any, resource: str) -> None:
    if resource == "memory":
        budget = "70%"
    start = network()
    before = copy.deepcopy(start.state_dict())
    found = slimmed(budget, resource=resource)
    limits = budget if isinstance(budget, dict) else {resource: budget}
    for name, text in limits.items():
        assert found.costs[name] <= float(text.rstrip("%")) / 100 * found.default_costs[name]
    assert found.costs["params"] == sum(parameter.numel() for parameter in found.network.parameters())
    assert found.costs == {name: found.graph.cost(found.channels, name) for name in ("macs", "params", "memory")}
    assert not found.network.training
    images, labels = next(iter(loader(64, 64)))
    with torch.no_grad():
        assert float((found.network(images).argmax(1) == labels).float().mean()) > 0.9
    other = extract_network(found.supernet, found.trajectory.within("90%"), loader(128, 32))
    assert found.graph.macs() >= sum(p.numel() for p in other.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in start.state_dict().items())


def test_other_losses_scores_and_limits() -> None:
    """A regression of the label, with the first layer frozen."""

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(output[:, 0], labels.float())

    found = slimmed(
        {"params": "60%"},
        loss=loss,
        distillation=lambda output, widest: F.mse_loss(output, widest),
        score=lambda output, labels: (output[:, 0] - labels).square(),
        optimiser=lambda parameters: torch.optim.Adam(parameters, 0.01),
        spec=GridSpec(divisor=1, groups={"0": GroupLimits(freeze=True)}),
        recalibration_batches=2,
    )
    assert found.channels["0"] == 16
    assert found.costs["params"] <= 0.6 * found.default_costs["params"]


def test_wrong_arguments_are_found_before_the_training() -> None:
    with pytest.raises(UserError, match=r"the budget of 1 parameters is below the narrowest network, which has .*"):
        slimmed(1, resource="params")
    with pytest.raises(UserError, match="there is no latency table"):
        slimmed("1ms", resource="latency")
    with pytest.raises(UserError, match="pass a data loader, not an iterator"):
        slim(network(), torch.empty(1, 1, 8, 8), iter(loader(64, 32)), loader(64, 32), "50%", epochs=2)


class Pair(nn.Module):
    """A regression from an image and three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())
        self.last = nn.Linear(8 + 3, 1)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        return self.last(torch.cat([self.image(image).mean((2, 3)), numbers], 1))  # (N, 1)


def test_a_task_is_named_as_in_the_parameters() -> None:
    torch.manual_seed(0)
    images, numbers = torch.randn(64, 1, 8, 8), torch.randn(64, 3)
    batches = [((image, three), three.sum(1)) for image, three in zip(images.split(32), numbers.split(32), strict=True)]
    example = torch.empty(1, 1, 8, 8), torch.empty(1, 3)
    start = Pair()
    settings: dict[str, Any] = {"epochs": 1, "spec": GridSpec(divisor=1)}
    named, given = (
        slim(start, example, batches, batches, "60%", task=task, **settings) for task in ("regression", Regression())
    )
    assert named.channels == given.channels
    assert named.trajectory == given.trajectory
    for tensor, same in zip(named.network.parameters(), given.network.parameters(), strict=True):
        torch.testing.assert_close(tensor, same, rtol=0, atol=0)
    with pytest.raises(UserError, match="task 'regresion' is unknown; write classification, multilabel, segmentation"):
        slim(start, example, batches, batches, "60%", task="regresion")
    with pytest.raises(UserError, match="such as task='regression', or a function of your own as loss"):
        slim(start, example, batches, batches, "60%", **settings)
