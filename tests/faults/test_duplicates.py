"""Images that are in more than one split are counted, whichever way the data are stored."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoslim.data.prepare import prepare


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def write(names: dict[str, int]) -> Path:
        """Writes an image for each path; paths with the same number have the same pixels."""
        for name, number in names.items():
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name)
        return tmp_path / "images"

    return write


def warnings(folder: Path, storage: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    prepare(
        f"folder:{folder}",
        folder.parent / "prepared",
        image_size=None,
        channels=None,
        search_images=8,
        seed=0,
        storage=storage,
    )
    return caplog.messages


@pytest.mark.parametrize("storage", ["arrays", "files"])
def test_duplicates_are_counted(storage: str, make: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    names = {f"train/{label}/{i}.png": 100 * c + i for c, label in enumerate("ab") for i in range(10)}
    folder = make(
        names | {f"test/{label}/{i}.png": 1000 * (c + 1) + i for c, label in enumerate("ab") for i in range(4)}
    )
    assert warnings(folder, storage, caplog) == []
    for source, target in (("a/0", "a/x"), ("a/1", "b/y"), ("b/2", "b/z")):  # of train and search images
        shutil.copy(folder / f"train/{source}.png", folder / f"test/{target}.png")
    [message] = warnings(folder, storage, caplog)
    start, _, counts = message.partition(": ")
    assert start == "identical images are in more than one split"
    counted = counts.removesuffix("; accuracies that are measured on them are too high: remove the copies")
    found = {part.split(" ", 1)[1]: int(part.split(" ", 1)[0]) for part in counted.split(", ")}
    assert sum(found.values()) == 3
    assert found.keys() <= {"of test are also in train", "of test are also in search"}


@pytest.mark.parametrize("storage", ["arrays", "files"])
def test_copies_in_train_and_search_are_counted(
    storage: str, make: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """All 20 images of a class are the same, so all four of its search images are also in train."""
    names = {f"train/a/{i}.png": 7 for i in range(20)} | {f"train/b/{i}.png": 100 + i for i in range(20)}
    folder = make(names | {f"test/{label}/0.png": 1000 + ord(label) for label in "ab"})
    [message] = warnings(folder, storage, caplog)
    assert "split: 4 of search are also in train; " in message


def test_files_of_equal_size_and_end_are_compared_as_a_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Uncompressed images that differ in the first pixel have the same size and the same last 4 KiB."""
    for split, labels in (("train", "ab"), ("test", "ab")):
        for number, label in enumerate(labels):
            for index in range(16 if split == "train" else 1):
                pixels = np.full((64, 64, 3), 9, np.uint8)
                pixels[0, 0] = (index, number, split == "test")
                (tmp_path / "images" / split / label).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / "images" / split / label / f"{index}.ppm")
    assert warnings(tmp_path / "images", "files", caplog) == []
    shutil.copy(tmp_path / "images/train/b/3.ppm", tmp_path / "images/test/b/3.ppm")
    [message] = warnings(tmp_path / "images", "files", caplog)
    assert "split: 1 of test are also in " in message
