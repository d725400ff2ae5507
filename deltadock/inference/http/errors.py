"""Errors in OpenAI's format and with its statuses, on every route."""

from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deltadock.errors import DeltadockError, InvalidInput, NotFound
from deltadock.inference.metrics import Metrics
from deltadock.openai.errors import ErrorBody, openai_status, validation_message

RETRY_AFTER_SECONDS: Final = 1
STATUSES: Final = (400, 401, 404, 409, 413, 429, 500, 503)
ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody} for status in STATUSES
}
"""The `responses=` of every route."""


def error_body(error: DeltadockError) -> ErrorBody:
    """OpenAI's body for an error; its detail `param` names the field in error."""
    param = error.details.get("param")
    status = openai_status(error.status)
    return ErrorBody.of(status, error.code, error.message, None if param is None else str(param))


def install_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Respond to every error in OpenAI's format, and count it by its code."""

    def respond(error: DeltadockError) -> JSONResponse:
        metrics.requests.labels(error.code).inc()
        seconds = error.details.get("retry_after", RETRY_AFTER_SECONDS)
        headers = {"Retry-After": str(seconds)} if error.retryable else None
        body = error_body(error).model_dump()
        return JSONResponse(body, status_code=openai_status(error.status), headers=headers)

    def on_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, DeltadockError)
        return respond(error)

    def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param = validation_message(error.errors())
        return respond(InvalidInput(message, param=param))

    def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == NotFound.status:
            return respond(NotFound(f"There is nothing at {request.url.path}."))
        detail = str(error.detail)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            detail = f"{request.method} is not allowed here; see the Allow header."
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        metrics.requests.labels(code).inc()
        body = ErrorBody.of(error.status_code, code, detail).model_dump()
        return JSONResponse(body, error.status_code, error.headers)

    def on_unexpected(_: Request, error: Exception) -> JSONResponse:
        # Starlette re-raises it afterwards, so that the server logs it.
        return respond(DeltadockError("An unexpected error occurred; see the node's log."))

    app.add_exception_handler(DeltadockError, on_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_unexpected)
