"""Inference nodes: their registrations and heartbeats, and listing them with their deltas."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from fastapi import APIRouter, Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, TypeAdapter
from sqlalchemy.orm import Session

from deltadock.api.access import Caller, CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.fleet import TIERS
from deltadock.api.schemas import (
    EXAMPLE_DELTA_ID,
    EXAMPLE_DIGEST,
    EXAMPLE_TIME,
    Digest,
    RequestBody,
)
from deltadock.storage.models import BaseRow, NodeRow
from deltadock.storage.repositories import BaseRepository, DeltaRepository, NodeRepository
from deltadock.storage.repositories.deltas import NamedDelta

router = APIRouter(prefix="/v1/nodes", tags=["nodes"])

EXAMPLE_NODE_ID: Final = "node_7hq2xk4m5n6p7q2r3s4t5u6v7w"
MAX_DELTAS: Final = 10_000


def _check_url(url: str) -> str:
    TypeAdapter(HttpUrl).validate_python(url)
    return url.rstrip("/")


NodeUrl = Annotated[
    str, Field(max_length=255, examples=["http://10.0.0.7:8100"]), AfterValidator(_check_url)
]
Tier = Literal["disk", "host", "device"]


class HeldDeltaIn(RequestBody):
    """A delta on a node, with the fastest tier that holds it."""

    digest: Digest = Field(description="The artifact's SHA-256.")
    tier: Tier
    bytes: int = Field(ge=0, le=2**62, examples=[416_992])
    references: int = Field(default=0, ge=0, le=2**31 - 1, description="Requests using it now.")
    pinned: bool = False


class NodeIn(RequestBody):
    """A node's heartbeat."""

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
    adopts: bool = Field(default=False, description="It loads whichever base requests need.")
    draining: bool = Field(default=False, description="It only finishes running requests.")
    capacity: int = Field(ge=1, le=2**31 - 1, description="Maximum sequences.")
    admitted: int = Field(ge=0, le=2**31 - 1, description="Current sequences.")
    delta_slots: int = Field(ge=0, le=2**31 - 1)
    deltas: list[HeldDeltaIn] = Field(default=[], max_length=MAX_DELTAS)
    lives_seconds: float = Field(
        gt=0, le=3600, description="The registration expires after this time without a heartbeat."
    )


class HeldDeltaOut(BaseModel):
    """A delta on a node."""

    artifact: Digest
    deltas: list[str] = Field(
        description="Ids of deltas with these bytes; of thousands, some.",
        examples=[[EXAMPLE_DELTA_ID]],
    )
    names: list[str] = Field(examples=[["maths/skills:1"]])
    tier: Tier
    bytes: int = Field(examples=[416_992])
    references: int = Field(examples=[2])
    pinned: bool = Field(examples=[False])


class NodeOut(BaseModel):
    """A registered inference node."""

    id: str = Field(examples=[EXAMPLE_NODE_ID])
    url: str = Field(examples=["http://10.0.0.7:8100"])
    state: Literal["ready", "draining"]
    base: Digest | None
    base_name: str | None = Field(examples=["tiny-base"])
    adopts: bool
    capacity: int = Field(examples=[80])
    admitted: int = Field(examples=[3])
    delta_slots: int = Field(examples=[32])
    held: dict[Tier, int] = Field(
        description="How many deltas each tier holds.", examples=[{"device": 3, "host": 40}]
    )
    deltas: list[HeldDeltaOut] = Field(description="The first `limit`, fastest tier first.")
    started_at: datetime = Field(examples=[EXAMPLE_TIME])
    seen_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(
        cls,
        node: NodeRow,
        bases: Mapping[str, BaseRow],
        seen: Sequence[dict[str, Any]],
        deltas: Mapping[str, Sequence[NamedDelta]],
        *,
        limit: int,
        whole: bool,
    ) -> Self:
        """Convert a row; `bases` and `deltas` are keyed by checkpoint and artifact digest.

        `seen` is what of the node's deltas the caller may see. Unless `whole`, a base that is not
        among `bases` is left out.
        """
        base = bases.get(node.base_digest or "")
        return cls(
            id=node.id,
            url=node.url,
            state="draining" if node.draining else "ready",
            base=node.base_digest if whole or base is not None else None,
            base_name=None if base is None else base.name,
            adopts=node.adopts,
            capacity=node.capacity,
            admitted=node.admitted,
            delta_slots=node.delta_slots,
            held=Counter(held["tier"] for held in seen),
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
                for held in seen[:limit]
            ],
            started_at=node.started_at,
            seen_at=node.seen_at,
        )


class NodeList(BaseModel):
    """The registered nodes."""

    data: list[NodeOut]


def registered_nodes(session: Session, caller: Caller, limit: int) -> NodeList:
    """The registered nodes, with their bases and deltas as far as the caller may see them.

    An operator sees by digest what belongs to other tenants. Of each node the first `limit` deltas
    are listed.
    """
    nodes = NodeRepository(session).alive()
    digests = {node.base_digest for node in nodes if node.base_digest is not None}
    found = BaseRepository(session, caller.tenant_id).with_checkpoints(digests)
    bases = {base.checkpoint_digest: base for base in found}
    deltas = DeltaRepository(session, caller.tenant_id)
    held = {node.id: sorted(node.deltas, key=_by_tier) for node in nodes}
    if not caller.is_operator:
        own = deltas.with_artifacts([one["digest"] for some in held.values() for one in some])
        held = {node: [one for one in some if one["digest"] in own] for node, some in held.items()}
    listed = {one["digest"] for some in held.values() for one in some[:limit]}
    named = deltas.named_by_artifact(list(listed))
    return NodeList(
        data=[
            NodeOut.of(node, bases, held[node.id], named, limit=limit, whole=caller.is_operator)
            for node in nodes
        ]
    )


def _by_tier(held: dict[str, Any]) -> int:
    return TIERS.index(held["tier"])


NodeId = Annotated[
    str, Path(pattern=r"^node_[a-z0-9]{1,32}$", description="Chosen by the node at its start.",
              examples=[EXAMPLE_NODE_ID])
]  # fmt: skip


@router.get("")
def list_nodes(
    caller: CallerDep,
    session: ReadSession,
    limit: Annotated[
        int, Query(ge=0, le=MAX_DELTAS, description="Deltas to list of each node.")
    ] = 200,
) -> NodeList:
    """List the registered inference nodes and the deltas they hold."""
    return registered_nodes(session, caller, limit)


# What nodes call is no part of the public description.


@router.put(
    "/{node_id}",
    status_code=204,
    include_in_schema=False,
)
def put_node(node_id: NodeId, body: NodeIn, unit: WriteUnit, resources: ResourcesDep) -> None:
    """Register a node, or record its heartbeat; a registration expires without heartbeats."""
    fields = body.model_dump()
    fields["base_digest"] = fields.pop("base")
    NodeRepository(unit.session).put(node_id, **fields)
    unit.after_commit.append(resources.fleet.invalidate)


@router.delete(
    "/{node_id}",
    status_code=204,
    include_in_schema=False,
)
def drop_node(node_id: NodeId, unit: WriteUnit, resources: ResourcesDep) -> None:
    """Deregister a node."""
    NodeRepository(unit.session).drop(node_id)
    unit.after_commit.append(resources.fleet.invalidate)
