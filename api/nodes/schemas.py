"""Bodies of the routes of nodes."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, TypeAdapter

from deltadock.api.deltas.schemas import EXAMPLE_DELTA_ID
from deltadock.api.schemas import EXAMPLE_DIGEST, EXAMPLE_TIME, Digest, RequestBody
from deltadock.storage.models import BaseRow, DeltaRow, NodeRow

EXAMPLE_NODE_ID = "node_7hq2xk4m5n6p7q2r3s4t5u6v7w"
MAX_DELTAS = 10_000


def _check_url(url: str) -> str:
    TypeAdapter(HttpUrl).validate_python(url)
    return url.rstrip("/")


NodeUrl = Annotated[
    str, Field(max_length=255, examples=["http://10.0.0.7:8100"]), AfterValidator(_check_url)
]
Tier = Literal["disk", "host", "device"]


class HeldDelta(RequestBody):
    """A delta on a node, in the fastest tier that has it."""

    digest: Digest = Field(description="The artifact's SHA-256.")
    tier: Tier
    bytes: int = Field(ge=0, le=2**62, examples=[416_992])
    references: int = Field(default=0, ge=0, le=2**31 - 1, description="Requests on it now.")
    pinned: bool = False


class NodeIn(RequestBody):
    """What a node tells of itself."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "url": "http://10.0.0.7:8100",
                    "base": EXAMPLE_DIGEST,
                    "capacity": 80,
                    "admitted": 3,
                    "delta_slots": 32,
                    "lives_seconds": 10,
                    "deltas": [{"digest": EXAMPLE_DIGEST, "tier": "device", "bytes": 416_992}],
                }
            ]
        }
    )

    url: NodeUrl
    base: Digest | None = None
    adopts: bool = Field(default=False, description="It changes its base as requests need it.")
    draining: bool = Field(default=False, description="It only finishes what runs.")
    capacity: int = Field(ge=1, le=2**31 - 1, description="Sequences that it takes at once.")
    admitted: int = Field(ge=0, le=2**31 - 1, description="Sequences that it has.")
    delta_slots: int = Field(ge=0, le=2**31 - 1)
    deltas: list[HeldDelta] = Field(default=[], max_length=MAX_DELTAS)
    lives_seconds: float = Field(
        gt=0, le=3600, description="Unless it tells again, it is gone after this time."
    )


class HeldDeltaOut(BaseModel):
    """A delta on a node."""

    artifact: Digest
    deltas: list[str] = Field(
        description="Ids of the deltas with these bytes.", examples=[[EXAMPLE_DELTA_ID]]
    )
    names: list[str] = Field(examples=[["maths/skills:1"]])
    tier: Tier
    bytes: int = Field(examples=[416_992])
    references: int = Field(examples=[2])
    pinned: bool = Field(examples=[False])


class NodeOut(BaseModel):
    """An inference node that is there."""

    id: str = Field(examples=[EXAMPLE_NODE_ID])
    url: str = Field(examples=["http://10.0.0.7:8100"])
    state: Literal["ready", "draining"]
    base: Digest | None
    base_name: str | None = Field(examples=["tiny-base"])
    adopts: bool
    capacity: int = Field(examples=[80])
    admitted: int = Field(examples=[3])
    delta_slots: int = Field(examples=[32])
    deltas: list[HeldDeltaOut]
    started_at: datetime = Field(examples=[EXAMPLE_TIME])
    seen_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(
        cls, node: NodeRow, bases: Mapping[str, BaseRow], deltas: Mapping[str, Sequence[DeltaRow]]
    ) -> Self:
        """A row with the names of what it holds, both by digest."""
        base = bases.get(node.base_digest or "")
        return cls(
            id=node.id,
            url=node.url,
            state="draining" if node.draining else "ready",
            base=node.base_digest,
            base_name=None if base is None else base.name,
            adopts=node.adopts,
            capacity=node.capacity,
            admitted=node.admitted,
            delta_slots=node.delta_slots,
            deltas=[
                HeldDeltaOut(
                    artifact=held["digest"],
                    deltas=[delta.id for delta in deltas.get(held["digest"], ())],
                    names=[f"{d.name}:{d.version}" for d in deltas.get(held["digest"], ())],
                    tier=held["tier"],
                    bytes=held["bytes"],
                    references=held["references"],
                    pinned=held["pinned"],
                )
                for held in node.deltas
            ],
            started_at=node.started_at,
            seen_at=node.seen_at,
        )


class NodeList(BaseModel):
    """The nodes that are there."""

    data: list[NodeOut]
