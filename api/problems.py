"""Error responses: RFC 9457 problem bodies, and OpenAI's format on OpenAI's routes."""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from deltadock.errors import DeltadockError, InvalidInput, RangeNotSatisfiable, Unauthorized
from deltadock.names import PART
from deltadock.openai.errors import ErrorBody, openai_status, validation_message

log = structlog.get_logger(__name__)

OPENAI_PATHS: Final = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models"})
PROBLEM_TYPE: Final = "application/problem+json"
Responses = dict[int | str, dict[str, Any]]
FORMS: Final = MappingProxyType(
    {
        rf"^{PART}/{PART}$": "a name of the form project/model, such as maths/skills: each part "
        "has letters, digits, '.', '_' and '-', at most 96, a letter or digit first",
        rf"^{PART}$": "a name of letters, digits, '.', '_' and '-', at most 96, a letter or digit "
        "first",
        r"^[0-9a-f]{64}$": "a SHA-256, 64 lower-case hexadecimal digits",
        r"^[a-z0-9][a-z0-9._-]{0,63}$": "a tag of lower-case letters, digits, '.', '_' and '-', at "
        "most 64, a letter or digit first",
        r"^(keep|ready|[0-9]{1,5})$": "keep, ready or a number of days",
        r"^node_[a-z0-9]{1,32}$": "a node's id, node_ and at most 32 lower-case letters and digits",
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


def problem_body(
    status: int,
    code: str,
    detail: str,
    *,
    retryable: bool = False,
    extensions: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """The members of a problem; extension members never override the standard ones."""
    members: dict[str, Any] = jsonable_encoder(dict(extensions))
    return members | {
        "type": f"urn:deltadock:error:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        "retryable": retryable,
    }


def _openai_terms(status: int, code: str) -> tuple[int, str, str | None]:
    """Status, code and param as OpenAI's service answers; its 404 is about the model."""
    if code == "not_found":
        return status, "model_not_found", "model"
    return openai_status(status), code, None


class ErrorResponse(JSONResponse):
    """An error; its code is kept in the request's state for the metrics."""

    def __init__(self, code: str, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        scope.setdefault("state", {})["error_code"] = self._code
        await super().__call__(scope, receive, send)


def error_response(
    path: str,
    status: int,
    code: str,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    retryable: bool = False,
    extensions: Mapping[str, object] = MappingProxyType({}),
) -> Response:
    """The error in the format that clients of `path` expect."""
    headers = dict(headers or {})
    if retryable:
        headers.setdefault("Retry-After", "1")
    if _is_openai_route(path):
        status, named, param = _openai_terms(status, code)
        body = ErrorBody.of(status, named, detail, param).model_dump()
        return ErrorResponse(code, body, status, headers)
    body = problem_body(status, code, detail, retryable=retryable, extensions=extensions)
    return ErrorResponse(code, body, status, headers, media_type=PROBLEM_TYPE)


def _is_openai_route(path: str) -> bool:
    return path in OPENAI_PATHS or path.startswith("/v1/models/")


async def _domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DeltadockError)
    if error.status >= 500:
        log.error("request_failed", code=error.code, detail=error.message, exc_info=error)
    return problem_response(request.url.path, error)


def problem_response(path: str, error: DeltadockError) -> Response:
    """The response for a domain error, in the format that clients of `path` expect."""
    headers = dict(error.headers)
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.details['size']}"
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="deltadock"'
    return error_response(
        path,
        error.status,
        error.code,
        error.message,
        headers=headers,
        retryable=error.retryable,
        extensions=error.details,
    )


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if _is_openai_route(request.url.path):
        status = openai_status(InvalidInput.status)
        body = ErrorBody.of(status, InvalidInput.code, *validation_message(error.errors()))
        return ErrorResponse(InvalidInput.code, body.model_dump(), status)
    field_errors = [
        {"where": ".".join(map(str, item["loc"])), "message": _message(item)}
        for item in error.errors()
    ]
    detail = "; ".join(f"{item['where']}: {item['message']}" for item in field_errors)
    return error_response(
        request.url.path,
        InvalidInput.status,
        InvalidInput.code,
        detail,
        extensions={"errors": field_errors},
    )


def _message(error: Mapping[str, Any]) -> str:
    """What is wrong with a field, in words rather than as a regular expression."""
    form = FORMS.get(error.get("ctx", {}).get("pattern", ""))
    message: str = error["msg"] if form is None else f"{error['input']!r:.100} is not {form}."
    return message


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    detail = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND and detail == phrase:
        detail = f"There is no route {request.url.path}; /openapi.json lists them."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not allowed here; the Allow header lists what is."
    code = {413: "too_large", 400: "bad_request"}.get(
        error.status_code, phrase.lower().replace(" ", "_")
    )
    return error_response(request.url.path, error.status_code, code, detail, headers=error.headers)


async def _client_disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every expected error in the route's format; the middleware handles the others."""
    app.add_exception_handler(DeltadockError, _domain_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_disconnected)


def problems(*errors: type[DeltadockError]) -> Responses:
    """The `responses=` of an endpoint that raises these errors, among others."""
    responses = _any_error(PROBLEM_TYPE, "Problem")
    for error in errors:
        body = problem_body(error.status, error.code, _summary(error), retryable=error.retryable)
        _add_example(responses, PROBLEM_TYPE, error, (error.status, body))
    return responses


def openai_problems(*errors: type[DeltadockError]) -> Responses:
    """Like `problems`, for OpenAI's routes."""
    responses = _any_error("application/json", "ErrorBody")
    for error in errors:
        status, code, param = _openai_terms(error.status, error.code)
        body = ErrorBody.of(status, code, _summary(error), param).model_dump()
        _add_example(responses, "application/json", error, (status, body))
    return responses


def _any_error(media_type: str, schema: str) -> Responses:
    content = {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"default": {"description": "Any other error", "content": content}}


def _add_example(
    responses: Responses,
    media_type: str,
    error: type[DeltadockError],
    example: tuple[int, dict[str, Any]],
) -> None:
    status, body = example
    schema = responses["default"]["content"][media_type]["schema"]
    response = responses.setdefault(
        status,
        {
            "description": HTTPStatus(status).phrase,
            "content": {media_type: {"schema": schema, "examples": {}}},
        },
    )
    response["content"][media_type]["examples"][error.code] = {
        "summary": _summary(error),
        "value": body,
    }


def _summary(error: type[DeltadockError]) -> str:
    return (error.__doc__ or error.code).strip()
