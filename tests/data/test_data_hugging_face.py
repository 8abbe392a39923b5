"""Folders of Hugging Face's package datasets, compared with the images that were saved."""

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autoslim.data.augmentation import Augmentation
from autoslim.data.batches import eval_batches, train_batches
from autoslim.data.hugging_face import HuggingFaceImages
from autoslim.data.prepare import check_source, prepare
from autoslim.data.prepared import DataInfo, PreparedData
from autoslim.errors import UserError

Save = Callable[..., str]


def pixels(split: str, index: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng((len(split), index)).integers(0, 256, (size, size, 3), dtype=np.uint8)


def rows(split: str, count: int, **columns: Any) -> dict[str, Any]:
    images = [Image.fromarray(pixels(split, index)) for index in range(count)]
    return {"photo": images, "animal": [index % 2 for index in range(count)], **columns}


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Returns a function that writes splits to the folder "pets" and returns the data source."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)

    def write(splits: dict[str, dict[str, Any]], **types: Any) -> str:
        kinds = {"photo": datasets.Image(), "animal": datasets.ClassLabel(names=["cat", "dog"]), **types}
        made = {
            name: datasets.Dataset.from_dict(
                columns, features=datasets.Features({key: kinds.get(key, datasets.Value("string")) for key in columns})
            )
            for name, columns in splits.items()
        }
        whole = made[""] if "" in made else datasets.DatasetDict(made)
        shutil.rmtree("pets", ignore_errors=True)
        whole.save_to_disk("pets")
        return "hf:pets"

    return write


def run(source: str, **options: Any) -> DataInfo:
    defaults: dict[str, Any] = {"image_size": None, "channels": None, "search_images": 10, "seed": 0}
    return prepare(source, Path("prepared"), **(defaults | options))


@pytest.mark.parametrize("storage", ["arrays", "files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_splits_have_the_saved_images(storage: str, workers: int, save: Save) -> None:
    source = save({"train": rows("train", 40), "validation": rows("other", 6), "test": rows("test", 8)})
    info = run(source, storage=storage)
    assert (info.classes, info.counts) == (("cat", "dog"), {"train": 30, "search": 10, "test": 8})
    assert (info.storage, info.input_shape) == (storage, (3, 8, 8))
    data = PreparedData.open(Path("prepared"))
    [(images, labels)] = eval_batches(data, "test", batch_size=8, device="cpu", workers=workers)
    mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
    expected = torch.stack([torch.from_numpy(pixels("test", index)).permute(2, 0, 1) for index in range(8)])
    torch.testing.assert_close(images, (expected.float() / 255 - mean) / std)
    assert labels.tolist() == [0, 1] * 4
    assert np.bincount(data.labels("search")).tolist() == [5, 5]
    recipe: dict[str, Any] = {"batch_size": 10, "augmentation": Augmentation(pad=1), "seed": 0, "device": "cpu"}
    epochs = [list(train_batches(data, epoch=1, workers=count, **recipe)) for count in (0, workers)]
    assert len(epochs[0]) == 3
    assert all(torch.equal(first[0], second[0]) for first, second in zip(*epochs, strict=True))


def test_without_a_test_split_or_with_hidden_classes_another_one_is_used(save: Save) -> None:
    assert run(save({"": rows("train", 40)})).counts == {"train": 20, "search": 10, "test": 10}
    hidden = rows("test", 8) | {"animal": [-1] * 8}
    source = save({"train": rows("train", 40), "validation": rows("other", 6), "test": hidden})
    assert run(source).counts["test"] == 6


def test_a_query_names_the_columns(save: Save) -> None:
    datasets = pytest.importorskip("datasets")
    columns = rows("train", 40, mask=rows("masks", 40)["photo"], coarse=[index % 3 for index in range(40)])
    types = {"mask": datasets.Image(), "coarse": datasets.ClassLabel(names=["a", "b", "c"])}
    source = save({"": columns}, **types)
    with pytest.raises(UserError, match=r"hf:pets has 2 columns of type Image \(photo, mask\); choose .*\?image=photo"):
        run(source)
    with pytest.raises(
        UserError, match=r"2 columns of type ClassLabel \(animal, coarse\); .* hf:pets\?image=mask&label=animal"
    ):
        run(f"{source}?image=mask")
    with pytest.raises(UserError, match="'animal' is no column of type Image; columns of this type are photo, mask"):
        run(f"{source}?image=animal")
    assert run(f"{source}?image=mask&label=coarse", search_images=9).classes == ("a", "b", "c")
    opener = HuggingFaceImages(f"{source}?image=mask&label=coarse", Path("pets"), 3)
    assert np.array_equal(pickle.loads(pickle.dumps(opener))("train/5"), pixels("masks", 5))


def test_identical_images_are_counted(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    copies = {name: values[:6] for name, values in rows("train", 40).items()}
    source = save({"train": rows("train", 40), "test": copies})
    for storage in ("arrays", "files"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run(source, storage=storage)
        assert "of test are also in" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"animal": ["cat"] * 40},
            "hf:pets has no column of type ClassLabel; its columns are photo .Image., animal .Value.",
        ),
        ({"animal": [-1] + [0] * 39}, "1 images of train have no class; remove them"),
        ({"photo": [b"no image"] * 40}, "image 0 of train of hf:pets is not a readable image"),
    ],
)
def test_images_and_classes_that_cannot_be_read(change: dict[str, Any], message: str, save: Save) -> None:
    datasets = pytest.importorskip("datasets")
    text = {"animal": datasets.Value("string")} if "cat" in change.get("animal", ()) else {}
    source = save({"": rows("train", 40) | change}, **text)
    with pytest.raises(UserError, match=message):
        run(source)


def test_classes_and_splits_that_do_not_fit(save: Save) -> None:
    one = rows("train", 40) | {"animal": [0] * 40}
    with pytest.raises(UserError, match="hf:pets: images of class dog are in test, but not in train"):
        run(save({"train": one, "test": rows("test", 8)}))
    with pytest.raises(UserError, match="has the splits a, b, but no train; name one of them train"):
        run(save({"a": one, "b": one}))
    Path("pets/a/state.json").write_text("{")
    with pytest.raises(UserError, match=r"hf:pets cannot be read .*; write it again with save_to_disk"):
        run("hf:pets")


def test_other_folders(save: Save, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for source, message in (
        ("hf:none", "data folder none does not exist; write it with save_to_disk"),
        ("hf:images", "data folder images has neither dataset_dict.json nor state.json; .* or use folder:PATH"),
        ("hf:images?column=x", "has no option 'column'; its options are image and label"),
        ("hf:", "data source 'hf:' is unknown; expected"),
    ):
        with pytest.raises(UserError, match=message):
            check_source(source)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="hf:pets needs the package datasets, autoslim's extra hf; install it with `pip"
    ):
        check_source("hf:pets")
