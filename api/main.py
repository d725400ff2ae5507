"""The app: `uvicorn deltadock.api.main:app`."""

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

import anyio
from fastapi import FastAPI, Request
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
from deltadock.api.middleware import RequestLog
from deltadock.api.registry import endpoints as registry
from deltadock.api.uploads import endpoints as uploads
from deltadock.body_limit import BodyLimit
from deltadock.description import DescribedApp, Schema, each_operation
from deltadock.errors import (
    BadRequest,
    DeltadockError,
    Forbidden,
    InvalidInput,
    MethodNotAllowed,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from deltadock.logs import configure_logging
from deltadock.problems import install_error_handlers
from deltadock.request_ids import RequestIds
from deltadock.settings import Settings, get_settings
from deltadock.tracing import configure_tracing, telemetry
from deltadock.version import DOCS, __version__

KEY_USES_SECONDS: Final = 60.0
"""How often the times at which keys were last used are written."""

ROUTES: Final = tuple(
    route
    for module in (
        uploads, bases, previews, deltas, registry, jobs, methods, generation, nodes, webhooks,
        keys, tenants, audit, retention, storage, health, metrics, dashboard, operations,
        sign_in,
    )
    for route in module.router.routes
)  # fmt: skip
"""All routes but those of static files and of the description."""

DESCRIPTION: Final = f"""
Store fine-tuned LLMs as small deltas on a shared base, and serve them.

1. Upload a base's files, complete the upload, and register its checkpoint as a base.
2. Upload a fine-tune of it, and a calibration text.
3. Create a delta and follow its job.
4. Generate with the delta's id as the model.

Every request needs an API key as a bearer token, with the scope that its route requires.

Errors are `application/problem+json` (RFC 9457) with a stable `code`; OpenAI's routes answer errors
in OpenAI's format. [What holds for all routes]({DOCS}/api.md); [the four steps with
curl]({DOCS}/how-to/curl.md).
"""


def _describe_keys(schema: Schema, rules: RuleTable) -> None:
    """Describe what each operation requires: a key with one of some scopes, or nothing."""
    schema["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key, `ddk_...`."}
    }
    for method, path, operation in each_operation(schema):
        rule = rules.find(method, path)
        operation["security"] = [{"key": []}] if rule.scopes else []
        if rule.scopes:
            scopes = " or ".join(f"`{scope}`" for scope in rule.scopes)
            tenant = " of the operator's tenant" if rule.operator else ""
            operation["description"] += f"\n\nNeeds a key{tenant} with the scope {scopes}."


def _common_errors(
    rules: RuleTable, method: str, path: str, operation: Schema
) -> Iterator[type[DeltadockError]]:
    """The errors that an operation may answer by what it requires and takes."""
    if rules.find(method, path).scopes:
        yield from (Unauthorized, Forbidden, RateLimited)
    if "requestBody" in operation:
        yield from (BadRequest, TooLarge)
    if "{delta_id}/" in path:  # `a/report` is a name, and its path that of a delta
        yield MethodNotAllowed
    yield from (InvalidInput, DeltadockError, Unavailable)


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
        description=DESCRIPTION,
        lifespan=lifespan,
        routes=list(ROUTES),
        telemetry=telemetry(),
        errors_of=lambda *operation: _common_errors(app.state.rules, *operation),
        finish=lambda schema: _describe_keys(schema, app.state.rules),
    )
    app.state.resources = resources
    install_error_handlers(app, page=rendering.error_page)
    app.add_api_route("/docs", _docs, include_in_schema=False, response_class=HTMLResponse)
    app.mount("/static", rendering.static_files)
    app.state.rules = RuleTable(app.routes)
    app.add_middleware(BodyLimit)
    app.add_middleware(
        AccessControl, resources=resources, rules=app.state.rules, page=rendering.error_page
    )
    app.state.metrics = metrics.Metrics(resources)
    app.add_middleware(RequestLog, count=app.state.metrics.count)
    app.add_middleware(RequestIds)
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


app = create_app(get_settings())
tune_memory()
