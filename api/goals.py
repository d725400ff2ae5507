"""What a compression aims at, as requests and answers spell it."""

from typing import Self

from pydantic import BaseModel, Field

from deltadock.api.schemas import RequestBody
from deltadock.compression.options import Goal, GoalKind, MethodInfo, default_method, goal_for


class GoalFields(RequestBody):
    """Method and goal; at most one goal is given, and a budget of 1.0 bit is what stands for none.

    Ranges are the domain's to check: its errors say what to do.
    """

    method: str = Field(
        default=default_method().name, description="One of GET /v1/methods.", max_length=32
    )
    bits: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Bits per weight of what is compressed, for the methods that take a budget.",
    )
    target_bytes: int | None = Field(
        default=None, lt=2**63, description="Most bytes of the whole artifact."
    )
    ratio: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Least bf16 checkpoint bytes per artifact byte.",
    )
    max_kl: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Most KL divergence to the fine-tune, nats per held-out token: the smallest "
        "artifact that keeps it.",
    )
    min_agreement: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Least share of held-out tokens with the fine-tune's likeliest next token: "
        "the smallest artifact that keeps it.",
    )

    def check_goal(self) -> tuple[MethodInfo, Goal | None]:
        """The method, and its goal if it takes one.

        Raises:
            UnknownMethod, BitsOutOfRange, InvalidGoal.
        """
        return goal_for(
            self.method,
            bits=self.bits,
            target_bytes=self.target_bytes,
            ratio=self.ratio,
            max_kl=self.max_kl,
            min_agreement=self.min_agreement,
        )


class GoalOut(BaseModel):
    """What decides a delta's size."""

    kind: GoalKind = Field(examples=["bits"])
    value: float = Field(examples=[1.0])

    @classmethod
    def of(cls, goal: Goal) -> Self:
        """The public form of a goal."""
        return cls(kind=goal.kind, value=goal.value)

    def __str__(self) -> str:
        return str(Goal(self.kind, self.value))
