"""Bodies of the generation routes."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.schemas import EXAMPLE_DELTA_ID, RequestBody
from deltadock.openai.chat import ChatRequest
from deltadock.openai.completions import CompletionRequest
from deltadock.openai.fields import MaxTokens, ModelName, Seed, Stop, Temperature, TopP
from deltadock.storage.models import BaseRow, DeltaRow

Model = Annotated[
    ModelName,
    Field(
        description="A delta's id, project/model, project/model:version, or a base's name or id."
    ),
]


class CompletionIn(CompletionRequest):
    """OpenAI's completion request."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": EXAMPLE_DELTA_ID, "prompt": "17 + 25 =", "max_tokens": 8}]
        }
    )

    model: Model


class ChatIn(ChatRequest):
    """OpenAI's chat completion request; a message has a `role` and a `content` of text."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": EXAMPLE_DELTA_ID,
                    "messages": [{"role": "user", "content": "What is 17 + 25?"}],
                    "max_completion_tokens": 8,
                }
            ]
        }
    )

    model: Model


class GenerateIn(RequestBody):
    """One prompt."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "17 + 25 =", "max_tokens": 8, "temperature": 0}]}
    )

    prompt: str
    max_tokens: MaxTokens = 128
    temperature: Temperature | None = Field(
        default=None,
        description="0: always the likeliest token. Unset, the model's generation config decides.",
    )
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Stop | None = None


class UsageOut(BaseModel):
    """Tokens counted."""

    prompt_tokens: int = Field(examples=[5])
    completion_tokens: int = Field(examples=[3])
    total_tokens: int = Field(examples=[8])


class GeneratedOut(BaseModel):
    """The continuation of a prompt."""

    text: str = Field(examples=[" 42"])
    finish_reason: str | None = Field(examples=["stop"])
    usage: UsageOut

    @classmethod
    def of(cls, completion: dict[str, Any], **ids: str) -> Self:
        """From the node's OpenAI-style completion."""
        choice = completion["choices"][0]
        return cls(
            text=choice["text"],
            finish_reason=choice["finish_reason"],
            usage=UsageOut.model_validate(completion["usage"]),
            **ids,
        )


class DeltaGenerated(GeneratedOut):
    """What a delta generated."""

    delta: str = Field(examples=[EXAMPLE_DELTA_ID])


class BaseGenerated(GeneratedOut):
    """What a bare base generated."""

    base: str = Field(examples=["tiny-base"])


class ModelOut(BaseModel):
    """A model in OpenAI's list, with what Deltadock knows of it beside OpenAI's fields."""

    id: str = Field(examples=[EXAMPLE_DELTA_ID])
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds.", examples=[1_795_348_800])
    owned_by: str = "deltadock"
    name: str | None = Field(default=None, examples=["maths/skills:1"])
    delta: str | None = Field(default=None, examples=[EXAMPLE_DELTA_ID])
    base: str = Field(examples=["tiny-base"])

    @classmethod
    def of_base(cls, base: BaseRow) -> Self:
        """A base, by its name."""
        return cls(id=base.name, created=int(base.created_at.timestamp()), base=base.name)

    @classmethod
    def of_delta(cls, model_id: str, delta: DeltaRow) -> Self:
        """A delta, under its id or its name."""
        return cls(
            id=model_id,
            created=int(delta.created_at.timestamp()),
            name=f"{delta.name}:{delta.version}",
            delta=delta.id,
            base=delta.base.name,
        )


class ModelList(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelOut]
