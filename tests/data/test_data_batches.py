from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from autoslim.data.augmentation import Augmentation
from autoslim.data.batches import batches_per_epoch, eval_batches, train_batches
from autoslim.data.prepare import prepare
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError

ALL_ON = Augmentation(pad=1, flip=True, area=(0.3, 1.0), jitter=0.3)
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(params=["arrays", "files"])
def data(request: pytest.FixtureRequest, pets: Path, tmp_path: Path) -> PreparedData:
    return prepared(pets, tmp_path / "prepared", request.param)


def prepared(folder: Path, destination: Path, storage: str) -> PreparedData:
    source = f"folder:{folder}"
    prepare(source, destination, image_size=None, channels=None, search_images=9, seed=0, storage=storage)
    return PreparedData.open(destination)


def train(data: PreparedData, **options: object) -> Batches:
    settings: dict[str, object] = {"batch_size": 8, "augmentation": ALL_ON, "seed": 0, "epoch": 0, "device": "cpu"}
    return list(train_batches(data, **(settings | options)))  # type: ignore[arg-type]


def same(one: Batches | Iterator[tuple[Tensor, Tensor]], other: Batches | Iterator[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_an_epoch_has_whole_batches_of_normalised_images(data: PreparedData) -> None:
    batches = train(data)
    assert len(batches) == batches_per_epoch(data, 8) == 51 // 8
    for images, labels in batches:
        assert images.shape == (8, 3, 8, 8)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64


def test_without_augmentation_an_epoch_is_the_evaluation_images_once_each(data: PreparedData) -> None:
    (stored, stored_labels) = next(eval_batches(data, "train", batch_size=100, device="cpu"))
    batches = train(data, augmentation=Augmentation(), batch_size=17)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    match = (images[:, None] == stored[None]).flatten(2).all(2)  # (drawn, stored)
    assert match.sum() == len(stored) == 51
    assert (match.sum(0) == 1).all()
    assert (match.sum(1) == 1).all()
    assert torch.equal(labels, stored_labels[match.int().argmax(1)])
    assert match.int().argmax(1).tolist() != list(range(51))


def test_a_split_smaller_than_a_batch_is_one_batch(data: PreparedData) -> None:
    batches = train(data, batch_size=64)
    assert batches_per_epoch(data, 64) == len(batches) == 1
    assert len(batches[0][1]) == 51


def test_seed_and_epoch_determine_the_draws(data: PreparedData) -> None:
    assert same(train(data), train(data))
    assert not same(train(data), train(data, epoch=1))
    assert not same(train(data), train(data, seed=1))
    plain = Augmentation()
    assert not same(train(data, augmentation=plain), train(data, augmentation=plain, epoch=1))


def test_skipping_batches_does_not_change_the_others(data: PreparedData) -> None:
    whole = train(data)
    for skip in (0, 1, 4, 6):
        assert same(train(data, skip=skip), whole[skip:])


def test_skipped_batches_are_not_read(pets: Path, tmp_path: Path) -> None:
    data = prepared(pets, tmp_path / "prepared", "files")
    order = np.random.default_rng((0, 0)).permutation(51)
    for index in order[:16]:
        (pets / data.paths("train")[index].decode()).write_bytes(b"broken")
    assert len(train(data, skip=2)) == 4
    with pytest.raises(UserError, match="is not a readable image"):
        train(data, skip=1)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_slices_of_the_ranks_are_the_batch_of_one_process(data: PreparedData, world_size: int) -> None:
    ranks = [train(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*ranks, strict=True)
    ]
    # Equal up to rounding: grid_sample and sums may be grouped differently for another batch size.
    for (images, labels), (expected, expected_labels) in zip(joined, train(data), strict=True):
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
        assert torch.equal(labels, expected_labels)


def test_a_batch_smaller_than_the_number_of_ranks_is_an_error(data: PreparedData) -> None:
    message = r"^a batch of 8 images cannot be shared by 9 processes; raise batch_size or lower runtime.processes$"
    with pytest.raises(UserError, match=message):
        train(data, world_size=9)


def test_the_number_of_workers_does_not_change_the_draws(pets: Path, tmp_path: Path) -> None:
    data = prepared(pets, tmp_path / "prepared", "files")
    alone = train(data)
    assert same(alone, train(data, workers=1))
    assert same(alone, train(data, workers=2))


def test_batches_do_not_change_the_global_random_state(data: PreparedData) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train(data)
    list(eval_batches(data, "search", batch_size=4, device="cpu", shuffled_by=0))
    assert torch.equal(before, torch.get_rng_state())


def test_arrays_and_files_give_the_same_batches(pets: Path, tmp_path: Path) -> None:
    arrays, files = (prepared(pets, tmp_path / storage, storage) for storage in ("arrays", "files"))
    for split in ("train", "search", "test"):
        options = {"batch_size": 5, "device": "cpu"}
        assert same(eval_batches(arrays, split, **options), eval_batches(files, split, **options))  # type: ignore[arg-type]
    augmentation = Augmentation(pad=2, flip=True, jitter=0.4)
    assert same(train(arrays, augmentation=augmentation), train(files, augmentation=augmentation))


def test_area_crops_of_arrays_and_files_show_the_same_part(make_folder: object, tmp_path: Path) -> None:
    counts = {"train": {"a": 12, "b": 12}, "test": {"a": 2, "b": 2}}
    folder = make_folder(counts, size=(24, 24))  # type: ignore[operator]
    options = {"augmentation": Augmentation(area=(0.3, 1.0)), "batch_size": 15, "seed": 4, "epoch": 2}
    one, other = (prepared(folder, tmp_path / storage, storage) for storage in ("arrays", "files"))
    for (images, labels), (expected, expected_labels) in zip(
        train(one, **options), train(other, **options), strict=True
    ):
        assert torch.equal(labels, expected_labels)
        # Files are interpolated in 8 bits with rows and columns rounded, a difference of up to 1/255.
        torch.testing.assert_close(images, expected, rtol=0, atol=1.05 / 255 / min(one.info.std))


def test_evaluation_gives_all_images_once_in_the_stored_order(data: PreparedData) -> None:
    for split, count in (("train", 51), ("search", 9), ("test", 18)):
        batches = list(eval_batches(data, split, batch_size=4, device="cpu"))
        assert [len(labels) for _, labels in batches] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
        assert torch.cat([labels for _, labels in batches]).tolist() == data.labels(split).tolist()


def test_a_shuffled_evaluation_is_a_fixed_permutation(data: PreparedData) -> None:
    def labels_and_images(seed: int | None, limit: int | None = None) -> tuple[list[int], Tensor]:
        batches = list(eval_batches(data, "train", batch_size=10, device="cpu", shuffled_by=seed, limit=limit))
        return torch.cat([labels for _, labels in batches]).tolist(), torch.cat([images for images, _ in batches])

    plain, images = labels_and_images(None)
    shuffled, mixed = labels_and_images(5)
    assert plain == sorted(plain)  # sorted by class: a chunk would contain one class
    assert shuffled != plain
    assert sorted(shuffled) == plain
    assert torch.equal(mixed, labels_and_images(5)[1])
    assert not torch.equal(mixed, labels_and_images(6)[1])
    assert ((images[:, None] == mixed[None]).flatten(2).all(2).sum(0) == 1).all()
    assert len(set(shuffled[:10])) == 3
    assert torch.equal(labels_and_images(5, limit=13)[1], mixed[:13])
    assert torch.equal(labels_and_images(None, limit=13)[1], images[:13])


def test_evaluating_nothing_is_an_error(data: PreparedData) -> None:
    with pytest.raises(UserError, match=r"^batch_size 0 is not possible; use at least 1$"):
        eval_batches(data, "test", batch_size=0, device="cpu")
    with pytest.raises(UserError, match=r"^limit 0 is not possible; use at least 1 image, or None for all$"):
        eval_batches(data, "test", batch_size=4, device="cpu", limit=0)


def test_normalisation_is_pixels_over_255_minus_mean_over_std(pets: Path, tmp_path: Path) -> None:
    data = prepared(pets, tmp_path / "prepared", "arrays")
    pixels = data.images("train").astype(np.float64) / 255
    np.testing.assert_allclose(data.info.mean, pixels.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(data.info.std, pixels.std((0, 2, 3)), atol=1e-6)
    images = torch.cat([images for images, _ in eval_batches(data, "test", batch_size=5, device="cpu")])
    mean, std = (np.array(values)[:, None, None] for values in (data.info.mean, data.info.std))
    np.testing.assert_allclose(images, (data.images("test") / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_for_an_unreadable_image_has_its_path_also_from_a_worker(
    pets: Path, tmp_path: Path, workers: int
) -> None:
    data = prepared(pets, tmp_path / "prepared", "files")
    broken = pets / data.paths("test")[7].decode()
    broken.write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        list(eval_batches(data, "test", batch_size=4, device="cpu", workers=workers))
    message = str(caught.value)
    assert message.startswith(f"{broken} is not a readable image (")
    assert message.endswith("repair or remove the file and prepare the data again")
    assert "\n" not in message


def test_a_truncated_image_is_unreadable(pets: Path, tmp_path: Path) -> None:
    data = prepared(pets, tmp_path / "prepared", "files")
    broken = pets / data.paths("test")[0].decode()
    broken.write_bytes(broken.read_bytes()[:-60])
    with pytest.raises(UserError, match=f"^{broken} is not a readable image"):
        list(eval_batches(data, "test", batch_size=4, device="cpu"))


def test_a_large_split_remains_on_the_host(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(pets, tmp_path / "prepared", "arrays")
    expected = train(data)
    monkeypatch.setattr("autoslim.data.prepared.RESIDENT_LIMIT", 10)
    assert data.resident("train", torch.device("meta")).device.type == "cpu"
    assert same(expected, train(data))
