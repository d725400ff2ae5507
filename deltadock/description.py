"""The OpenAPI descriptions of the api and the nodes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from deltadock.errors import DeltadockError, InvalidInput
from deltadock.openai.errors import ErrorBody
from deltadock.problems import Problem, Responses, described_errors, is_openai_route

Schema = dict[str, Any]
ErrorsOf = Callable[[str, str, Schema], Iterable[type[DeltadockError]]]
"""The errors that an operation may answer besides its own, by its method, path and description."""

BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
EVENT_STREAM: Final = "text/event-stream"
COMMON_RESPONSES: Final = described_errors([InvalidInput], in_openai_shape=False)
"""Every route refuses malformed parameters; FastAPI would describe its own body of that."""


class DescribedApp(FastAPI):
    """An app whose description names every error, and whole bounds of numbers as such."""

    def __init__(
        self,
        *,
        errors_of: ErrorsOf,
        finish: Callable[[Schema], None] = lambda schema: None,
        **options: Any,
    ) -> None:
        """`finish` completes the description; `options` are FastAPI's."""
        super().__init__(docs_url=None, redoc_url=None, responses=COMMON_RESPONSES, **options)
        self._errors_of = errors_of
        self._finish = finish

    def openapi(self) -> Schema:
        """The OpenAPI 3.1 description, cached."""
        if self.openapi_schema is None:
            schema = get_openapi(
                title=self.title,
                version=self.version,
                summary=self.summary,
                description=self.description,
                routes=self.routes,
            )
            _describe_errors(schema, self._errors_of)
            _describe_streams(schema)
            _drop_null_parameters(schema)
            _state_whole_bounds(schema)
            self._finish(schema)
            self.openapi_schema = schema
        return self.openapi_schema


def each_operation(schema: Schema) -> Iterator[tuple[str, str, Schema]]:
    """The method (in capitals), path and description of every operation."""
    for path, item in schema["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def _describe_errors(schema: Schema, errors_of: ErrorsOf) -> None:
    _, bodies = models_json_schema(
        [(Problem, "serialization"), (ErrorBody, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    schema["components"]["schemas"] |= bodies["$defs"]
    shared: Responses = schema["components"].setdefault("responses", {})
    for method, path, operation in each_operation(schema):
        responses = operation["responses"]
        openai = is_openai_route(path)
        if openai:  # they answer 400 instead
            responses.pop(str(InvalidInput.status), None)
        described = described_errors(errors_of(method, path, operation), in_openai_shape=openai)
        for status, response in described.items():
            own = responses.get(str(status))
            if own is None:
                name = f"{'OpenAI' if openai else 'Problem'}{status}"
                _merge(shared.setdefault(name, response), response)
                responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
            else:
                _merge(own, response)


def _merge(response: Schema, more: Schema) -> None:
    content = response.setdefault("content", {})
    for media_type, body in more["content"].items():
        known = content.setdefault(media_type, {"schema": body["schema"]})
        known.setdefault("examples", {}).update(body["examples"])


def _describe_streams(schema: Schema) -> None:
    """Replace `itemSchema`, which FastAPI uses for event streams, but which needs OpenAPI 3.2."""
    for _, _, operation in each_operation(schema):
        for response in operation["responses"].values():
            stream = response.get("content", {}).get(EVENT_STREAM, {})
            stream.pop("itemSchema", None)


def _drop_null_parameters(schema: Schema) -> None:
    """A parameter that is not sent is no null."""
    for _, _, operation in each_operation(schema):
        for parameter in operation.get("parameters", ()):
            described = parameter["schema"]
            choices = [c for c in described.get("anyOf", ()) if c != {"type": "null"}]
            if len(choices) == 1:
                del described["anyOf"]
                described.update(choices[0])


def _state_whole_bounds(part: Any) -> None:
    """FastAPI makes all bounds floats, which 64-bit integers do not survive in every reader."""
    if isinstance(part, list):
        for item in part:
            _state_whole_bounds(item)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in BOUNDS and isinstance(value, float) and value.is_integer():
                part[name] = int(value)
            else:
                _state_whole_bounds(value)
