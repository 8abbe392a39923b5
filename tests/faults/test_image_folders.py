"""Image folders with symbolic links, named pipes and files that are no images."""

import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from failures import message_of
from PIL import Image

from autoslim.data.prepare import prepare
from autoslim.data.prepared import DataInfo
from autoslim.data.sources import load_folder_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with 10 training and 2 test images for each of the classes a and b."""
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def prepared(folder: Path, **options: object) -> DataInfo:
    settings: dict[str, object] = {"image_size": None, "channels": None, "search_images": 4, "seed": 0}
    return prepare(f"folder:{folder}", folder.parent / "prepared", **(settings | options))  # type: ignore[arg-type]


def warning(caplog: pytest.LogCaptureFixture) -> str:
    [message] = caplog.messages
    return message


def test_a_loop_adds_no_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train/a/again").symlink_to(folder / "train/a", target_is_directory=True)
    assert prepared(folder).counts == {"train": 16, "search": 4, "test": 4}
    assert "skipped 1 x folder that a link repeats; images are .jpg " in warning(caplog)


def test_a_link_upwards_is_refused_because_it_contains_the_other_classes_and_the_test_images(folder: Path) -> None:
    (folder / "train/b/up").symlink_to(folder, target_is_directory=True)
    assert re.search(
        rf"^{folder}/train/b/up/\S+ is a link to an image that is also in {folder}/train/a; an image must be in one "
        "class of one split: remove one of the two$",
        message_of(lambda: prepared(folder)),
    )


@pytest.mark.parametrize("where", ["train/b", "test/a"])
def test_an_image_in_two_classes_or_splits_is_refused(where: str, folder: Path) -> None:
    (folder / where / "copy.png").symlink_to(folder / "train/a/3.png")
    message = message_of(lambda: prepared(folder))
    assert message.startswith(f"{folder / where / 'copy.png'} is a link to an image that is also in {folder}/train/a;")


def test_links_to_images_elsewhere_are_followed_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = folder.parent / "store"
    (folder / "train/a").rename(store)
    (folder / "train/a").mkdir()
    for path in sorted(store.iterdir()):
        (folder / "train/a" / path.name).symlink_to(path)
    (folder / "train/a/twice.png").symlink_to(store / "3.png")
    source = load_folder_source("images", folder)
    assert np.bincount(source.train.labels).tolist() == [10, 10]
    assert "skipped 1 x image that a link repeats;" in warning(caplog)


def test_what_is_skipped_is_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(folder / "train/a/pipe.png")
    (folder / "train/b/gone.png").symlink_to(folder / "nothing.png")
    for name in ("train/a/x.gif", "train/a/y.GIF", "test/b/notes.txt", "test/b/README"):
        (folder / name).touch()
    (folder / "test/b/.hidden.gif").touch()
    assert prepared(folder).counts == {"train": 16, "search": 4, "test": 4}
    assert warning(caplog) == (
        f"{folder}: skipped 2 x .gif file, 1 x .txt file, 1 x broken link, 1 x file that is not a regular file, "
        "1 x other file; images are .jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp"
    )


def test_a_folder_that_cannot_be_read_is_counted(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "train/a/private").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read every folder
    with caplog.at_level(logging.WARNING):
        load_folder_source("images", folder)
    assert f"skipped 1 x not readable ({folder}/train/a/private)" in warning(caplog)


def test_a_named_pipe_that_replaces_an_image_is_an_error(folder: Path) -> None:
    source = load_folder_source("images", folder)
    (folder / "train/a/0.png").unlink()
    os.mkfifo(folder / "train/a/0.png")
    assert message_of(lambda: source.train.read(0)).startswith(
        f"{folder}/train/a/0.png is not a readable image (it is not a file); repair"
    )
