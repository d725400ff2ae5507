"""Where calibration text is from, as requests and answers spell it."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.schemas import EXAMPLE_DIGEST, Digest, RequestBody
from deltadock.compression.options import (
    LENGTH,
    MAX_LENGTH,
    MAX_SOURCES,
    MAX_TOKENS,
    MIN_LENGTH,
    MIN_TOKENS,
    TOKENS,
)

Weight = Annotated[
    float,
    Field(
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Share of the tokens, relative to the other sources'.",
    ),
]


class TextSource(RequestBody):
    """A calibration text that was uploaded before."""

    source: Literal["text"] = "text"
    digest: Digest
    weight: Weight = 1.0


class SampledSource(RequestBody):
    """Text that the fine-tuned model writes itself."""

    source: Literal["sampled"]
    weight: Weight = 1.0


Source = TextSource | SampledSource


def _sampled() -> list[Source]:
    return [SampledSource(source="sampled")]


class CalibrationIn(RequestBody):
    """A mixture of sources, and how much of it calibrates."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "sources": [
                        {"digest": EXAMPLE_DIGEST, "weight": 3.0},
                        {"source": "sampled", "weight": 1.0},
                    ],
                    "tokens": TOKENS,
                    "length": LENGTH,
                }
            ]
        }
    )

    sources: list[Source] = Field(default_factory=_sampled, min_length=1, max_length=MAX_SOURCES)
    tokens: int = Field(
        default=TOKENS, ge=MIN_TOKENS, le=MAX_TOKENS, description="Most tokens that calibrate."
    )
    length: int = Field(
        default=LENGTH, ge=MIN_LENGTH, le=MAX_LENGTH, description="Tokens of a window."
    )

    @property
    def digests(self) -> list[str]:
        """The texts that must have been uploaded."""
        return [source.digest for source in self.sources if isinstance(source, TextSource)]

    def to_options(self) -> dict[str, Any]:
        """As a delta's row keeps it; a digest of None is text that is sampled."""
        sources = [
            {
                "digest": source.digest if isinstance(source, TextSource) else None,
                "weight": source.weight,
            }
            for source in self.sources
        ]
        return {"sources": sources, "tokens": self.tokens, "length": self.length}


def mixture(wish: CalibrationIn | Source) -> CalibrationIn:
    """A single source is a mixture of one."""
    return wish if isinstance(wish, CalibrationIn) else CalibrationIn(sources=[wish])


class SourceOut(BaseModel):
    """One source of a delta's calibration text."""

    source: Literal["text", "sampled"]
    digest: Digest | None
    weight: float = Field(examples=[1.0])


class CalibrationOut(BaseModel):
    """What a delta is calibrated with."""

    sources: list[SourceOut]
    tokens: int = Field(examples=[TOKENS])
    length: int = Field(examples=[LENGTH])

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """The public form of what `CalibrationIn.to_options` made."""
        sources = [
            SourceOut(source="text" if source["digest"] else "sampled", **source)
            for source in options["sources"]
        ]
        return cls(sources=sources, tokens=options["tokens"], length=options["length"])
