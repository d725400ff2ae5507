"""Error responses of the api and the nodes.

RFC 9457's problem bodies, and OpenAI's shape on OpenAI's routes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, compile_path
from starlette.types import Receive, Scope, Send

from deltadock.errors import (
    BadRequest,
    Conflict,
    DeltadockError,
    InvalidInput,
    MethodNotAllowed,
    NotFound,
    RangeNotSatisfiable,
    RouteNotFound,
    TooLarge,
    Unauthorized,
)
from deltadock.names import (
    DIGEST_PATTERN,
    NAME_PATTERN,
    NODE_PATTERN,
    PART_PATTERN,
    SOURCE_PATTERN,
    TAG_PATTERN,
)
from deltadock.openai.errors import ErrorBody, openai_status, validation_message
from deltadock.request_ids import REQUEST_ID
from deltadock.settings import RETENTION_PATTERN

log = structlog.get_logger(__name__)

OPENAI_PATHS: Final = re.compile(
    r"/v1/(assistants|audio|batches|chat|completions|containers|conversations|embeddings|evals|files"
    r"|fine_tuning|images|models|moderations|realtime|responses|threads|vector_stores|videos)(/|$)"
    r"|/(chat/completions|completions|embeddings|models|responses)$"
)
"""OpenAI's routes, those that are not there and those without /v1 included: its client shows no
error of another shape."""
PROBLEM_TYPE: Final = "application/problem+json"
Responses = dict[int | str, dict[str, Any]]
FORMS: Final = MappingProxyType(
    {
        NAME_PATTERN: "a name of the form project/model, such as maths/skills: each part "
        "has letters, digits, '.', '_' and '-', at most 96, a letter or digit first",
        PART_PATTERN: "a name of letters, digits, '.', '_' and '-', at most 96, a letter or digit "
        "first",
        DIGEST_PATTERN: "a SHA-256, 64 lower-case hexadecimal digits",
        TAG_PATTERN: "a tag of lower-case letters, digits, '.', '_' and '-', at "
        "most 64, a letter or digit first",
        SOURCE_PATTERN: "a source of the form file:///folder, s3://bucket/prefix or "
        "hf://org/name@revision",
        RETENTION_PATTERN: "keep, ready or a number of days",
        NODE_PATTERN: "a node's id, node_ and at most 32 lower-case letters and digits",
    }
)
"""What the patterns of fields allow, in words."""
CLIENT_CLOSED_REQUEST: Final = 499
"""Never sent: the access log's status for clients that disconnected."""


class Problem(BaseModel):
    """An error (RFC 9457). `code` is stable; `detail` is for people."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:deltadock:error:not_found"])
    title: str = Field(examples=["Not found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no delta with this id."])
    code: str = Field(examples=["not_found"])
    retryable: bool = Field(examples=[False])


def problem_body(error: DeltadockError) -> dict[str, Any]:
    """The members of a problem; extension members never override the standard ones."""
    members: dict[str, Any] = jsonable_encoder(error.details)
    return members | {
        "type": f"urn:deltadock:error:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": error.status,
        "detail": error.message,
        "code": error.code,
        "retryable": error.retryable,
    }


class ErrorResponse(JSONResponse):
    """An error; its code is kept in the request's state for the metrics."""

    def __init__(self, code: str, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        scope.setdefault("state", {})["error_code"] = self._code
        await super().__call__(scope, receive, send)


def error_response(path: str, error: DeltadockError) -> Response:
    """The response for an error, in the format that clients of `path` expect."""
    headers = dict(error.headers)
    if error.retryable:
        headers.setdefault("Retry-After", str(error.details.get("retry_after", 1)))
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.details['size']}"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="deltadock"'
    if is_openai_route(path):
        body = ErrorBody.of_error(error).model_dump()
        return ErrorResponse(error.code, body, openai_status(error.status), headers)
    return ErrorResponse(
        error.code, problem_body(error), error.status, headers, media_type=PROBLEM_TYPE
    )


def is_openai_route(path: str) -> bool:
    """Whether errors of this path have OpenAI's shape."""
    return OPENAI_PATHS.match(path) is not None


def _domain_error(request: Request, error: Exception) -> DeltadockError:
    """What FastAPI, Starlette or an endpoint raised, as a domain error."""
    match error:
        case DeltadockError():
            return error
        case RequestValidationError() if is_openai_route(request.url.path):
            message, param = validation_message(error.errors())
            return InvalidInput(message, param=param)
        case RequestValidationError():
            messages: dict[str, str] = {}
            for item in error.errors():  # of a union, what its first member says
                messages.setdefault(_where(item), _message(item))
            detail = "; ".join(f"{where}: {message}" for where, message in messages.items())
            found = [{"where": where, "message": message} for where, message in messages.items()]
            return InvalidInput(detail, errors=found)
        case HTTPException(status_code=HTTPStatus.NOT_FOUND) if _wants_page(request):
            return NotFound(f"There is no page {request.url.path}. The menu above lists all pages.")
        case HTTPException(status_code=HTTPStatus.NOT_FOUND) if is_openai_route(request.url.path):
            hint = (
                "Of OpenAI's there are /v1/chat/completions, /v1/completions, /v1/responses and "
                "/v1/models."
                if request.url.path.startswith("/v1/")
                else "The base_url of OpenAI's client must end in /v1."
            )
            return RouteNotFound(f"There is no route {request.url.path}. {hint}")
        case HTTPException(status_code=HTTPStatus.NOT_FOUND):
            return NotFound(f"There is no route {request.url.path}.")
        case HTTPException(status_code=HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
            return TooLarge(error.detail)
        case HTTPException(status_code=HTTPStatus.METHOD_NOT_ALLOWED):
            # The router's own header names the methods of the first route with this path only.
            allowed = {"Allow": ", ".join(_allowed_methods(request))}
            message = f"{request.method} is not allowed here; the Allow header lists what is."
            return MethodNotAllowed(message, headers=allowed)
        case HTTPException():
            return BadRequest(error.detail, headers=error.headers)
        case _:  # the server logs it
            under = request.state.request_id
            return DeltadockError(f"An unexpected error occurred; it is logged under {under}.")


def _where(error: Mapping[str, Any]) -> str:
    """The place of the field, without pydantic's labels of types such as `literal['']`."""
    return ".".join(str(part) for part in error["loc"] if "[" not in str(part))


def _message(error: Mapping[str, Any]) -> str:
    """What is wrong with a field, in words rather than as a regular expression."""
    form = FORMS.get(error.get("ctx", {}).get("pattern", ""))
    message: str = error["msg"] if form is None else f"{error['input']!r:.100} is not {form}."
    return message


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes with the request's path."""
    methods: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        if isinstance(route.original_route, Mount):  # of files
            if request.url.path.startswith(f"{route.original_route.path}/"):
                methods |= {"GET", "HEAD"}
        elif route.path and compile_path(route.path)[0].match(request.url.path):
            methods |= set(route.methods or ())
    return sorted(methods)


def _wants_page(request: Request) -> bool:
    accepts = request.headers.get("Accept", "")
    return "text/html" in accepts and not request.url.path.startswith("/v1/")


async def _client_disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def log_failure(error: DeltadockError, raised: Exception) -> None:
    """Log what the server cannot do: with a traceback if that is unexpected."""
    if error.code == DeltadockError.code:
        log.error("request_failed", code=error.code, detail=error.message, exc_info=raised)
    elif error.status >= 500:
        cause = {} if error.__cause__ is None else {"cause": repr(error.__cause__)}
        log.warning("request_failed", code=error.code, detail=error.message, **cause)


def install_error_handlers(
    app: FastAPI,
    count: Callable[[str], object] | None = None,
    page: Callable[[Request, DeltadockError], Response] | None = None,
) -> None:
    """Answer every error in the format of its route.

    `count` is called with its code; `page` answers browsers that ask for what is no route of /v1.
    """

    async def respond(request: Request, raised: Exception) -> Response:
        error = _domain_error(request, raised)
        # An unexpected one is handled outside of all middleware.
        error.headers = {**error.headers, REQUEST_ID: request.state.request_id}
        with structlog.contextvars.bound_contextvars(request_id=request.state.request_id):
            log_failure(error, raised)
        if count is not None:
            count(error.code)
        if page is not None and _wants_page(request):
            return page(request, error)
        return error_response(request.url.path, error)

    for kind in (DeltadockError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(ClientDisconnect, _client_disconnected)


def problems(
    *errors: type[DeltadockError], by_state: Iterable[type[InvalidInput]] = ()
) -> Responses:
    """The `responses=` of an endpoint that raises these errors, besides those that all may.

    `by_state`: those that it raises inside `refused_by_state`.
    """
    return described_errors(errors, by_state, in_openai_shape=False)


def openai_problems(*errors: type[DeltadockError]) -> Responses:
    """Like `problems`, for OpenAI's routes."""
    return described_errors(errors, in_openai_shape=True)


def described_errors(
    errors: Iterable[type[DeltadockError]],
    by_state: Iterable[type[InvalidInput]] = (),
    *,
    in_openai_shape: bool,
) -> Responses:
    """The responses of these errors by status, with an example by code."""
    media_type, schema = (
        ("application/json", "ErrorBody") if in_openai_shape else (PROBLEM_TYPE, "Problem")
    )
    responses: Responses = {}
    conflicts = tuple(by_state)
    for kind in (*errors, *conflicts):
        error = kind((kind.__doc__ or kind.code).strip())
        if kind in conflicts:
            error.status = Conflict.status
        status, value = error.status, problem_body(error)
        if in_openai_shape:
            status, value = openai_status(status), ErrorBody.of_error(error).model_dump()
        response = responses.setdefault(
            status,
            {
                "description": HTTPStatus(status).phrase,
                "content": {
                    media_type: {
                        "schema": {"$ref": f"#/components/schemas/{schema}"},
                        "examples": {},
                    }
                },
            },
        )
        example = {"summary": error.message, "value": value}
        response["content"][media_type]["examples"][error.code] = example
    return responses
