"""Types that several domains' schemas share."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.storage.models import CheckpointRow

EXAMPLE_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
EXAMPLE_TIME = datetime.fromisoformat("2026-11-22T12:00:00+00:00")

Digest = Annotated[
    str,
    Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256, 64 lower-case hex digits.",
        examples=[EXAMPLE_DIGEST],
    ),
]


class RequestBody(BaseModel):
    """Root of request bodies: an unknown field is an error, not a silently lost wish."""

    model_config = ConfigDict(extra="forbid")


class CheckpointOut(BaseModel):
    """A complete checkpoint."""

    digest: Digest = Field(description="Names the whole checkpoint: files, tensors and config.")
    weights_digest: Digest = Field(
        description="Names the tensors alone, however sharded; what an artifact's base is."
    )
    model_type: str = Field(examples=["llama"])
    total_bytes: int = Field(examples=[4_196_352])

    @classmethod
    def of(cls, checkpoint: CheckpointRow) -> Self:
        """The public form of a row."""
        return cls(
            digest=checkpoint.digest,
            weights_digest=checkpoint.weights_digest,
            model_type=checkpoint.model_type,
            total_bytes=checkpoint.total_bytes,
        )
