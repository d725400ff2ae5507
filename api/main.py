"""The app: `uvicorn deltadock.api.main:app`."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response

from deltadock.api import (
    audit,
    bases,
    health,
    jobs,
    keys,
    methods,
    metrics,
    nodes,
    previews,
    retention,
    storage,
    tenants,
    webhooks,
)
from deltadock.api.access.middleware import AccessControl
from deltadock.api.access.rules import RuleTable
from deltadock.api.dashboard import endpoints as dashboard
from deltadock.api.dashboard import operations, rendering, sign_in
from deltadock.api.deltas import endpoints as deltas
from deltadock.api.dependencies import Resources
from deltadock.api.generation import endpoints as generation
from deltadock.api.memory import tune_memory
from deltadock.api.middleware import BodyLimit, RequestContext
from deltadock.api.paging import refuse_unknown_query
from deltadock.api.problems import Problem, install_error_handlers, problems
from deltadock.api.registry import endpoints as registry
from deltadock.api.uploads import endpoints as uploads
from deltadock.logs import configure_logging
from deltadock.openai.errors import ErrorBody
from deltadock.settings import Settings, get_settings
from deltadock.tracing import configure_tracing, telemetry
from deltadock.version import __version__

KEY_USES_SECONDS: Final = 60.0
"""How often the times at which keys were last used are written."""

DESCRIPTION: Final = """
Store fine-tuned LLMs as small deltas on a shared base, and serve them.

1. Upload a base's files, complete the upload, and register its checkpoint as a base.
2. Upload a fine-tune of it, and a calibration text.
3. Create a delta and follow its job.
4. Generate with the delta's id as the model.

Every request needs an API key as a bearer token, with the scope that its route requires.

Errors are `application/problem+json` (RFC 9457) with a stable `code`; OpenAI's routes answer errors
in OpenAI's format.
"""


class DescribedApp(FastAPI):
    """Adds to the OpenAPI description the schemas of error bodies, which no endpoint returns."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI 3.1 description, cached."""
        if self.openapi_schema is None:
            schema = get_openapi(
                title=self.title,
                version=self.version,
                summary=self.summary,
                description=DESCRIPTION,
                routes=self.routes,
            )
            _, errors = models_json_schema(
                [(Problem, "serialization"), (ErrorBody, "serialization")],
                ref_template="#/components/schemas/{model}",
            )
            schema["components"]["schemas"] |= errors["$defs"]
            _describe_keys(schema, self.state.rules)
            _describe_streams_as_text(schema)
            self.openapi_schema = schema
        return self.openapi_schema


def _describe_keys(schema: dict[str, Any], rules: RuleTable) -> None:
    """Describe what each operation requires: a key with one of some scopes, or nothing."""
    schema["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key, `ddk_...`."},
        "node": {"type": "http", "scheme": "bearer", "description": "The secret of the nodes."},
    }
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            rule = rules.find(method.upper(), path)
            scheme = "node" if rule.node else "key"
            operation["security"] = [{scheme: []}] if rule.node or rule.scopes else []


def _describe_streams_as_text(schema: dict[str, Any]) -> None:
    """Replace `itemSchema`, which FastAPI uses for event streams, but which needs OpenAPI 3.2."""
    for path in schema["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                stream = response.get("content", {}).get("text/event-stream", {})
                if stream.pop("itemSchema", None):
                    stream["schema"] = {"type": "string"}


def create_app(settings: Settings) -> FastAPI:
    """The api with these settings. The database must be migrated already."""
    resources = Resources.of(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings, process="api")
        configure_tracing(settings, "api")
        _route_uvicorn_logs()
        await run_in_threadpool(resources.blobs.prepare)
        resources.completer.start()
        async with anyio.create_task_group() as group:
            group.start_soon(_write_key_uses, resources)
            yield
            group.cancel_scope.cancel()
        await resources.close()

    app = DescribedApp(
        title="Deltadock",
        version=__version__,
        summary="Fine-tuned LLMs as deltas on a shared base.",
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        responses=problems(),
        docs_url=None,
        redoc_url=None,
        telemetry=telemetry(),
    )
    app.state.resources = resources
    install_error_handlers(app)
    for module in (
        uploads, bases, previews, deltas, registry, jobs, methods, generation, nodes, webhooks,
        keys, tenants, audit, retention, storage, health, metrics, dashboard, operations,
        sign_in,
    ):  # fmt: skip
        app.include_router(module.router, dependencies=[Depends(refuse_unknown_query)])
    app.add_api_route("/docs", _docs, include_in_schema=False, response_class=HTMLResponse)
    app.mount("/static", rendering.static_files)
    app.state.rules = RuleTable(app.routes)
    app.add_middleware(BodyLimit)
    app.add_middleware(AccessControl, resources=resources, rules=app.state.rules)
    app.state.metrics = metrics.Metrics(resources)
    app.add_middleware(RequestContext, count=app.state.metrics.count)
    return app


async def _write_key_uses(resources: Resources) -> None:
    while True:
        await anyio.sleep(KEY_USES_SECONDS)
        await run_in_threadpool(resources.keys.write_uses)


def _docs(request: Request) -> Response:
    """Swagger UI from this server's own files, so that it works offline."""
    return rendering.render(request, "docs.html", {}, headers=rendering.INLINE_IMAGES)


def _route_uvicorn_logs() -> None:
    """Route uvicorn's logs through structlog; the middleware's access log replaces uvicorn's."""
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every forwarded request
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def _operation_id(route: APIRoute) -> str:
    return route.name


app = create_app(get_settings())
tune_memory()
