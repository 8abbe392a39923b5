"""Errors that tests raise, and the messages of those that they expect."""

from collections.abc import Callable

import pytest

from autoslim.errors import UserError


class KilledError(Exception):
    """Ends a run in its middle, as a kill would."""


def message_of(act: Callable[[], object]) -> str:
    """Returns the message, which must be one line, of the ``UserError`` that ``act`` raises."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)
