"""One prompt being continued, and the events it emits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from deltadock.inference.engine.sampling import (
    SampledToken,
    SamplingParams,
    SamplingRow,
    UniformDraws,
)
from deltadock.inference.prompts.matching import TokenMatcher
from deltadock.inference.prompts.tokenizer import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """Text that is final, the tokens since the last event, and the finish reason at the end.

    `prompt` has the scores of the prompt's tokens but the first, in the first event of a sequence
    that asks for them.
    """

    text: str = ""
    tokens: tuple[SampledToken, ...] = ()
    finish: FinishReason | None = None
    error: Exception | None = None
    prompt: tuple[SampledToken, ...] = ()


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt being continued on one delta slot."""

    tokens: list[int]
    """The prompt, followed by the generated tokens."""
    sampling: SamplingParams
    delta_slot: int
    queue_key: str
    """Fairness and cache key (`ModelTarget.queue_key`): the digest of the weights and the tenant.
    Never a name, for a name may move to other weights."""
    end_ids: frozenset[int]
    """Tokens that end the answer."""
    stream: TextStream
    emit: Callable[[Event], None]
    """Called from the engine thread; the last event has `finish` set."""
    draws: UniformDraws | None = None
    """Its random numbers; None is greedy."""
    matcher: TokenMatcher | None = None
    """Restricts the answer to a grammar."""
    sampling_row: SamplingRow = field(init=False)
    prompt_length: int = field(init=False)
    computed: int = field(default=0, init=False)
    """Number of tokens whose keys and values are in the cache."""
    kv_slot: int = field(default=-1, init=False)
    charged: int = field(default=0, init=False)
    """Prompt tokens that were charged to the delta or came from the prefix cache."""
    late: bool = field(default=False, init=False)
    """Whether passes leave it out: its mask was not there when a token was to be sampled."""
    unsent: list[SampledToken] = field(default_factory=list, init=False)
    prompt_scores: dict[int, SampledToken] = field(default_factory=dict, init=False)
    """Scores of the prompt's tokens, by position, until they are sent."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        counts = self.sampling.token_counts(self.prompt_length)
        self.sampling_row = SamplingRow(
            self.sampling, self.tokens, self.prompt_length, self.draws, counts, self.matcher
        )

    @property
    def generated(self) -> int:
        """Number of generated tokens."""
        return len(self.tokens) - self.prompt_length

    @property
    def scores_prompt(self) -> bool:
        """Whether passes score its prompt: not again when it is recomputed after a preemption."""
        return self.sampling.prompt_logprobs and not self.generated

    @property
    def has_mask(self) -> bool:
        """Whether its next token can be sampled."""
        return self.matcher is None or self.matcher.ready
