"""Settings, random numbers and results of sampling, per sequence."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch

from deltadock.inference.engine.token_counts import TokenCounts
from deltadock.inference.prompts.matching import TokenMatcher

MIN_TEMPERATURE: Final = 1e-5
"""Lower temperatures are greedy, as in vLLM: logits divided by them would not be finite."""
DRAWN_AT_ONCE: Final = 32
"""Random numbers that a sequence draws at a time."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of a sequence. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, by token id."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """End the answer, beside the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: bool = False
    """Whether to score the prompt's tokens too, with `logprobs` alternatives each."""

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    def filters(self, vocabulary: int) -> bool:
        """Whether a token's probability depends on its rank among `vocabulary` tokens."""
        return 0 < self.top_k < vocabulary or self.top_p < 1 or self.min_p > 0

    def token_counts(self, prompt_length: int) -> TokenCounts | None:
        """The tokens that are penalized in a sequence, None without penalties.

        The repetition penalty is for all tokens, the others are for the answer only.
        """
        if not self.penalizes:
            return None
        return TokenCounts(0 if self.repetition_penalty != 1 else prompt_length, prompt_length)

    def end_ids(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end the answer of a model with these end-of-sequence tokens."""
        return self.stop_token_ids | (frozenset() if self.ignore_eos else eos_ids)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token with its log-probability under the model (nats, before penalties and filters).

    `logprob` and the `top` most likely alternatives (id, log-probability) are set on request only.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class UniformDraws:
    """Uniform random numbers in [0, 1): one for each token of an answer, by its position."""

    def __init__(self, seed: int | None) -> None:
        """Begin the stream of `seed`, of the system's entropy if None."""
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed % 2**63)
        self._drawn = array("d")

    def at(self, position: int) -> float:
        """The number for one position, the same each time."""
        while len(self._drawn) <= position:
            drawn = torch.rand(DRAWN_AT_ONCE, generator=self._generator, dtype=torch.float64)
            self._drawn.extend(drawn.tolist())
        return self._drawn[position]


def make_draws(params: SamplingParams, choice: int) -> UniformDraws | None:
    """The random numbers of one sequence, None if it is greedy.

    Choice i of a request is seeded with `seed` + i; without a seed, from the system's entropy.
    """
    if params.temperature < MIN_TEMPERATURE:
        return None
    return UniformDraws(None if params.seed is None else params.seed + choice)


class SamplingRow(NamedTuple):
    """What the next token of one sequence depends on, beside its logits."""

    params: SamplingParams
    tokens: Sequence[int] = ()
    """The prompt followed by the answer so far."""
    prompt_length: int = 0
    draws: UniformDraws | None = None
    """None is greedy."""
    counts: TokenCounts | None = None
    """Of `tokens`; from `SamplingParams.token_counts`."""
    matcher: TokenMatcher | None = None
    """Allows only the tokens that continue the answer's grammar."""
