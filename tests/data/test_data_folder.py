import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from autoslim.data.prepare import check_source
from autoslim.data.sources import load_folder_source
from autoslim.errors import UserError

Make = Callable[..., Path]
LAYOUT = "expected <folder>/train/<class>/<images> and <folder>/test/<class>/<images> (or val)"


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_source(f"folder:{folder}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "source", ["", "digit", "digits:8", "scenes:8", "folder:", "torchvision:", "imagenet:x", "/some/path"]
)
def test_unknown_sources(source: str) -> None:
    with pytest.raises(UserError) as caught:
        check_source(source)
    assert str(caught.value) == (
        f"data source {source!r} is unknown; "
        "expected digits, scenes, torchvision:NAME (for example torchvision:CIFAR10), folder:PATH, hf:PATH, or "
        "path/to/file.py:function"
    )


def test_valid_sources_pass(pets: Path) -> None:
    check_source("digits")
    check_source("scenes")
    check_source(f"folder:{pets}")
    check_source("folder:images", relative_to=pets.parent)


def test_missing_folders(pets: Path, tmp_path: Path) -> None:
    assert message(tmp_path / "no") == f"data folder {tmp_path / 'no'} does not exist; {LAYOUT}"
    shutil.rmtree(pets / "test")
    assert message(pets) == f"data folder {pets} has neither test/ nor val/; {LAYOUT}"
    shutil.rmtree(pets / "train")
    assert message(pets) == f"data folder {pets} has no train/; {LAYOUT}"


def test_empty_and_one_class_folders(make_folder: Make) -> None:
    one = make_folder({"train": {"cat": 3}, "test": {"cat": 3}})
    assert message(one) == f"{one / 'train'} has only one class (cat); at least two are required"
    shutil.rmtree(one / "train" / "cat")
    assert message(one) == f"{one / 'train'} is empty: it has no class folders; {LAYOUT}"


def test_a_class_without_images(pets: Path) -> None:
    for path in (pets / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert message(pets).startswith(f"{pets / 'train' / 'dog'} contains no image (.jpg ")
    assert message(pets).endswith("; add images or remove the class")


def test_classes_that_differ(pets: Path) -> None:
    shutil.rmtree(pets / "test" / "emu")
    assert message(pets) == (
        f"classes differ between {pets / 'train'} (3) and {pets / 'test'} (2): "
        "test/ lacks emu; both must have the same class folders"
    )
    (pets / "test" / "emu").mkdir()
    (pets / "test" / "fox").mkdir()
    assert "train/ lacks fox" in message(pets)


def test_val_is_the_test_split_if_there_is_no_test(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pets / "test").rename(pets / "val")
    source = load_folder_source("images", pets)
    assert source.test is not None
    assert source.test.paths is not None
    assert {path.split("/")[0] for path in source.test.paths} == {"val"}
    assert not caplog.records


def test_test_is_preferred_to_val_with_a_warning(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(pets / "test", pets / "val")
    with caplog.at_level(logging.WARNING):
        source = load_folder_source("images", pets)
    assert source.test is not None
    assert source.test.paths is not None
    assert {path.split("/")[0] for path in source.test.paths} == {"test"}
    [message] = caplog.messages
    assert str(pets) in message
    assert "val/ is not used" in message


def test_nested_images_count_and_hidden_ones_do_not(pets: Path) -> None:
    (pets / "train" / "cat" / "more").mkdir()
    shutil.copy(pets / "train" / "cat" / "000.png", pets / "train" / "cat" / "more" / "x.PNG")
    (pets / "train" / "cat" / "._000.png").write_bytes(b"left by a Mac")
    (pets / "train" / ".cache").mkdir()
    (pets / "train" / "cat" / "notes.txt").write_text("no image")
    source = load_folder_source("images", pets)
    assert source.classes == ("cat", "dog", "emu")
    assert source.train.paths is not None
    assert list(source.train.paths[:21]) == [f"train/cat/{index:03}.png" for index in range(20)] + [
        "train/cat/more/x.PNG"
    ]
    assert source.train.labels.tolist() == [0] * 21 + [1] * 20 + [2] * 20
