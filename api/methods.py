"""The catalogue of compression methods."""

from typing import Self

from pydantic import BaseModel, Field

from deltadock.api.routing import api_router
from deltadock.compression.options import METHODS, MethodInfo

router = api_router("/v1/methods", tags=["methods"])


class MethodOut(BaseModel):
    """A compression method and the range of its bit budget (null: it takes no budget)."""

    name: str = Field(examples=["adamix"])
    title: str
    bits_min: float | None = Field(examples=[0.1])
    bits_max: float | None = Field(examples=[8.0])
    budgets: list[float] = Field(
        description="The budgets it accepts; empty: any within the bounds."
    )
    needs_calibration: bool
    default: bool = Field(description="Used when a request names no method.")

    @classmethod
    def of(cls, method: MethodInfo) -> Self:
        """Convert a catalogue entry."""
        return cls(
            name=method.name,
            title=method.title,
            bits_min=method.bits_min,
            bits_max=method.bits_max,
            budgets=list(method.budgets),
            needs_calibration=method.needs_calibration,
            default=method.default,
        )


class MethodList(BaseModel):
    """All compression methods."""

    data: list[MethodOut]


@router.get("")
def list_methods() -> MethodList:
    """List the compression methods."""
    return MethodList(data=[MethodOut.of(method) for method in METHODS.values()])
