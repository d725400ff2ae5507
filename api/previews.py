"""Size previews: the artifact's size, predicted from tensor shapes."""

from typing import Self

import anyio
from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.access import CallerDep
from deltadock.api.bases import require_base, require_checkpoint
from deltadock.api.comparison import REFUSED_COMPARISONS, compare
from deltadock.api.dependencies import ResourcesDep
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_DIGEST, Digest, GoalFields, goal_choices
from deltadock.artifacts.checkpoint import ADAPTER_TYPE
from deltadock.compression.options import METHODS, SIZES
from deltadock.compression.preview import SizePreview, preview_size
from deltadock.errors import (
    BitsOutOfRange,
    Conflict,
    InvalidGoal,
    NotFound,
    UnknownMethod,
    refused_by_state,
)
from deltadock.problems import problems

router = api_router("/v1/previews", tags=["deltas"])


class PreviewIn(GoalFields):
    """A compression whose size to predict."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "base": "tiny-base",
                    "checkpoint": EXAMPLE_DIGEST,
                    "method": "adamix",
                    "bits": 1.0,
                }
            ],
            "anyOf": goal_choices(METHODS.values(), SIZES),
        }
    )

    base: str = Field(min_length=1, max_length=96, description="The base's id or name.")
    checkpoint: Digest = Field(description="The fine-tuned checkpoint's digest.")


class PartOut(BaseModel):
    """One kind of changed tensor, or the manifest, in the artifact."""

    kind: str = Field(examples=["linear layers"])
    tensors: int = Field(examples=[196])
    weights: int = Field(examples=[6_525_288_448])
    bytes: int = Field(examples=[815_661_056])


class PreviewOut(BaseModel):
    """The predicted size of a compression."""

    method: str = Field(examples=["adamix"])
    bits: float | None = Field(
        examples=[1.0], description="The budget, as given or derived from the requested size."
    )
    artifact_bytes: int = Field(examples=[952_834_765])
    checkpoint_bytes: int = Field(
        examples=[15_231_233_024], description="Of the fine-tune at two bytes per weight."
    )
    parameters: int = Field(examples=[7_615_616_512])
    ratio: float = Field(examples=[15.99], description="Checkpoint bytes per artifact byte.")
    true_bits: float = Field(
        examples=[1.0], description="Bits per weight, all stored bytes counted."
    )
    parts: list[PartOut]

    @classmethod
    def of(cls, size: SizePreview) -> Self:
        """Convert a preview."""
        return cls.model_validate(size.to_dict())


@router.post(
    "",
    responses=problems(
        NotFound,
        Conflict,
        UnknownMethod,
        BitsOutOfRange,
        InvalidGoal,
        by_state=REFUSED_COMPARISONS,
    ),
)
async def preview_delta(body: PreviewIn, caller: CallerDep, resources: ResourcesDep) -> PreviewOut:
    """Predict the size of a delta from the tensors' shapes; nothing is stored."""

    def preview() -> SizePreview:
        with resources.database.read_scope() as session:
            base = require_base(session, caller.tenant_id, body.base)
            checkpoint = require_checkpoint(session, caller.tenant_id, body.checkpoint)
        method, goal = body.check_goal(is_adapter=checkpoint.model_type == ADAPTER_TYPE)
        shapes, carried = compare(
            resources.blobs, base.checkpoint_digest, checkpoint.digest, method, goal
        )
        with refused_by_state():
            return preview_size(shapes, method.name, goal, carried=carried)

    return PreviewOut.of(await anyio.to_thread.run_sync(preview, limiter=resources.comparing))
