"""The training loop: resuming after a kill, errors for numbers that are not finite, and the parts of a recipe."""

import csv
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from failures import KilledError, kill_in
from safetensors.torch import load_file
from small_data import SPAN, prepared_digits, recipe, run_context, small_network
from torch import Tensor, nn

from autoslim import Supernet, resize, trace
from autoslim.channels.resize import initialise
from autoslim.data.batches import even_chunk, search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.files import file_digest, run_key, write_atomically, write_json
from autoslim.models.architectures import mobilenet_v2
from autoslim.pipeline.artifacts import initial_weights_file, write_initial_weights
from autoslim.supernet.extract import subnet_extractor
from autoslim.supernet.sandwich import Sandwich
from autoslim.supernet.train import initial_supernet, train_supernet
from autoslim.tasks.classification import Classification
from autoslim.tasks.evaluation import evaluate
from autoslim.training.checkpoints import Checkpoints, load_weights
from autoslim.training.device import autocast
from autoslim.training.loop import Plan, Row, label_step, train, write_rows
from autoslim.training.recipe import learning_rate_at, sgd
from autoslim.training.retrain import evaluate_retrained, retrain

STEPS = 8  # per epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepared_digits(tmp_path_factory.mktemp("data") / "prepared")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Returns whether all tensors are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def disturb_generator() -> None:
    """Changes the state of torch's generator, as a new process would."""
    torch.manual_seed(12345)
    torch.rand(7)


# Resuming: the loop


class Run:
    """Trains a network with dropout on random data; the run can be killed at a step or after an epoch."""

    def __init__(self, checkpoints: Checkpoints, every: float, kill_at: int | None = None, kill_after: int = 0) -> None:
        torch.manual_seed(7)
        self.network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))
        self.optimiser = sgd(self.network, learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
        self.plan = Plan(3, STEPS, every)
        self.checkpoints, self.kill_at, self.kill_after = checkpoints, kill_at, kill_after
        self.observed: list[Row] = []
        self.steps: list[int] = []

    def go(self) -> list[Row]:
        loss = label_step(self.network, F.cross_entropy, autocast(torch.device("cpu"), "fp32"))

        def step(images: Tensor, labels: Tensor, number: int) -> Tensor:
            if number == self.kill_at:
                raise KilledError
            self.steps.append(number)
            return loss(images, labels, number)

        def observe(row: Row) -> None:
            self.observed.append(row)
            if row["epoch"] == self.kill_after:
                raise KilledError

        return train(
            self.network,
            self.optimiser,
            self.plan,
            step=step,
            batches=drawn_batches,
            learning_rate=lambda step: 0.1 / (step + 1),
            validate=lambda: {"draw": float(torch.rand(()))},  # validation may use the generator too
            observe=observe,
            checkpoints=self.checkpoints,
            name="run",
            label="test",
        )


def drawn_batches(epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(skip, STEPS):
        generator = torch.Generator().manual_seed(100 * epoch + index)
        yield torch.randn(10, 6, generator=generator), torch.randint(3, (10,), generator=generator)


@pytest.mark.parametrize(
    ("kill", "resumed_at"),
    [
        ({"kill_at": 0}, 0),
        ({"kill_at": 4}, 4),  # in the first epoch
        ({"kill_at": STEPS + 7}, STEPS + 7),  # in the second
        ({"kill_at": STEPS}, STEPS),  # between two epochs
        ({"kill_after": 1}, STEPS),  # after an epoch's checkpoint, before its row is observed
        ({"kill_after": 3}, 3 * STEPS),  # after the last checkpoint, before its row is observed
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, kill: dict[str, int], resumed_at: int) -> None:
    whole = Run(Checkpoints(tmp_path, "whole", "a"), every=1e9)
    rows = whole.go()
    torn = Run(Checkpoints(tmp_path, "torn", "a"), every=0, **kill)
    with pytest.raises(KilledError):
        torn.go()
    disturb_generator()
    again = Run(Checkpoints(tmp_path, "torn", "a"), every=0)
    assert again.go() == rows == again.observed
    assert again.steps == list(range(resumed_at, 3 * STEPS))
    assert same(again.network.state_dict(), whole.network.state_dict())
    states = [run.optimiser.state_dict()["state"] for run in (again, whole)]
    assert all(torch.equal(states[0][i]["momentum_buffer"], states[1][i]["momentum_buffer"]) for i in states[1])


def test_a_run_can_be_killed_again_and_again(tmp_path: Path) -> None:
    whole = Run(Checkpoints(tmp_path, "whole", "a"), every=1e9)
    rows = whole.go()
    for number in range(2, 3 * STEPS, 4):
        disturb_generator()
        with pytest.raises(KilledError):
            Run(Checkpoints(tmp_path, "torn", "a"), every=0, kill_at=number).go()
    last = Run(Checkpoints(tmp_path, "torn", "a"), every=0)
    assert last.go() == rows
    assert same(last.network.state_dict(), whole.network.state_dict())


def test_a_changed_key_never_resumes(tmp_path: Path) -> None:
    key = run_key(retrain={"epochs": 3, "optimiser": {"learning_rate": 0.1}}, inputs=["x"])
    with pytest.raises(KilledError):
        Run(Checkpoints(tmp_path, "stage", key), every=0, kill_at=7).go()
    other = run_key(retrain={"epochs": 3, "optimiser": {"learning_rate": 0.2}}, inputs=["x"])
    fresh = Run(Checkpoints(tmp_path, "stage", other), every=0)
    fresh.go()
    assert fresh.steps[0] == 0
    resumed = Run(Checkpoints(tmp_path, "stage", key), every=0)
    resumed.go()
    assert resumed.steps[0] == 7


def test_keys_depend_on_every_value_and_not_on_order() -> None:
    base: dict[str, Any] = {"a": {"x": 1, "y": [1, 2]}, "b": "text"}
    assert run_key(**base) == run_key(b="text", a={"y": [1, 2], "x": 1})
    others = [
        base | {"a": {"x": 2, "y": [1, 2]}},
        base | {"a": {"x": 1, "y": [2, 1]}},
        base | {"a": {"x": 1}},
        base | {"b": "Text"},
        base | {"c": None},
        {"a": base["b"], "b": base["a"]},
        base | {"a": {"x": "1", "y": [1, 2]}},
    ]
    assert len({run_key(**parts) for parts in [base, *others]}) == len(others) + 1


# Resuming: supernet training and retraining


@pytest.mark.parametrize("kill", [None, 5, STEPS, STEPS + 4])
def test_retraining_resumes_bitwise_with_dropout(
    tmp_path: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch, kill: int | None
) -> None:
    network, graph = small_network(dropout=0.5)
    channels = graph.scaled(0.5, 2)

    def run(name: str, every: float = 0.0) -> dict[int, list[Row]]:
        return retrain(
            network,
            graph,
            channels,
            data,
            recipe(),
            run_context(every),
            seeds=[0, 3],
            label="test",
            folder=tmp_path / name,
            checkpoints=Checkpoints(tmp_path / "checkpoints", name, "key"),
            observe=lambda seed, row: None,
        )

    rows = run("whole", every=1e9)
    if kill is not None:
        kill_in(monkeypatch, torch.optim.SGD, kill)
        with pytest.raises(KilledError):
            run("torn")
        disturb_generator()
    assert run("torn") == rows
    for seed in (0, 3):
        files = [(tmp_path / name / f"seed-{seed}.safetensors").read_bytes() for name in ("whole", "torn")]
        assert files[0] == files[1]
    assert (tmp_path / "whole/seed-0.safetensors").read_bytes() != (tmp_path / "whole/seed-3.safetensors").read_bytes()


@pytest.mark.parametrize("kill", [4, STEPS])
def test_supernet_training_resumes_bitwise(
    tmp_path: Path, data: PreparedData, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    network, graph = small_network(dropout=0.5)

    def run(name: str, every: float = 0.0) -> Any:
        return train_supernet(
            network,
            graph,
            data,
            SPAN,
            recipe(epochs=2, channels_last=True),
            run_context(every),
            sandwich=Sandwich(random_widths=2, seed=1),
            name="test",
            folder=tmp_path / name,
            checkpoints=Checkpoints(tmp_path / "checkpoints", name, "key"),
            observe=lambda row: None,
        )

    whole = run("whole", every=1e9)
    kill_in(monkeypatch, torch.optim.SGD, kill)
    with pytest.raises(KilledError):
        run("torn")
    disturb_generator()
    assert run("torn") == whole
    for file in ("weights.safetensors", "supernet.json"):
        assert (tmp_path / "torn" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# Numbers that are no longer finite


def diverging(checkpoints: Checkpoints, at: int, what: str) -> tuple[nn.Module, Callable[[], list[Row]]]:
    """Returns a network and its run, whose loss or gradient is not finite at step ``at`` (from 0)."""
    network = nn.Linear(6, 3)
    loss = label_step(network, F.cross_entropy, autocast(torch.device("cpu"), "fp32"))

    def step(images: Tensor, labels: Tensor, number: int) -> Tensor:
        value = loss(images, labels, number)
        if number == at and what == "gradient":
            assert network.weight.grad is not None
            network.weight.grad[0, 0] = math.inf
        return value * float(what) if number == at and what != "gradient" else value

    def go() -> list[Row]:
        return train(
            network,
            sgd(network, learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.0),
            Plan(3, STEPS, 0),
            step=step,
            batches=drawn_batches,
            learning_rate=lambda step: 0.1,
            validate=dict,
            observe=lambda row: None,
            checkpoints=checkpoints,
            name="run",
            label="test",
        )

    return network, go


@pytest.mark.parametrize(
    ("at", "what", "message", "saved"),
    [
        (STEPS + 4, "nan", f"the loss is nan at step {STEPS + 5} (epoch 2); the last valid weights are in ", STEPS + 4),
        (STEPS + 3, "inf", f"the loss is inf at step {STEPS + 4} (epoch 2); the last valid weights are in ", STEPS + 3),
        (STEPS - 1, "nan", f"the loss is nan at step {STEPS} (epoch 1); the last valid weights are in ", STEPS - 1),
        (0, "nan", "the loss is nan at step 1 (epoch 1); no checkpoint was written before; lower", None),
        # The last step of an epoch: its loss is finite, the weights after it are not.
        (STEPS - 1, "gradient", f"weights are no longer finite after step {STEPS} (epoch 1); the", STEPS - 1),
        (
            3 * STEPS - 1,
            "gradient",
            f"weights are no longer finite after step {3 * STEPS} (epoch 3); the",
            3 * STEPS - 1,
        ),
    ],
)
def test_a_number_that_is_not_finite_raises_with_the_step_and_keeps_finite_weights(
    tmp_path: Path, at: int, what: str, message: str, saved: int | None
) -> None:
    checkpoints = Checkpoints(tmp_path, "run", "key")
    _, go = diverging(checkpoints, at, what)
    with pytest.raises(UserError) as error:
        go()
    assert str(error.value).startswith(message)
    assert "lower learning_rate, or set precision to fp32" in str(error.value)
    assert "\n" not in str(error.value)
    state = checkpoints.load("run")
    if saved is None:
        assert state is None
        return
    assert state is not None
    assert str(checkpoints.path("run")) in str(error.value)
    assert state["step"] == saved
    assert all(tensor.isfinite().all() for tensor in state["network"].values())


def test_a_learning_rate_that_is_far_too_high_is_named(tmp_path: Path, data: PreparedData) -> None:
    network, graph = small_network()
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+ \(epoch \d\); .* lower learning_rate"):
        train_supernet(
            network,
            graph,
            data,
            SPAN,
            recipe(learning_rate=1e30),
            run_context(),
            sandwich=Sandwich(random_widths=1),
            name="test",
            folder=tmp_path,
            checkpoints=Checkpoints(tmp_path, "run", "key"),
            observe=lambda row: None,
        )
    assert not (tmp_path / "weights.safetensors").exists()


# Accuracy


def test_a_supernet_learns_the_digits(tmp_path: Path, data: PreparedData) -> None:
    """Chance is 10 %. Rows have the loss, the learning rate and the accuracy of widest, default and narrowest."""
    network, graph = small_network()
    observed: list[Row] = []
    rows, scores = train_supernet(
        network,
        graph,
        data,
        SPAN,
        recipe(epochs=15),
        run_context(),
        sandwich=Sandwich(random_widths=1),
        name="test",
        folder=tmp_path,
        checkpoints=Checkpoints(tmp_path, "run", "key"),
        observe=observed.append,
    )
    assert rows == observed
    assert list(rows[0]) == ["epoch", "learning_rate", "loss", "widest_top1", "default_top1", "narrowest_top1"]
    assert [row["epoch"] for row in rows] == list(range(1, 16))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["widest_top1"] == pytest.approx(1 - scores["widest"].error)
    assert scores["widest"].error < 0.6


def test_test_accuracy_is_that_of_the_files_written(tmp_path: Path, data: PreparedData) -> None:
    """It is compared with the accuracy computed here from the stored weights."""
    network, graph = small_network()
    channels = graph.scaled(0.75, 2)
    retrain(
        network,
        graph,
        channels,
        data,
        recipe(),
        run_context(),
        seeds=[5],
        label="test",
        folder=tmp_path,
        checkpoints=Checkpoints(tmp_path, "run", "key"),
        observe=lambda seed, row: None,
    )
    found = evaluate_retrained(network, graph, channels, data, recipe(), run_context(), seeds=[5], folder=tmp_path)
    plain = resize(network, graph, channels).eval()
    load_weights(plain, tmp_path / "seed-5.safetensors")
    pixels = torch.from_numpy(np.array(data.images("test"))).float() / 255
    images = (pixels - torch.tensor(data.info.mean)[:, None, None]) / torch.tensor(data.info.std)[:, None, None]
    with torch.no_grad():
        right = plain(images).argmax(1).numpy() == data.labels("test")
    assert found == {5: {"top1": pytest.approx(right.mean())}}


# Starting from the supernet


def test_an_extracted_subnet_equals_the_supernet_at_its_channels(data: PreparedData) -> None:
    """It has the first channels of each layer and the running statistics of the search images."""
    network, graph = small_network()
    levels = graph.grid(SPAN)
    supernet = initial_supernet(network, graph, {name: counts[0] for name, counts in levels.items()}, 0, trained=False)
    channels = {name: counts[len(counts) // 2] for name, counts in levels.items()}
    cut = subnet_extractor(supernet, data, run_context(), seed=0)(channels)
    wide = dict(supernet.network.named_parameters())
    for name, parameter in cut.named_parameters():
        assert torch.equal(parameter, wide[name][tuple(slice(size) for size in parameter.shape)])
    assert cut.state_dict().keys() == network.state_dict().keys()
    [(images, _)] = search_chunks(
        data, images=2048, chunk=256, seed=0, device=run_context().device, workers=run_context().workers
    )  # all of them, in one
    supernet.select(channels)
    count = len(images) * 4  # the smallest number of values per channel
    with torch.no_grad():
        torch.testing.assert_close(cut.eval()(images), supernet(images), rtol=4 / count, atol=0.02)


def test_a_subnet_wider_than_the_supernet_is_an_error() -> None:
    network, graph = small_network()
    supernet = initial_supernet(network, graph, graph.default, 0, trained=False)
    name = next(iter(graph.groups))
    wider = {**graph.default, name: graph.default[name] + 1}
    with pytest.raises(UserError, match=f"group {name} has at most {graph.default[name]} channels in this supernet"):
        supernet.extract(wider)


def test_retraining_starts_from_the_initial_weights(tmp_path: Path, data: PreparedData) -> None:
    """With a negligible learning rate, every seed returns these weights."""
    network, graph = small_network()
    channels = graph.scaled(0.75, 2)
    given = resize(network, graph, channels)
    initialise(given, 7)
    write_initial_weights(tmp_path, "start", given)
    retrain(
        network,
        graph,
        channels,
        data,
        dataclasses.replace(recipe(), learning_rate=1e-30),
        run_context(),
        seeds=[0, 1],
        start=initial_weights_file(tmp_path, "start"),
        label="test",
        folder=tmp_path,
        checkpoints=Checkpoints(tmp_path, "run", "key"),
        observe=lambda seed, row: None,
    )
    for seed in (0, 1):
        load_weights(network := resize(network, graph, channels), tmp_path / f"seed-{seed}.safetensors")
        for name, parameter in given.named_parameters():
            assert torch.allclose(parameter, network.get_parameter(name), rtol=0, atol=1e-20)
    write_initial_weights(tmp_path, "nothing", None)
    assert load_file(tmp_path / "nothing.safetensors") == {}


# Parts


def test_learning_rates_by_their_formulas() -> None:
    total, base = 100, 0.4
    for step in range(total):
        assert learning_rate_at(step, total, base=base, schedule="linear") == pytest.approx(base * (1 - step / total))
        cosine = base * (1 + math.cos(math.pi * step / total)) / 2
        assert learning_rate_at(step, total, base=base, schedule="cosine") == pytest.approx(cosine)
        drops = base / 10 ** ((step >= 30) + (step >= 60) + (step >= 90))
        assert learning_rate_at(
            step, total, base=base, schedule="multistep", milestones=(0.3, 0.6, 0.9)
        ) == pytest.approx(drops)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "multistep"])
def test_warmup_rises_to_the_full_rate(schedule: Any) -> None:
    rates = [
        learning_rate_at(step, 50, base=1.0, schedule=schedule, warmup=10, milestones=(0.8,)) for step in range(50)
    ]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert all(a >= b > 0 for a, b in pairwise(rates[10:]))


def decay_by_parameter(network: nn.Module) -> dict[nn.Parameter, float]:
    optimiser = sgd(network, learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.5)
    return {p: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}


@pytest.mark.parametrize("in_channels", [3, 1])
@pytest.mark.parametrize("wrap", [lambda network, graph: network, Supernet], ids=["network", "supernet"])
def test_weight_decay_is_on_dense_weights_only(in_channels: int, wrap: Any) -> None:
    """These are dense convolutions, including the stem for grey images, and linear layers, as in the authors' code."""
    network = mobilenet_v2(10, 8, [[1, 8, 1, 1], [2, 8, 2, 2]], 16, in_channels=in_channels)
    graph = trace(network, torch.zeros(1, in_channels, 8, 8))
    decay = decay_by_parameter(wrap(network, graph))
    depthwise = 0
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dense = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
            depthwise += isinstance(module, nn.Conv2d) and not dense
            assert decay.pop(parameter) == (0.5 if dense and name == "weight" else 0.0)
    assert not decay
    assert depthwise == 3


def test_weight_decay_of_other_layers() -> None:
    """Grouped and transposed convolutions are decayed unless they are depthwise; other parameters by their shape."""
    network = nn.Module()
    network.grouped = nn.Conv2d(8, 8, 3, groups=4)
    network.transposed = nn.ConvTranspose2d(8, 1, 3)  # its weight has the shape of a depthwise one
    network.depthwise_transposed = nn.ConvTranspose2d(8, 16, 3, groups=8)
    network.embedding = nn.Embedding(5, 4)
    network.scale = nn.Parameter(torch.ones(8, 1, 1))
    decay = decay_by_parameter(network)
    decayed = {name for name, parameter in network.named_parameters() if decay[parameter] > 0}
    assert decayed == {"grouped.weight", "transposed.weight", "embedding.weight"}


def test_scores_over_chunks_are_those_over_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(12, 4)).train()
    images, labels = torch.randn(50, 3, 2, 2, generator=generator), torch.randint(4, (50,), generator=generator)
    chunks = list(zip(images.split([20, 20, 10]), labels.split([20, 20, 10]), strict=True))
    score = evaluate(Classification(), network, chunks, autocast(torch.device("cpu"), "fp32"))
    logits = (images.flatten(1) @ network[2].weight.T + network[2].bias).detach().double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert score.error == (logits.argmax(1) != labels.numpy()).mean()
    assert score.loss == pytest.approx(-np.log(probabilities[range(50), labels]).mean(), rel=1e-5)
    assert network.training


def test_evaluation_restores_the_mode_of_each_module() -> None:
    """A batch norm that the user has frozen remains frozen."""
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    network[1].eval()
    chunk = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])
    evaluate(Classification(), network, [chunk], autocast(torch.device("cpu"), "fp32"))
    assert [module.training for module in network.modules()] == [True, True, False, True]


def test_chunks_have_at_least_the_requested_size_and_not_many_more() -> None:
    for images in range(1, 400):
        for least in (2, 7, 32, 256):
            size = even_chunk(images, least)
            sizes = [size] * (images // size) + ([images % size] if images % size else [])
            assert sum(sizes) == images
            assert min(sizes) >= least or sizes == [images]
            assert max(sizes) <= 2 * least or least < 32
    assert even_chunk(2048, 256) == 256
    assert even_chunk(300, 256) == 300


def test_search_chunks_are_deterministic_and_mix_the_classes(data: PreparedData) -> None:
    chunks = search_chunks(
        data, images=80, chunk=32, seed=0, device=run_context().device, workers=run_context().workers
    )
    again = search_chunks(data, images=80, chunk=32, seed=0, device=run_context().device, workers=run_context().workers)
    assert [len(labels) for _, labels in chunks] == [40, 40]
    assert all(
        torch.equal(a, b) for pair, other in zip(chunks, again, strict=True) for a, b in zip(pair, other, strict=True)
    )
    assert all(len(labels.unique()) >= 9 for _, labels in chunks)
    other = search_chunks(data, images=80, chunk=32, seed=1, device=run_context().device, workers=run_context().workers)
    assert not torch.equal(chunks[0][1], other[0][1])
    assert (
        sum(
            len(labels)
            for _, labels in search_chunks(
                data, images=10**6, chunk=32, seed=0, device=run_context().device, workers=run_context().workers
            )
        )
        == 96
    )


def test_files_are_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})

    def fail(to: Path) -> None:
        to.write_text("half")
        raise KilledError

    with pytest.raises(KilledError):
        write_atomically(path, fail)
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_rows_are_written_as_csv(tmp_path: Path) -> None:
    rows: list[Row] = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-9}]
    write_rows(tmp_path / "curves.csv", rows)
    with (tmp_path / "curves.csv").open() as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == rows


def test_a_digest_depends_on_all_files_and_their_order(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two"), ("c", "onetwo")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    digests = {file_digest(*files) for files in ((a,), (b,), (c,), (a, b), (b, a))}
    assert len(digests) == 5
    (tmp_path / "copy").write_text("one")
    assert file_digest(tmp_path / "copy", b) == file_digest(a, b)


def test_a_damaged_checkpoint_is_reported_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Run(Checkpoints(tmp_path, "whole", "a"), every=1e9)
    rows = whole.go()
    checkpoints = Checkpoints(tmp_path, "torn", "a")
    with pytest.raises(KilledError):
        Run(checkpoints, every=0, kill_at=7).go()
    for path in checkpoints.folder.glob("*.pt"):  # the last one, and the one before
        path.write_bytes(path.read_bytes()[:-100])
    again = Run(checkpoints, every=0)
    assert again.go() == rows
    assert again.steps[0] == 0
    assert f"checkpoint {checkpoints.path('run')} cannot be used" in capsys.readouterr().err


def test_runs_with_the_same_key_exclude_each_other(tmp_path: Path) -> None:
    inside: list[str] = []

    def second() -> None:
        with Checkpoints(tmp_path, "stage", "key").lock():
            inside.append("second")

    with Checkpoints(tmp_path, "stage", "key").lock(), Checkpoints(tmp_path, "stage", "other").lock():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        inside.append("first")
    thread.join(10)
    assert inside == ["first", "second"]
    assert not list(tmp_path.glob("*.lock"))


def test_checkpoints_can_be_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "search", "key")
    checkpoints.save("state", {"x": torch.ones(2)})
    assert checkpoints.load("other") is None
    checkpoints.clear()
    assert checkpoints.load("state") is None
    assert not list(tmp_path.iterdir())
    checkpoints.clear()
