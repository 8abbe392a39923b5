"""Places in the user's source, for messages."""

import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "(.+)", line (\d+)')
_MACHINERY = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


def place(frames: Iterable[tuple[str, int]]) -> str:
    """The innermost of the frames (file, line), outermost first, that is not torch's or ours: ``net.py:12``, or ''."""
    own = [(file, line) for file, line in frames if not file.startswith(_MACHINERY)]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def place_in(error: Exception) -> str:
    """The line that an error comes from."""
    return place((frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__))


def place_of(node: fx.Node) -> str:
    """The line of a ``forward`` that made this node."""
    return place((file, int(line)) for file, line in _FRAME.findall(node.stack_trace or ""))
