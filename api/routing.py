"""Routers of the api, whose routes are built once, at their import, for every app."""

from typing import Any

from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute

from deltadock.api.paging import refuse_unknown_query
from deltadock.description import COMMON_RESPONSES


def api_router(prefix: str = "", **options: Any) -> APIRouter:
    """A router whose routes refuse unknown query parameters; `options` are FastAPI's.

    Its routes are added to an app directly. FastAPI's `include_router` would build each of them a
    second time for every app, and match every request twice.
    """
    return APIRouter(
        prefix=prefix,
        dependencies=[Depends(refuse_unknown_query)],
        responses=COMMON_RESPONSES,
        generate_unique_id_function=_operation_id,
        **options,
    )


def _operation_id(route: APIRoute) -> str:
    return route.name
