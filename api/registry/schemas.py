"""Request and response bodies of the registry's routes."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deltadock.api.deltas.schemas import DeltaOut
from deltadock.api.schemas import (
    EXAMPLE_DELTA_ID,
    EXAMPLE_DIGEST,
    EXAMPLE_TIME,
    Digest,
    RequestBody,
)
from deltadock.names import TAG_PATTERN
from deltadock.storage.tables import AliasMoveRow, AliasRow, ModelRow

Tag = Annotated[str, Field(pattern=TAG_PATTERN, examples=["german"])]
Reason = Annotated[
    str, Field(max_length=500, description="Why, for the history.", examples=["Evaluated."])
]


class RuleFields(RequestBody):
    """When a newer version that is ready becomes the default by itself."""

    max_kl: float = Field(
        ge=0, allow_inf_nan=False, description="Maximum KL, in nats per token.", examples=[0.05]
    )
    max_increase: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Maximum KL above that of the default at the time.",
    )


class ModelPatch(RequestBody):
    """Changes of a model; fields that are left out stay as they are."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "description": "# Skills\nSolves maths exercises.",
                    "tags": ["maths"],
                    "rule": {"max_kl": 0.05, "max_increase": 0.001},
                }
            ]
        }
    )

    description: str | None = Field(
        default=None, max_length=50_000, description="The model card, in Markdown."
    )
    tags: Annotated[list[Tag], AfterValidator(lambda tags: list(dict.fromkeys(tags)))] | None = (
        Field(default=None, max_length=50)
    )
    rule: RuleFields | None = Field(
        default=None,
        description="null: once the first versions have ended, the default moves only by hand.",
    )


class AliasIn(RequestBody):
    """What an alias shall mean."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 3, "reason": "Tested."}]})

    version: int = Field(ge=1, le=2**31 - 1, examples=[3])
    reason: Reason = ""
    expected: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="The version that it must mean now (0: none); another one is a conflict.",
    )


class AliasOut(BaseModel):
    """What an alias means."""

    alias: str = Field(examples=["default"])
    version: int = Field(examples=[3])
    delta: str = Field(examples=[EXAMPLE_DELTA_ID])
    moved_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, row: AliasRow) -> Self:
        """Convert a row."""
        return cls(alias=row.alias, version=row.version, delta=row.delta_id, moved_at=row.moved_at)


class AliasMoveOut(BaseModel):
    """One move of an alias; a version of null is none."""

    id: int = Field(examples=[17])
    alias: str = Field(examples=["default"])
    from_version: int | None = Field(examples=[2])
    to_version: int | None = Field(examples=[3])
    reason: str
    moved_by: str | None = Field(
        description="The id of an API key; null: a rule, or one of the first versions."
    )
    moved_by_name: str | None = Field(description="That key's name.", examples=["ci"])
    at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, row: AliasMoveRow, key_names: Mapping[str, str]) -> Self:
        """Convert a row; `key_names` are by the keys' ids."""
        return cls(
            id=row.id,
            alias=row.alias,
            from_version=row.from_version,
            to_version=row.to_version,
            reason=row.reason,
            moved_by=row.moved_by,
            moved_by_name=key_names.get(row.moved_by or ""),
            at=row.at,
        )


class HistoryPage(BaseModel):
    """Moves of a model's aliases, newest first. `next` is the next page's `after`."""

    data: list[AliasMoveOut]
    next: int | None


class ModelEntry(BaseModel):
    """A model in a list."""

    name: str = Field(examples=["maths/skills"])
    tags: list[str] = Field(examples=[["maths"]])
    last_version: int = Field(description="The highest version that was pushed.", examples=[3])
    rule: dict[str, Any] | None = Field(
        description="When a newer version becomes the default by itself; null: by hand."
    )
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, model: ModelRow, **more: Any) -> Self:
        """Convert a row."""
        return cls(
            name=model.name,
            tags=model.tags,
            last_version=model.last_version,
            rule=model.rule,
            created_at=model.created_at,
            **more,
        )


class ModelCardOut(ModelEntry):
    """A model with its card and aliases."""

    description: str
    aliases: list[AliasOut] = Field(description="The bare name means the alias `default`.")


class ModelPage(BaseModel):
    """Models by name. `next` is the next page's `after`; null on the last page."""

    data: list[ModelEntry]
    next: str | None


class Resolved(BaseModel):
    """What a name means now, for programs that fetch or cache the bytes."""

    name: str = Field(examples=["maths/skills:3"])
    delta: str = Field(examples=[EXAMPLE_DELTA_ID])
    digest: Digest = Field(description="The artifact's.")
    bytes: int = Field(examples=[262_144])
    artifact: str = Field(
        description="The path of the artifact's download.",
        examples=[f"/v1/deltas/{EXAMPLE_DELTA_ID}/artifact"],
    )
    base: str = Field(description="The base's name.", examples=["tiny-base"])
    base_digest: Digest = Field(description="The base's checkpoint.", examples=[EXAMPLE_DIGEST])

    @classmethod
    def of(cls, delta: DeltaOut, digest: str) -> Self:
        """What a ready delta's name resolves to."""
        return cls(
            name=f"{delta.name}:{delta.version}",
            delta=delta.id,
            digest=digest,
            bytes=delta.artifact.bytes if delta.artifact else 0,
            artifact=f"/v1/deltas/{delta.id}/artifact",
            base=delta.base.name,
            base_digest=delta.base.checkpoint,
        )
