"""Tasks: losses, scores and measures against closed forms, and what is refused before training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_params
from torch import Tensor, nn

from autoslim import Measure, Supernet, Task, sandwich_step, slim, trace
from autoslim.data.prepared import DataInfo
from autoslim.data.structure import tensor_structure
from autoslim.errors import UserError
from autoslim.models.building import check_network
from autoslim.pipeline.checks import check_task
from autoslim.pipeline.params import check_params
from autoslim.tasks.building import BUILT_IN, find_task, try_task
from autoslim.tasks.classification import CLASSIFICATION, Classification
from autoslim.tasks.evaluation import evaluate_measures
from autoslim.tasks.measure import TOP1, named_scores, scores_entry
from autoslim.tasks.multilabel import Multilabel
from autoslim.tasks.regression import Regression
from autoslim.tasks.segmentation import Segmentation
from autoslim.training.device import autocast

CAST = autocast(torch.device("cpu"), "fp32")


def described(*shape: int, dtype: str = "float32", classes: int = 0) -> DataInfo:
    """Returns the description of data of the user's own: images (3, 8, 8), and targets of a shape and dtype."""
    return DataInfo(
        "my_data.py:build",
        tuple(map(str, range(classes))),
        3,
        (8, 8),
        (),
        (),
        {},
        storage="own",
        targets=tensor_structure(*shape, dtype=dtype),
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Losses and scores

TARGETS: dict[str, tuple[tuple[int, ...], Tensor]] = {
    "classification": ((6, 4), torch.tensor([0, 3, 1, 1, 2, 0])),
    "multilabel": ((6, 4), (drawn(6, 4, seed=1) > 0).float()),
    "segmentation": ((6, 4, 5, 7), torch.randint(4, (6, 5, 7), generator=torch.Generator().manual_seed(2))),
    "regression": ((6, 3), drawn(6, 3, seed=3)),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_loss_is_the_mean_of_the_scores_of_samples(name: str) -> None:
    """This holds for targets without ignored pixels. The sums of scores are those of the samples."""
    task, (shape, target) = find_task(name), TARGETS[name]
    output = drawn(*shape)
    scores = task.sample_scores(output, target)
    assert scores.shape == (2, 6)
    assert float(task.loss(output, target)) == pytest.approx(float(scores[1].mean()), rel=1e-6)
    torch.testing.assert_close(task.summed_scores(output, target), scores.sum(1))
    alone = torch.cat([task.sample_scores(output[i : i + 1], target[i : i + 1]) for i in range(6)], 1)
    torch.testing.assert_close(alone, scores)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_gradient_of_distillation_vanishes_at_the_teachers_output(name: str) -> None:
    task, (shape, _) = find_task(name), TARGETS[name]
    teacher = drawn(*shape)
    output = teacher.clone().requires_grad_()
    task.distillation(output, teacher).backward()
    assert output.grad is not None
    assert float(output.grad.abs().max()) < 1e-7
    task.distillation(other := (teacher + 1).detach().requires_grad_(), teacher * 2).backward()
    assert float(other.grad.abs().max()) > 1e-4


def test_soft_labels_equal_class_numbers() -> None:
    output, labels = drawn(6, 4).float(), TARGETS["classification"][1]
    soft = F.one_hot(labels, 4).float()
    for smoothing in (0.0, 0.2):
        losses = [float(CLASSIFICATION.smoothed_loss(output, target, smoothing)) for target in (labels, soft)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(CLASSIFICATION.sample_scores(output, labels), CLASSIFICATION.sample_scores(output, soft))
    mixed = 0.3 * soft + 0.7 * soft.flip(0)
    parts = [float(CLASSIFICATION.loss(output, target)) for target in (soft, soft.flip(0))]
    assert float(CLASSIFICATION.loss(output, mixed)) == pytest.approx(0.3 * parts[0] + 0.7 * parts[1], rel=1e-5)


def test_ignored_pixels_do_not_count() -> None:
    task, output = Segmentation(), drawn(2, 3, 4, 4)
    target = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    masked = target.clone()
    masked[:, 2:] = 255
    torch.testing.assert_close(task.sample_scores(output, masked), task.sample_scores(output[:, :, :2], target[:, :2]))
    torch.testing.assert_close(task.loss(output, masked), task.loss(output[:, :, :2], target[:, :2]))
    nothing = torch.full((2, 4, 4), 255)
    assert float(task.loss(output, nothing)) == 0
    assert torch.equal(task.sample_scores(output, nothing), torch.zeros(2, 2))


def test_outputs_may_be_mappings_and_single_numbers() -> None:
    output, target = drawn(2, 3, 4, 4), torch.ones(2, 4, 4)
    task = Segmentation()
    assert torch.equal(task.loss({"out": output}, target), task.loss(output, target))
    regression = Regression()
    single, numbers = drawn(5, 1), drawn(5, seed=1).float()
    assert torch.equal(regression.loss(single, numbers), regression.loss(single[:, 0], numbers))
    assert regression.sample_scores(single, numbers).shape == (2, 5)


# Measures


def test_the_measures_are_those_of_all_samples_together() -> None:
    """They do not depend on how samples are divided into chunks; the mean IoU counts the pixels of all images."""
    output, target = (
        drawn(12, 3, 4, 4).float(),
        torch.randint(3, (12, 4, 4), generator=torch.Generator().manual_seed(1)),
    )
    info, network = described(4, 4, dtype="int64", classes=3), nn.Identity()
    chunks = list(zip(output.split([5, 5, 2]), target.split([5, 5, 2]), strict=True))
    found = evaluate_measures(Segmentation(), info, network, chunks, CAST)
    predicted = output.argmax(1)
    both = [((predicted == each) & (target == each)).sum() for each in range(3)]
    either = [((predicted == each) | (target == each)).sum() for each in range(3)]
    mean = sum(float(b / e) for b, e in zip(both, either, strict=True)) / 3
    accuracy = float((predicted == target).float().mean())
    assert found.values == {"mean_iou": pytest.approx(mean), "pixel_accuracy": pytest.approx(accuracy)}
    assert [measure.name for measure in Segmentation().measures(info)] == list(found.values)
    assert found.score.images == 12


def test_classification_needs_no_metric() -> None:
    info = described(dtype="int64", classes=4)
    output, labels = drawn(6, 4).float(), TARGETS["classification"][1]
    found = evaluate_measures(CLASSIFICATION, info, nn.Identity(), [(output, labels)], CAST)
    assert found.values == {"top1": 1 - int((output.argmax(1) != labels).sum()) / 6}
    assert CLASSIFICATION.measures(info) == [TOP1]


@pytest.mark.parametrize(
    ("measure", "texts"),
    [
        (TOP1, ["97.62", "+0.15", "97.6%", "top-1 (%)", "points"]),
        (
            Measure("mae", "error", "years", higher_is_better=False),
            ["0.9762", "+0.0015", "0.9762 years", "error (years)", "years"],
        ),
        (Measure("r2", "R²", ""), ["0.9762", "+0.0015", "0.9762", "R²", ""]),
    ],
)
def test_how_numbers_are_written(measure: Measure, texts: list[str]) -> None:
    written = [measure.number(0.9762), measure.number(0.0015, "+"), measure.short(0.9762), measure.header()]
    assert [*written, measure.unit_of_differences] == texts
    with pytest.raises(UserError, match="'mean IoU'; use lower-case letters"):
        Measure("mean IoU", "mean IoU")


def test_files_name_the_scores_of_other_tasks() -> None:
    assert scores_entry(TOP1, "cross_entropy") == {}
    assert named_scores({}) == (TOP1, "cross_entropy")
    for task in (Regression(), Segmentation()):
        assert named_scores(scores_entry(task.score, task.loss_name)) == (task.score, task.loss_name)


# Misfits


class Net(nn.Module):
    """Returns an output of a shape, from convolutions of images (3, 8, 8)."""

    def __init__(self, *shape: int, key: str = "") -> None:
        super().__init__()
        self.shape, self.key, self.layer = shape, key, nn.Linear(3, 1)

    def forward(self, images: Tensor) -> Any:
        output = self.layer(images.mean((2, 3))).reshape(-1, *[1] * len(self.shape)).expand(-1, *self.shape)
        return {self.key: output} if self.key else output


@pytest.mark.parametrize(
    ("task", "info", "network", "message"),
    [
        (Classification(), described(3), Net(3), ""),
        (Classification(), described(dtype="int64", classes=3), Net(3), ""),
        (Classification(), described(dtype="int64", classes=3), Net(4), "4 outputs for 3 classes of data; set model.k"),
        (
            Classification(),
            described(8, 8, dtype="int64", classes=3),
            Net(3),
            "a target of the data is 8x8 int64",
        ),
        (Multilabel(), described(5), Net(5), ""),
        (Multilabel(), described(5), Net(3), "returns 3 outputs for 5 labels of data; set model.kwargs.num_classes: 5"),
        (Multilabel(), described(dtype="int64", classes=5), Net(5), "task multilabel needs 0 or 1 for each label"),
        (Segmentation(), described(8, 8, dtype="int64", classes=3), Net(3, 8, 8), ""),
        (Segmentation(), described(8, 8, dtype="uint8", classes=3), Net(3, 8, 8, key="out"), ""),
        (Segmentation(), described(8, 8, dtype="int64"), Net(3, 8, 8), "add the attribute classes"),
        (Segmentation(), described(8, 8, dtype="int64", classes=2), Net(3, 8, 8), "3 outputs for 2 classes"),
        (Segmentation(), described(8, 8, dtype="int64", classes=3), Net(3, 4, 4), "maps of 4x4 for masks of 8x8"),
        (Segmentation(), described(8, 8, dtype="int64", classes=3), Net(3), "needs logits (N, classes, H, W)"),
        (Segmentation(), described(8, 8, dtype="int64", classes=3), Net(3, 8, 8, key="maps"), "returns dict for two"),
        (
            Segmentation(),
            described(dtype="int64", classes=3),
            Net(3, 8, 8),
            "needs a mask with the class of each",
        ),
        (Regression(), described(), Net(1), ""),
        (Regression(), described(), Net(), ""),
        (Regression(), described(2), Net(2), ""),
        (Regression(), described(2), Net(3), "for two samples with targets of shape (N, 2); change its last layer"),
        (Regression(), described(dtype="int64"), Net(1), "needs numbers with a decimal point"),
    ],
)
def test_a_network_or_data_that_do_not_fit_the_task(task: Task, info: DataInfo, network: Net, message: str) -> None:
    if not message:
        check_network(network, "net", info, task)
        return
    with pytest.raises(UserError) as error:
        check_network(network, "net", info, task)
    assert str(error.value).startswith("model 'net' ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "regression",
            {"search": {"score": "cross_entropy"}},
            "search.score is cross_entropy, but the scores of task regression are error (mean absolute",
        ),
        (
            "regression",
            {"search": {"score": "loss"}},
            "retrain.label_smoothing is 0.1, which has no meaning for task",
        ),
        ("multilabel", {"search": {"score": "error"}, "retrain": {"label_smoothing": 0.0}}, ""),
        ("classification", {"search": {"score": "loss"}}, ""),
        ("classification", {"retrain": {"label_smoothing": 0.9}}, "with 4 classes it must be at most 0.75"),
    ],
)
def test_parameters_without_meaning_for_the_task(task: str, changes: dict[str, Any], message: str) -> None:
    params = check_params(tiny_params({"task": task, **changes}), "params.yaml")
    if not message:
        check_task(params, described(4), find_task(task))
        return
    with pytest.raises(UserError) as error:
        check_task(params, described(dtype="int64", classes=4), find_task(task))
    assert message in str(error.value)


# Tasks of the user's own

GOOD = """
import torch
from autoslim import Measure, Task


class Mine(Task):
    name = "mine"
    score = Measure("mine", "my error", "", higher_is_better=False)

    def loss(self, output, target):
        return (output[:, 0] - target).square().mean()

    def sample_scores(self, output, target):
        return (output[:, 0] - target).abs().expand(2, -1)
"""


def refused(code: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """Returns the error of a task in a file, tried with a network and data of single numbers; "" if it is accepted."""
    monkeypatch.chdir(folder)
    Path("my_task.py").write_text(code)
    try:
        try_task(find_task("my_task.py:Mine"), described(), torch.zeros(2, 1, device="meta"))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", ""),
        ("(Task)", "", "is a Mine; derive its class from autoslim.Task"),
        ("def loss", "def losses", "cannot be built: Can't instantiate abstract class Mine with"),
        ("class Mine", "class Mines", "my_task.py has no callable 'Mine'; similar names are Mines"),
        ('    name = "mine"\n', "", "has no attribute name of type str; add one to its class, such as name = 'depth'"),
        ("score = Measure(", "score = str(", "cannot be imported: "),
        (
            ".square().mean()",
            ".square()",
            "task mine: loss returns a tensor of shape (2,); return a scalar",
        ),
        (
            ".abs().expand(2, -1)",
            ".abs().mean()",
            "sample_scores returns a tensor of shape () for two samples",
        ),
        ("output[:, 0]", "output.depth", "task mine: loss does not accept the output of the network and the"),
    ],
)
def test_a_task_of_ones_own(old: str, new: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = refused(GOOD.replace(old, new) if old else GOOD, monkeypatch, tmp_path)
    assert message in found if message else not found


class Weighted(Classification):
    """A derived class that replaces one method of each kind."""

    name = "weighted"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, output.new_tensor([1.0, 2.0, 3.0, 4.0]))

    def sample_scores(self, output: Tensor, target: Tensor) -> Tensor:
        best = output.topk(2).indices
        wrong = (best != target[:, None]).all(1)
        return torch.stack([wrong.double(), F.cross_entropy(output, target, reduction="none")])


def test_a_derived_classification_is_trained_and_scored_by_its_own_methods() -> None:
    shape, target = TARGETS["classification"]
    output, task = drawn(*shape), Weighted()
    assert task.smoothed_loss(output, target, 0.0) == task.loss(output, target) != F.cross_entropy(output, target)
    top2 = (output.argsort(1, descending=True)[:, :2] == target[:, None]).any(1)
    assert task.summed_scores(output, target)[0] == (~top2).sum()


def test_labels_of_a_replaced_loss_are_not_smoothed() -> None:
    params, info = check_params(tiny_params({}), "params.yaml"), described(dtype="int64", classes=4)
    check_task(params, info, CLASSIFICATION)
    with pytest.raises(UserError, match=r"set it to 0\.0, or define its method smoothed_loss"):
        check_task(params, info, Weighted())
    check_task(params, info, type("Smoothing", (Weighted,), {"smoothed_loss": Classification.smoothed_loss})())


def test_a_task_without_distillation_is_told_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not refused(GOOD, monkeypatch, tmp_path)
    changes = {"task": "my_task.py:Mine", "search": {"score": "loss"}, "retrain": {"label_smoothing": 0.0}}
    params = check_params(tiny_params(changes), "params.yaml")
    with pytest.raises(UserError, match="has no distillation loss; define its method distillation, or set"):
        check_task(params, described(), find_task("my_task.py:Mine"))
    weights = {"model": {"weights": "trained.pt"}, "supernet": {"distillation": False, "width": 1.0}}
    taught = {"retrain": {"label_smoothing": 0.0, "teacher": "default"}}
    params = check_params(tiny_params(changes | weights | taught), "params.yaml")
    with pytest.raises(UserError, match=r"retrain\.teacher is default, but task .* set retrain\.teacher to null"):
        check_task(params, described(), find_task("my_task.py:Mine"))
    with pytest.raises(UserError, match="task 'segment' is unknown; write classification, multilabel, segmentation,"):
        find_task("segment")


# In one's own loop


def test_the_library_takes_a_task() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 3, 1))
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(3, (8, 8, 8))) for _ in range(2)]
    task = Segmentation()
    result = slim(network, torch.empty(1, 3, 8, 8), batches, batches, "60%", epochs=1, task=task)
    assert result.costs["macs"] <= 0.6 * result.default_costs["macs"]
    point = result.trajectory.points[0]
    result.supernet.eval().select(point.channels)
    with torch.no_grad():
        expected = [task.sample_scores(result.supernet(images), masks)[1] for images, masks in batches]
    assert point.score == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)

    graph = trace(network, torch.empty(1, 3, 8, 8))
    gradients = []
    for arguments in ({"task": task}, {"loss": task.loss, "distillation": task.distillation}):
        supernet = Supernet(copy.deepcopy(network), graph).train()
        supernet.zero_grad()
        sandwich_step(supernet, batches[0], [dict.fromkeys(graph.groups, 4)], **arguments)
        gradients.append([parameter.grad.clone() for parameter in supernet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
