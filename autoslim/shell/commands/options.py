"""Options that several commands have, and those whose text stands for something: an image size, a file of channels."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from autoslim.vocabulary.channels import Channels
from autoslim.vocabulary.errors import UserError

ParamsFile = Annotated[Path, typer.Argument(help="The parameters.", show_default=True)]
Classes = Annotated[int | None, typer.Option("--classes", min=2, help="Classes there are. Default: as prepared.")]

_INPUT = re.compile(r"(\d+)x(\d+)x(\d+)")


def input_shape(image: str | None, size: int | None) -> tuple[int, int, int] | None:
    """(C, H, W) of ``--input 3x224x224`` or ``--size 224``; None where neither is given."""
    if image is not None and size is not None:
        raise UserError("--input and --size both give the images' size; give one of them")
    if image is None:
        return None if size is None else (3, size, size)
    match = _INPUT.fullmatch(image)
    if match is None or "0" in match.groups():
        raise UserError(f"--input {image!r} is no image size; write channels x height x width, such as 3x224x224")
    return int(match[1]), int(match[2]), int(match[3])


def keyword_values(pairs: Sequence[str]) -> dict[str, Any]:
    """``["depth=3", "act=relu"]`` -> ``{"depth": 3, "act": "relu"}``; values are read as in ``params.yaml``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--kwargs {pair!r} is not KEY=VALUE; write it like --kwargs depth=3")
        try:
            values[key] = YAML(typ="safe").load(text)
        except YAMLError as error:
            raise UserError(f"--kwargs {pair!r}: the value cannot be read; write it as in params.yaml") from error
    return values


def read_channels(path: Path) -> Channels:
    """Channels by group, alone or under "channels" as in ``outputs/channels/METHOD.json``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--channels {path} cannot be read ({error.strerror}); give a JSON file") from error
    except ValueError as error:
        raise UserError(f'--channels {path} is not JSON ({error}); write it like {{"features.0.0": 24}}') from error
    channels = values.get("channels", values) if isinstance(values, dict) else values
    if not isinstance(channels, dict) or not all(type(count) is int for count in channels.values()):
        raise UserError(f'--channels {path} holds no numbers by group; write it like {{"features.0.0": 24, ...}}')
    return channels
