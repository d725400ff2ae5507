"""OpenAI's list of models."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """One entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="Unix seconds.", examples=[1_795_348_800])
    owned_by: str = "deltadock"


class ModelList(BaseModel):
    """The models that can be requested."""

    object: Literal["list"] = "list"
    data: Sequence[ModelCard]
