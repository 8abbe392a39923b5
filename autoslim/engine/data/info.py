"""What a prepared data folder says about itself: ``data.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from autoslim.vocabulary.errors import UserError

SPLITS = ("train", "search", "test")
FILE_NAME = "data.json"
FORMAT = 1


@dataclass(frozen=True)
class DataInfo:
    """One prepared data set.

    ``mean`` and ``std`` are per channel, of the train split under the evaluation transform, for pixels in [0, 1].
    ``counts`` are images by split. ``storage`` is "arrays" (pixels as ``.npy``) or "files" (a manifest, no copy).
    ``resize`` is the length of the shorter side before the centre crop of ``image_size`` (pixels.py says the rule);
    0 stands for ``image_size`` itself. ``root`` is the folder that the paths of a manifest start from ("files" only).
    """

    source: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, int]
    storage: str
    resize: int = 0
    root: str = ""

    @property
    def shorter_side(self) -> int:
        """Length in pixels that the shorter side gets before the centre crop."""
        return self.resize or self.image_size

    def to_json(self) -> str:
        """The text of ``data.json``: same values, same bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DataInfo:
        """The inverse of ``to_json``; raises ``ValueError`` or ``KeyError`` where the text is something else."""
        values = json.loads(text)
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"not a data.json of format {FORMAT}")
        known = {field.name: values[field.name] for field in fields(cls)}
        for name in ("classes", "mean", "std"):
            known[name] = tuple(known[name])
        return cls(**known)


def read_info(folder: Path) -> DataInfo:
    """``data.json`` of a prepared folder; ``UserError`` where there is none or it cannot be read."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared data folder (it has no {FILE_NAME}); run the prepare stage first")
    try:
        return DataInfo.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); run the prepare stage again") from error
