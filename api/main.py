"""The app: `uvicorn api.main:app`."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse

from deltadock.api.bases.endpoints import router as bases
from deltadock.api.dashboard.endpoints import router as dashboard
from deltadock.api.dashboard.pages import asset, static_files
from deltadock.api.deltas.endpoints import router as deltas
from deltadock.api.generation.endpoints import router as generation
from deltadock.api.health.endpoints import router as health
from deltadock.api.jobs.endpoints import router as jobs
from deltadock.api.methods.endpoints import router as methods
from deltadock.api.middleware import BodyLimit, RequestContext
from deltadock.api.nodes.endpoints import router as nodes
from deltadock.api.openapi import DescribedApp
from deltadock.api.previews.endpoints import router as previews
from deltadock.api.problems import install_error_handlers, problems
from deltadock.api.resources import Resources
from deltadock.api.uploads.endpoints import router as uploads
from deltadock.logs import configure_logging
from deltadock.settings import Settings, get_settings
from deltadock.version import __version__


def create_app(settings: Settings) -> FastAPI:
    """The api on these settings. The database must be migrated already."""
    resources = Resources.of(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings, process="api")
        _join_logs()
        await run_in_threadpool(resources.blobs.prepare)
        yield
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
    )
    app.state.resources = resources
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestContext)
    install_error_handlers(app)
    for router in (
        uploads, bases, previews, deltas, jobs, methods, generation, nodes, health, dashboard,
    ):  # fmt: skip
        app.include_router(router)
    app.add_api_route("/docs", _docs, include_in_schema=False, response_class=HTMLResponse)
    app.mount("/static", static_files)
    return app


def _docs() -> HTMLResponse:
    """The routes as a page, from this server's own files: it works offline."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Deltadock API",
        swagger_js_url=asset("swagger-ui-bundle.js"),
        swagger_css_url=asset("swagger-ui.css"),
        swagger_favicon_url=asset("icon.svg"),
    )


def _join_logs() -> None:
    """Let uvicorn's records take the way of ours; its access log says less than ours."""
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("httpx").setLevel(logging.WARNING)  # every forwarded request
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


def _operation_id(route: APIRoute) -> str:
    return route.name


app = create_app(get_settings())
