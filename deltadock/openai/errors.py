"""Errors in OpenAI's shape and with its statuses."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from deltadock.openai.fields import FAULT


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words; `code` is Deltadock's stable code."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["model"])
    code: str = Field(examples=["model_not_found"])


class ErrorBody(BaseModel):
    """An error as OpenAI's clients expect it."""

    error: ErrorDetail

    @classmethod
    def of(cls, status: int, code: str, message: str, param: str | None = None) -> "ErrorBody":
        """The body of an answer with this status."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        return cls(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def openai_status(status: int) -> int:
    """OpenAI answers 400 to every malformed request."""
    return 400 if status == 422 else status


def refusal(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Message and param of a request that FastAPI refuses with these errors; the first is told."""
    error = errors[0]
    kind, param = error["type"], _path(error)
    subject = "The body" if param is None else f"`{param}`"
    if kind == "json_invalid":
        return f"The body is no JSON: {error['ctx']['error']}.", None
    if param is None and kind in {"model_attributes_type", "model_type"}:
        return "The body must be a JSON object, sent as Content-Type: application/json.", None
    if kind == "missing":
        return f"{subject} is missing; send it.", param
    if kind == "extra_forbidden":
        return f"{subject} is not a field that is known here; leave it out.", param
    if kind == FAULT:
        return f"{subject} {error['msg']}", param
    return f"{subject}: {error['msg']}.", param


def _path(error: Mapping[str, Any]) -> str | None:
    """Where it is, such as `messages[0].role`.

    After a field's name only a list's index leads on: other names are of pydantic's making.
    """
    places: list[str | int] = []
    for place in error["loc"][1:]:
        if isinstance(place, str) and places and isinstance(places[-1], str):
            break
        places.append(place)
    if field := error.get("ctx", {}).get("field"):
        places.append(field)
    path = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places)
    return path.removeprefix(".") or None
