"""AdamW, clipped gradients, averaged weights and a teacher, in the training loop and in the stages' trainings."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from failures import KilledError, kill_in, message_of
from safetensors.torch import load_file
from small_data import SPAN, prepared_digits, recipe, run_context, small_network
from torch import Tensor, nn

from autoslim import Supernet, resize
from autoslim.channels.resize import initialise
from autoslim.data.augmentation import Augmentation
from autoslim.data.prepared import PreparedData
from autoslim.supernet.sandwich import Sandwich
from autoslim.supernet.train import train_supernet
from autoslim.tasks.classification import smoothed_cross_entropy
from autoslim.training.averaging import AveragedWeights
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import autocast
from autoslim.training.distillation import Teacher, taught_step
from autoslim.training.loop import Plan, Row, label_step, train
from autoslim.training.recipe import Recipe, adamw, sgd
from autoslim.training.retrain import retrain

STEPS = 8  # per epoch
FP32 = autocast(torch.device("cpu"), "fp32")
EVERYTHING: dict[str, Any] = {
    "optimiser_name": "adamw",
    "learning_rate": 0.01,
    "clip_norm": 0.5,
    "ema": 0.9,
    "augmentation": Augmentation(1, True, (0.5, 1.0), 0.2, "rand_augment", 2, 5, 0.3, 0.4, 1.0),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepared_digits(tmp_path_factory.mktemp("data") / "prepared")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Returns whether all tensors are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def small() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def drawn_batches(epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(skip, STEPS):
        generator = torch.Generator().manual_seed(100 * epoch + index)
        yield torch.randn(10, 6, generator=generator), torch.randint(3, (10,), generator=generator)


def trained(network: nn.Module, optimiser: torch.optim.Optimizer, folder: Path, **options: Any) -> list[Row]:
    return train(
        network,
        optimiser,
        Plan(2, STEPS),
        step=label_step(network, F.cross_entropy, FP32),
        batches=drawn_batches,
        learning_rate=lambda number: 0.1 / (number + 1),
        observe=lambda row: None,
        checkpoints=Checkpoints(folder, "run", "key"),
        name="run",
        label="test",
        **({"validate": dict} | options),
    )


# The loop


def test_the_loop_equals_one_written_by_hand(tmp_path: Path) -> None:
    """The average is computed in double precision, from its formula."""
    network, reference = small(), small()
    decayed = [reference[0].weight, reference[3].weight]
    others = [p for p in reference.parameters() if not any(p is weight for weight in decayed)]
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    by_hand = torch.optim.AdamW(groups, **settings, fused=True)
    average = {name: tensor.double() for name, tensor in reference.state_dict().items()}
    norms, validated = [], []
    for number, (images, labels) in enumerate(batch for epoch in range(2) for batch in drawn_batches(epoch, 0)):
        for group in by_hand.param_groups:
            group["lr"] = 0.1 / (number + 1)
        by_hand.zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), 1.0)))
        by_hand.step()
        decay = min(0.9, (2 + number) / (11 + number))
        for name, tensor in reference.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    assert min(norms) < 1 < max(norms)

    optimiser = adamw(network, learning_rate=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)

    def validate() -> Row:
        validated.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {}

    trained(network, optimiser, tmp_path, clip_norm=1.0, ema=0.9, validate=validate)
    state = network.state_dict()
    assert same(validated[-1], state)
    assert state["1.num_batches_tracked"] == 2 * STEPS  # copied, not averaged
    for name, tensor in state.items():
        if name != "1.num_batches_tracked":
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(tensor, reference.state_dict()[name])
    saved = Checkpoints(tmp_path, "run", "key").load("run")
    assert saved is not None
    assert same(saved["network"], reference.state_dict())  # training itself does not see the average


def test_without_options_nothing_is_clipped_or_averaged(tmp_path: Path) -> None:
    network, reference = small(), small()
    optimisers = [
        sgd(each, learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0) for each in (network, reference)
    ]
    trained(network, optimisers[0], tmp_path)
    for number, (images, labels) in enumerate(batch for epoch in range(2) for batch in drawn_batches(epoch, 0)):
        for group in optimisers[1].param_groups:
            group["lr"] = 0.1 / (number + 1)
        optimisers[1].zero_grad()
        F.cross_entropy(reference(images), labels).backward()
        optimisers[1].step()
    assert same(network.state_dict(), reference.state_dict())
    saved = Checkpoints(tmp_path, "run", "key").load("run")
    assert saved is not None
    assert "average" not in saved


def test_a_validation_that_fails_leaves_the_trained_weights(tmp_path: Path) -> None:
    network = small()
    average = AveragedWeights(network, 0.9)
    with torch.no_grad():
        network[0].weight.add_(1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with average.applied(network):
        assert not torch.equal(network[0].weight, before["0.weight"])
    assert same(network.state_dict(), before)
    with pytest.raises(KilledError), average.applied(network):
        raise KilledError
    assert same(network.state_dict(), before)


def test_an_average_of_another_network_is_not_loaded() -> None:
    average, other = AveragedWeights(small(), 0.9), AveragedWeights(nn.Linear(6, 3), 0.9)
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(ValueError, match="another network"):
        average.load(other.state())
    assert same(average.tensors, before)


def test_narrow_configurations_of_a_supernet_use_the_average() -> None:
    network, graph = small_network()
    supernet = Supernet(resize(network, graph, graph.scaled(1.5)), graph).eval()
    narrow = graph.scaled(0.5, 2)
    average = AveragedWeights(supernet, 0.9)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.mul_(1.5)
    average.update(supernet)
    images = torch.rand(4, 1, 8, 8)
    supernet.select(narrow)
    own = supernet(images)
    with average.applied(supernet), torch.no_grad():
        averaged = supernet(images)
        expected = supernet.extract(narrow).train()(images)
    torch.testing.assert_close(averaged, expected)
    assert not torch.allclose(averaged, own)
    assert torch.equal(supernet(images), own)


# The stages' trainings


@pytest.mark.parametrize("kill", [3, STEPS, STEPS + 5])
def test_retraining_with_everything_resumes_bitwise(
    tmp_path: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    network, graph = small_network(dropout=0.5)
    initialise(teacher := resize(network, graph, graph.default), 3)

    def run(name: str, every: float = 0.0) -> Any:
        return retrain(
            network,
            graph,
            graph.scaled(0.5, 2),
            data,
            recipe(**EVERYTHING, epochs=2),
            run_context(every),
            seeds=[0],
            teacher=Teacher(teacher, 0.5, 2.0),
            label="test",
            folder=tmp_path / name,
            checkpoints=Checkpoints(tmp_path / "checkpoints", name, "key"),
            observe=lambda seed, row: None,
        )

    rows = run("whole", every=1e9)
    kill_in(monkeypatch, torch.optim.AdamW, kill)
    with pytest.raises(KilledError):
        run("torn")
    torch.manual_seed(12345)
    assert run("torn") == rows
    files = [(tmp_path / name / "seed-0.safetensors").read_bytes() for name in ("whole", "torn")]
    assert files[0] == files[1]


@pytest.mark.parametrize("kill", [4, STEPS])
def test_supernet_training_with_everything_resumes_bitwise(
    tmp_path: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    network, graph = small_network(dropout=0.5)

    def run(name: str, every: float = 0.0) -> Any:
        return train_supernet(
            network,
            graph,
            data,
            SPAN,
            recipe(**EVERYTHING, epochs=2),
            run_context(every),
            sandwich=Sandwich(random_widths=1, seed=1),
            name="test",
            folder=tmp_path / name,
            checkpoints=Checkpoints(tmp_path / "checkpoints", name, "key"),
            observe=lambda row: None,
        )

    whole = run("whole", every=1e9)
    kill_in(monkeypatch, torch.optim.AdamW, kill)
    with pytest.raises(KilledError):
        run("torn")
    torch.manual_seed(12345)
    assert run("torn") == whole
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "torn")]
    assert files[0] == files[1]


def test_the_average_is_evaluated_and_saved(tmp_path: Path, data: PreparedData) -> None:
    network, graph = small_network()
    rows = {}
    for name, ema in (("averaged", 0.9), ("plain", None)):
        rows[name] = retrain(
            network,
            graph,
            graph.default,
            data,
            recipe(epochs=2, ema=ema),
            run_context(0.0),
            seeds=[0],
            label="test",
            folder=tmp_path / name,
            checkpoints=Checkpoints(tmp_path, name, "key"),
            observe=lambda seed, row: None,
        )[0]
    assert [row["loss"] for row in rows["averaged"]] == [row["loss"] for row in rows["plain"]]
    saved = {name: load_file(tmp_path / name / "seed-0.safetensors") for name in rows}
    states = {name: Checkpoints(tmp_path, name, "key").load("seed-0") for name in rows}
    assert same(saved["averaged"], states["averaged"]["average"]["tensors"])  # type: ignore[index]
    assert same(saved["plain"], states["averaged"]["network"])  # type: ignore[index]
    assert not same(saved["plain"], saved["averaged"])


# The teacher


def test_a_network_that_equals_its_teacher_learns_nothing_from_it() -> None:
    network = nn.Linear(6, 3)
    images, labels = next(drawn_batches(0, 0))
    for temperature in (1.0, 4.0):
        network.zero_grad()
        taught_step(network, F.cross_entropy, Teacher(network, 1.0, temperature), FP32)(images, labels, 0)
        assert network.weight.grad is not None
        assert network.weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.7, 4.0), (1.0, 2.0)])
def test_gradients_with_a_teacher_by_their_formula(weight: float, temperature: float) -> None:
    """d loss / d logits = ((1 - w) (softmax(z) - y) + w T (softmax(z / T) - softmax(v / T))) / N."""
    torch.manual_seed(0)
    network = nn.Linear(6, 3).double()
    teacher = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).double()
    images, labels = next(drawn_batches(0, 0))
    images = images.double()
    with torch.no_grad():
        z, v = network(images), teacher[1](images)
        one_hot = F.one_hot(labels, 3)
        softened = (z / temperature).softmax(1) - (v / temperature).softmax(1)
        by_logits = ((1 - weight) * (z.softmax(1) - one_hot) + weight * temperature * softened) / len(images)
    taught_step(network, F.cross_entropy, Teacher(teacher, weight, temperature), FP32)(images, labels, 0)
    torch.testing.assert_close(network.weight.grad, by_logits.T @ images, rtol=1e-5, atol=1e-7)
    assert teacher[1].weight.grad is None


def test_a_teacher_of_a_network_with_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            out: Tensor = self.layer(first + second)
            return out

    torch.manual_seed(0)
    network, teacher = Sum(), Sum()
    images, labels = next(drawn_batches(0, 0))
    taught_step(network, F.cross_entropy, Teacher(teacher), FP32)((images, images), labels, 0)
    expected = nn.Linear(6, 3)
    expected.load_state_dict(network.layer.state_dict())
    taught_step(expected, F.cross_entropy, Teacher(teacher.layer), FP32)(2 * images, labels, 0)
    torch.testing.assert_close(network.layer.weight.grad, expected.weight.grad)


def test_soft_labels_with_smoothing_mix_the_smoothed_losses() -> None:
    """The cross-entropy is linear in the probabilities, so that of mixed labels is the mix of those of the labels."""
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    others = labels.roll(1, 0)
    mixed = 0.3 * F.one_hot(labels, 5) + 0.7 * F.one_hot(others, 5)
    expected = 0.3 * smoothed_cross_entropy(logits, labels, 0.1) + 0.7 * smoothed_cross_entropy(logits, others, 0.1)
    torch.testing.assert_close(smoothed_cross_entropy(logits, mixed, 0.1), expected)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.0}, "ema 1.0 is not possible; use a decay between 0 and 1, such as 0.999, or None for none"),
        ({"ema": 0.0}, "ema 0.0 is not possible; use a decay between 0 and 1, such as 0.999, or None for none"),
        ({"ema": math.nan}, "ema nan is not possible; use a decay between 0 and 1, such as 0.999, or None for none"),
        ({"clip_norm": 0.0}, "clip_norm 0.0 is not possible; use a norm above 0, or None for no clipping"),
        ({"clip_norm": math.nan}, "clip_norm nan is not possible; use a norm above 0, or None for no clipping"),
        ({"optimiser_name": "adam"}, "optimiser_name 'adam' does not exist; use sgd or adamw"),
    ],
)
def test_recipes_that_are_not_possible(changes: dict[str, Any], message: str) -> None:
    assert message_of(lambda: replace(recipe(), **changes)) == message


@pytest.mark.parametrize(
    ("weight", "temperature", "message"),
    [
        (0.0, 1.0, "teacher weight 0.0 is not possible; use a share above 0 and up to 1"),
        (1.5, 1.0, "teacher weight 1.5 is not possible; use a share above 0 and up to 1"),
        (0.5, 0.0, "teacher temperature 0.0 is not possible; use a number above 0, such as 1"),
    ],
)
def test_teachers_that_are_not_possible(weight: float, temperature: float, message: str) -> None:
    assert message_of(lambda: Teacher(nn.Identity(), weight, temperature)) == message


def test_a_recipe_without_the_new_fields_is_that_of_before() -> None:
    fields = {name: value for name, value in vars(recipe()).items() if name not in _NEW}
    assert Recipe(**fields) == recipe()
    assert isinstance(recipe().optimiser(small()), torch.optim.SGD)


_NEW = ("optimiser_name", "betas", "eps", "clip_norm", "ema")
