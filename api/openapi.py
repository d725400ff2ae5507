"""The app's own description."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from deltadock.api.problems import Problem
from deltadock.openai.errors import ErrorBody

DESCRIPTION = """
Keep fine-tuned LLMs as small deltas on a shared base, and serve them.

1. Upload a base's files, complete the upload, and register its checkpoint as a base.
2. Upload a fine-tune of it, and a calibration text.
3. Ask for a delta and follow its job.
4. Generate with the delta's id as the model.

Errors are `application/problem+json` (RFC 9457) with a stable `code`; on OpenAI's routes they have
OpenAI's shape.
"""


class DescribedApp(FastAPI):
    """A FastAPI whose description has the schemas of error bodies, which no endpoint returns."""

    def openapi(self) -> dict[str, Any]:
        """OpenAPI 3.1, made once."""
        if self.openapi_schema is None:
            schema = get_openapi(
                title=self.title,
                version=self.version,
                summary=self.summary,
                description=DESCRIPTION,
                routes=self.routes,
            )
            _, errors = models_json_schema(
                [(Problem, "serialization"), (ErrorBody, "serialization")],
                ref_template="#/components/schemas/{model}",
            )
            schema["components"]["schemas"] |= errors["$defs"]
            _describe_streams_as_text(schema)
            self.openapi_schema = schema
        return self.openapi_schema


def _describe_streams_as_text(schema: dict[str, Any]) -> None:
    """FastAPI describes event streams in a keyword that OpenAPI has only from version 3.2 on."""
    for path in schema["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                stream = response.get("content", {}).get("text/event-stream", {})
                if stream.pop("itemSchema", None):
                    stream["schema"] = {"type": "string"}
