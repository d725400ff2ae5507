"""The operators' routes: which deltas are where, and moving them by hand.

Each takes the header Deltadock-Base, for a node that has no base yet, or is to have another.
"""

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel

from deltadock.inference.deltas.store import Held, Tier
from deltadock.inference.http.dependencies import ArtifactDigest, NamedBase, NodeDep, only_trusted
from deltadock.inference.http.problems import ERRORS

router = APIRouter(prefix="/v1/deltas", dependencies=[Depends(only_trusted)], responses=ERRORS)


class HeldDelta(BaseModel):
    """A delta in the fastest tier that has it."""

    digest: str
    tier: Tier
    bytes: int
    references: int
    pinned: bool

    @classmethod
    def of(cls, held: Held) -> "HeldDelta":
        """The public form."""
        return cls(**held._asdict())


class HeldDeltas(BaseModel):
    """Fast tiers first, last used first."""

    data: list[HeldDelta]


class LoadRequest(BaseModel):
    """How far a delta is to come."""

    tier: Tier = "device"


@router.get("")
async def list_deltas(node: NodeDep) -> HeldDeltas:
    """Every delta that the node holds."""
    return HeldDeltas(data=[HeldDelta.of(held) for held in node.held()])


@router.post("/{digest}/load")
async def load(
    digest: ArtifactDigest, node: NodeDep, base: NamedBase, body: LoadRequest | None = None
) -> HeldDelta:
    """Bring a delta in, verified; it stays until others need its place."""
    async with node.using(base) as served:
        await served.deltas.load(digest, (body or LoadRequest()).tier)
        return HeldDelta.of(served.deltas.find(digest))


@router.post("/{digest}/unload", status_code=204)
async def unload(digest: ArtifactDigest, node: NodeDep, base: NamedBase) -> Response:
    """Take a delta out of its slot and out of memory; 409 while it is pinned or in use."""
    async with node.using(base) as served:
        await served.deltas.unload(digest)
    return Response(status_code=204)


@router.post("/{digest}/pin")
async def pin(digest: ArtifactDigest, node: NodeDep, base: NamedBase) -> HeldDelta:
    """Bring a delta into a slot and keep it there."""
    async with node.using(base) as served:
        await served.deltas.pin(digest)
        return HeldDelta.of(served.deltas.find(digest))


@router.post("/{digest}/unpin")
async def unpin(digest: ArtifactDigest, node: NodeDep, base: NamedBase) -> HeldDelta:
    """Let a delta leave its slot again when another needs it."""
    async with node.using(base) as served:
        served.deltas.unpin(digest)
        return HeldDelta.of(served.deltas.find(digest))
