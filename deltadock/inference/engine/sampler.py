"""Samples the next tokens of a pass: all rows at once, each with its sequence's settings.

The number of operators does not depend on the number of rows, the device's results are copied to
the host once, and a row's token depends neither on other rows nor on which rows are in the pass.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadock.inference.model.added_tokens import Logits
from deltadock.inference.prompts.grammar import TokenMatcher

MIN_TEMPERATURE: Final = 1e-5
"""Lower temperatures are greedy, as in vLLM: logits divided by them would not be finite."""
MAX_ALTERNATIVES: Final = 20
"""The most alternatives whose log-probability a request may ask for, as in OpenAI's API."""


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


def make_generator(params: SamplingParams, choice: int) -> random.Random | None:
    """The random generator of one sequence, None if it is greedy.

    Choice i of a request is seeded with `seed` + i; without a seed, from the system's entropy.
    """
    if params.temperature < MIN_TEMPERATURE:
        return None
    return random.Random(None if params.seed is None else (params.seed + choice) % 2**64)


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """The token to sample that follows `tokens`, from one row of a pass's logits."""

    row: int
    params: SamplingParams
    generator: random.Random | None
    """None: greedily."""
    tokens: Sequence[int]
    """The prompt, followed by the output so far."""
    prompt_length: int
    matcher: TokenMatcher | None = None
    """Allows only what the answer's grammar does."""


def sample(
    logits: Logits, requests: Sequence[SampleRequest]
) -> list[SampledToken | FloatingPointError]:
    """The requested tokens; an error for rows whose logits contain NaN or infinity."""
    sampled: dict[int, SampledToken | FloatingPointError] = {}
    extended = {row for rows, _ in logits.extended for row in rows}
    places = {row: row for row in range(len(logits.base)) if row not in extended}
    for place_of, scores in [
        (places, logits.base),
        *(({row: i for i, row in enumerate(rows)}, scores) for rows, scores in logits.extended),
    ]:
        chosen = [number for number, request in enumerate(requests) if request.row in place_of]
        if chosen:
            part = [requests[number] for number in chosen]
            rows = [place_of[request.row] for request in part]
            tokens = _sample_rows(_select(scores, rows), part)
            sampled.update(zip(chosen, tokens, strict=True))
    return [sampled[number] for number in range(len(requests))]


def _sample_rows(
    logits: Tensor, requests: Sequence[SampleRequest]
) -> Iterator[SampledToken | FloatingPointError]:
    """Sample one token from each row of (rows, vocabulary) float32."""
    scores = adjust(logits, requests)
    tokens = scores.argmax(-1)
    drawn = _where(requests, lambda request: request.generator is not None)
    if drawn:
        part = [requests[row] for row in drawn]
        tokens[drawn] = _draw(_select(scores, drawn), part)
    # One copy to the host: float64 holds token ids and float32 values exactly.
    columns = [tokens.double()[:, None], *torch.aminmax(logits, dim=-1, keepdim=True)]
    asked = any(request.params.logprobs is not None for request in requests)
    if asked:
        logprobs = torch.log_softmax(logits, -1)
        values, ids = logprobs.topk(min(MAX_ALTERNATIVES, logits.shape[1]))
        columns += [logprobs.gather(1, tokens[:, None]), values, ids]
    for request, row in zip(requests, torch.cat(columns, 1).tolist(), strict=True):
        token, lowest, highest, *scored = row
        if not (math.isfinite(lowest) and math.isfinite(highest)):  # NaN is both
            yield FloatingPointError("The model's output is not finite; its weights are broken.")
            continue
        wanted = request.params.logprobs
        if wanted is None:
            yield SampledToken(int(token))
            continue
        own, *alternatives = scored
        found = len(alternatives) // 2
        best = zip(map(int, alternatives[found:]), alternatives[:found], strict=True)
        yield SampledToken(int(token), own, tuple(best)[:wanted])


def adjust(logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """Apply biases, penalties and grammars to (rows, vocabulary); a new tensor if there are any.

    As in vLLM: the bias, then the repetition penalty over all tokens, then OpenAI's frequency and
    presence penalties over the output only.
    """
    vocabulary, device = logits.shape[1], logits.device
    biases, repeated, output = _Entries(vocabulary), _Entries(vocabulary), _Entries(vocabulary)
    for row, request in enumerate(requests):
        params = request.params
        if params.logit_bias:
            biases.add(row, list(params.logit_bias), list(params.logit_bias.values()))
        if params.repetition_penalty != 1:
            repeated.add(row, np.unique(request.tokens), params.repetition_penalty)
        answer = request.tokens[request.prompt_length :]
        if answer and (params.frequency_penalty or params.presence_penalty):
            ids, counts = np.unique(answer, return_counts=True)
            output.add(row, ids, -params.frequency_penalty * counts - params.presence_penalty)
    masked = _where(requests, lambda request: request.matcher is not None)
    if not (biases or repeated or output or masked):
        return logits
    scores = logits.clone()
    flat = scores.view(-1)
    # The ids of one kind are distinct, so that the order of additions does not matter.
    if biases:
        flat.index_add_(0, *biases.on(device))
    if repeated:
        places, penalties = repeated.on(device)
        seen = flat[places]
        flat.index_copy_(0, places, torch.where(seen > 0, seen / penalties, seen * penalties))
    if output:
        flat.index_add_(0, *output.on(device))
    if masked:
        words = np.zeros((len(masked), -(-vocabulary // 32)), dtype=np.int32)
        for number, row in enumerate(masked):
            matcher = requests[row].matcher
            assert matcher is not None
            allowed = matcher.allowed()[: words.shape[1]]
            words[number, : len(allowed)] = allowed
        shifts = torch.arange(32, dtype=torch.int32, device=device)
        bits = (torch.from_numpy(words).to(device)[:, :, None] >> shifts) & 1
        allowed_tokens = bits.flatten(1)[:, :vocabulary].bool()
        scores[masked] = _select(scores, masked).masked_fill(~allowed_tokens, -torch.inf)
    return scores


class _Entries:
    """Values for some tokens of some rows, collected on the host."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._ids: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []

    def __bool__(self) -> bool:
        return bool(self._ids)

    def add(
        self,
        row: int,
        ids: Sequence[int] | NDArray[np.int64],
        values: float | Sequence[float] | NDArray[np.floating[Any]],
    ) -> None:
        """Add one row's token ids and their values, or one value for all."""
        places = row * self._vocabulary + np.asarray(ids, dtype=np.int64)
        self._ids.append(places)
        self._values.append(np.broadcast_to(np.asarray(values, np.float32), places.shape))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places in the flattened (rows, vocabulary), int64, and values, float32."""
        ids, values = np.concatenate(self._ids), np.concatenate(self._values)
        return torch.from_numpy(ids).to(device), torch.from_numpy(values).to(device)


def probabilities(scores: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """What may be sampled from (rows, vocabulary) float32: each row's probabilities, 0 for others.

    As in transformers: temperature, then top_k, top_p and min_p, each over the tokens that the
    filter before it kept. Tokens as likely as the last one that is kept are kept too, so that no
    result depends on the order in which a device sorts equals.
    """

    def column(values: Sequence[float], rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        chosen = [values[row] for row in rows]
        return torch.tensor(chosen, dtype=dtype, device=scores.device)[:, None]

    def keep(rows: Sequence[int], least_of: Callable[[Tensor], Tensor]) -> None:
        if rows:
            part = _select(scaled, rows)
            scaled[rows] = part.masked_fill(part < least_of(part), -torch.inf)

    def nucleus(part: Tensor) -> Tensor:
        ordered = part.sort(dim=-1, descending=True).values
        likely = torch.softmax(ordered, -1)
        before = likely.cumsum(-1) - likely
        count = (before < column(top_p, nuclei, torch.float32)).sum(-1, keepdim=True)
        return ordered.gather(1, count.clamp_min(1) - 1)

    every = range(len(requests))
    top_k = [request.params.top_k for request in requests]
    top_p = [request.params.top_p for request in requests]
    min_p = [request.params.min_p for request in requests]
    scaled = scores / column([r.params.temperature for r in requests], every, torch.float32)
    limited = [row for row in every if 0 < top_k[row] < scores.shape[1]]
    nuclei = [row for row in every if top_p[row] < 1]
    relative = [row for row in every if min_p[row] > 0]
    keep(
        limited,
        lambda part: part.topk(max(top_k[row] for row in limited)).values.gather(
            1, column(top_k, limited, torch.int64) - 1
        ),
    )
    keep(nuclei, nucleus)
    keep(
        relative,
        lambda part: part.amax(-1, keepdim=True) + column(min_p, relative, torch.float32).log(),
    )
    return torch.softmax(scaled, -1)


def _draw(scores: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """One token of each row, (rows,) int64, by inversion of one random number a row."""
    draws = [request.generator.random() for request in requests if request.generator is not None]
    cumulative = probabilities(scores, requests).double().cumsum(-1)
    total = cumulative[:, -1:]
    places = torch.tensor(draws, dtype=torch.float64, device=scores.device)[:, None] * total
    # Rounded, the product may be the total itself, which no token's share exceeds.
    places = torch.minimum(places, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, places, right=True)[:, 0]
    return tokens.clamp_max(scores.shape[1] - 1)  # rows that are not finite


def _where(
    requests: Sequence[SampleRequest], condition: Callable[[SampleRequest], bool]
) -> list[int]:
    return [row for row, request in enumerate(requests) if condition(request)]


def _select(values: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows of a matrix; the matrix itself if these are all, in order."""
    return values if rows == list(range(len(values))) else values[torch.tensor(rows)]


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
