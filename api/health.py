"""Liveness and readiness probes."""

from collections.abc import Callable
from typing import Annotated

import structlog
from fastapi import Response
from pydantic import BaseModel, Field
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

from deltadock.api.dependencies import Resources, ResourcesDep
from deltadock.api.routing import api_router
from deltadock.errors import DeltadockError

log = structlog.get_logger(__name__)
router = api_router(tags=["health"])

OK = "ok"
DOWN = "unavailable"


class Health(BaseModel):
    """The process is alive."""

    status: str = Field(examples=[OK])


class Readiness(BaseModel):
    """State of each dependency; `node` is reported, but not required."""

    status: str = Field(examples=[OK])
    checks: Annotated[
        dict[str, str],
        Field(examples=[{"database": OK, "broker": OK, "blobs": OK, "node": DOWN}]),
    ]


@router.get("/healthz")
async def health() -> Health:
    """Liveness: checks no dependency."""
    return Health(status=OK)


@router.get(
    "/readyz", responses={503: {"model": Readiness, "description": "A required part is down"}}
)
async def readiness(resources: ResourcesDep, response: Response) -> Readiness:
    """Readiness: the database, the broker and the blob store answer."""
    checks = await run_in_threadpool(_check_required, resources)
    ready = all(state == OK for state in checks.values())
    checks["node"] = await _check_nodes(resources)
    response.status_code = 200 if ready else 503
    return Readiness(status=OK if ready else DOWN, checks=checks)


def _check_required(resources: Resources) -> dict[str, str]:
    def ask_database() -> None:
        with resources.database.read_scope() as session:
            session.execute(text("SELECT 1"))

    parts: dict[str, Callable[[], object]] = {
        "database": ask_database,
        "broker": resources.tasks.ping,
        "blobs": lambda: resources.blobs.exists("0" * 64),
    }
    return {name: _state(name, check) for name, check in parts.items()}


def _state(name: str, check: Callable[[], object]) -> str:
    try:
        check()
    except DeltadockError as error:
        log.warning("not_ready", part=name, error=str(error.__cause__ or error))
        return DOWN
    return OK


async def _check_nodes(resources: Resources) -> str:
    try:
        nodes = await resources.fleet.nodes()
    except DeltadockError:
        return DOWN
    return OK if any(not node.draining for node in nodes) else DOWN
