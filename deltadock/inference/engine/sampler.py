"""From logits to tokens: every sequence has its own settings and its own random numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from deltadock.inference.model.logits import Logits

LEAST_TEMPERATURE: Final = 1e-5
"""Anything less is 0, as in vLLM: logits divided by it would not be finite."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is continued: greedily at temperature 0; `top_k` 0 and `top_p` 1 are off."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits, by token id."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token with its log-probability under the model (nats, before anything a request changes).

    `logprob` and the `top` most likely alternatives (id, log-probability) only where asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def make_generator(params: SamplingParams, choice: int) -> torch.Generator | None:
    """Random numbers of one sequence, None if it is greedy.

    Choices of the same request draw different ones, from `seed` on; without a seed nobody draws
    the same twice.
    """
    if params.temperature < LEAST_TEMPERATURE:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((params.seed + choice) % 2**63)
    return generator


def adjusted(
    logits: Tensor, params: SamplingParams, tokens: Sequence[int], prompt_length: int
) -> Tensor:
    """The logits (vocabulary,) with bias and penalties; a new tensor where there are any.

    `tokens` is the prompt, then the answer so far. As in vLLM the bias comes first, then the
    repetition penalty over all tokens, then OpenAI's other two penalties over the answer alone.
    """
    bias, repetition = params.logit_bias, params.repetition_penalty
    frequency, presence = params.frequency_penalty, params.presence_penalty
    if bias:
        ids = torch.tensor(list(bias), device=logits.device)
        values = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(0, ids, values)
    if repetition != 1:
        ids = torch.tensor(tokens, device=logits.device)
        found = logits[ids]
        changed = torch.where(found > 0, found / repetition, found * repetition)
        logits = logits.scatter(0, ids, changed)
    if (frequency or presence) and len(tokens) > prompt_length:
        answer = torch.tensor(tokens[prompt_length:], device=logits.device)
        ids, counts = answer.unique(return_counts=True)
        logits = logits.index_add(0, ids, -frequency * counts.to(logits.dtype) - presence)
    return logits


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn: probabilities and ids (None: all, in order of their ids).

    Filters as in transformers: temperature, then top_k, top_p and min_p, each over what the one
    before it left. `logits` is (vocabulary,) float32.
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


class Sampler:
    """One pass's logits, looked over once for all rows of equal length."""

    def __init__(self, logits: Logits) -> None:
        self._rows = logits.rows()
        self._finite, self._best = _look_over(logits.known)
        for numbers, whole in logits.longer:
            for row, finite, best in zip(numbers, *_look_over(whole), strict=True):
                self._finite[row], self._best[row] = finite, best

    def sample(
        self,
        row: int,
        params: SamplingParams,
        generator: torch.Generator | None,
        tokens: Sequence[int],
        prompt_length: int,
    ) -> SampledToken:
        """Draw one row's token, which follows `tokens`; without a generator, the likeliest one.

        Raises:
            FloatingPointError: the row's logits hold NaN or an infinity.
        """
        if not self._finite[row]:
            raise FloatingPointError("The model's output is not finite; its weights are broken.")
        logits = self._rows[row]
        scores = adjusted(logits, params, tokens, prompt_length)
        if generator is not None:
            token = _draw(scores, params, generator)
        else:
            token = self._best[row] if scores is logits else int(scores.argmax())
        if params.logprobs is None:
            return SampledToken(token)
        logprobs = torch.log_softmax(logits, -1)
        values, best = torch.topk(logprobs, params.logprobs)
        return SampledToken(
            token, float(logprobs[token]), tuple(zip(best.tolist(), values.tolist(), strict=True))
        )


def _look_over(logits: Tensor) -> tuple[list[bool], list[int]]:
    """Of each row of (rows, vocabulary): whether it is finite, and its most likely token."""
    return torch.isfinite(logits).all(-1).tolist(), logits.argmax(-1).tolist()


def _draw(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    probabilities, ids = candidates(logits, params)
    cumulative = probabilities.double().cumsum(-1)
    draw = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device)
    place = torch.searchsorted(cumulative, draw * cumulative[-1], right=True)
    place = place.clamp_max(cumulative.numel() - 1)
    return int(place if ids is None else ids[place])
