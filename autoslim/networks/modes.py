"""Evaluation mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each in the mode that it had (a user may have frozen some)."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
