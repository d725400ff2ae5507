"""Bodies of the job routes."""

from datetime import datetime
from typing import Self

from pydantic import BaseModel, Field

from deltadock.api.schemas import EXAMPLE_TIME
from deltadock.storage.models import JobRow, JobState

EXAMPLE_JOB_ID = "job_k7wq2mzv5c3xj6nhy4tbr2dfsa"


class JobError(BaseModel):
    """Why a job failed or stopped."""

    code: str = Field(examples=["non_finite_weights"])
    message: str = Field(examples=["model.layers.3.mlp.up_proj.weight holds NaN."])


class JobOut(BaseModel):
    """How far a compression is."""

    id: str = Field(examples=[EXAMPLE_JOB_ID])
    delta: str = Field(description="The delta's id.", examples=["dlt_k7wq2mzv5c3xj6nhy4tbr2dfsa"])
    state: JobState = Field(examples=["compressing"])
    block: int = Field(description="Of the present stage.", examples=[3])
    blocks: int = Field(examples=[8])
    percent: float = Field(description="Of the whole job, to one decimal.", examples=[42.5])
    message: str = Field(examples=["model.layers.3"])
    error: JobError | None = None
    cancel_requested: bool
    attempt: int = Field(description="How many workers have taken it up.", examples=[1])
    created_at: datetime = Field(examples=[EXAMPLE_TIME])
    updated_at: datetime = Field(examples=[EXAMPLE_TIME])
    finished_at: datetime | None = None

    @classmethod
    def of(cls, job: JobRow) -> Self:
        """The public form of a row."""
        error = None
        if job.error_code is not None:
            error = JobError(code=job.error_code, message=job.error_message or "")
        return cls(
            id=job.id,
            delta=job.delta_id,
            state=job.state,
            block=job.stage_block,
            blocks=job.stage_blocks,
            percent=round(job.percent, 1),
            message=job.message,
            error=error,
            cancel_requested=job.cancel_requested,
            attempt=job.attempt,
            created_at=job.created_at,
            updated_at=job.updated_at,
            finished_at=job.finished_at,
        )
