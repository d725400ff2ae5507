"""What a node is to run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """Weights by digest: the base's checkpoint, and the artifact on top of it, if any."""

    base_digest: str
    artifact_digest: str | None
