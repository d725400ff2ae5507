"""Which weights nodes run for a request, where they hold them, and the api's headers for them."""

from dataclasses import dataclass
from typing import Final, Literal

BASE_HEADER: Final = "Deltadock-Base"
ARTIFACT_HEADER: Final = "Deltadock-Artifact"
BASE_NAME_HEADER: Final = "Deltadock-Base-Name"
TENANT_HEADER: Final = "Deltadock-Tenant"

SERVED: Final = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3",
    "granite", "olmo2", "olmo3", "ministral",
)  # fmt: skip
"""The `model_type`s that nodes serve."""


def not_served(model_type: str) -> str | None:
    """Why nodes serve no model of this type, and what to do; None: they do."""
    if model_type in SERVED:
        return None
    return (
        f"Models of type {model_type!r} are not served by nodes, which know {', '.join(SERVED)}. "
        "Merge the delta for another engine (`deltadock merge`), or load it in Python "
        "(`deltadock.load_delta`)."
    )


Tier = Literal["disk", "host", "device"]
"""What holds a delta, from the slowest to the fastest."""


@dataclass(frozen=True, slots=True)
class ModelTarget:
    """Weights by SHA-256: the base's checkpoint, and the artifact of one of its deltas, if any."""

    base_digest: str
    artifact_digest: str | None = None
    tenant: str | None = None
    """Whose request it is."""
    base_name: str | None = None
    """What the tenant calls the base; for messages."""

    @property
    def shown_base(self) -> str:
        """The base, in messages."""
        return self.base_name or self.base_digest

    @property
    def model_key(self) -> str:
        """Digest of the weights that answer."""
        return self.artifact_digest or self.base_digest

    @property
    def queue_key(self) -> str:
        """Fairness and cache key: tenants that share weights share neither queue nor prefixes."""
        return self.model_key if self.tenant is None else f"{self.model_key}/{self.tenant}"

    @property
    def headers(self) -> dict[str, str]:
        """The headers that name these weights."""
        named = {
            BASE_HEADER: self.base_digest,
            ARTIFACT_HEADER: self.artifact_digest,
            BASE_NAME_HEADER: self.base_name,
        }
        return {header: value for header, value in named.items() if value is not None}
