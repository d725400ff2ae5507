"""The sampler's rules for one row, one after the other, as the truth that batches must match."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltadock.inference.engine.sampling import SampledToken, SamplingParams


def apply_penalties(
    logits: Tensor, params: SamplingParams, tokens: Sequence[int], prompt_length: int
) -> Tensor:
    """The logits (vocabulary,) with bias and penalties."""
    repetition, frequency = params.repetition_penalty, params.frequency_penalty
    presence = params.presence_penalty
    if bias := params.logit_bias:
        values = torch.tensor(list(bias.values()), dtype=logits.dtype)
        logits = logits.index_add(0, torch.tensor(list(bias)), values)
    if repetition != 1:
        ids = torch.tensor(tokens)
        seen = logits[ids]
        penalized = torch.where(seen > 0, seen / repetition, seen * repetition)
        logits = logits.scatter(0, ids, penalized)
    if (frequency or presence) and len(tokens) > prompt_length:
        ids, counts = torch.tensor(tokens[prompt_length:]).unique(return_counts=True)
        logits = logits.index_add(0, ids, -frequency * counts.to(logits.dtype) - presence)
    return logits


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities and ids of the tokens that may be drawn (ids None: all, in id order)."""
    scaled = logits / params.temperature
    if params.top_k and params.top_k < scaled.numel():
        scaled, ids = torch.topk(scaled, params.top_k)
    elif params.top_p < 1 or params.min_p > 0:
        scaled, ids = torch.sort(scaled, descending=True, stable=True)
    else:
        return torch.softmax(scaled, -1), None
    probabilities = torch.softmax(scaled, -1)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities[before < params.top_p]
    if params.min_p > 0:
        probabilities = probabilities[probabilities >= params.min_p * probabilities[0]]
    return probabilities / probabilities.sum(), ids[: probabilities.numel()]


def draw(logits: Tensor, params: SamplingParams, uniform: Tensor) -> int:
    """The token at `uniform` of the cumulated probabilities."""
    probabilities, ids = candidates(logits, params)
    cumulative = probabilities.double().cumsum(-1)
    place = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    place = place.clamp_max(cumulative.numel() - 1)
    return int(place if ids is None else ids[place])


def sample(
    logits: Tensor,
    params: SamplingParams,
    tokens: Sequence[int],
    prompt_length: int,
    *,
    generator: torch.Generator | None,
    allowed: Tensor | None = None,
) -> SampledToken:
    """One row's token; greedy without a generator."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError
    penalized = apply_penalties(logits, params, tokens, prompt_length)
    if allowed is not None:
        penalized = penalized.masked_fill(~allowed, -torch.inf)
    if generator is None:
        token = int(penalized.argmax())
    else:
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        token = draw(penalized, params, uniform)
    if params.logprobs is None:
        return SampledToken(token)
    logprobs = torch.log_softmax(logits, -1)
    values, best = torch.topk(logprobs, params.logprobs)
    top = tuple(zip(best.tolist(), values.tolist(), strict=True))
    return SampledToken(token, float(logprobs[token]), top)
