"""Errors in OpenAI's shape and with its statuses."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from deltadock.errors import DeltadockError, ModelNotFound, NotFound
from deltadock.openai.fields import FIELD_ERROR


class ErrorDetail(BaseModel):
    """OpenAI's error object; `code` is Deltadock's stable code."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["model"])
    code: str = Field(examples=["model_not_found"])


class ErrorBody(BaseModel):
    """An error as OpenAI's clients expect it."""

    error: ErrorDetail

    @classmethod
    def of(cls, status: int, code: str, message: str, param: str | None = None) -> "ErrorBody":
        """The body of a response with this status."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        return cls(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    @classmethod
    def of_error(cls, error: DeltadockError) -> "ErrorBody":
        """The body for an error, whose detail `param` names the field; a 404 is the model's."""
        param, code = error.details.get("param"), error.code
        if code == NotFound.code:
            param, code = "model", ModelNotFound.code
        named = None if param is None else str(param)
        return cls.of(openai_status(error.status), code, error.message, named)


def openai_status(status: int) -> int:
    """Map to OpenAI's status, which is 400 for every malformed request."""
    return 400 if status == 422 else status


def validation_message(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Message and param of the first of FastAPI's validation errors."""
    error = errors[0]
    kind, param = error["type"], _path(error)
    subject = "The body" if param is None else f"`{param}`"
    if kind == "json_invalid":
        return f"The body is not JSON: {error['ctx']['error']}.", None
    if param is None and kind in {"model_attributes_type", "model_type"}:
        return "The body must be a JSON object, sent as Content-Type: application/json.", None
    if kind == "missing":
        return f"{subject} is missing; send it.", param
    if kind == "extra_forbidden":
        return f"{subject} is not a known field; leave it out.", param
    if kind == FIELD_ERROR:
        return f"{subject} {error['msg']}", param
    return f"{subject}: {error['msg']}.", param


def _path(error: Mapping[str, Any]) -> str | None:
    """Path of the field, such as `messages[0].role`.

    A name that follows a field's name is pydantic's label of a type, not part of the path.
    """
    parts: list[str | int] = []
    for part in error["loc"][1:]:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            break
        parts.append(part)
    if field := error.get("ctx", {}).get("field"):
        parts.append(field)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".") or None
