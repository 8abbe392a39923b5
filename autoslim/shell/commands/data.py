"""The data that a command is about: as they were prepared, or as options describe them where there are none."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autoslim.vocabulary.errors import UserError

if TYPE_CHECKING:
    from autoslim.engine.data import DataInfo
    from autoslim.shell.params import Params


def prepared_info(params: "Params") -> "DataInfo | None":
    """What the prepared data say of themselves, or None where there are none, or others, as far as can be seen."""
    from autoslim.engine.data.info import FILE_NAME, read_info
    from autoslim.shell.places import PREPARED

    if not (PREPARED / FILE_NAME).is_file():
        return None
    info = read_info(PREPARED)
    data = params.data
    asked = (data.source, data.image_size or info.image_size, data.channels or info.channels)
    there = info.counts
    same = asked == (info.source, info.image_size, info.channels) and data.search_images == there["search"]
    more = there["train"] > (data.train_images or math.inf) or there.get("test", 0) > (data.test_images or math.inf)
    return info if same and not more else None


def described_data(
    params: "Params", *, classes: int, size: int | None, channels: int | None, counts: Mapping[str, int], remedy: str
) -> "DataInfo":
    """Data of so many classes with images of ``size`` pixels and ``channels``, which nobody has prepared.

    Args:
        counts: images by split.
        remedy: what to do where size or channels are not known.

    Raises:
        UserError: they are not.
    """
    from autoslim.engine.data import DataInfo

    source = params.data.source
    if size is None or channels is None:
        raise UserError(
            f"data.image_size is {size} and data.channels {channels}: as the source has them, which only prepared data "
            f"tell; {remedy}"
        )
    return DataInfo(source, tuple(map(str, range(classes))), channels, size, (), (), dict(counts), storage="files")
