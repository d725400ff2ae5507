"""Fields of OpenAI's requests with their bounds, and what completions and chat share."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.config import JsonDict, JsonValue
from pydantic_core import PydanticCustomError

from deltadock.json_depth import MAX_DEPTH, is_too_deep

FIELD_ERROR: Final = "field_error"
"""Type of a validation error whose message continues a sentence that begins with the field."""


def field_error(message: str, **context: str) -> PydanticCustomError:
    """A validation error reported as: the field's name, a space, `message`."""
    return PydanticCustomError(FIELD_ERROR, message, context)


def reported_as(message: str) -> WrapValidator:
    """Report any error of a field as one message instead of one per accepted type."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise field_error(message) from error

    return WrapValidator(validate)


def is_none(value: Any) -> bool:
    """Of fields that are left out if unset."""
    return value is None


def with_integers(body: Any) -> Any:
    """A body's fields with 1.0 as 1: JSON does not tell them apart."""
    if isinstance(body, dict):
        return {name: _integer(value) for name, value in body.items()}
    return body


def _integer(value: Any, depth: int = 2) -> Any:
    """Of a number or, as prompts are, of lists of numbers."""
    if isinstance(value, list) and depth:
        return [_integer(item, depth - 1) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Value = TypeVar("Value")
Unsupported = Annotated[Value | None, reported_as("is not supported yet; leave it out.")]
"""A field that is accepted only with null or values that disable it."""
Ignored = Any
"""A field without effect on the answer: billing, caching, storage or speed at OpenAI."""

ModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        description="A delta's id, project/model, project/model:version, or a base's name or id.",
    ),
]
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[
    Annotated[
        dict[TokenId, Bias],
        Field(max_length=300, json_schema_extra={"additionalProperties": False}),
    ],
    reported_as("must map at most 300 token ids in decimal digits to numbers from -100 to 100."),
]
"""Limited in number, since biases are added at every token while other sequences wait."""
EndTokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=128)]
GUIDED: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[
    str | Annotated[list[str], Field(max_length=16)],
    reported_as("must be a string, or a list of at most 16 strings."),
]


MAX_GRAMMAR_CHARACTERS: Final = 65_536
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]


def _check_depth(value: dict[str, Any]) -> dict[str, Any]:
    if is_too_deep(value):
        raise field_error(f"is nested more than {MAX_DEPTH} levels deep.")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_check_depth)]


def _check_schema_size(schema: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(schema)) > MAX_GRAMMAR_CHARACTERS:
        raise field_error(f"is longer than {MAX_GRAMMAR_CHARACTERS} characters.")
    return schema


Schema = Annotated[JsonObject, AfterValidator(_check_schema_size)]


class RequestPart(BaseModel):
    """Base class of requests and their parts: no type is converted."""

    model_config = ConfigDict(strict=True)


class TextFormat(RequestPart):
    """Plain text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class JsonObjectFormat(RequestPart):
    """Any JSON object."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_object"]


class JsonSchema(RequestPart):
    """A JSON schema with OpenAI's name for it; `strict` is always true."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(RequestPart):
    """JSON that follows a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")],
    reported_as(
        'must be {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", '
        '"json_schema": {"name": ..., "schema": {...}}}.'
    ),
]


NULL: Final[JsonDict] = {"type": "null"}
OFF: Final[JsonDict] = {"enum": [None, False]}


def excluding(*fields: Mapping[str, JsonValue]) -> JsonDict:
    """The JSON schema of objects in which at most one of these is set.

    Each maps the name of a field to the schema of what does not count as setting it.
    """
    unset = {name: schema for field in fields for name, schema in field.items()}
    choices: list[JsonValue] = [
        {"properties": {name: schema for name, schema in unset.items() if name != allowed}}
        for allowed in unset
    ]
    return {"anyOf": choices}


class StreamOptions(RequestPart):
    """What a stream contains besides text."""

    include_usage: bool | None = None


class AnswerFields(RequestPart):
    """How an answer is generated: what every request for one takes. Unknown fields are errors.

    Unset fields take the values of the model's generation config. `top_k`, `min_p`,
    `repetition_penalty`, `stop_token_ids`, `ignore_eos`, `skip_special_tokens` and `guided_*`
    extend OpenAI's request, with vLLM's meaning. `guided_grammar` is in EBNF, with a rule `root`.
    """

    model_config = ConfigDict(extra="forbid")

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: EndTokens | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: Schema | GrammarText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Annotated[list[GrammarText], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: GrammarText | None = None

    _integers = model_validator(mode="before")(with_integers)

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        """Refuse several restrictions of one answer."""
        form = self.response_format
        names = ["response_format"] if form is not None and form.type != "text" else []
        names += [name for name in GUIDED if getattr(self, name) is not None]
        if len(names) > 1:
            raise field_error(f"excludes `{names[0]}`; send one of them.", field=names[1])
        return self


class SamplingFields(AnswerFields):
    """Fields that completions and chat completions share."""

    model: ModelName
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def answers(self) -> int:
        """Number of answers per prompt."""
        return self.n or 1


ONE_GRAMMAR: Final = excluding(
    {"response_format": {"anyOf": [NULL, {"properties": {"type": {"const": "text"}}}]}},
    *({name: NULL} for name in GUIDED),
)
"""Describes what `_one_grammar` checks."""


PROMPT_TOKENS_HEADER: Final = "Deltadock-Prompt-Tokens"
"""In the head of a node's stream, for one that is broken off never reports its usage."""


GENERATION_HEADER: Final = "Deltadock-Generation"
"""A name for the request, by which the api ends it for a client that is gone, with its usage."""


class Usage(BaseModel):
    """Prompt and generated tokens."""

    prompt_tokens: int = Field(examples=[5])
    completion_tokens: int = Field(examples=[3])
    total_tokens: int = Field(examples=[8])

    @classmethod
    def of(cls, prompt: int, generated: int) -> Self:
        """These counts and their sum."""
        return cls(
            prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
        )
