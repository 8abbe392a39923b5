"""The forms that ``data.source`` can take: ``digits``, ``torchvision:NAME``, ``folder:PATH``."""

from __future__ import annotations

from pathlib import Path

from autoslim.engine.data.digits import load_digits_source
from autoslim.engine.data.folder import check_folder, load_folder_source
from autoslim.engine.data.source import Source
from autoslim.engine.data.torchvision_sets import check_torchvision, load_torchvision_source
from autoslim.vocabulary.errors import UserError

_FORMS = "expected digits, torchvision:NAME (for example torchvision:CIFAR10) or folder:PATH"


def check_source(source: str, *, relative_to: Path = Path()) -> None:
    """The cheap checks of a source, before any work: its form, the folder and its classes, torchvision's name.

    Downloads nothing and opens no image. A relative ``folder:`` path starts at ``relative_to``. Raises ``UserError``.
    """
    scheme, rest = _parse(source)
    if scheme == "torchvision":
        check_torchvision(rest)
    elif scheme == "folder":
        check_folder(located(rest, relative_to))


def load_source(source: str, *, raw: Path, relative_to: Path = Path()) -> Source:
    """Find (torchvision: download into ``raw``) the images of a source, decoding few. Raises ``UserError``."""
    scheme, rest = _parse(source)
    if scheme == "torchvision":
        return load_torchvision_source(rest, raw, relative_to)
    if scheme == "folder":
        return load_folder_source(rest, located(rest, relative_to))
    return load_digits_source()


def located(path: str, relative_to: Path) -> Path:
    """A user's path, ``~`` expanded, relative ones from ``relative_to``."""
    return relative_to / Path(path).expanduser()


def _parse(source: str) -> tuple[str, str]:
    scheme, colon, rest = source.partition(":")
    known = (scheme == "digits" and not colon) or (scheme in ("torchvision", "folder") and rest)
    if not known:
        raise UserError(f"data source {source!r} is unknown; {_FORMS}")
    return scheme, rest
