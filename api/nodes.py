"""Inference nodes: registrations and heartbeats, lists with their deltas, and operating them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Final, Literal, Self

import httpx
from fastapi import Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, TypeAdapter
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from deltadock.api.access import Caller, CallerDep
from deltadock.api.dependencies import ReadSession, Resources, ResourcesDep, WriteUnit
from deltadock.api.fleet import TIERS
from deltadock.api.routing import api_router
from deltadock.api.schemas import (
    EXAMPLE_DELTA_ID,
    EXAMPLE_DIGEST,
    EXAMPLE_TIME,
    Digest,
    RequestBody,
)
from deltadock.errors import Conflict, NotFound, Unavailable
from deltadock.model_target import Tier
from deltadock.names import DIGEST_PATTERN, NODE_PATTERN
from deltadock.problems import problems
from deltadock.storage.documents import HeldDelta
from deltadock.storage.repositories import BaseRepository, DeltaRepository, NodeRepository
from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.blobs import BlobRepository
from deltadock.storage.repositories.deltas import NamedDelta
from deltadock.storage.tables import AuditAction, BaseRow, NodeRow
from deltadock.trust import credentials

router = api_router("/v1/nodes", tags=["nodes"])

EXAMPLE_NODE_ID: Final = "node_7hq2xk4m5n6p7q2r3s4t5u6v7w"
MAX_DELTAS: Final = 10_000
MAX_DAMAGED: Final = 100
TELL_SECONDS: Final = 30.0
"""How long a node may take to do what an operator says."""


def _check_url(url: str) -> str:
    TypeAdapter(HttpUrl).validate_python(url)
    return url.rstrip("/")


NodeUrl = Annotated[
    str, Field(max_length=255, examples=["http://10.0.0.7:8100"]), AfterValidator(_check_url)
]


class HeldDeltaIn(RequestBody):
    """A delta on a node, with the fastest tier that holds it."""

    digest: Digest = Field(description="The artifact's SHA-256.")
    tier: Tier
    bytes: int = Field(ge=0, le=2**62, examples=[416_992])
    references: int = Field(default=0, ge=0, le=2**31 - 1, description="Requests using it now.")
    pinned: bool = False


class NodeUsage(RequestBody):
    """A node's throughput, latency and memory in the ten seconds before its heartbeat."""

    tokens_per_second: float = Field(ge=0, description="Generated.", examples=[812.5])
    first_token_seconds: float | None = Field(
        default=None, ge=0, description="Mean; null: no answer began.", examples=[0.21]
    )
    inter_token_seconds: float | None = Field(
        default=None, ge=0, description="Mean between two tokens of an answer.", examples=[0.018]
    )
    memory_bytes: int | None = Field(
        default=None, ge=0, le=2**62, description="Of the GPU, or else of the node's process.",
        examples=[21_474_836_480],
    )  # fmt: skip
    memory_limit: int | None = Field(
        default=None, ge=0, le=2**62, description="Of the GPU or machine.",
        examples=[85_899_345_920],
    )  # fmt: skip


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
    context_tokens: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="Of the longest sequence, with its answer."
    )
    deltas: list[HeldDeltaIn] = Field(default=[], max_length=MAX_DELTAS)
    damaged: list[Digest] = Field(
        default=[],
        max_length=MAX_DAMAGED,
        description="Blobs whose bytes in the store do not have their SHA-256.",
    )
    usage: NodeUsage | None = None
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
    """A registered inference node.

    Where it is and how busy is for the operator's tenant: from `url` on, others get null or
    nothing.
    """

    id: str = Field(examples=[EXAMPLE_NODE_ID])
    state: Literal["ready", "draining"]
    base: Digest | None
    base_name: str | None = Field(examples=["tiny-base"])
    adopts: bool = Field(description="Whether it loads the base that a request needs.")
    url: str | None = Field(default=None, examples=["http://10.0.0.7:8100"])
    capacity: int | None = Field(default=None, examples=[80])
    admitted: int | None = Field(default=None, examples=[3])
    delta_slots: int | None = Field(default=None, examples=[32])
    held: dict[Tier, int] = Field(
        default={},
        description="How many deltas each tier holds.",
        examples=[{"device": 3, "host": 40}],
    )
    deltas: list[HeldDeltaOut] = Field(
        default=[], description="The first `limit`, fastest tier first."
    )
    usage: NodeUsage | None = None
    started_at: datetime | None = Field(default=None, examples=[EXAMPLE_TIME])
    seen_at: datetime | None = Field(default=None, examples=[EXAMPLE_TIME])

    @classmethod
    def for_tenant(cls, node: NodeRow, base: BaseRow | None) -> Self:
        """Whether the node can serve; `base` is the one that it has, if the caller may see it."""
        return cls(
            id=node.id,
            state="draining" if node.draining else "ready",
            base=None if base is None else base.checkpoint_digest,
            base_name=None if base is None else base.name,
            adopts=node.adopts,
        )

    @classmethod
    def for_operator(
        cls,
        node: NodeRow,
        base: BaseRow | None,
        named: Mapping[str, Sequence[NamedDelta]],
        limit: int,
    ) -> Self:
        """All of a row, with its first `limit` deltas; `named` are keyed by artifact digest."""
        return cls(
            id=node.id,
            state="draining" if node.draining else "ready",
            base=node.base_digest,
            base_name=None if base is None else base.name,
            adopts=node.adopts,
            url=node.url,
            capacity=node.capacity,
            admitted=node.admitted,
            delta_slots=node.delta_slots,
            held=Counter(held["tier"] for held in node.deltas),
            deltas=[
                HeldDeltaOut(
                    artifact=held["digest"],
                    deltas=[delta.id for delta in named.get(held["digest"], ())],
                    names=[f"{d.name}:{d.version}" for d in named.get(held["digest"], ())],
                    tier=held["tier"],
                    bytes=held["bytes"],
                    references=held["references"],
                    pinned=held["pinned"],
                )
                for held in _first(node, limit)
            ],
            usage=None if node.usage is None else NodeUsage(**node.usage),
            started_at=node.started_at,
            seen_at=node.seen_at,
        )


class NodeList(BaseModel):
    """The registered nodes."""

    data: list[NodeOut]


def registered_nodes(session: Session, caller: Caller, limit: int) -> NodeList:
    """The registered nodes: all, with the first `limit` deltas of each, for an operator.

    Others see those that can serve a base of theirs, and which of these are ready. Addresses, load
    and deltas would tell how others are served, and what they use: equal deltas of several tenants
    are one on a node.
    """
    nodes = NodeRepository(session).alive()
    digests = {node.base_digest for node in nodes if node.base_digest is not None}
    found = BaseRepository(session, caller.tenant_id).with_checkpoints(digests)
    bases = {base.checkpoint_digest: base for base in found}
    based = [(node, bases.get(node.base_digest or "")) for node in nodes]
    if not caller.is_operator:
        return NodeList(
            data=[
                NodeOut.for_tenant(node, base)
                for node, base in based
                if base is not None or node.adopts
            ]
        )
    listed = {held["digest"] for node in nodes for held in _first(node, limit)}
    named = DeltaRepository(session, caller.tenant_id).named_by_artifact(list(listed))
    return NodeList(data=[NodeOut.for_operator(node, base, named, limit) for node, base in based])


def _first(node: NodeRow, limit: int) -> list[HeldDelta]:
    """A node's deltas, fastest tier first."""
    return sorted(node.deltas, key=lambda held: TIERS.index(held["tier"]))[:limit]


NodeId = Annotated[
    str, Path(pattern=NODE_PATTERN, description="Chosen by the node at its start.",
              examples=[EXAMPLE_NODE_ID])
]  # fmt: skip
ArtifactDigest = Annotated[
    str, Path(pattern=DIGEST_PATTERN, description="The artifact's SHA-256.",
              examples=[EXAMPLE_DIGEST])
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


class NodeSample(NodeUsage):
    """What a node reported at one moment."""

    model_config = ConfigDict(from_attributes=True)

    at: datetime = Field(examples=[EXAMPLE_TIME])
    admitted: int = Field(description="Sequences, running and waiting.", examples=[3])
    device: int = Field(description="Deltas in slots.", examples=[3])
    host: int = Field(description="Deltas in host memory only.", examples=[40])
    disk: int = Field(description="Deltas on disk only.", examples=[200])


class NodeSamples(BaseModel):
    """The samples of the last hour, oldest first; one in about fifteen seconds."""

    data: list[NodeSample]


@router.get("/{node_id}/samples", responses=problems(NotFound))
def list_samples(node_id: NodeId, session: ReadSession) -> NodeSamples:
    """List what a node did in the last hour: load, throughput, latency, memory and deltas."""
    found = NodeRepository(session).samples([node_id])[node_id]
    if not found:
        raise NotFound(f"There is no node {node_id!r} that reported in the last hour.")
    return NodeSamples(data=[NodeSample.model_validate(sample) for sample in found])


TOLD: Final = problems(NotFound, Conflict)
"""Errors of what an operator tells a node."""


@router.post("/{node_id}/drain", status_code=204, responses=TOLD)
async def drain_node(node_id: NodeId, caller: CallerDep, resources: ResourcesDep) -> None:
    """Let a node finish its running requests and accept no others, until it is resumed or
    starts again.
    """
    await _tell(resources, node_id, "drain")
    await _record(resources, caller, AuditAction.NODE_DRAIN, node_id)


@router.post("/{node_id}/resume", status_code=204, responses=TOLD)
async def resume_node(node_id: NodeId, caller: CallerDep, resources: ResourcesDep) -> None:
    """Let a drained node accept requests again."""
    await _tell(resources, node_id, "resume")
    await _record(resources, caller, AuditAction.NODE_RESUME, node_id)


@router.delete("/{node_id}/deltas/{artifact}", status_code=204, responses=TOLD)
async def evict_delta(
    node_id: NodeId, artifact: ArtifactDigest, caller: CallerDep, resources: ResourcesDep
) -> None:
    """Remove a delta from a node's slots and host memory; its file stays on the node's disk.

    The next request for it loads it again. 409 while it is pinned or in use.
    """
    await _tell(resources, node_id, f"deltas/{artifact}/unload")
    await _record(resources, caller, AuditAction.NODE_EVICT, node_id, artifact=artifact)


async def _tell(resources: Resources, node_id: str, what: str) -> None:
    """Call a node's route for operators.

    Raises:
        NotFound: there is no such node, or the node lacks what is named.
        Conflict: the node refuses it now.
        Unavailable: the node does not answer.
    """
    node = next((node for node in await resources.fleet.nodes() if node.id == node_id), None)
    if node is None:
        raise NotFound(f"There is no node {node_id!r}; GET /v1/nodes lists them.")
    try:
        answer = await resources.http.post(
            f"{node.url}/v1/{what}",
            headers=credentials(resources.settings.node_secret),
            timeout=TELL_SECONDS,
        )
        if answer.is_success:
            resources.fleet.invalidate()
            return
        problem = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"The node {node.url} does not answer; try again.") from error
    refusal = {error.status: error for error in (NotFound, Conflict)}.get(answer.status_code)
    if refusal is None:
        raise Unavailable(f"The node {node.url} refuses: {problem.get('detail')}")
    raise refusal(str(problem.get("detail")))


async def _record(
    resources: Resources, caller: Caller, action: AuditAction, node_id: str, **details: str
) -> None:
    def write() -> None:
        with resources.database.session_scope() as session:
            record(session, caller.tenant_id, action, node_id, **details)

    await run_in_threadpool(write)


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
    for digest in fields.pop("damaged"):
        BlobRepository(unit.session).note_damaged(digest)
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
