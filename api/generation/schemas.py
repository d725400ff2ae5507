"""Schemas of the generation routes, besides OpenAI's own."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.schemas import EXAMPLE_DELTA_ID
from deltadock.openai.completions import Completion
from deltadock.openai.fields import ONE_GRAMMAR, AnswerFields, MaxTokens, Usage
from deltadock.openai.models import ModelCard, ModelList
from deltadock.storage.repositories.models import Answering
from deltadock.storage.repositories.shown import ShownDelta
from deltadock.storage.tables import BaseRow


class GenerateIn(AnswerFields):
    """One prompt, and how its answer is generated as in /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "17 + 25 =", "max_tokens": 8, "temperature": 0}],
            "allOf": [ONE_GRAMMAR],
        }
    )

    prompt: str = Field(min_length=1)
    max_tokens: MaxTokens = 128


class GeneratedOut(BaseModel):
    """The continuation of a prompt."""

    text: str = Field(examples=[" 42"])
    finish_reason: str | None = Field(examples=["stop"])
    usage: Usage

    @classmethod
    def of(cls, completion: Completion, **ids: str) -> Self:
        """From the node's completion."""
        choice = completion.choices[0]
        return cls(
            text=choice.text,
            finish_reason=choice.finish_reason,
            usage=completion.usage or Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0),
            **ids,
        )


class DeltaGenerated(GeneratedOut):
    """A continuation by a delta."""

    delta: str = Field(examples=[EXAMPLE_DELTA_ID])


class BaseGenerated(GeneratedOut):
    """A continuation by a base."""

    base: str = Field(examples=["tiny-base"])


class ModelOut(ModelCard):
    """A model in OpenAI's list, with Deltadock's names of it."""

    id: str = Field(examples=[EXAMPLE_DELTA_ID])
    name: str | None = Field(default=None, examples=["maths/skills:1"])
    delta: str | None = Field(default=None, examples=[EXAMPLE_DELTA_ID])
    base: str = Field(examples=["tiny-base"])

    @classmethod
    def of_base(cls, base: BaseRow) -> Self:
        """A base, by its name."""
        return cls(id=base.name, created=int(base.created_at.timestamp()), base=base.name)

    @classmethod
    def of_delta(cls, model_id: str, delta: ShownDelta) -> Self:
        """A delta, under any of its names."""
        return cls._named(model_id, delta, delta.base.name)

    @classmethod
    def of_name(cls, model: Answering) -> Self:
        """A model, under its bare name."""
        return cls._named(model.name, model, model.base)

    @classmethod
    def _named(cls, model_id: str, delta: ShownDelta | Answering, base: str) -> Self:
        return cls(
            id=model_id,
            created=int(delta.created_at.timestamp()),
            name=f"{delta.name}:{delta.version}",
            delta=delta.id,
            base=base,
        )


class ModelListOut(ModelList):
    """A page of the bases and of the names that answer, one entry each."""

    data: list[ModelOut]
    first_id: str | None
    last_id: str | None = Field(description="The next page's `after`.")
    has_more: bool

    @classmethod
    def of(cls, models: list[ModelOut], *, has_more: bool) -> Self:
        """A page, as OpenAI pages its lists."""
        return cls(
            data=models,
            first_id=models[0].id if models else None,
            last_id=models[-1].id if models else None,
            has_more=has_more,
        )
