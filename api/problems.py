"""Errors as HTTP: RFC 9457 problem bodies, and OpenAI's shape on OpenAI's routes."""

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

from deltadock.errors import DeltadockError, InvalidInput, RangeNotSatisfiable
from deltadock.openai.errors import ErrorBody, openai_status, refusal

log = structlog.get_logger(__name__)

OPENAI_PATHS: Final = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/models"})
PROBLEM_TYPE: Final = "application/problem+json"
Responses = dict[int | str, dict[str, Any]]
CLIENT_CLOSED_REQUEST: Final = 499
"""Never reaches anyone; it is what the access log says of a client that went away."""


class Problem(BaseModel):
    """What went wrong (RFC 9457). `code` is stable; `detail` is for a person."""

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
    """The members of a problem; extension members never replace the standard ones."""
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
    """Status, code and param as OpenAI's own service would say it; its 404 is about the model."""
    if code == "not_found":
        return status, "model_not_found", "model"
    return openai_status(status), code, None


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
    """The error in the shape that clients of `path` expect."""
    headers = dict(headers or {})
    if retryable:
        headers.setdefault("Retry-After", "1")
    if _is_openais(path):
        status, code, param = _openai_terms(status, code)
        body = ErrorBody.of(status, code, detail, param).model_dump()
        return JSONResponse(body, status, headers)
    body = problem_body(status, code, detail, retryable=retryable, extensions=extensions)
    return JSONResponse(body, status, headers, media_type=PROBLEM_TYPE)


def _is_openais(path: str) -> bool:
    return path in OPENAI_PATHS or path.startswith("/v1/models/")


async def _domain_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DeltadockError)
    if error.status >= 500:
        log.error("request_failed", code=error.code, detail=error.message, exc_info=error)
    headers = {}
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.details['size']}"
    return error_response(
        request.url.path,
        error.status,
        error.code,
        error.message,
        headers=headers,
        retryable=error.retryable,
        extensions=error.details,
    )


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if _is_openais(request.url.path):
        status = openai_status(InvalidInput.status)
        body = ErrorBody.of(status, InvalidInput.code, *refusal(error.errors()))
        return JSONResponse(body.model_dump(), status)
    faults = [
        {"where": ".".join(map(str, fault["loc"])), "message": fault["msg"]}
        for fault in error.errors()
    ]
    detail = "; ".join(f"{fault['where']}: {fault['message']}" for fault in faults)
    return error_response(
        request.url.path,
        InvalidInput.status,
        InvalidInput.code,
        detail,
        extensions={"errors": faults},
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    detail = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND and detail == phrase:
        detail = f"There is nothing at {request.url.path}; see /openapi.json for what there is."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not possible here; the Allow header names what is."
    code = {413: "too_large", 400: "bad_request"}.get(
        error.status_code, phrase.lower().replace(" ", "_")
    )
    return error_response(request.url.path, error.status_code, code, detail, headers=error.headers)


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error with a body of ours; what nobody expected is the middleware's."""
    app.add_exception_handler(DeltadockError, _domain_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)


def problems(*errors: type[DeltadockError]) -> Responses:
    """The `responses=` of an endpoint that may raise these errors, among others."""
    responses = _any_error(PROBLEM_TYPE, "Problem")
    for error in errors:
        body = problem_body(error.status, error.code, _summary(error), retryable=error.retryable)
        _add_example(responses, PROBLEM_TYPE, error, (error.status, body))
    return responses


def openai_problems(*errors: type[DeltadockError]) -> Responses:
    """The same for OpenAI's routes."""
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
