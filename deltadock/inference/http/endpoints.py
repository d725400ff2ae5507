"""The routes that answer, in OpenAI's shapes, and those that tell how the node is."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from deltadock.errors import Unavailable
from deltadock.inference.http.chat_replies import ChatReply
from deltadock.inference.http.chat_schemas import ChatCompletion, ChatRequest
from deltadock.inference.http.dependencies import (
    NamedTarget,
    NodeDep,
    only_with_secret,
    while_connected,
)
from deltadock.inference.http.problems import ERRORS
from deltadock.inference.http.replies import CompletionReply, Reply
from deltadock.inference.http.schemas import Completion, CompletionRequest, Model, ModelList

openai = APIRouter(prefix="/v1", dependencies=[Depends(only_with_secret)], responses=ERRORS)
health = APIRouter()


@openai.post("/completions", response_model=Completion)
async def complete(
    body: CompletionRequest, request: Request, node: NodeDep, target: NamedTarget
) -> Response | BaseModel:
    """Continue a prompt with the base or one of its deltas.

    The headers Deltadock-Base and Deltadock-Artifact name the weights by digest; without them
    `model` is the base's name or digest, or the digest of a delta that the node holds.
    """
    target = target or node.target(body.model)
    generation = await while_connected(request, node.generate(target, body))
    return await _answer(request, CompletionReply(body, generation))


@openai.post("/chat/completions", response_model=ChatCompletion)
async def chat(
    body: ChatRequest, request: Request, node: NodeDep, target: NamedTarget
) -> Response | BaseModel:
    """Answer a conversation, put to the model by its own chat template."""
    target = target or node.target(body.model)
    generation = await while_connected(request, node.generate(target, body))
    return await _answer(request, ChatReply(body, generation))


async def _answer(request: Request, reply: Reply[Any]) -> Response | BaseModel:
    if reply.request.stream:
        return StreamingResponse(reply.stream(), media_type="text/event-stream")
    return await while_connected(request, reply.whole())


@openai.get("/models")
async def models(node: NodeDep) -> ModelList:
    """The base and the deltas that are held, by what `model` may name them here."""
    if node.base is None:
        return ModelList(data=[])
    names = [node.base.name, *(held.digest for held in node.held())]
    return ModelList(data=[Model(id=name) for name in names])


@openai.get("/models/{model:path}")
async def model(model: str, node: NodeDep) -> Model:
    """One of them; 404 `model_not_found` for any other."""
    node.target(model)
    return Model(id=model)


@health.get("/healthz")
async def healthy() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@health.get("/readyz", responses=ERRORS)
async def ready(node: NodeDep) -> dict[str, str | None]:
    """Requests can be taken."""
    if node.draining:
        raise Unavailable("The node is stopping.")
    if not node.ready:
        raise Unavailable("The engine has stopped; restart the node.")
    return {"status": "ok", "base": node.base.digest if node.base is not None else None}


@health.get("/metrics", response_class=Response)
async def metrics(node: NodeDep) -> Response:
    """Prometheus metrics."""
    return Response(node.metrics.render(), media_type=CONTENT_TYPE_LATEST)
