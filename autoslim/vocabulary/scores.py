"""How well a network does on images."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """``error`` is the fraction wrong at top-1, ``cross_entropy`` the mean in nats, over so many ``images``."""

    error: float
    cross_entropy: float
    images: int = 0
