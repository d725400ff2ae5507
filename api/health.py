"""Liveness and readiness probes."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Final

import anyio
import anyio.to_thread
import structlog
from fastapi import Response
from pydantic import BaseModel, Field
from sqlalchemy import text

from deltadock.api.dependencies import Resources, ResourcesDep
from deltadock.api.routing import api_router
from deltadock.errors import DeltadockError, StorageFull

log = structlog.get_logger(__name__)
router = api_router(tags=["health"])

OK = "ok"
DOWN = "unavailable"
FULL = "full"
CHECK_SECONDS: Final = 5.0
"""A part that takes longer, such as a store that keeps a connection and does not answer, is down.
Probes give up soon after."""


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
    """Readiness: database, broker and blob store answer, and the database's disk has room."""
    parts: dict[str, Callable[[], object]] = {
        "database": partial(_ask_database, resources),
        "broker": resources.tasks.ping,
        "blobs": partial(resources.blobs.exists, "0" * 64),
    }
    checks = dict.fromkeys(parts, DOWN)

    async def ask(name: str) -> None:
        with anyio.move_on_after(CHECK_SECONDS) as scope:
            try:
                await anyio.to_thread.run_sync(
                    parts[name], abandon_on_cancel=True, limiter=resources.probing[name]
                )
                checks[name] = OK
            except DeltadockError as error:
                checks[name] = FULL if isinstance(error, StorageFull) else DOWN
                log.warning("not_ready", part=name, error=str(error.__cause__ or error))
        if scope.cancelled_caught:
            log.warning("not_ready", part=name, error=f"No answer within {CHECK_SECONDS:g} s.")

    async with anyio.create_task_group() as group:
        for name in parts:
            group.start_soon(ask, name)
    ready = all(state == OK for state in checks.values())
    checks["node"] = await _check_nodes(resources) if checks["database"] == OK else DOWN
    response.status_code = 200 if ready else 503
    return Readiness(status=OK if ready else DOWN, checks=checks)


def _ask_database(resources: Resources) -> None:
    resources.database.check_room()
    with resources.database.read_scope() as session:
        session.execute(text("SELECT 1"))


async def _check_nodes(resources: Resources) -> str:
    try:
        nodes = await resources.fleet.nodes()
    except DeltadockError:
        return DOWN
    return OK if any(not node.draining for node in nodes) else DOWN
