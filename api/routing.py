"""Routers of the api, whose routes are built once, at their import, for every app."""

from collections.abc import Callable, Coroutine
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute

from deltadock.api.paging import refuse_unknown_query
from deltadock.description import COMMON_RESPONSES


class ApiRoute(APIRoute):
    """Makes the answer of an endpoint that blocks in the endpoint's own thread.

    FastAPI would check the model that it returns, which is one already, in another thread, and make
    its JSON in the event loop. A request that waits for that thread still holds its connection and
    its locks, for which all threads may wait.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint, field, status = self.endpoint, self.response_field, self.status_code or 200
        changed_name = self.dependant.response_param_name
        if field is None or iscoroutinefunction(endpoint):
            return super().get_route_handler()

        @wraps(endpoint)
        def answer(**values: Any) -> Response:
            found = endpoint(**values)
            if isinstance(found, Response):
                return found
            response = Response(field.serialize_json(found), status, media_type="application/json")
            if changed_name is not None:
                changed: Response = values[changed_name]
                response.status_code = changed.status_code or status
                response.headers.raw.extend(changed.headers.raw)
            return response

        self.dependant.call = answer
        return super().get_route_handler()


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
        route_class=ApiRoute,
        **options,
    )


def _operation_id(route: APIRoute) -> str:
    return route.name
