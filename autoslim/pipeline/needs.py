"""What the methods of ``params.yaml`` need: the stage ``resources`` writes it, and ``supernet`` and ``search`` read it.

These stages depend on this file and not on the methods, so that they run again only if what is needed changes.
"""

from autoslim.errors import UserError
from autoslim.files import read_json, write_sealed
from autoslim.pipeline.project import RESOURCES

_PATH = RESOURCES / "needs.json"


def write_needs(*, supernet: bool) -> None:
    """Writes whether a method needs the supernet and the search on it."""
    write_sealed(_PATH, {"supernet": supernet})


def supernet_is_needed() -> bool:
    """Returns what ``write_needs`` wrote. If a stage is run alone, before the stage ``resources``, it is true.

    Raises:
        UserError: the file is damaged.
    """
    if not _PATH.exists():
        return True
    needed = read_json(_PATH, "resources").get("supernet")
    if not isinstance(needed, bool):
        raise UserError(f"{_PATH} is damaged (supernet is {needed!r}); delete it and run `dvc repro resources`")
    return needed
