import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms.v2 import functional as reference

from autoslim.data.augmentation import (
    AREA,
    Augmentation,
    augment,
    crop_boxes,
    jittered,
    resized_boxes,
    shifted,
    uniforms,
)
from autoslim.errors import UserError


def random_images(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(1)).byte()


def test_a_pad_crop_is_a_shifted_window_of_the_zero_padded_image() -> None:
    images = random_images(40, 3, 6)
    rng = np.random.default_rng(0)
    offsets, flips = rng.integers(0, 5, (40, 2)), rng.random(40) < 0.5
    output = shifted(images, offsets, flips, 2).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    for index, ((top, left), flip) in enumerate(zip(offsets, flips, strict=True)):
        window = padded[index, :, top : top + 6, left : left + 6]
        assert np.array_equal(output[index], window[:, :, ::-1] if flip else window)


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    images = random_images(400, 1, 5)
    output = augment(images, uniforms(0, 0, np.arange(400)), Augmentation(flip=True), cropped=False)
    plain = images.float() / 255
    mirrored = (output == plain.flip(-1)).flatten(1).all(1)
    same = (output == plain).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 160 < mirrored.sum() < 240  # 200 +- 4 standard deviations


def test_pad_without_flip_never_mirrors_and_draws_every_shift_equally() -> None:
    size, pad, count = 4, 1, 1800
    images = random_images(1, 1, size).clamp(min=1).expand(count, 1, size, size)
    output = augment(images, uniforms(0, 0, np.arange(count)), Augmentation(pad=pad), cropped=False)
    padded = functional.pad(images[:1].float() / 255, (pad,) * 4)
    counts = torch.zeros(3, 3)
    for top in range(3):
        for left in range(3):
            window = padded[..., top : top + size, left : left + size]
            counts[top, left] = (output == window).flatten(1).all(1).sum()
    assert counts.sum() == count
    assert counts.min() > 140  # 200 each, +- 4.5 standard deviations
    assert counts.max() < 260


def test_an_area_crop_is_the_box_cut_out_and_interpolated() -> None:
    images = random_images(30, 3, 12)
    boxes = crop_boxes(uniforms(0, 0, np.arange(30), AREA), 12, 12, (0.1, 1.0))
    output = resized_boxes(images, boxes)
    for index, (top, left, height, width) in enumerate(boxes.tolist()):
        part = images[index : index + 1, :, top : top + height, left : left + width].float()
        expected = functional.interpolate(part, size=(12, 12), mode="bilinear", align_corners=False)
        torch.testing.assert_close(output[index], expected[0], rtol=0, atol=1e-3)  # of 255


def test_the_whole_image_as_area_is_the_image() -> None:
    images = random_images(8, 3, 9)
    output = augment(images, uniforms(0, 0, np.arange(8)), Augmentation(area=(1.0, 1.0)), cropped=False)
    whole = (crop_boxes(uniforms(0, 0, np.arange(8), AREA), 9, 9, (1.0, 1.0)) == (0, 0, 9, 9)).all(axis=1)
    assert whole.any()
    torch.testing.assert_close(output[whole], images[whole].float() / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_brightness_contrast_and_saturation(channels: int) -> None:
    images = random_images(20, channels, 7).float() / 255
    factors = np.random.default_rng(0).uniform(0.2, 1.8, (20, 3))
    output = jittered(images, factors)
    for index, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        expected = reference.adjust_brightness(images[index], brightness)
        expected = reference.adjust_contrast(expected, contrast)
        expected = reference.adjust_saturation(expected, saturation)
        torch.testing.assert_close(output[index], expected, rtol=0, atol=2e-5)


def test_jitter_factors_fill_their_range() -> None:
    images = torch.full((2000, 1, 2, 2), 100, dtype=torch.uint8)  # uniform grey: only brightness has an effect
    output = augment(images, uniforms(0, 0, np.arange(2000)), Augmentation(jitter=0.4), cropped=False)
    factor = output[:, 0, 0, 0] * 255 / 100
    assert factor.min() >= 0.6 - 1e-5
    assert factor.max() <= 1.4 + 1e-5
    assert abs(factor.mean() - 1) < 0.02  # 3.9 standard errors
    assert factor.min() < 0.61
    assert factor.max() > 1.39


def test_everything_is_off_by_default() -> None:
    images = random_images(4, 3, 5)
    assert torch.equal(
        augment(images, uniforms(0, 0, np.arange(4)), Augmentation(), cropped=False), images.float() / 255
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pad": -1}, "augmentation pad -1 is not possible; use a number of pixels, 0 for none"),
        ({"jitter": -0.1}, "augmentation jitter -0.1 is not possible; use a number from 0"),
        (
            {"area": (0.0, 1.0)},
            "augmentation area (0.0, 1.0) is not possible; use two shares with 0 < low <= high <= 1",
        ),
        ({"area": (0.5, 0.4)}, "augmentation area (0.5, 0.4) is not possible"),
    ],
)
def test_values_out_of_range_are_errors(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Augmentation(**values)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_wide_images_are_augmented_as_their_transpose_is() -> None:
    """Cropping and resizing a (H, W) image is the transpose of doing so with the transposed box and image."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (9, 3, 6, 10), dtype=np.uint8))
    boxes = crop_boxes(uniforms(0, 0, np.arange(9), AREA), 6, 10, (0.2, 1.0), aspect=10 / 6)
    turned = resized_boxes(images.transpose(2, 3), boxes[:, [1, 0, 3, 2]]).transpose(2, 3)
    assert torch.allclose(resized_boxes(images, boxes), turned, atol=1e-3)
    ratios = boxes[:, 3] / boxes[:, 2]
    assert ((boxes[:, 3] - 0.5) / (boxes[:, 2] + 0.5) <= 10 / 6 * 4 / 3).all()
    assert ((boxes[:, 3] + 0.5) / (boxes[:, 2] - 0.5) >= 10 / 6 * 3 / 4).all()
    assert ratios.min() < 10 / 6 < ratios.max()

    same = shifted(images, np.full((9, 2), 2), np.zeros(9, bool), 2)
    assert torch.equal(same, images)
    moved = shifted(images, np.tile([0, 3], (9, 1)), np.ones(9, bool), 2)  # two rows down, one column left, mirrored
    assert torch.equal(moved[:, :, 2:, 1:], images[:, :, :-2, 1:].flip(3))
    assert moved[:, :, :2].eq(0).all()
    assert moved[:, :, :, 0].eq(0).all()
