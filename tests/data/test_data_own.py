"""Data of the user's own: splits, batches, random numbers and errors."""

import json
import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from failures import KilledError
from small_data import recipe, run_context
from torch import nn

from autoslim.data import own, own_inspection
from autoslim.data.augmentation import Augmentation
from autoslim.data.batches import eval_batches, search_chunks, train_batches
from autoslim.data.prepare import check_source, prepare
from autoslim.data.prepared import DataInfo, PreparedData
from autoslim.errors import UserError
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.loop import Row, train

HEAD = """
import random

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset


class Samples(Dataset):
    def __init__(self, count, start=0, **attributes):
        self.count, self.start = count, start
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def image(self, index):
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(index + self.start))

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.image(index), (index + self.start) % 3


class Noisy(Samples):
    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image + torch.randn(1) + np.random.rand() + random.random(), target


def noisy(image, target):
    return image + torch.randn(1) + np.random.rand() + random.random(), target


"""
PLAIN = "def build():\n    return Samples(120), Samples(30, 1000)\n"
AUGMENTED = """
def build():
    return {"train": Samples(120), "test": Samples(30, 1000), "train_transforms": noisy}
"""
OFF = Augmentation()


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Returns a function that writes my_data.py into the working directory and returns its source."""
    monkeypatch.chdir(tmp_path)

    def write(code: str) -> str:
        Path("my_data.py").write_text(HEAD + code)
        return "my_data.py:build"

    return write


def run(source: str, **options: Any) -> DataInfo:
    defaults: dict[str, Any] = {"image_size": None, "channels": None, "search_images": 30, "seed": 0}
    return prepare(source, Path("prepared"), **(defaults | options))


def opened(source: str, **options: Any) -> PreparedData:
    run(source, **options)
    return PreparedData.open(Path("prepared"))


def training(data: PreparedData, **options: Any) -> list[tuple[Any, Any]]:
    defaults: dict[str, Any] = {"batch_size": 20, "augmentation": OFF, "seed": 1, "epoch": 2, "device": "cpu"}
    return list(train_batches(data, **(defaults | options)))


def same(batches: list[tuple[Any, Any]], others: list[tuple[Any, Any]]) -> bool:
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# Splits


def test_the_splits_are_disjoint_and_balanced_and_copy_no_sample(written: Callable[[str], str]) -> None:
    data = opened(written(PLAIN))
    assert data.info.classes == ("0", "1", "2")
    assert data.info.counts == {"train": 90, "search": 30, "test": 30}
    assert (data.info.input_shape, data.info.mean, data.info.std) == ((3, 8, 8), (), ())
    train, search = data.indices("train"), data.indices("search")
    assert sorted([*train, *search]) == list(range(120))
    assert np.bincount(data.labels("search")).tolist() == [10, 10, 10]
    assert (data.labels("train") == train % 3).all()
    assert sum(path.stat().st_size for path in Path("prepared").iterdir()) < 3 * 8 * 8 * 4 * 20
    assert sorted(path.suffix for path in Path("prepared").iterdir()) == [".json", *[".npy"] * 6]


def test_batches_are_the_samples_of_the_data_set_in_the_order_of_images(written: Callable[[str], str]) -> None:
    data = opened(written(PLAIN))
    [first, *_] = training(data)
    positions = np.random.default_rng((1, 2)).permutation(90)[:20]
    for index, image, label in zip(data.indices("train")[positions], *first, strict=True):
        assert torch.equal(image, torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(int(index))))
        assert label == index % 3
    assert first[1].dtype == torch.int64
    tested = list(eval_batches(data, "test", batch_size=16, device="cpu"))
    assert [len(labels) for _, labels in tested] == [16, 14]
    assert torch.equal(tested[0][0][3], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1003)))


def test_a_search_data_set_is_the_search_split(written: Callable[[str], str]) -> None:
    code = "def build():\n    return {'train': Samples(90), 'search': Samples(60, 500), 'test': Samples(30, 1000)}\n"
    data = opened(written(code))
    assert data.info.counts == {"train": 90, "search": 30, "test": 30}
    [(images, _)] = search_chunks(data, images=30, chunk=30, seed=0, device=torch.device("cpu"), workers=0)
    held = {int(index) + 500 for index in data.indices("search")}
    expected = {float(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(key)).sum()) for key in held}
    assert {float(image.sum()) for image in images} == expected
    assert run("my_data.py:build", search_images=61).counts["search"] == 60


def test_targets_of_any_structure_split_evenly(written: Callable[[str], str]) -> None:
    code = """
from collections import namedtuple

Pair = namedtuple("Pair", "image rest")


class Mixed(Samples):
    def __getitem__(self, index):
        image = self.image(index)
        return Pair(image, {"length": index}), {"mask": (image[0] > 0).to(torch.uint8), "age": 0.5, "name": str(index)}


def build():
    return Mixed(40), Mixed(10, 100)
"""
    data = opened(written(code), search_images=10, train_images=25, class_targets=False)
    info = data.info
    assert (info.counts, info.classes, info.outputs) == ({"train": 25, "search": 10, "test": 10}, (), None)
    image, length = info.example()
    assert image.shape == (1, 3, 8, 8)
    assert length == {"length": torch.zeros(1, dtype=torch.int64)}
    for workers in (0, 1):
        [(inputs, targets)] = training(data, batch_size=25, epoch=0, workers=workers)
        assert type(inputs) is tuple
    assert (targets["mask"].dtype, targets["age"].dtype) == (torch.int64, torch.float32)
    assert [int(name) for name in targets["name"]] == inputs[1]["length"].tolist()
    assert not {*data.indices("train")} & {*data.indices("search")}
    with pytest.raises(ValueError, match=r"the targets of my_data\.py:build are not class numbers"):
        data.labels("train")


@pytest.mark.parametrize(
    ("class_targets", "attributes", "classes"),
    [
        (True, "", ("0", "1", "2")),
        (False, "", ()),
        (False, ", classes=['a', 'b', 'c']", ("a", "b", "c")),
    ],
)
def test_the_task_decides_whether_integers_are_classes(
    class_targets: bool, attributes: str, classes: tuple[str, ...], written: Callable[[str], str]
) -> None:
    code = f"def build():\n    return Samples(120{attributes}), Samples(30, 1000)\n"
    info = run(written(code), class_targets=class_targets)
    assert info.classes == classes
    assert info.outputs == (3 if classes else 1)


@pytest.mark.parametrize("number", ["index % 3", "(index + 1) % 3"])
def test_class_numbers_in_an_attribute_are_used_if_they_are_those_of_the_samples(
    number: str, written: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
def build():
    whole = Samples(240, targets=[{number} for index in range(240)])
    return Subset(ConcatDataset([whole]), range(0, 200, 2)), Subset(whole, range(201, 240))
"""
    read: list[int] = []
    sample = own.Samples._sample

    def counted(self: own.Samples, *arguments: Any) -> Any:
        read.append(0)
        return sample(self, *arguments)

    monkeypatch.setattr(own.Samples, "_sample", counted)
    monkeypatch.setattr(own_inspection, "READ", 20)
    data = opened(written(code))
    few = 20 + 20 + 3 + 4 + 4  # samples of both data sets, the first of each (with other transforms, too), and probes
    assert len(read) == (few if number == "index % 3" else few + 80 + 19)
    assert (data.labels("train") == 2 * data.indices("train") % 3).all()
    assert np.bincount(data.labels("search")).tolist() == [10, 10, 10]


def test_small_classes_are_warned_of(written: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    code = """
class Rare(Samples):
    def __getitem__(self, index):
        return self.image(index), int(index < 4) if self.start == 0 else index % 3


def build():
    names = ["many", "few", "none"]
    return Rare(120, classes=names), Rare(30, 1000)
"""
    with caplog.at_level(logging.WARNING):
        run(written(code))
    assert "the train data set of my_data.py:build has no samples of 1 of its 3 classes: none" in caplog.text
    assert "the search split is uneven" in caplog.text


# Random numbers


def test_random_transforms_do_not_depend_on_workers_or_on_where_a_run_resumes(written: Callable[[str], str]) -> None:
    data = opened(written(AUGMENTED))
    undisturbed = training(data)
    assert same(training(data, workers=2), undisturbed)
    torch.manual_seed(5)
    assert same(training(data, skip=2), undisturbed[2:])
    assert same(training(data, skip=2, workers=2), undisturbed[2:])
    for change in ({"seed": 2}, {"epoch": 3}):
        assert not same(training(data, **change), undisturbed)
    halves = [training(data, rank=rank, world_size=2) for rank in (0, 1)]
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*halves, strict=True)]
    assert same(joined, undisturbed)  # type: ignore[arg-type]


def test_the_global_generators_are_as_before(written: Callable[[str], str]) -> None:
    data = opened(written(AUGMENTED))

    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()

    def seed() -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    seed()
    expected = drawn()
    for workers in (0, 2):
        seed()
        training(data, workers=workers)
        assert drawn() == expected


def test_transforms_apply_to_their_splits(written: Callable[[str], str]) -> None:
    code = AUGMENTED.replace('"train_transforms"', '"eval_transforms": lambda image, label: (2 * image, label),\n "x"')
    data = opened(written(code.replace('"x"', '"train_transforms"')))
    for split, start in (("search", 0), ("test", 1000)):
        [(images, _)] = eval_batches(data, split, batch_size=30, device="cpu")
        for index, image in zip(data.indices(split), images, strict=True):
            generator = torch.Generator().manual_seed(int(index) + start)
            assert torch.equal(image, 2 * torch.randn(3, 8, 8, generator=generator))


@pytest.mark.parametrize(
    ("code", "warning"),
    [
        (PLAIN, ""),
        (AUGMENTED, ""),
        (PLAIN.replace("Samples(120)", "Noisy(120)"), "augments its samples, and the search split is held out of it"),
        (
            "GENERATOR = np.random.default_rng()\n\n\nclass Unkeyed(Samples):\n    def __getitem__(self, index):\n"
            "        return self.image(index) + GENERATOR.random(), index % 3\n\n\n"
            "def build():\n    return Unkeyed(120), Samples(30, 1000)\n",
            "returns other samples each time: its random numbers are not those of the global generators",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_random_samples_are_warned_of(
    code: str, warning: str, workers: int, written: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(written(code), workers=workers)
    assert [warning in record.message for record in caplog.records] == ([True] if warning else [])


def test_preparing_again_gives_the_same_bytes(written: Callable[[str], str]) -> None:
    source = written(PLAIN.replace("Samples(120)", "Noisy(120)"))
    files = []
    for workers in (0, 2):
        run(source, workers=workers)
        files.append({path.name: path.read_bytes() for path in Path("prepared").iterdir()})
    assert files[0] == files[1]
    run(written(PLAIN.replace("Samples(120)", "Noisy(120, start=3)")))
    changed = json.loads(Path("prepared/data.json").read_text())
    assert changed["origin"]["samples"] != json.loads(files[0]["data.json"])["origin"]["samples"]


def test_workers_that_are_not_forked_build_the_data_sets_again(written: Callable[[str], str]) -> None:
    built = own.build_own(written(PLAIN))
    samples = own.Samples(built, "train", own.ASIDE)
    [here] = samples.__getitems__([3])
    [there] = pickle.loads(pickle.dumps(samples)).__getitems__([3])
    assert here[0] == there[0] == 3  # type: ignore[index]
    assert torch.equal(here[1], there[1])  # type: ignore[index]


# Errors


ERRORS = [
    (
        "raise OSError('no disk')",
        f"data.source my_data.py:build raised OSError: no disk (my_data.py, line {HEAD.count(chr(10)) + 2}); correct",
    ),
    ("return 5", "data.source my_data.py:build returned an object of type int; return (train, test)"),
    ("return {'train': Samples(9)}", "returned a mapping with no test; return (train, test)"),
    ("return {'train': Samples(9), 'test': Samples(9), 'val': 1}", "with unknown keys 'val'"),
    ("return Samples(0), Samples(9)", "the train data set of my_data.py:build is empty"),
    ("return Samples(9), iter([])", "of my_data.py:build, of type list_iterator, has no access by index"),
    ("return torch.utils.data.DataLoader(Samples(9)), Samples(9)", "is a DataLoader; return its data set"),
    ("return Dataset(), Samples(9)", "the train data set of my_data.py:build, of type Dataset, has no length"),
    (
        "return {'train': Samples(9), 'test': Samples(9, 99), 'eval_transforms': 1}",
        "eval_transforms of my_data.py:build is of type int; return a function of (input, target)",
    ),
    ("return [Samples(9)] * 2", "9 samples of the test data set of my_data.py:build are also in its train data set"),
    (
        "whole = Samples(99)\n    return Subset(whole, range(50)), Subset(whole, range(40, 99))",
        "10 samples of the test data set of my_data.py:build are also in its train data set",
    ),
    ("return Samples(120), Samples(30, 90)", "30 of the 30 inputs that were read from the test data set"),
    ("return Noisy(120), Noisy(30)", "30 of the 30 inputs that were read from the test data set"),
    (
        "return Samples(120, classes='abc'), Samples(30, 1000)",
        "classes of the train data set of my_data.py:build is 'abc'",
    ),
    (
        "return Samples(120, classes=['a', 'b']), Samples(30, 1000)",
        "the target of sample 2 of the train data set of my_data.py:build is 2, and 40 of its 120 targets are out of "
        "range; class numbers are from 0 to 1 (from the attribute classes): correct the targets",
    ),
]
ITEMS = [
    ("image", "sample 0 of the train data set of my_data.py:build is of type Tensor; return a pair (input, target)"),
    ("image, 1, 2", "is of type tuple and length 3; return a pair (input, target)"),
    ("image, None", "the target of sample 0 of the train data set of my_data.py:build cannot be part of a batch"),
    ("[[1], 'x', None], 1", "NoneType is not a tensor, an array, a number or text; return tensors, arrays and numbers"),
    (
        "image[: 3 - (index == 7)], 1",
        "the input of sample 7 of the train data set of my_data.py:build is 2x8x8, but others are 3x8x8; all samples",
    ),
    (
        "image, [0, index / 2][index % 2]",
        "my_data.py:build is float32, but others are int64; all samples need the same",
    ),
    (
        "image, 1 / (index - 5)",
        "sample 5 of the train data set of my_data.py:build cannot be read: ZeroDivisionError: division by zero "
        f"(my_data.py, line {HEAD.count(chr(10)) + 4}); correct the data set",
    ),
    (
        "(image if index % 2 else image.tolist()), 1",
        "the input of sample 1 of the train data set of my_data.py:build is",
    ),
    ("image, -1", "my_data.py:build is -1, and 40 of its 40 targets are out of range; class numbers start at 0"),
    ("image, 0", "the train data set of my_data.py:build has only one class"),
    (
        "image, index % (3 if self.start == 0 else 5)",
        "the target of sample 3 of the test data set of my_data.py:build is 3, and 8 of its 20 targets are out of "
        "range; class numbers are from 0 to 2 (the largest class number of the train data set)",
    ),
]
CASES = [(f"def build():\n    {body}\n", message) for body, message in ERRORS]
CASES += [
    (
        "class Wrong(Samples):\n    def __getitem__(self, index):\n        image = self.image(index)\n"
        f"        return {item}\n\n\ndef build():\n    return Wrong(40), Wrong(20, 100)\n",
        message,
    )
    for item, message in ITEMS
]


@pytest.mark.parametrize(("code", "message"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("workers", [0, 1])
def test_each_error_names_the_file_and_the_remedy(
    code: str, message: str, workers: int, written: Callable[[str], str]
) -> None:
    with pytest.raises(UserError) as raised:
        run(written(code), search_images=10, workers=workers)
    assert message in str(raised.value)
    assert "my_data.py" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("prepared").exists()


def test_other_sources_and_names_that_do_not_exist(written: Callable[[str], str]) -> None:
    written(PLAIN)
    check_source("my_data.py:build")
    for source, message in (
        (
            "my_data.py:bild",
            "data.source 'my_data.py:bild': my_data.py has no callable 'bild'; similar names are build",
        ),
        ("data/mine.py:build", "data.source names the file 'data/mine.py', which does not exist"),
        ("my_data:build", "data source 'my_data:build' is unknown; expected .* path/to/file.py:function"),
    ):
        with pytest.raises(UserError, match=message):
            check_source(source)
    with pytest.raises(UserError, match="image_size, channels and storage have no effect"):
        run("my_data.py:build", channels=3)


def test_data_that_changed_after_they_were_prepared(written: Callable[[str], str]) -> None:
    code = PLAIN + "\n\nSIZES = open('sizes').read()\n"
    Path("sizes").write_text("")
    source = written(code.replace("Samples(120)", "Samples(120 - len(SIZES))"))
    run(source)
    with Path("my_data.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(UserError, match=r"my_data\.py changed after the data were prepared; run `dvc repro prepare`"):
        PreparedData.open(Path("prepared"))
    run(source)
    Path("sizes").write_text("five!")
    with pytest.raises(UserError, match=r"have \{'train': 115, 'test': 30\} samples, but had \{'train': 120"):
        PreparedData.open(Path("prepared"))


@pytest.mark.parametrize("name", ["train.indices.npy", "search.labels.npy"])
def test_damaged_and_missing_files(name: str, written: Callable[[str], str]) -> None:
    run(written(PLAIN))
    path = Path("prepared") / name
    np.save(path, np.load(path)[::-1])
    with pytest.raises(UserError, match=f"prepared is damaged .{name} does not match its digest"):
        PreparedData.open(Path("prepared"))
    path.unlink()
    with pytest.raises(UserError, match=r"prepared is incomplete .*; run the prepare stage again"):
        PreparedData.open(Path("prepared"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_changes_its_shape_later_is_an_error_in_training(
    workers: int, written: Callable[[str], str]
) -> None:
    code = "def build():\n    return {'train': Samples(120), 'test': Samples(30, 1000), 'train_transforms': cut}\n"
    cut = "def cut(image, label):\n    return image[:, : 8 - int(image.sum() > 20)], label\n\n\n"
    data = opened(written(cut + code))
    message = "the input of sample \\d+ of the train data set of my_data.py:build is 3x7x8, but others are 3x8x8"
    with pytest.raises(UserError, match=message):
        training(data, workers=workers)


def test_the_file_may_import_its_neighbours_at_any_time(written: Callable[[str], str]) -> None:
    Path("sub").mkdir()
    Path("sub/neighbour_of_data.py").write_text("SCALE = 2.0\n")
    code = HEAD + PLAIN.replace("def build", "def later").replace("Samples", "Scaled")
    scaled = (
        "class Scaled(Samples):\n    def image(self, index):\n        import neighbour_of_data\n\n        return "
        "neighbour_of_data.SCALE * super().image(index)\n\n\n"
    )
    written("")
    Path("sub/my_data.py").write_text(code.replace("def later", scaled + "def build"))
    data = opened("sub/my_data.py:build")
    [(images, _)] = eval_batches(data, "test", batch_size=30, device="cpu")
    assert torch.equal(images[0], 2 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1000)))


# Training


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_on_random_samples_equals_an_undisturbed_one(
    workers: int, written: Callable[[str], str], tmp_path: Path
) -> None:
    data = opened(written(AUGMENTED))

    def run_training(name: str, workers: int, kill_at: int | None = None) -> tuple[list[Row], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))
        settings = recipe(augmentation=OFF, epochs=2)
        context = replace(run_context(checkpoint_every_s=0), workers=workers)
        plan = settings.plan(data, context)

        def step(inputs: torch.Tensor, targets: torch.Tensor, number: int) -> torch.Tensor:
            if number == kill_at:
                raise KilledError
            loss = F.cross_entropy(network(inputs), targets)
            loss.backward()
            return loss.detach()

        rows = train(
            network,
            settings.optimiser(network),
            plan,
            step=step,
            batches=settings.batches(data, 0, context),
            learning_rate=settings.rate(plan),
            validate=lambda: {"draw": float(torch.rand(()))},
            observe=lambda row: None,
            checkpoints=Checkpoints(tmp_path / "checkpoints", name, "key"),
            name="run",
            label="test",
        )
        return rows, network.state_dict()

    rows, weights = run_training("whole", 0)
    with pytest.raises(KilledError):
        run_training("torn", 2 - workers, kill_at=6)
    again, same_weights = run_training("torn", workers)
    assert again == rows
    assert all(torch.equal(same_weights[name], weight) for name, weight in weights.items())
