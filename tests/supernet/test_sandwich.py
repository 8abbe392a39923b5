"""Compares the sandwich step with separately built plain networks, and the losses with their formulas."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from specimens import batch_statistics, specimen, spread
from torch import Tensor, nn

from autoslim import Supernet, sandwich_step, trace
from autoslim.channels.grid import Grid, GridSpec
from autoslim.errors import UserError
from autoslim.supernet.sandwich import Per, Sandwich, random_subnet, random_width, sandwich_rule
from autoslim.tasks.classification import smoothed_cross_entropy, soft_cross_entropy
from autoslim.training.device import autocast

CLASSES = 10


def make_supernet(name: str, dtype: torch.dtype) -> tuple[Supernet, Grid]:
    """Returns a supernet in training mode, and its grid."""
    sample = specimen(name)
    width = 1.5 if name.startswith("small") else 0.25
    levels = sample.graph.grid(GridSpec(width=width, narrowest=0.1 * width, steps=6, divisor=2))
    supernet = Supernet(sample.real(levels.widest, dtype), sample.graph)
    return supernet.train(), levels


def batch(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images = specimen(name).images(6).to(dtype)
    return images, torch.arange(6) % CLASSES


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(1, keepdim=True).log()


def smoothed(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Returns the loss by definition: 1 - epsilon on the label, epsilon / (K - 1) on every other class."""
    target = torch.full_like(logits, epsilon / (logits.shape[1] - 1))
    target[torch.arange(len(labels)), labels] = 1 - epsilon
    return -(target * log_softmax(logits)).sum(1).mean()


@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("name", ["small_mobilenet_v2", "cifar_resnet18"])
def test_gradients_are_the_sum_of_those_of_plain_networks(name: str, distillation: bool) -> None:
    supernet, levels = make_supernet(name, torch.float64)
    images, labels = batch(name, torch.float64)
    configurations: list[Mapping[str, int]] = [levels.narrowest]
    configurations += [random_subnet(levels, 0, 0, index) for index in range(2)]
    plain = [batch_statistics(supernet.extract(channels)) for channels in (supernet.widest, *configurations)]
    plain = [network.train() for network in plain]
    logits = plain[0](images)
    loss = smoothed(logits, labels, 0.1)
    loss.backward()
    target = log_softmax(logits.detach()).exp()  # the soft targets, by hand
    for network in plain[1:]:
        narrow = network(images)
        if distillation:
            (-(target * log_softmax(narrow)).sum(1).mean()).backward()
        else:
            smoothed(narrow, labels, 0.1).backward()
    expected = [
        torch.stack(parts).sum(0)
        for parts in zip(*(spread(supernet.graph, n, supernet.widest) for n in plain), strict=True)
    ]
    label_loss = partial(smoothed_cross_entropy, smoothing=0.1)
    distil = soft_cross_entropy if distillation else False
    value = sandwich_step(supernet, (images, labels), configurations, loss=label_loss, distillation=distil)
    assert supernet.selected == supernet.widest
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    assert not value.requires_grad
    for parameter, gradient in zip(supernet.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)


def test_gradients_are_added_to_existing_ones() -> None:
    supernet, levels = make_supernet("cifar_resnet18", torch.float64)
    images, labels = batch("cifar_resnet18", torch.float64)
    narrowest = levels.narrowest
    sandwich_step(supernet, (images, labels), [narrowest])
    once = [parameter.grad.clone() for parameter in supernet.parameters() if parameter.grad is not None]
    weights = [parameter.detach().clone() for parameter in supernet.parameters()]
    sandwich_step(supernet, (images, labels), [narrowest])
    for parameter, gradient, weight in zip(supernet.parameters(), once, weights, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
        assert torch.equal(parameter, weight)  # the step does not call an optimiser


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_label_smoothing_by_its_formula(epsilon: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(20, classes, dtype=torch.float64, generator=generator)
    labels = torch.arange(20) % classes
    torch.testing.assert_close(
        smoothed_cross_entropy(logits, labels, epsilon), smoothed(logits, labels, epsilon), rtol=1e-12, atol=0
    )


# Losses, outputs and batches of any structure


class Heads(nn.Module):
    """Two inputs and two heads, in dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.height = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images).relu().mean((2, 3))
        return {"classes": self.classes(features), "height": self.height(features)}


def heads_loss(output: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(output["classes"], targets["classes"]) + F.mse_loss(output["height"], targets["height"])


def heads_distillation(output: Mapping[str, Tensor], widest: Mapping[str, Tensor]) -> Tensor:
    assert not any(tensor.requires_grad for tensor in widest.values())
    return soft_cross_entropy(output["classes"], widest["classes"]) + F.mse_loss(output["height"], widest["height"])


def two_heads() -> tuple[Supernet, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    network = Heads()
    supernet = Supernet(network.double(), trace(Heads(), torch.zeros(1, 3, 8, 8)))
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    targets = {"classes": torch.arange(6) % 4, "height": torch.randn(6, 1, dtype=torch.float64)}
    return supernet, images, targets


@pytest.mark.parametrize("distillation", [heads_distillation, True, False])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"images": x}], ids=["one", "list", "mapping"])
def test_any_loss_output_and_batch(distillation: Any, wrap: Callable[[Tensor], Any]) -> None:
    """With a loss of one's own there is no default distillation. Gradients are those of plain networks."""
    supernet, images, targets = two_heads()
    plain = [supernet.extract({"body": count}) for count in (8, 3)]
    widest, narrow = plain[0](images), plain[1](images)
    heads_loss(widest, targets).backward()
    detached = {name: tensor.detach() for name, tensor in widest.items()}
    (heads_distillation(narrow, detached) if callable(distillation) else heads_loss(narrow, targets)).backward()
    sandwich_step(supernet, [wrap(images), targets], [{"body": 3}], loss=heads_loss, distillation=distillation)
    expected = zip(*(spread(supernet.graph, network, supernet.widest) for network in plain), strict=True)
    for parameter, parts in zip(supernet.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(0), rtol=1e-9, atol=1e-12)


def test_losses_can_be_scaled() -> None:
    supernet, images, targets = two_heads()
    batch = (images, targets)
    value = sandwich_step(supernet, batch, [{"body": 3}], loss=heads_loss)
    once = [parameter.grad.clone() for parameter in supernet.parameters() if parameter.grad is not None]
    supernet.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = sandwich_step(
        supernet, batch, [{"body": 3}], loss=heads_loss, backward=lambda loss: scaler.scale(loss).backward()
    )
    assert torch.equal(value, scaled)  # the loss itself is not scaled
    scaler.unscale_(optimiser := torch.optim.SGD(supernet.parameters(), 0.1))
    for parameter, gradient in zip(supernet.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, gradient)
    scaler.step(optimiser)


def test_the_widest_configuration_is_selected_after_a_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, images, targets = two_heads()
    with pytest.raises(UserError, match=r"loss must return a scalar tensor, but it returned a value of shape \(6, 4\)"):
        sandwich_step(supernet, (images, targets), [], loss=lambda output, _: output["classes"])
    with pytest.raises(UserError, match=r"distillation must return a scalar .* of type dict; use its mean"):
        sandwich_step(
            supernet, (images, targets), [{"body": 3}], loss=heads_loss, distillation=lambda output, _: output
        )
    assert supernet.selected == {"body": 8}
    with pytest.raises(UserError, match=r"must be a pair \(inputs, targets\), but this one is a dict; convert it"):
        sandwich_step(supernet, targets, [])
    message = r"needs logits .* and the targets are .*; pass the name of a task, .* or a function of your own as loss"
    for output in (lambda output: output, lambda output: output["height"]):  # one class: a loss that is always zero
        monkeypatch.setattr(supernet, "forward", lambda images, of=output: of(supernet.network(images)))
        with pytest.raises(UserError, match=message):
            sandwich_step(supernet, (images, targets["height"]), [])


# Random subnets


def test_random_subnets_are_keyed_by_seed_step_and_index() -> None:
    levels = make_supernet("small_mobilenet_v2", torch.float32)[1]
    same = {str(random_subnet(levels, 1, 2, 3)) for _ in range(3)}
    others = {str(random_subnet(levels, *key)) for key in [(0, 2, 3), (1, 1, 3), (1, 2, 2), (1, 23, 0), (12, 2, 3)]}
    assert len(same) == 1
    assert len(others | same) == 6


def test_random_subnets_are_on_the_grid_and_cover_it_evenly() -> None:
    """The levels of each group are equally likely (within 5 standard errors), and groups are independent."""
    levels = {"a": (24, 16, 8), "b": (64, 32), "c": (7,), "d": (10, 9, 8, 7, 6)}
    draws = [random_subnet(levels, 0, step, 0) for step in range(4000)]
    assert all(draw.keys() == levels.keys() for draw in draws)
    for name, options in levels.items():
        share = 1 / len(options)
        for level in options:
            count = sum(draw[name] == level for draw in draws)
            assert abs(count - 4000 * share) <= 5 * (4000 * share * (1 - share)) ** 0.5
    together = sum(draw["a"] == 24 and draw["b"] == 64 for draw in draws)
    assert abs(together - 4000 / 6) < 5 * (4000 / 6 * 5 / 6) ** 0.5


def test_a_random_width_is_at_the_same_position_in_all_groups_and_covers_the_grid_evenly() -> None:
    levels = {"a": (24, 16, 8), "b": (60, 50, 40, 30, 20, 10), "c": (7,)}
    draws = [random_width(levels, 0, step, 0) for step in range(4000)]
    assert draws[0] == random_width(levels, 0, 0, 0)
    assert len({str(random_width(levels, *key)) for key in [(seed, 0, i) for seed in range(9) for i in (0, 1)]}) > 1
    halves = dict(zip(levels["a"], [(60, 50), (40, 30), (20, 10)], strict=True))
    assert all(draw["b"] in halves[draw["a"]] and draw["c"] == 7 for draw in draws)
    for level in levels["b"]:
        assert abs(sum(draw["b"] == level for draw in draws) - 4000 / 6) < 5 * (4000 / 6 * 5 / 6) ** 0.5


# The rule in the training loop


@pytest.mark.parametrize(
    ("per", "drawn"),
    [
        ("group", [random_subnet, random_subnet]),
        ("network", [random_width, random_width]),
        ("both", [random_subnet, random_width]),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_rule_trains_widest_narrowest_and_random_ones(
    monkeypatch: pytest.MonkeyPatch, per: Per, drawn: list[Callable[..., Any]], count: int
) -> None:
    supernet, levels = make_supernet("small_mobilenet_v2", torch.float32)
    selected: list[dict[str, int]] = []
    select = supernet.select

    def record(channels: Mapping[str, int]) -> None:
        selected.append(dict(channels))
        select(channels)

    monkeypatch.setattr(supernet, "select", record)
    step = sandwich_rule(
        supernet,
        levels,
        Sandwich(random_widths=count, random_widths_per=per, seed=5),
        label_smoothing=0.0,
        autocast=autocast(torch.device("cpu"), "fp32"),
    )
    images, labels = batch("small_mobilenet_v2", torch.float32)
    done = 0
    for number in range(3):
        selected.clear()
        step(images, labels, number)
        assert selected[:2] == [supernet.widest, levels.narrowest]
        turns = [drawn[(done + index) % 2] for index in range(count)]
        assert selected[-1] == supernet.widest
        assert selected[2:-1] == [draw(levels, 5, number, index) for index, draw in enumerate(turns)]
        done += count


@pytest.mark.parametrize("name", ["small_mobilenet_v2", "cifar_resnet18"])
def test_mixed_precision_gives_the_gradients_of_plain_networks_in_mixed_precision(name: str) -> None:
    """bf16 has 8 bits, so sums differ by rounding; gradients are compared, and remain fp32."""
    supernet, grid = make_supernet(name, torch.float32)
    images, labels = batch(name, torch.float32)
    mixed = autocast(torch.device("cpu"), "bf16")
    configurations = [supernet.widest, grid.narrowest, random_subnet(grid, 0, 0, 0)]
    plain = [batch_statistics(supernet.extract(channels)).train() for channels in configurations]
    with mixed():
        logits = plain[0](images)
        losses = [smoothed_cross_entropy(logits, labels, 0.1)]
        target = logits.detach().softmax(1, dtype=torch.float32)
        losses += [torch.nn.functional.cross_entropy(network(images), target) for network in plain[1:]]
    for loss in losses:
        loss.backward()
    parts = zip(*(spread(supernet.graph, network, supernet.widest) for network in plain), strict=True)
    expected = torch.cat([torch.stack(part).sum(0).flatten() for part in parts])
    step = sandwich_rule(supernet, grid, Sandwich(random_widths=1), label_smoothing=0.1, autocast=mixed)
    assert step(images, labels, 0).isfinite()
    gradients = [parameter.grad for parameter in supernet.parameters() if parameter.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    found = torch.cat([gradient.flatten() for gradient in gradients])
    assert float((found - expected).norm() / expected.norm()) < 0.01


def test_backward_passes_run_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, grid = make_supernet("small_mobilenet_v2", torch.float32)
    mixed = autocast(torch.device("cpu"), "bf16")
    active: list[bool] = []
    original = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        active.append(torch.is_autocast_enabled("cpu"))
        original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "backward", backward)
    step = sandwich_rule(supernet, grid, Sandwich(random_widths=2), label_smoothing=0.1, autocast=mixed)
    step(*batch("small_mobilenet_v2", torch.float32), 0)
    assert active == [False] * 4
