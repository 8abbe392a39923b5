"""Tests of torchvision's data sets, which are replaced by classes with the same constructors: nothing is downloaded."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from autoslim.data.batches import eval_batches
from autoslim.data.prepare import check_source, prepare
from autoslim.data.prepared import DataInfo, PreparedData
from autoslim.errors import UserError


def image_of(split: str, index: int) -> Image.Image:
    """Returns an 8x8 RGB image that differs from all others."""
    rng = np.random.default_rng((len(split), index))
    return Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))


class InMemory(Dataset[Any]):
    """Like CIFAR10: ``train=``, images in memory, ``targets``, named ``classes``."""

    def __init__(self, root: str, train: bool = True, transform: Any = None, download: bool = False) -> None:
        assert download
        self.split = "train" if train else "test"
        self.targets = [index % 4 for index in range(40 if train else 12)]
        self.classes = ["ape", "bee", "cow", "doe"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return image_of(self.split, index), self.targets[index]


class InFiles(Dataset[Any]):
    """Like CLEVR: ``split=``, files below the root, ``_image_files`` and ``_labels``, a test split without labels."""

    splits: tuple[str, ...] = ("train", "val", "test")
    without_labels: tuple[str, ...] = ("test",)

    def __init__(self, root: str, split: str = "train", transform: Any = None, download: bool = False) -> None:
        if split not in self.splits:
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {self.splits}.")
        folder = Path(root) / "in-files" / split
        folder.mkdir(parents=True, exist_ok=True)
        count = 40 if split.startswith("train") else 12
        self._image_files = [folder / f"{index}.png" for index in range(count)]
        for index, path in enumerate(self._image_files):
            image_of(split, index).save(path)
        self._labels = [None if split in self.without_labels else index % 3 for index in range(count)]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        return Image.open(self._image_files[index]).convert("RGB"), self._labels[index]


class WholeSet(Dataset[Any]):
    """Like EuroSAT: neither ``train=`` nor ``split=``; labels only in the items, and one misleading attribute."""

    def __init__(self, root: str, download: bool = False) -> None:
        self.targets = [0] * 40

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return image_of("all", index), 1 + index % 2


class Letters(InMemory):
    """Like EMNIST: a ``split`` without default in addition to the parent's ``train``; class 0 has no images."""

    def __init__(self, root: str, split: str, **kwargs: Any) -> None:
        if split != "letters":
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root, **kwargs)
        self.targets = [1 + label % 3 for label in self.targets]
        self.classes = ["N/A", "a", "b", "c"]


class Captions(Dataset[Any]):
    """Images with texts, which are not for classification."""

    def __init__(self, root: str, split: str = "train") -> None:
        self.split = split

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return image_of(self.split, index), "a text"


class NoNetwork(InFiles):
    """The test split cannot be downloaded; the val split can."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if split == "test":
            raise URLError("Name or service not known\nsecond line")
        super().__init__(root, split, download=download)


class NeedsFile(InMemory):
    def __init__(self, root: str, annotation_path: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root, train, download=download)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (InMemory, InFiles, WholeSet, Letters, Captions, NoNetwork, NeedsFile):
        monkeypatch.setattr(torchvision.datasets, cls.__name__, cls, raising=False)


def run(name: str, tmp_path: Path, **options: Any) -> tuple[DataInfo, PreparedData]:
    settings = {"image_size": None, "channels": None, "search_images": 6, "seed": 0, "raw": tmp_path / "raw"}
    info = prepare(f"torchvision:{name}", tmp_path / "prepared", **(settings | options))
    return info, PreparedData.open(tmp_path / "prepared")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def test_a_set_with_train_is_read_from_memory(tmp_path: Path) -> None:
    info, data = run("InMemory", tmp_path)
    assert info.counts == {"train": 34, "search": 6, "test": 12}
    assert info.classes == ("ape", "bee", "cow", "doe")
    assert info.storage == "arrays"
    assert np.array_equal(data.images("test"), [pixels(image_of("test", index)) for index in range(12)])
    assert data.labels("test").tolist() == [0, 1, 2, 3] * 3
    held_out = {image.tobytes() for split in ("train", "search") for image in data.images(split)}
    assert held_out == {pixels(image_of("train", index)).tobytes() for index in range(40)}


@pytest.mark.parametrize("storage", ["arrays", "files"])
def test_a_set_with_split_is_read_from_files_and_uses_the_first_labelled_test_split(
    tmp_path: Path, storage: str
) -> None:
    info, data = run("InFiles", tmp_path, storage=storage)
    assert info.counts == {"train": 34, "search": 6, "test": 12}
    assert info.classes == ("0", "1", "2")
    images, labels = next(eval_batches(data, "test", batch_size=12, device="cpu"))
    assert labels.tolist() == [0, 1, 2] * 4
    mean, std = (np.array(values)[:, None, None] for values in (info.mean, info.std))
    expected = [(pixels(image_of("val", index)) / 255 - mean) / std for index in range(12)]
    np.testing.assert_allclose(images, expected, atol=1e-5)
    if storage == "files":
        assert data.paths("test")[3] == b"in-files/val/3.png"
        assert info.root == str(tmp_path / "raw")


def test_trainval_is_used_if_it_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pets(InFiles):
        splits = ("trainval", "test")
        without_labels = ()

        def __init__(self, root: str, split: str = "trainval", download: bool = False) -> None:
            super().__init__(root, split, download=download)

    monkeypatch.setattr(torchvision.datasets, "Pets", Pets, raising=False)
    _, data = run("Pets", tmp_path, storage="files")
    assert data.paths("train")[0].startswith(b"in-files/trainval/")
    assert data.paths("test")[0].startswith(b"in-files/test/")


def test_a_set_without_splits_has_the_same_quarter_held_out_for_every_seed(tmp_path: Path) -> None:
    info, data = run("WholeSet", tmp_path)
    assert info.counts == {"train": 24, "search": 6, "test": 10}
    assert info.classes == ("1", "2")
    assert np.bincount(data.labels("test")).tolist() == [5, 5]
    images = [{image.tobytes() for image in data.images(split)} for split in info.counts]
    assert len(set.union(*images)) == 40
    test = data.images("test").copy()
    assert np.array_equal(run("WholeSet", tmp_path, seed=1)[1].images("test"), test)


def test_constructor_arguments_and_missing_class_numbers(tmp_path: Path) -> None:
    info, data = run("Letters?split=letters", tmp_path)
    assert info.classes == ("a", "b", "c")
    assert set(data.labels("train").tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "torchvision:cifar10: torchvision.datasets has no data set 'cifar10'; did you mean CIFAR10?"),
        ("Qwzx", "torchvision:Qwzx: torchvision.datasets has no data set 'Qwzx'; see torchvision's data sets"),
        ("wrap_dataset_for_transforms_v2", "torchvision:wrap_dataset_for_transforms_v2: torchvision.datasets has no"),
        ("Letters", "torchvision:Letters needs split; write torchvision:Letters?split=..."),
        ("NeedsFile", "torchvision:NeedsFile needs annotation_path; write torchvision:NeedsFile?annotation_path=..."),
        ("InMemory?fold=3", "torchvision:InMemory takes no argument 'fold' here; it has root, train, transform, down"),
        ("InMemory?train=false", "torchvision:InMemory takes no argument 'train' here; it has root, train"),
    ],
)
def test_names_and_arguments_are_checked_before_any_work(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_source(f"torchvision:{name}")
    assert str(caught.value).startswith(message)


def test_torchvisions_sets_pass_the_check() -> None:
    names = (
        "CIFAR10 CIFAR100 FashionMNIST KMNIST MNIST QMNIST USPS SVHN STL10 Flowers102 OxfordIIITPet DTD Food101 GTSRB"
    )
    for name in f"{names} Country211 EuroSAT FGVCAircraft Imagenette ImageNet EMNIST?split=letters".split():
        check_source(f"torchvision:{name}")


def test_torchvisions_fashion_mnist_from_its_file_format(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = {"train": np.arange(60 * 28 * 28).reshape(60, 28, 28) % 251, "t10k": np.full((20, 28, 28), 9)}
    for part, pixels_ in images.items():
        count = len(pixels_)
        header = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels_.astype(np.uint8).tobytes())
        header = np.array([0x801, count], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + (np.arange(count) % 10).astype(np.uint8).tobytes())
    info, data = run("FashionMNIST", tmp_path, search_images=10)
    assert (info.channels, info.image_size, info.classes[0]) == (1, (28, 28), "T-shirt/top")
    assert info.counts == {"train": 50, "search": 10, "test": 20}
    assert (data.images("test") == 9).all()
    _, larger = run("FashionMNIST", tmp_path, search_images=10, image_size=32, channels=3)
    assert larger.images("test").shape == (20, 3, 32, 32)


def test_torchvisions_imagenette_is_listed_as_files(tmp_path: Path) -> None:
    names = sorted(torchvision.datasets.Imagenette._WNID_TO_CLASS)
    for split, count in (("train", 4), ("val", 1)):
        for number, name in enumerate(names):
            folder = tmp_path / "raw" / "imagenette2-160" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                image_of(split, 100 * number + index).save(folder / f"{index}.JPEG")
    info, data = run("Imagenette?size=160px", tmp_path, search_images=10, storage="files")
    assert info.counts == {"train": 30, "search": 10, "test": 10}
    assert info.classes[0].startswith("tench")
    assert data.paths("test")[9] == b"imagenette2-160/val/n03888257/0.JPEG"
    assert data.labels("test").tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Captions", "torchvision:Captions does not return (image, class) pairs; use an image classification set"),
        (
            "NoNetwork",
            "torchvision:NoNetwork could not be loaded (URLError: <urlopen error Name or service not known); check the "
            "network, or put its files into ",
        ),
        (
            "Letters?split=x",
            "torchvision:Letters could not be loaded (ValueError: Unknown value 'x' for argument split",
        ),
    ],
)
def test_sets_that_cannot_be_used(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(name, tmp_path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "prepared").exists()


def test_images_in_memory_cannot_be_listed_as_files(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^storage files: the images of torchvision:InMemory are not files; use storage"
    ):
        run("InMemory", tmp_path, storage="files")
