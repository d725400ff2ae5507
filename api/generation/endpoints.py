"""Routes that generate text: OpenAI's, and one per delta and base."""

from typing import Annotated, Any

from fastapi import Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from deltadock.api.access import Caller, CallerDep
from deltadock.api.bases import BaseRef, require_base
from deltadock.api.deltas.lookup import show_delta
from deltadock.api.dependencies import ReadSession, Resources, ResourcesDep
from deltadock.api.generation import service
from deltadock.api.generation.forward import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    ForwardedResponse,
    ask_nodes,
)
from deltadock.api.generation.metering import Meter
from deltadock.api.generation.schemas import (
    BaseGenerated,
    DeltaGenerated,
    GenerateIn,
    ModelListOut,
    ModelOut,
)
from deltadock.api.references import DeltaReference
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_DELTA_ID
from deltadock.errors import (
    InvalidInput,
    NotFound,
    NotReady,
    Overloaded,
    Unavailable,
    UnsupportedModel,
)
from deltadock.model_target import ModelTarget
from deltadock.openai.chat import ChatRequest
from deltadock.openai.completions import CompletionRequest
from deltadock.openai.responses import ResponseRequest
from deltadock.problems import openai_problems, problems

router = api_router(tags=["generation"])


@router.get("/v1/models", responses=openai_problems(InvalidInput))
def list_models(
    caller: CallerDep,
    session: ReadSession,
    after: Annotated[
        str | None, Query(max_length=256, description="`last_id` of the previous page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
) -> ModelListOut:
    """Bases and delta names that answer now, in OpenAI's format, while `has_more` in pages."""
    return service.list_models(session, caller.tenant_id, after=after, limit=limit)


@router.get("/v1/models/{model:path}", responses=openai_problems(NotFound, NotReady))
def get_model(
    model: Annotated[str, Path(max_length=256, examples=[EXAMPLE_DELTA_ID])],
    caller: CallerDep,
    session: ReadSession,
) -> ModelOut:
    """One model: a delta by id or name, with or without a version or alias, or a base."""
    return service.get_model(session, caller.tenant_id, model)


def _answers(what: str) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "description": f"OpenAI's {what}; with stream, chunks of it as server-sent events",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "text/event-stream": {},
            },
        },
        **openai_problems(
            InvalidInput, UnsupportedModel, NotFound, NotReady, Overloaded, Unavailable
        ),
    }


@router.post("/v1/completions", response_class=Response, responses=_answers("completion"))
async def complete(
    body: CompletionRequest, caller: CallerDep, request: Request, resources: ResourcesDep
) -> Response:
    """OpenAI's completions, by the delta or base that `model` names."""
    return await _forward(resources, request, caller, COMPLETIONS, body)


@router.post("/v1/chat/completions", response_class=Response, responses=_answers("chat completion"))
async def chat(
    body: ChatRequest, caller: CallerDep, request: Request, resources: ResourcesDep
) -> Response:
    """OpenAI's chat completions, with each delta's own chat template."""
    return await _forward(resources, request, caller, CHAT, body)


@router.post("/v1/responses", response_class=Response, responses=_answers("response"))
async def respond(
    body: ResponseRequest, caller: CallerDep, request: Request, resources: ResourcesDep
) -> Response:
    """OpenAI's responses, without state: what a chat completion answers, in another format."""
    return await _forward(resources, request, caller, RESPONSES, body)


async def _forward(
    resources: Resources,
    request: Request,
    caller: Caller,
    path: str,
    body: CompletionRequest | ChatRequest | ResponseRequest,
) -> ForwardedResponse:
    """Forward the validated request; its weights are resolved once, even if the name moves."""

    def find() -> ModelTarget:
        with resources.database.read_scope() as session:
            return service.resolve(session, caller.tenant_id, body.model)

    target = await run_in_threadpool(find)
    content = body.model_dump(exclude_unset=True)
    async with Meter.of(resources, caller, target, content) as meter:
        answer = await ask_nodes(resources, request, target, path, content, meter)
        return ForwardedResponse(answer, meter)


GENERATE_PROBLEMS = problems(NotFound, NotReady, InvalidInput, Overloaded, Unavailable)


@router.post("/v1/deltas/{delta_id:prefix}/generate", responses=GENERATE_PROBLEMS)
async def generate_with_delta(
    delta_id: DeltaReference,
    body: GenerateIn,
    caller: CallerDep,
    request: Request,
    resources: ResourcesDep,
) -> DeltaGenerated:
    """Continue one prompt with a delta."""

    def find() -> tuple[str, ModelTarget]:
        with resources.database.read_scope() as session:
            found = show_delta(session, caller.tenant_id, delta_id)
            return found.id, service.target_of_delta(found)

    found_id, target = await run_in_threadpool(find)
    completion = await service.generate(resources, request, caller, target, found_id, body)
    return DeltaGenerated.of(completion, delta=found_id)


@router.post("/v1/bases/{base}/generate", responses=GENERATE_PROBLEMS)
async def generate_with_base(
    base: BaseRef,
    body: GenerateIn,
    caller: CallerDep,
    request: Request,
    resources: ResourcesDep,
) -> BaseGenerated:
    """Continue one prompt with the bare base."""

    def find() -> tuple[str, ModelTarget]:
        with resources.database.read_scope() as session:
            found = require_base(session, caller.tenant_id, base)
            return found.name, service.target_of_base(found)

    name, target = await run_in_threadpool(find)
    completion = await service.generate(resources, request, caller, target, name, body)
    return BaseGenerated.of(completion, base=name)
