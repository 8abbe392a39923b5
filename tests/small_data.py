"""A small subset of the digits, and a recipe and a network for them that train in a second."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoslim import trace
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import GridSpec
from autoslim.data.augmentation import Augmentation
from autoslim.data.prepare import prepare
from autoslim.data.prepared import PreparedData
from autoslim.models.architectures import mobilenet_v2
from autoslim.search.search import SearchSettings
from autoslim.training.device import RunContext
from autoslim.training.recipe import Recipe

torch.set_num_threads(1)  # on such small networks, more threads are slower

SPAN = GridSpec(width=1.5, narrowest=0.25, steps=4, divisor=2)
_RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 20,
    "label_smoothing": 0.1,
    "augmentation": Augmentation(pad=1, flip=False, area=None, jitter=0.2),
    "learning_rate": 0.1,
    "schedule": "cosine",
    "milestones": (),
    "warmup_epochs": 0.5,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "precision": "fp32",
    "channels_last": False,
}


def prepared_digits(folder: Path) -> PreparedData:
    """Prepares 160 training images (8 steps of 20), 96 search images and 100 test images."""
    prepare(
        "digits", folder, image_size=None, channels=None, search_images=96, seed=0, train_images=160, test_images=100
    )
    return PreparedData.open(folder)


def recipe(**changes: object) -> Recipe:
    return Recipe(**(_RECIPE | changes))


def search_settings(**changes: Any) -> SearchSettings:
    """Returns the settings of a search on three chunks: by the error, with one group a step, of all options."""
    settings = SearchSettings(
        stop=0.4,
        images=96,
        chunk=32,
        score="error",
        per_cost=False,
        step=0.0,
        incremental=True,
        risk=None,
        precision="fp32",
    )
    return replace(settings, **changes)


def run_context(checkpoint_every_s: float = 300.0) -> RunContext:
    return RunContext(torch.device("cpu"), workers=0, checkpoint_every_s=checkpoint_every_s)


@cache
def _traced(dropout: float) -> tuple[nn.Module, ChannelGraph]:
    network = mobilenet_v2(10, 8, [[1, 8, 1, 1], [2, 8, 2, 2]], 16, in_channels=1, dropout=dropout)
    return network, trace(network, torch.zeros(1, 1, 8, 8))


def small_network(dropout: float = 0.0) -> tuple[nn.Module, ChannelGraph]:
    """Returns a MobileNetV2 with about 50 thousand MACs and its graph. No test changes it."""
    return _traced(dropout)
