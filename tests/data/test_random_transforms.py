"""torchvision's random transforms: their draws depend only on (seed, epoch, image or batch)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failures import message_of
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from autoslim.data.augmentation import Augmentation, draw_seeds, shuffle
from autoslim.data.batches import eval_batches, train_batches
from autoslim.data.prepare import prepare
from autoslim.data.prepared import PreparedData
from autoslim.data.random_transforms import ERASE, MIX, POLICY, check_mixing

CLASSES = 3
OPTIONS: dict[str, Augmentation] = {
    "trivial_augment": Augmentation(policy="trivial_augment"),
    "rand_augment": Augmentation(policy="rand_augment", operations=3, magnitude=12),
    "erase": Augmentation(erase=0.5),
    "mixup": Augmentation(mixup=0.4),
    "cutmix": Augmentation(cutmix=1.0),
    "mixup or cutmix": Augmentation(mixup=0.4, cutmix=1.0),
    "all": Augmentation(2, True, (0.5, 1.0), 0.2, "rand_augment", 2, 9, 0.5, 0.4, 1.0),
}
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(params=OPTIONS)
def augmentation(request: pytest.FixtureRequest) -> Augmentation:
    return OPTIONS[request.param]


@pytest.fixture(params=["arrays", "files"])
def data(request: pytest.FixtureRequest, make_folder: Callable[..., Path], tmp_path: Path) -> PreparedData:
    return prepared(make_folder, tmp_path / "prepared", request.param)


def prepared(make_folder: Callable[..., Path], destination: Path, storage: str, mode: str = "RGB") -> PreparedData:
    classes = ("cat", "dog", "emu")
    counts = {"train": dict.fromkeys(classes, 12), "test": dict.fromkeys(classes, 2)}
    source = f"folder:{make_folder(counts, size=(16, 16), mode=mode, name=f'images-{storage}')}"
    prepare(source, destination, image_size=None, channels=None, search_images=6, seed=0, storage=storage)
    return PreparedData.open(destination)


def train(data: PreparedData, augmentation: Augmentation, **options: Any) -> Batches:
    settings: dict[str, Any] = {"batch_size": 8, "seed": 0, "epoch": 0, "device": "cpu"}
    return list(train_batches(data, augmentation=augmentation, **(settings | options)))


def same(one: Batches, other: Batches) -> bool:
    """Returns whether images and labels are bitwise equal."""
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# Draws


def test_a_resumed_epoch_draws_what_the_whole_one_draws(data: PreparedData, augmentation: Augmentation) -> None:
    whole = train(data, augmentation)
    assert len(whole) == 3
    torch.rand(5)
    assert same(train(data, augmentation, skip=1), whole[1:])
    assert same(train(data, augmentation, skip=2), whole[2:])


def test_draws_change_with_seed_and_epoch(data: PreparedData, augmentation: Augmentation) -> None:
    """The order of the images changes too, so batches are compared by the set of their images."""

    def images(**options: int) -> set[bytes]:
        batches = train(data, augmentation, batch_size=30, **options)
        return {image.numpy().tobytes() for images, _ in batches for image in images}

    first = images()
    assert images() == first
    for other in (images(epoch=1), images(seed=1)):
        assert other != first


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_draw_as_one_process(data: PreparedData, augmentation: Augmentation, world_size: int) -> None:
    ranks = [train(data, augmentation, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    for (images, labels), (expected, expected_labels) in zip(joined, train(data, augmentation), strict=True):
        assert torch.equal(labels, expected_labels)
        if augmentation.area is None:
            assert torch.equal(images, expected)
        else:  # grid_sample rounds by batch size, and the policy's uint8 images may then differ by a level
            assert (images - expected).abs().mean() < 0.01


def test_workers_draw_as_one_process(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    data = prepared(make_folder, tmp_path / "prepared", "files")
    for augmentation in OPTIONS.values():
        assert same(train(data, augmentation), train(data, augmentation, workers=2))


def test_torchs_generator_keeps_its_state(data: PreparedData, augmentation: Augmentation) -> None:
    before = torch.get_rng_state()
    batches = train_batches(data, augmentation=augmentation, batch_size=8, seed=0, epoch=0, device="cpu")
    for _ in batches:
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_arrays_and_files_give_the_same_batches(make_folder: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    arrays, files = (prepared(make_folder, tmp_path / storage, storage, mode) for storage in ("arrays", "files"))
    for augmentation in OPTIONS.values():
        whole = replace(augmentation, area=None)  # files are cropped at their own resolution
        assert same(train(arrays, whole), train(files, whole))


def test_seeds_are_uniform_and_differ_by_seed_epoch_purpose_and_position() -> None:
    positions = np.arange(4000)
    keys = [(0, 0, POLICY), (0, 0, ERASE), (0, 0, MIX), (0, 1, POLICY), (1, 0, POLICY), (2**33, 0, POLICY)]
    drawn = [draw_seeds(*key, positions) / 2.0**64 for key in keys]
    for one in drawn:
        assert stats.kstest(one, "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef(drawn) - np.eye(len(keys))).max() < 5 / np.sqrt(len(positions))
    assert np.array_equal(draw_seeds(0, 0, POLICY, positions[7:9]), draw_seeds(0, 0, POLICY, positions)[7:9])


# What is drawn


@pytest.mark.parametrize("name", ["trivial_augment", "rand_augment", "erase"])
def test_an_image_is_transformed_as_by_torchvision_with_its_seed(data: PreparedData, name: str) -> None:
    augmentation = OPTIONS[name]
    order = shuffle(30, 5, 2)[:24]
    seeds = draw_seeds(5, 2, ERASE if name == "erase" else POLICY, order)
    evaluated = torch.cat([images for images, _ in eval_batches(data, "train", batch_size=30, device="cpu")])[order]
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.info.mean, data.info.std))
    transforms: dict[str, Any] = {
        "trivial_augment": v2.TrivialAugmentWide(),
        "rand_augment": v2.RandAugment(3, 12),
        "erase": v2.RandomErasing(0.5),
    }
    expected = []
    for image, seed in zip(evaluated, seeds, strict=True):
        torch.manual_seed(int(seed))
        if name == "erase":
            expected.append(transforms[name](image))
        else:
            pixels = ((image * std + mean) * 255).round().to(torch.uint8)
            expected.append((transforms[name](pixels).float() / 255 - mean) / std)
    batches = train(data, augmentation, seed=5, epoch=2)
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack(expected))
    changed = torch.tensor([not torch.equal(a, b) for a, b in zip(evaluated, torch.stack(expected), strict=True)])
    assert 0 < changed.sum() < 24 if name == "erase" else changed.sum() > 12


@pytest.mark.parametrize("name", ["mixup", "cutmix", "mixup or cutmix"])
def test_images_and_labels_are_mixed_in_the_same_proportion(data: PreparedData, name: str) -> None:
    """Each image is mixed with the one before it in the batch. Proportions are read from the mixed labels."""
    kinds = set()
    for epoch in range(4):
        plain, mixed = (train(data, each, epoch=epoch) for each in (Augmentation(), OPTIONS[name]))
        for (images, labels), (images_mixed, probabilities) in zip(plain, mixed, strict=True):
            assert probabilities.shape == (8, CLASSES)
            assert probabilities.dtype == torch.float32
            torch.testing.assert_close(probabilities.sum(1), torch.ones(8))
            before, before_labels = images.roll(1, 0), labels.roll(1, 0)
            row = int((labels != before_labels).nonzero()[0])
            share = float(probabilities[row, labels[row]])
            one_hot = torch.nn.functional.one_hot(torch.stack([labels, before_labels]), CLASSES)
            torch.testing.assert_close(probabilities, share * one_hot[0] + (1 - share) * one_hot[1])
            if share in (0.0, 1.0):  # a rectangle without or with all pixels
                continue
            from_before = (images_mixed == before) & (images != before)
            if bool(((images_mixed == images) | from_before).all()):
                kinds.add("cutmix")
                assert from_before[row].any(0).float().mean() == pytest.approx(1 - share, abs=1e-6)
            else:
                kinds.add("mixup")
                torch.testing.assert_close(images_mixed, share * images + (1 - share) * before)
    assert kinds == {*name.split(" or ")}


def test_without_the_new_transforms_labels_and_images_are_as_before(data: PreparedData) -> None:
    """Random numbers of the other transforms do not change if an image is not erased."""
    old = Augmentation(2, True, None, 0.2)
    plain, erased = train(data, old), train(data, replace(old, erase=0.3))
    pairs = zip(*(torch.cat([images for images, _ in batches]) for batches in (plain, erased)), strict=True)
    assert 8 < sum(torch.equal(one, other) for one, other in pairs) < 24
    assert all(labels.dtype == torch.int64 for _, labels in erased)


# Errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "auto_augment"}, "augmentation policy 'auto_augment' does not exist; use trivial_augment or"),
        ({"operations": 0}, "augmentation operations 0 with magnitude 9 are not possible; use at least 1 operation"),
        ({"magnitude": 31}, "augmentation operations 2 with magnitude 31 are not possible; "),
        ({"erase": 1.5}, "augmentation erase 1.5 is not possible; use a probability from 0 to 1"),
        ({"mixup": -1.0}, "augmentation mixup -1.0 is not possible; use an alpha above 0, or 0 for none"),
        ({"cutmix": float("nan")}, "augmentation cutmix nan is not possible; "),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    assert message_of(lambda: Augmentation(**values)).startswith(message)


def test_labels_without_classes_are_not_mixed(data: PreparedData) -> None:
    for classes, has in ((0, "no classes"), (1, "1 class")):
        message = message_of(lambda classes=classes: check_mixing(OPTIONS["cutmix"], classes, "retrain.augment"))  # type: ignore[misc]
        assert message == (
            "retrain.augment.cutmix is 1, but labels can be mixed only if each image has one of several classes, and "
            f"the data have {has}; set it to 0"
        )
    check_mixing(OPTIONS["trivial_augment"], 0, "retrain.augment")
    data.info = replace(data.info, classes=())
    with pytest.raises(ValueError, match=r"augmentation.mixup is 0.4, but"):
        train_batches(data, augmentation=OPTIONS["mixup"], batch_size=8, seed=0, epoch=0, device="cpu")
