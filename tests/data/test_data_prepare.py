import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoslim.data import prepare as preparation_module
from autoslim.data.batches import eval_batches
from autoslim.data.prepare import prepare
from autoslim.data.prepared import FILE_NAME, SPLITS, DataInfo, PreparedData
from autoslim.errors import UserError

Make = Callable[..., Path]


def run(source: str, destination: Path, **options: object) -> DataInfo:
    settings: dict[str, object] = {"image_size": None, "channels": None, "search_images": 9, "seed": 0}
    return prepare(source, destination, **(settings | options))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(data: PreparedData, split: str) -> list[bytes]:
    return [image.tobytes() for image in data.images(split)]


def error(source: str, destination: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        run(source, destination, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_split_without_overlap_and_balanced(tmp_path: Path) -> None:
    info = run("digits", tmp_path / "prepared", search_images=500)
    assert info == PreparedData.open(tmp_path / "prepared").info
    assert (info.channels, info.image_size, info.storage) == (1, (8, 8), "arrays")
    assert info.classes == tuple("0123456789")
    assert info.counts == {"train": 848, "search": 500, "test": 449}
    data = PreparedData.open(tmp_path / "prepared")
    splits = [set(rows(data, split)) for split in SPLITS]
    assert [len(images) for images in splits] == [848, 500, 449]  # the 1,797 digits are all different
    assert len(set.union(*splits)) == 1797
    assert np.bincount(data.labels("search")).tolist() == [50] * 10
    assert set(np.bincount(data.labels("test"))) == {44, 45}
    assert all(data.images(split).max() == 255 for split in SPLITS)


def test_the_seed_changes_the_search_split_but_never_the_test_split(tmp_path: Path) -> None:
    for seed in (0, 1):
        run("digits", tmp_path / str(seed), search_images=100, seed=seed)
    one, other = (PreparedData.open(tmp_path / seed) for seed in ("0", "1"))
    assert rows(one, "test") == rows(other, "test")
    assert set(rows(one, "search")) != set(rows(other, "search"))


@pytest.mark.parametrize("storage", ["arrays", "files"])
def test_a_folder_is_split_without_overlap_and_balanced(pets: Path, tmp_path: Path, storage: str) -> None:
    info = run(f"folder:{pets}", tmp_path / "prepared", storage=storage)
    assert info.counts == {"train": 51, "search": 9, "test": 18}
    assert info.classes == ("cat", "dog", "emu")
    assert (info.channels, info.image_size, info.storage) == (3, (8, 8), storage)
    data = PreparedData.open(tmp_path / "prepared")
    assert np.bincount(data.labels("search")).tolist() == [3, 3, 3]
    assert np.bincount(data.labels("train")).tolist() == [17, 17, 17]
    seen = set()
    for split in SPLITS:
        for images, labels in eval_batches(data, split, batch_size=1, device="cpu"):
            seen.add((images.numpy().tobytes(), int(labels)))
    assert len(seen) == 78


def test_arrays_contain_the_pixels_of_the_files(pets: Path, tmp_path: Path) -> None:
    run(f"folder:{pets}", tmp_path / "prepared")
    data = PreparedData.open(tmp_path / "prepared")
    paths = sorted((pets / "test").rglob("*.png"))
    pixels = [np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths]
    assert np.array_equal(data.images("test"), pixels)
    assert [data.info.classes[label] for label in data.labels("test")] == [path.parent.name for path in paths]


@pytest.mark.parametrize("storage", ["arrays", "files"])
def test_equal_inputs_produce_equal_bytes(pets: Path, tmp_path: Path, storage: str) -> None:
    for name in ("one", "two"):
        run(f"folder:{pets}", tmp_path / name, storage=storage, train_images=30, test_images=9)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    run(f"folder:{pets}", tmp_path / "two", storage=storage, train_images=30, test_images=9, seed=1)
    assert contents(tmp_path / "one") != contents(tmp_path / "two")


def test_files_are_listed_and_not_copied(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation_module, "SAMPLE", 5)
    broken = sorted((pets / "train").rglob("*.png"))
    for path in sorted((pets / "test").rglob("*.png")):
        path.write_bytes(b"no image, and not to be opened")
    run(f"folder:{pets}", tmp_path / "prepared", storage="files")
    assert sorted(contents(tmp_path / "prepared")) == ["data.json", "manifest.csv"]
    lines = (tmp_path / "prepared" / "manifest.csv").read_text().splitlines()
    assert lines[0] == "split,label,path"
    assert lines[-1] == "test,2,test/emu/005.png"
    assert len(lines) == 1 + len(broken) + 18


def test_auto_stores_arrays_up_to_the_limit_and_lists_files_beyond_it(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 78 * 3 * 8 * 8
    monkeypatch.setattr(preparation_module, "ARRAYS_LIMIT", limit)
    assert run(f"folder:{pets}", tmp_path / "prepared").storage == "arrays"
    monkeypatch.setattr(preparation_module, "ARRAYS_LIMIT", limit - 1)
    assert run(f"folder:{pets}", tmp_path / "prepared").storage == "files"
    assert run("digits", tmp_path / "prepared").storage == "arrays"  # no files to list


@pytest.mark.parametrize("storage", ["arrays", "files"])
def test_subsets_are_balanced_and_do_not_change_the_search_split(pets: Path, tmp_path: Path, storage: str) -> None:
    run(f"folder:{pets}", tmp_path / "whole", storage=storage)
    info = run(f"folder:{pets}", tmp_path / "part", storage=storage, train_images=12, test_images=6)
    assert info.counts == {"train": 12, "search": 9, "test": 6}
    whole, part = (PreparedData.open(tmp_path / name) for name in ("whole", "part"))
    for split in ("train", "test"):
        assert len(set(np.bincount(part.labels(split)).tolist())) == 1
    read = PreparedData.paths if storage == "files" else PreparedData.images
    assert np.array_equal(read(whole, "search"), read(part, "search"))
    for split in ("train", "test"):
        assert {item.tobytes() for item in read(part, split)} < {item.tobytes() for item in read(whole, split)}


def test_paths_may_be_relative_and_have_any_name(make_folder: Make, tmp_path: Path) -> None:
    names = ('a, "quoted"', "zwölf ü")
    make_folder({"train": dict.fromkeys(names, 8), "val": dict.fromkeys(names, 2)}, name="my images")
    options = {"storage": "files", "search_images": 2, "relative_to": tmp_path}
    info = run("folder:my images", tmp_path / "prepared", **options)
    assert info.root == "my images"
    assert str(tmp_path) not in "".join(text.decode() for text in contents(tmp_path / "prepared").values())
    data = PreparedData.open(tmp_path / "prepared", relative_to=tmp_path)
    images, labels = next(eval_batches(data, "test", batch_size=9, device="cpu"))
    assert len(images) == 4
    assert labels.tolist() == [0, 0, 1, 1]
    assert data.info.classes == names
    with pytest.raises(UserError, match="are in my images, which does not exist; run the prepare stage again"):
        PreparedData.open(tmp_path / "prepared")


def test_grey_becomes_rgb_and_rgb_becomes_grey(make_folder: Make, tmp_path: Path) -> None:
    counts = {"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}
    for mode, native in (("L", 1), ("RGB", 3)):
        folder = make_folder(counts, mode=mode, name=mode)
        files = [Image.open(path) for path in sorted((folder / "test").rglob("*.png"))]
        for channels in (None, 1, 3):
            info = run(f"folder:{folder}", tmp_path / "prepared", channels=channels, search_images=2)
            assert info.channels == (channels or native)
            assert len(info.mean) == len(info.std) == info.channels
            images = PreparedData.open(tmp_path / "prepared").images("test")
            assert images.shape == (4, info.channels, 8, 8)
            for image, file in zip(images, files, strict=True):
                pixels = np.asarray(file).astype(float)
                if mode == "L":
                    assert (image == pixels).all()
                elif info.channels == 1:
                    luma = pixels @ (0.299, 0.587, 0.114)
                    assert np.abs(image[0] - luma).max() <= 1


def test_one_colour_image_makes_a_folder_rgb(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}, mode="L")
    for path in sorted((folder / "train").rglob("*.png")):
        Image.open(path).convert("RGB" if path.stem == "005" else "L").save(path)
    assert run(f"folder:{folder}", tmp_path / "prepared", search_images=2).channels == 3


def test_sixteen_bit_grey_keeps_its_upper_byte(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 1, "b": 1}}, mode="L")
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for path in (folder / "test").rglob("*.png"):
        Image.fromarray(deep).save(path)
    run(f"folder:{folder}", tmp_path / "prepared", search_images=2)
    assert np.array_equal(PreparedData.open(tmp_path / "prepared").images("test")[0, 0], deep >> 8)


def test_floating_point_pixels_are_an_error_with_the_path(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 1, "b": 1}}, mode="L")
    path = folder / "test" / "a" / "deep.tiff"
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(path)
    message = error(f"folder:{folder}", tmp_path / "prepared", search_images=2)
    assert message.startswith(f"{path} is not a readable image (floating-point pixels have no known range: save it wi")


@pytest.mark.parametrize(
    ("native", "size", "resized"),
    [
        ((8, 8), 8, (8, 8)),
        ((8, 8), 14, (14, 14)),  # larger: only resized
        ((10, 10), 9, (9, 9)),  # smaller by less than the margin: only resized
        ((12, 9), 9, (12, 9)),  # not square: centre crop
        ((24, 30), 14, (16, 20)),  # beyond the margin: shorter side 14 * 256 / 224 = 16, centre crop 14
    ],
)
def test_other_sizes_are_resized_and_cropped(
    make_folder: Make, tmp_path: Path, native: tuple[int, int], size: int, resized: tuple[int, int]
) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}, size=native)
    info = run(f"folder:{folder}", tmp_path / "prepared", image_size=size, search_images=2)
    assert (info.image_size, info.resize) == ((size, size), min(resized))
    images = PreparedData.open(tmp_path / "prepared").images("test")
    for image, path in zip(images, sorted((folder / "test").rglob("*.png")), strict=True):
        expected = Image.open(path).resize(resized, Image.Resampling.BILINEAR)
        left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
        expected = expected.crop((left, top, left + size, top + size))
        assert np.array_equal(image, np.asarray(expected).transpose(2, 0, 1))


def test_images_of_different_sizes_require_a_size(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}})
    for path in (folder / "train").rglob("*.png"):  # at least five of them are in the train split
        Image.open(path).resize((20, 16) if path.stem < "003" else (8, 8)).save(path)
    message = error(f"folder:{folder}", tmp_path / "prepared", search_images=2)
    assert message == f"the images of folder:{folder} differ in size (from 8x8 to 20x16); set image_size"
    assert run(f"folder:{folder}", tmp_path / "prepared", search_images=2, image_size=8).counts["train"] == 10


def test_too_many_images(pets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = f"folder:{pets}"
    assert run(source, tmp_path / "p", search_images=30).counts["train"] == 30
    assert caplog.text == ""
    run(source, tmp_path / "more", search_images=300)
    assert {file.name: file.read_bytes() for file in (tmp_path / "more").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "p").iterdir()
    }
    assert (
        "search_images is 300, but at most half of each class is held out of the 60 training images: the" in caplog.text
    )
    assert "search_images 0 is not possible" in error(source, tmp_path / "p", search_images=0)
    expected = "train_images 52 is not possible; use 3 to 51, the number of images in the split"
    assert error(source, tmp_path / "p", train_images=52) == expected
    assert error(source, tmp_path / "p", train_images=2).startswith("train_images 2 is not possible")
    expected = "test_images 19 is not possible; use 1 to 18, the number of images in the split"
    assert error(source, tmp_path / "p", test_images=19) == expected


def test_values_out_of_range_are_errors(tmp_path: Path) -> None:
    destination = tmp_path / "p"
    expected = "channels 2 is not possible; use 1 (grey) or 3 (RGB), or omit it"
    assert error("digits", destination, channels=2) == expected
    assert error("digits", destination, image_size=0).startswith("image_size 0 is not possible")
    expected = "storage 'disk' is unknown; expected one of auto, arrays, files"
    assert error("digits", destination, storage="disk") == expected
    expected = "storage files: the images of digits are not files; use storage auto or arrays"
    assert error("digits", destination, storage="files") == expected
    assert not destination.exists()


def test_the_error_for_an_unreadable_image_has_its_path_and_nothing_is_written(pets: Path, tmp_path: Path) -> None:
    run(f"folder:{pets}", tmp_path / "out" / "prepared")
    before = contents(tmp_path / "out")
    broken = pets / "test" / "dog" / "003.png"
    broken.write_bytes(b"no image")
    message = error(f"folder:{pets}", tmp_path / "out" / "prepared", storage="arrays")
    assert message == (
        f"{broken} is not a readable image (cannot identify image file it); "
        "repair or remove the file and prepare the data again"
    )
    assert contents(tmp_path / "out") == before


def test_a_folder_that_is_not_prepared_data_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    expected = f"{tmp_path / 'mine'} exists and is not a prepared data folder; remove it or choose another"
    assert error("digits", tmp_path / "mine") == expected
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_opening_a_folder_that_is_not_prepared(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is not a prepared data folder \(it has no data.json\); run the prepare stage"
    ):
        PreparedData.open(tmp_path / "nothing")
    folder = tmp_path / "prepared"
    run(f"folder:{pets}", folder)
    (folder / "test.images.npy").unlink()
    with pytest.raises(UserError, match=r"is incomplete \(.*test.images.npy.*\); run the prepare stage again"):
        PreparedData.open(folder)
    info = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps(info | {"format": 99}))
    with pytest.raises(UserError, match=r"data.json cannot be read \(not a data.json of format 3\); run the prepare"):
        PreparedData.open(folder)


def test_a_manifest_with_missing_rows_is_an_error(pets: Path, tmp_path: Path) -> None:
    run(f"folder:{pets}", tmp_path / "prepared", storage="files")
    manifest = tmp_path / "prepared" / "manifest.csv"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"is damaged \(manifest.csv does not match its digest\); delete it"):
        PreparedData.open(tmp_path / "prepared")


def test_an_unknown_split_is_an_error(pets: Path, tmp_path: Path) -> None:
    run(f"folder:{pets}", tmp_path / "prepared")
    with pytest.raises(ValueError, match="split 'val' is unknown; expected one of train, search, test"):
        PreparedData.open(tmp_path / "prepared").labels("val")


def test_progress_gets_a_description_and_a_total(pets: Path, tmp_path: Path) -> None:
    calls = []

    def progress(items: object, description: str, total: int) -> object:
        calls.append((description, total))
        return items

    run(f"folder:{pets}", tmp_path / "prepared", progress=progress)
    assert calls == [("preparing train", 51), ("preparing search", 9), ("preparing test", 18)]


def test_a_constant_channel_does_not_divide_by_zero(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}, mode="L")
    for path in folder.rglob("*.png"):
        Image.new("L", (8, 8), 51).save(path)
    info = run(f"folder:{folder}", tmp_path / "prepared", search_images=2)
    assert info.mean == (0.2,)
    assert info.std == (round(1 / 255, 6),)


def test_sizes_that_are_not_square(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}, size=(12, 8))
    info = run(f"folder:{folder}", tmp_path / "own", search_images=2)
    assert (info.image_size, info.resize, info.input_shape) == ((8, 12), 8, (3, 8, 12))
    data = PreparedData.open(tmp_path / "own")
    for image, path in zip(data.images("test"), sorted((folder / "test").rglob("*.png")), strict=True):
        assert np.array_equal(image, np.asarray(Image.open(path)).transpose(2, 0, 1))
    for storage in ("arrays", "files"):
        info = run(f"folder:{folder}", tmp_path / storage, search_images=2, image_size=(4, 7), storage=storage)
        assert (info.image_size, info.resize) == ((4, 7), round(4 * 256 / 224))
    ways = [PreparedData.open(tmp_path / storage) for storage in ("arrays", "files")]
    batches = [next(iter(eval_batches(way, "search", batch_size=2, device="cpu"))) for way in ways]
    assert batches[0][0].shape == (2, 3, 4, 7)
    assert batches[0][0].equal(batches[1][0])


@pytest.mark.parametrize("storage", ["arrays", "files"])
def test_twelve_of_sixteen_bits_are_scaled_alike_in_all_splits(
    storage: str, make_folder: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder({"train": {"a": 6, "b": 6}, "test": {"a": 2, "b": 2}}, mode="L")
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        values = np.random.default_rng(number).integers(0, 1000, (8, 8)).astype(np.uint16)
        values[0, 0] = 4095 if path.match("test/b/001.png") else 999  # only a test image uses 12 bits
        Image.fromarray(values).save(path)
    info = run(f"folder:{folder}", tmp_path / storage, search_images=2, storage=storage)
    assert info.bits == 12
    assert "use 12 bits: they are scaled from 0 .. 4095 to 0 .. 255" in caplog.text
    assert PreparedData.open(tmp_path / storage).info.bits == 12
    (images, _) = next(iter(eval_batches(PreparedData.open(tmp_path / storage), "test", batch_size=4, device="cpu")))
    pixels = (images * info.std[0] + info.mean[0]) * 255
    expected = [np.asarray(Image.open(path)) >> 4 for path in sorted((folder / "test").rglob("*.png"))]
    assert np.allclose(pixels[:, 0].numpy(), np.stack(expected), atol=1e-3)


def test_an_uneven_search_split_is_reported(
    make_folder: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder({"train": {"a": 60, "b": 2}, "test": {"a": 2, "b": 2}})
    run(f"folder:{folder}", tmp_path / "p", search_images=20)
    [message] = caplog.messages
    assert message.startswith("the search split is uneven: 19 of its images are of class a, and 1 of class b")
    assert message.endswith("or set search_images to 2")
    caplog.clear()
    run(f"folder:{folder}", tmp_path / "p", search_images=2)
    assert not caplog.messages
