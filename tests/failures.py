"""Errors that tests raise, and the messages of those that they expect."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autoslim.errors import UserError


class KilledError(Exception):
    """Ends a run in its middle, as a kill would."""


def kill_in(monkeypatch: pytest.MonkeyPatch, optimiser: type[torch.optim.Optimizer], number: int) -> None:
    """Kills the next training run at this step of its optimiser."""
    steps = 0
    original = optimiser.step

    def step(self: torch.optim.Optimizer, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > number:
            monkeypatch.setattr(optimiser, "step", original)
            raise KilledError
        return original(self, *args)

    monkeypatch.setattr(optimiser, "step", step)


def message_of(act: Callable[[], object]) -> str:
    """Returns the message, which must be one line, of the ``UserError`` that ``act`` raises."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)
