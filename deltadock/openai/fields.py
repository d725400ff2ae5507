"""Fields of OpenAI's requests with their bounds, and what both kinds of requests share."""

from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

FAULT: Final = "fault"
"""The type of a validation error whose message goes on where the field's name ends."""


def fault(message: str, **context: str) -> PydanticCustomError:
    """A validation error that reads: the field's name, a space, `message`."""
    return PydanticCustomError(FAULT, message, context)


def told(message: str) -> WrapValidator:
    """Whatever is wrong with a field, in one message instead of one for each form it may have."""

    def explain(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError as error:
            raise fault(message) from error

    return WrapValidator(explain)


Value = TypeVar("Value")
Unsupported = Annotated[Value | None, told("is not supported yet; leave it out.")]
"""A field that is taken only with null or values that turn it off."""
Ignored = Any
"""A field that changes no answer: it is for OpenAI's bills, caches, records and speed."""

ModelName = Annotated[str, Field(min_length=1, max_length=256)]
MaxTokens = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[
    Annotated[dict[TokenId, Bias], Field(max_length=300)],
    told("must map at most 300 token ids in decimal digits to numbers from -100 to 100."),
]
"""Each is added at every token, while all others wait."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[
    str | Annotated[list[str], Field(max_length=16)], told("must be a text, or at most 16 of them.")
]


class StreamOptions(BaseModel):
    """What a stream holds besides text."""

    include_usage: bool | None = None


class SamplingFields(BaseModel):
    """What both kinds of requests take. An unknown field is an error, not a silently lost wish.

    Where a request is silent, the model's own generation config decides. `top_k`, `min_p` and
    `repetition_penalty` go beyond OpenAI's, with the meaning that they have in vLLM.
    """

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None
    logit_bias: LogitBias | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
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
        """How many answers to each prompt are asked for."""
        return self.n or 1
