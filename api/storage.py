"""What the blob store holds, by kind."""

from typing import Self

from pydantic import BaseModel, Field

from deltadock.api.dependencies import ResourcesDep
from deltadock.api.routing import api_router
from deltadock.errors import Forbidden
from deltadock.problems import problems
from deltadock.storage.usage import Usage, UsageByKind

router = api_router("/v1/storage", tags=["storage"])


class UsageOut(BaseModel):
    """A number of stored files, and their bytes."""

    files: int = Field(examples=[3])
    bytes: int = Field(examples=[5_704_812])

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """Convert."""
        return cls(files=usage.files, bytes=usage.bytes)


class StorageOut(BaseModel):
    """What the blob store holds."""

    artifacts: UsageOut = Field(description="Of deltas, deleted ones that can be restored too.")
    checkpoints: UsageOut = Field(description="Of bases and uploaded fine-tunes.")
    calibration: UsageOut
    uploads: UsageOut = Field(description="Of unfinished uploads.")
    work: UsageOut = Field(description="Saved blocks of jobs.")
    unreferenced: UsageOut = Field(description="To be collected.")
    total: UsageOut

    @classmethod
    def of(cls, usage: UsageByKind) -> Self:
        """Convert."""
        files, size = (sum(numbers) for numbers in zip(*usage.values(), strict=True))
        kinds = {str(kind): UsageOut.of(one) for kind, one in usage.items()}
        return cls(**kinds, total=UsageOut(files=files, bytes=size))


@router.get("", responses=problems(Forbidden))
def get_storage(resources: ResourcesDep) -> StorageOut:
    """Get the bytes in the blob store, of all tenants; for keys of the operator's tenant.

    The figures are those of a listing of the store, which a large store repeats less often.
    """
    return StorageOut.of(resources.storage.usage())
