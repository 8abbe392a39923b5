"""torchvision's random transforms of training images, with draws that depend only on (seed, epoch, image or batch).

The transforms draw from torch's generator of the CPU. Here, that generator is seeded for each image or batch and
restored afterwards. The draws then do not depend on the numbers of workers and ranks, or on where a run was resumed.
torchvision is imported when a transform is made, because that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoslim.data.augmentation import Augmentation, draw_seeds
from autoslim.errors import UserError

POLICY, ERASE, MIX = 1, 2, 3  # purposes of seeds, see draw_seeds

ImageTransform = Callable[[Tensor], Tensor]
BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def policy_transform(augmentation: Augmentation) -> ImageTransform | None:
    """Returns the transform of ``policy``, uint8 (C, H, W) -> uint8 (C, H, W); None if it is off."""
    if augmentation.policy is None:
        return None
    from torchvision.transforms import v2

    if augmentation.policy == "trivial_augment":
        transform: ImageTransform = v2.TrivialAugmentWide()
    else:
        transform = v2.RandAugment(augmentation.operations, augmentation.magnitude)
    return transform


def erasing_transform(augmentation: Augmentation) -> ImageTransform | None:
    """Returns the transform of ``erase``, normalised float (C, H, W) -> (C, H, W); None if it is off."""
    if not augmentation.erase:
        return None
    from torchvision.transforms import v2

    transform: ImageTransform = v2.RandomErasing(augmentation.erase)
    return transform


def mixing_transform(augmentation: Augmentation, classes: int) -> BatchTransform | None:
    """Returns the transform of ``mixup`` and ``cutmix``; None if both are off.

    It maps images (n, C, H, W) and labels (n,) to mixed images and the probabilities of the classes (n, classes). Each
    image is mixed with the one before it in the batch, and the first with the last.
    """
    if not augmentation.mixes:
        return None
    from torchvision.transforms import v2

    transforms: list[Any] = []
    if augmentation.mixup:
        transforms.append(v2.MixUp(alpha=augmentation.mixup, num_classes=classes))
    if augmentation.cutmix:
        transforms.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=classes))
    transform: BatchTransform = transforms[0] if len(transforms) == 1 else v2.RandomChoice(transforms)
    return transform


def check_mixing(augmentation: Augmentation, classes: int, section: str) -> None:
    """Raises ``UserError`` if labels are to be mixed and there are no classes.

    Args:
        classes: number of classes; each image has one of them. 0 if the targets are something else.
        section: where ``augmentation`` is set, for the message, such as ``retrain.augment``.
    """
    for name in ("mixup", "cutmix"):
        if (alpha := getattr(augmentation, name)) and classes < 2:
            raise UserError(
                f"{section}.{name} is {alpha:g}, but labels can be mixed only if each image has one of several "
                f"classes, and the data have {classes or 'no'} class{'' if classes == 1 else 'es'}; set it to 0"
            )


def each_image(transform: ImageTransform, images: Tensor, seeds: np.ndarray) -> Tensor:
    """Applies ``transform`` to each of ``images`` (n, ...) with its seed (n,)."""
    with _restored_generator() as generator:
        return torch.stack([_seeded(generator, seed, transform, im) for im, seed in zip(images, seeds, strict=True)])


def whole_batch(
    transform: BatchTransform, images: Tensor, labels: Tensor, seed: int, epoch: int, number: int
) -> tuple[Tensor, Tensor]:
    """Applies ``transform`` to batch ``number`` of an epoch."""
    with _restored_generator() as generator:
        drawn = draw_seeds(seed, epoch, MIX, np.array([number]))[0]
        mixed: tuple[Tensor, Tensor] = _seeded(generator, drawn, transform, images, labels)
        return mixed


def _seeded(generator: torch.Generator, seed: np.uint64, transform: Callable[..., Any], *inputs: Tensor) -> Any:
    generator.manual_seed(int(seed))
    return transform(*inputs)


@contextmanager
def _restored_generator() -> Iterator[torch.Generator]:
    generator = torch.default_generator
    state = generator.get_state()
    try:
        yield generator
    finally:
        generator.set_state(state)
