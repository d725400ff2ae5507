"""What a tier counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class TierCounts:
    """What a tier was asked, since the start."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
