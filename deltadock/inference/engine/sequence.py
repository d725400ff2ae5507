"""One prompt being continued, and what it tells."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from deltadock.inference.engine.sampler import SampledToken, SamplingParams
from deltadock.inference.prompts.tokenizer import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """What a sequence tells: text that is certain, the tokens since the last event, its end."""

    text: str = ""
    tokens: tuple[SampledToken, ...] = ()
    finish: FinishReason | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt being continued on one delta slot."""

    tokens: list[int]
    """The prompt, then what was generated."""
    sampling: SamplingParams
    delta_slot: int
    model_key: str
    """Digest of the weights: the artifact's, or the base's. Sequences of equal digests share cached
    keys and values, and are one party where deltas compete. Never a name: names move."""
    eos_ids: frozenset[int]
    stream: TextStream
    emit: Callable[[Event], None]
    """Called from the engine's thread; the last event has `finish` set."""
    generator: torch.Generator | None = None
    prompt_length: int = field(init=False)
    computed: int = field(default=0, init=False)
    """Tokens whose keys and values are in the cache."""
    kv_slot: int = field(default=-1, init=False)
    charged: int = field(default=0, init=False)
    """Prompt tokens that its delta has been charged for, or that came from the cache."""
    unsent: list[SampledToken] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.prompt_length
