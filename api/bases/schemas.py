"""Bodies of the base routes."""

from datetime import datetime
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.schemas import EXAMPLE_DIGEST, EXAMPLE_TIME, CheckpointOut, Digest, RequestBody
from deltadock.storage.models import BaseRow

EXAMPLE_BASE_ID = "base_k7wq2mzv5c3xj6nhy4tbr2dfsa"


class BaseIn(RequestBody):
    """A checkpoint that deltas are to be made against."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "tiny-base", "checkpoint": EXAMPLE_DIGEST}]}
    )

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$",
        description="Letters, digits, '.', '_' and '-'; at most 96.",
    )
    checkpoint: Digest


class BaseOut(BaseModel):
    """A base."""

    id: str = Field(examples=[EXAMPLE_BASE_ID])
    name: str = Field(examples=["tiny-base"])
    checkpoint: CheckpointOut
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, base: BaseRow) -> Self:
        """The public form of a row."""
        return cls(
            id=base.id,
            name=base.name,
            checkpoint=CheckpointOut.of(base.checkpoint),
            created_at=base.created_at,
        )


class BaseList(BaseModel):
    """Every base, by name."""

    data: list[BaseOut]
