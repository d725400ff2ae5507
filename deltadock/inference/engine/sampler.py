"""Samples tokens from logits, with settings and random numbers per sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from deltadock.inference.model.added_tokens import Logits
from deltadock.inference.prompts.grammar import TokenMatcher

MIN_TEMPERATURE: Final = 1e-5
"""Lower temperatures are greedy, as in vLLM: logits divided by them would not be finite."""


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


def make_generator(params: SamplingParams, choice: int) -> torch.Generator | None:
    """The random generator of one sequence, None if it is greedy.

    Choice i of a request is seeded with `seed` + i; without a seed, from the system's entropy.
    """
    if params.temperature < MIN_TEMPERATURE:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((params.seed + choice) % 2**63)
    return generator


def apply_penalties(
    logits: Tensor, params: SamplingParams, tokens: Sequence[int], prompt_length: int
) -> Tensor:
    """Apply bias and penalties to the logits (vocabulary,); a new tensor if there are any.

    `tokens` is the prompt followed by the output so far. As in vLLM: the bias, then the repetition
    penalty over all tokens, then OpenAI's frequency and presence penalties over the output only.
    """
    bias, repetition = params.logit_bias, params.repetition_penalty
    frequency, presence = params.frequency_penalty, params.presence_penalty
    if bias:
        ids = torch.tensor(list(bias), device=logits.device)
        values = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(0, ids, values)
    if repetition != 1:
        ids = torch.tensor(tokens, device=logits.device)
        seen = logits[ids]
        penalized = torch.where(seen > 0, seen / repetition, seen * repetition)
        logits = logits.scatter(0, ids, penalized)
    if (frequency or presence) and len(tokens) > prompt_length:
        output = torch.tensor(tokens[prompt_length:], device=logits.device)
        ids, counts = output.unique(return_counts=True)
        logits = logits.index_add(0, ids, -frequency * counts.to(logits.dtype) - presence)
    return logits


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities and ids of the tokens that may be sampled (ids None: all, in id order).

    As in transformers: temperature, then top_k, top_p and min_p, each over the tokens that the
    previous filter kept. `logits` is (vocabulary,) float32.
    """
    scaled = logits / params.temperature
    if params.top_k and params.top_k < scaled.numel():
        scaled, ids = torch.topk(scaled, params.top_k)
    elif params.top_p < 1 or params.min_p > 0:
        scaled, ids = torch.sort(scaled, descending=True)
    else:
        return torch.softmax(scaled, -1), None
    probabilities = torch.softmax(scaled, -1)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities[before < params.top_p]
    if params.min_p > 0:
        probabilities = probabilities[probabilities >= params.min_p * probabilities[0]]
    return probabilities / probabilities.sum(), ids[: probabilities.numel()]


class TokenSampler:
    """Samples from one pass's logits; argmax and finiteness are computed for all rows at once."""

    def __init__(self, logits: Logits) -> None:
        self._rows = logits.rows()
        self._finite, self._argmax = _finite_and_argmax(logits.base)
        for numbers, extended in logits.extended:
            for row, finite, best in zip(numbers, *_finite_and_argmax(extended), strict=True):
                self._finite[row], self._argmax[row] = finite, best

    def sample(
        self,
        row: int,
        params: SamplingParams,
        generator: torch.Generator | None,
        tokens: Sequence[int],
        prompt_length: int,
        matcher: TokenMatcher | None = None,
    ) -> SampledToken:
        """Sample the token that follows `tokens` from one row; greedily without a generator.

        With a `matcher` it is one that the answer's grammar allows.

        Raises:
            FloatingPointError: the row's logits contain NaN or infinity.
        """
        if not self._finite[row]:
            raise FloatingPointError("The model's output is not finite; its weights are broken.")
        logits = self._rows[row]
        penalized = apply_penalties(logits, params, tokens, prompt_length)
        if matcher is not None:
            penalized = matcher.apply(penalized)
        if generator is not None:
            token = _draw(penalized, params, generator)
        else:
            token = self._argmax[row] if penalized is logits else int(penalized.argmax())
        if params.logprobs is None:
            return SampledToken(token)
        logprobs = torch.log_softmax(logits, -1)
        values, best = torch.topk(logprobs, params.logprobs)
        return SampledToken(
            token, float(logprobs[token]), tuple(zip(best.tolist(), values.tolist(), strict=True))
        )


def score_tokens(logits: Logits, tokens: Sequence[int], alternatives: int) -> list[SampledToken]:
    """Log-probabilities of the tokens of one sequence; row i of the logits precedes `tokens[i]`."""
    logprobs = torch.log_softmax(torch.stack(logits.rows()), -1)
    ids = torch.tensor(tokens, device=logprobs.device)
    own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    values, best = torch.topk(logprobs, alternatives)
    return [
        SampledToken(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, top in zip(
            tokens, own, zip(best.tolist(), values.tolist(), strict=True), strict=True
        )
    ]


def _finite_and_argmax(logits: Tensor) -> tuple[list[bool], list[int]]:
    """For each row of (rows, vocabulary): whether it is finite, and its most likely token."""
    return torch.isfinite(logits).all(-1).tolist(), logits.argmax(-1).tolist()


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    probabilities, ids = candidates(logits, params)
    cumulative = probabilities.double().cumsum(-1)
    draw = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device)
    place = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
    place = place.clamp_max(cumulative.numel() - 1)
    return int(place if ids is None else ids[place])
