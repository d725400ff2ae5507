"""Which weights a node runs for a request, and the headers by which the api names them."""

from dataclasses import dataclass
from typing import Final

BASE_HEADER: Final = "Deltadock-Base"
ARTIFACT_HEADER: Final = "Deltadock-Artifact"


@dataclass(frozen=True, slots=True)
class ModelTarget:
    """Weights by SHA-256: the base's checkpoint, and the artifact of one of its deltas, if any."""

    base_digest: str
    artifact_digest: str | None = None

    @property
    def model_key(self) -> str:
        """Fairness and cache key."""
        return self.artifact_digest or self.base_digest

    @property
    def headers(self) -> dict[str, str]:
        """The headers that name these weights."""
        if self.artifact_digest is None:
            return {BASE_HEADER: self.base_digest}
        return {BASE_HEADER: self.base_digest, ARTIFACT_HEADER: self.artifact_digest}
