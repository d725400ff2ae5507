"""Bodies of the preview route."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.goals import GoalFields
from deltadock.api.schemas import EXAMPLE_DIGEST, Digest
from deltadock.compression.preview import SizePreview


class PreviewIn(GoalFields):
    """A compression that is not to be done yet."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "base": "tiny-base",
                    "checkpoint": EXAMPLE_DIGEST,
                    "method": "adamix",
                    "bits": 1.0,
                }
            ]
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
    """What a compression will come to, predicted from shapes alone."""

    method: str = Field(examples=["adamix"])
    bits: float | None = Field(
        examples=[1.0], description="The budget, as given or as the size asks for."
    )
    artifact_bytes: int = Field(examples=[952_834_765])
    checkpoint_bytes: int = Field(
        examples=[15_231_233_024], description="Of the fine-tune at two bytes a weight."
    )
    parameters: int = Field(examples=[7_615_616_512])
    ratio: float = Field(examples=[15.99], description="Checkpoint bytes per artifact byte.")
    true_bits: float = Field(examples=[1.0], description="Stored bits per weight, all in.")
    parts: list[PartOut]

    @classmethod
    def of(cls, size: SizePreview) -> Self:
        """The public form of a preview."""
        return cls.model_validate(size.to_dict())
