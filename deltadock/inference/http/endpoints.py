"""The node's routes: OpenAI's, the operators' for moving deltas, health and metrics."""

import asyncio
import re
from collections.abc import Coroutine
from typing import Annotated, Any, Final, TypeVar

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from deltadock.errors import (
    BaseMismatch,
    Cancelled,
    Conflict,
    ContextExceeded,
    DamagedBlob,
    InvalidArtifact,
    InvalidInput,
    ModelNotFound,
    NotFound,
    NotReady,
    Overloaded,
    StorageFull,
    Unavailable,
    UnsupportedModel,
)
from deltadock.inference.deltas.store import HeldDelta
from deltadock.inference.http.replies import ChatReply, CompletionReply, Reply, StreamedReply
from deltadock.inference.http.response_reply import ResponseReply
from deltadock.inference.node import InferenceNode
from deltadock.model_target import (
    ARTIFACT_HEADER,
    BASE_HEADER,
    BASE_NAME_HEADER,
    TENANT_HEADER,
    ModelTarget,
    Tier,
)
from deltadock.names import DIGEST
from deltadock.openai.chat import ChatCompletion, ChatRequest
from deltadock.openai.completions import Completion, CompletionRequest
from deltadock.openai.fields import GENERATION_HEADER, Usage
from deltadock.openai.models import ModelCard, ModelList
from deltadock.openai.responses import ResponseObject, ResponseRequest
from deltadock.problems import openai_problems, problems
from deltadock.trust import check_trusted

DESCRIBED: Final[dict[str, Any]] = {"pattern": f"^{DIGEST}$"}
"""Of digests in the description; a refusal says it in words."""
LOADING: Final = (
    NotFound,
    Conflict,
    NotReady,
    BaseMismatch,
    InvalidArtifact,
    UnsupportedModel,
    DamagedBlob,
    StorageFull,
)
"""Errors of loading a delta, and its base if the node has none."""
GENERATING: Final = {
    200: {
        "description": "The answer; with stream, chunks of it as server-sent events",
        "content": {"text/event-stream": {}},
    },
    **openai_problems(*LOADING, ModelNotFound, ContextExceeded, Overloaded),
}

Result = TypeVar("Result")


def get_node(request: Request) -> InferenceNode:
    """The node of this process."""
    node: InferenceNode = request.app.state.node
    return node


NodeDep = Annotated[InferenceNode, Depends(get_node)]


def base_header(
    base: Annotated[str | None, Header(alias=BASE_HEADER, json_schema_extra=DESCRIBED)] = None,
) -> str | None:
    """The base's digest, if the request names one."""
    if base is not None and not re.fullmatch(DIGEST, base):
        raise InvalidInput(f"{BASE_HEADER} must be a SHA-256 digest in lower-case hex.")
    return base


BaseHeader = Annotated[str | None, Depends(base_header)]


def target_header(
    base: BaseHeader,
    artifact: Annotated[
        str | None, Header(alias=ARTIFACT_HEADER, json_schema_extra=DESCRIBED)
    ] = None,
    tenant: Annotated[str | None, Header(alias=TENANT_HEADER)] = None,
    base_name: Annotated[str | None, Header(alias=BASE_NAME_HEADER)] = None,
) -> ModelTarget | None:
    """The weights and the tenant that the headers name, None without headers."""
    if artifact is not None and (base is None or not re.fullmatch(DIGEST, artifact)):
        raise InvalidInput(
            f"{ARTIFACT_HEADER} must be a SHA-256 digest in lower-case hex, beside {BASE_HEADER}."
        )
    return None if base is None else ModelTarget(base, artifact, tenant, base_name)


TargetHeader = Annotated[ModelTarget | None, Depends(target_header)]
GenerationName = Annotated[
    str | None,
    Header(
        alias=GENERATION_HEADER,
        max_length=64,
        description="For `DELETE /v1/generations/{name}`, which ends the request.",
    ),
]


def artifact_digest(
    digest: Annotated[
        str, Path(description="The artifact's SHA-256.", json_schema_extra=DESCRIBED)
    ],
) -> str:
    """A delta's artifact digest in the path."""
    if not re.fullmatch(DIGEST, digest):
        raise InvalidInput(f"{digest!r} is not a SHA-256 digest in lower-case hex.")
    return digest


ArtifactDigest = Annotated[str, Depends(artifact_digest)]


def require_trusted(request: Request, node: NodeDep) -> None:
    """Require the secret or, if none is configured, a client on this machine."""
    check_trusted(
        node.settings.node_secret,
        request.headers.get("Authorization"),
        request.client.host if request.client is not None else None,
    )


def require_secret(request: Request, node: NodeDep) -> None:
    """Require the secret, if one is configured."""
    if node.settings.node_secret is not None:
        require_trusted(request, node)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        Cancelled: the client disconnected.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    watching = asyncio.create_task(disconnected())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("The client disconnected.")
    finally:
        watching.cancel()
        working.cancel()


openai = APIRouter(prefix="/v1", dependencies=[Depends(require_secret)], tags=["generation"])


@openai.post("/completions", response_model=Completion, responses=GENERATING)
async def complete(
    body: CompletionRequest,
    request: Request,
    node: NodeDep,
    target: TargetHeader,
    name: GenerationName = None,
) -> Response:
    """Continue a prompt with the base or one of its deltas.

    The headers Deltadock-Base and Deltadock-Artifact name the weights by digest; without them
    `model` is the base's name or digest, or the name or digest of a delta in `GET /v1/models`.
    """
    target = target or node.target(body.model)
    generation = await while_connected(request, node.generate(target, body, name))
    return await _respond(request, CompletionReply(body, generation))


@openai.post("/chat/completions", response_model=ChatCompletion, responses=GENERATING)
async def chat(
    body: ChatRequest,
    request: Request,
    node: NodeDep,
    target: TargetHeader,
    name: GenerationName = None,
) -> Response:
    """Answer a conversation, rendered with the model's own chat template."""
    target = target or node.target(body.model)
    generation = await while_connected(request, node.generate(target, body, name))
    return await _respond(request, ChatReply(body, generation))


@openai.post("/responses", response_model=ResponseObject, responses=GENERATING)
async def respond(
    body: ResponseRequest,
    request: Request,
    node: NodeDep,
    target: TargetHeader,
    name: GenerationName = None,
) -> Response:
    """Answer a conversation as /v1/chat/completions does; nothing is stored."""
    target = target or node.target(body.model)
    generation = await while_connected(request, node.generate(target, body.chat(), name))
    return await _respond(request, ResponseReply(body, generation))


async def _respond(request: Request, reply: Reply[Any]) -> Response:
    if reply.request.stream:
        return StreamedReply(reply)
    body = await while_connected(request, reply.complete())
    return Response(body, media_type="application/json")


@openai.get("/models")
async def models(node: NodeDep) -> ModelList:
    """The base and the deltas that the node was started with or has in memory."""
    if node.base is None:
        return ModelList(data=[])
    names = [node.base.name, *node.offered()]
    return ModelList(data=[ModelCard(id=name) for name in names])


@openai.get("/models/{model:path}", responses=openai_problems(ModelNotFound))
async def model(model: str, node: NodeDep) -> ModelCard:
    """One of these models; 404 `model_not_found` for any other."""
    node.target(model)
    return ModelCard(id=model)


deltas = APIRouter(
    prefix="/v1/deltas",
    dependencies=[Depends(require_trusted)],
    tags=["deltas"],
)
"""Each route accepts the header Deltadock-Base, for a node without a base or with another one."""


class DeltaStatus(BaseModel):
    """A delta in the fastest tier that has it."""

    digest: str
    tier: Tier
    bytes: int
    references: int
    pinned: bool

    @classmethod
    def of(cls, delta: HeldDelta) -> "DeltaStatus":
        """Convert to the public schema."""
        return cls(**delta._asdict())


class DeltaStatusList(BaseModel):
    """Fast tiers first, most recently used first."""

    data: list[DeltaStatus]


class LoadRequest(BaseModel):
    """The tier to load a delta into."""

    tier: Tier = "device"


@deltas.get("")
async def list_deltas(node: NodeDep) -> DeltaStatusList:
    """Every delta that the node holds."""
    return DeltaStatusList(data=[DeltaStatus.of(delta) for delta in node.held()])


@deltas.post("/{digest}/load", responses=problems(*LOADING))
async def load(
    digest: ArtifactDigest, node: NodeDep, base: BaseHeader, body: LoadRequest | None = None
) -> DeltaStatus:
    """Load and verify a delta; it stays until evicted."""
    async with node.using(base) as served:
        await served.deltas.load(digest, (body or LoadRequest()).tier)
        return DeltaStatus.of(served.deltas.find(digest))


@deltas.post("/{digest}/unload", status_code=204, responses=problems(*LOADING))
async def unload(digest: ArtifactDigest, node: NodeDep, base: BaseHeader) -> Response:
    """Remove a delta from its slot and from memory; 409 while it is pinned or in use."""
    if node.base is None:
        raise NotFound("The node has no base, and so no delta in memory.")
    async with node.using(base) as served:
        await served.deltas.unload(digest)
    return Response(status_code=204)


@deltas.post("/{digest}/pin", responses=problems(*LOADING))
async def pin(digest: ArtifactDigest, node: NodeDep, base: BaseHeader) -> DeltaStatus:
    """Load a delta into a slot and keep it there."""
    async with node.using(base) as served:
        await served.deltas.pin(digest)
        return DeltaStatus.of(served.deltas.find(digest))


@deltas.post("/{digest}/unpin", responses=problems(*LOADING))
async def unpin(digest: ArtifactDigest, node: NodeDep, base: BaseHeader) -> DeltaStatus:
    """Make a delta evictable again."""
    async with node.using(base) as served:
        served.deltas.unpin(digest)
        return DeltaStatus.of(served.deltas.find(digest))


operation = APIRouter(prefix="/v1", dependencies=[Depends(require_trusted)], tags=["operation"])


@operation.post("/drain", status_code=204)
async def drain(node: NodeDep) -> Response:
    """Reject new requests until `resume`; running ones continue."""
    await node.drain()
    return Response(status_code=204)


@operation.post("/resume", status_code=204, responses=problems(Conflict))
async def resume(node: NodeDep) -> Response:
    """Accept requests again; 409 while the node is stopping."""
    await node.resume()
    return Response(status_code=204)


@operation.delete("/generations/{name}", responses=problems(NotFound))
async def end_generation(name: str, node: NodeDep) -> Usage:
    """End the request that has this name in its header Deltadock-Generation; its usage so far."""
    return node.end(name)


health = APIRouter(tags=["health"])


@health.get("/healthz")
async def healthy() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@health.get("/readyz")
async def ready(node: NodeDep) -> dict[str, str | None]:
    """The node accepts requests."""
    if node.draining:
        raise Unavailable("The node is draining.")
    if not node.ready:
        raise Unavailable("The engine has stopped; restart the node.")
    return {"status": "ok", "base": node.base.digest if node.base is not None else None}


@health.get("/metrics", include_in_schema=False)
async def metrics(node: NodeDep) -> Response:
    """Prometheus metrics."""
    return Response(node.metrics.render(), media_type=CONTENT_TYPE_LATEST)
