"""Samples the tokens of a pass from its logits, all rows at once.

The number of operators does not depend on the number of rows. What the rows ask for is copied to
the device in one tensor, and what was sampled comes back in one: the pass's only synchronization.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from deltadock.inference.engine.sampling import SampledToken, SamplingRow
from deltadock.inference.engine.sampling_batch import MASK_BITS, SamplingBatch, SamplingInputs
from deltadock.inference.model.added_tokens import Logits

UNIT: Final = 2.0**40
"""Weight of a row's most likely token. Weights are integers, whose sums are exact: a draw depends
neither on the order of summation nor on the other rows. Those of 2**23 tokens fit into 63 bits."""


def sample_tokens(logits: Logits, rows: Sequence[SamplingRow]) -> list[SampledToken | Exception]:
    """Sample each row's next token; an exception for each row that cannot be sampled.

    The bias is added first, then the repetition penalty is applied to all tokens, then OpenAI's
    frequency and presence penalties to those of the answer, as in vLLM. Temperature, top_k, top_p
    and min_p follow, each over the tokens that the previous filter kept, as in transformers. Tokens
    with equal logits are ranked by id.
    """
    values = logits.values
    batch = SamplingBatch(rows, logits.lengths, values.shape[1])
    low, high = torch.aminmax(values, dim=-1)
    finite = high - low < torch.inf
    scores: dict[int, list[float]] = {}
    if batch.only_greedy:
        tokens = torch.where(finite, values.argmax(-1), -1).tolist()
    else:
        inputs = batch.to(values.device)
        found = _sample(values, inputs, batch.ranked_tokens)
        sampled = torch.where(finite, found, -1)
        if batch.scored:
            scored = _scores(values, inputs.scored_rows, found, batch.alternatives)
            sampled = torch.cat([sampled.double(), scored.flatten()])
        numbers = sampled.tolist()
        tokens, rest = numbers[: len(rows)], numbers[len(rows) :]
        width = 1 + 2 * batch.alternatives
        for place, row in enumerate(batch.scored):
            scores[row] = rest[place * width : (place + 1) * width]
    return [
        batch.errors.get(number) or _result(int(token), row, scores.get(number))
        for number, (row, token) in enumerate(zip(rows, tokens, strict=True))
    ]


def score_tokens(logits: Logits, tokens: Sequence[int], alternatives: int) -> list[SampledToken]:
    """Log-probabilities of the tokens of one sequence; row i of the logits precedes `tokens[i]`."""
    logprobs = torch.log_softmax(logits.values[:, : logits.lengths[0]], -1)
    ids = torch.tensor(tokens, device=logprobs.device)
    own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    values, best = torch.topk(logprobs, alternatives)
    return [
        SampledToken(token, logprob, tuple(zip(*top, strict=True)))
        for token, logprob, top in zip(
            tokens, own, zip(best.tolist(), values.tolist(), strict=True), strict=True
        )
    ]


def _result(
    token: int, row: SamplingRow, scores: list[float] | None
) -> SampledToken | FloatingPointError:
    if token < 0:
        return FloatingPointError("The model's output is not finite; its weights are broken.")
    if scores is None:
        return SampledToken(token)
    count = row.params.logprobs or 0
    middle = (len(scores) + 1) // 2
    best = zip(map(int, scores[middle:]), scores[1:middle], strict=True)
    return SampledToken(token, scores[0], tuple(best)[:count])


def _sample(values: Tensor, inputs: SamplingInputs, ranked_tokens: int) -> Tensor:
    """Tokens (rows,) of the logits (rows, width)."""
    edited = _edit(values, inputs)
    tokens = edited.argmax(-1)
    if len(inputs.drawn_rows):
        scaled, uniform, *_ = _scaled(edited, inputs.settings, inputs.drawn_rows)
        sums = _weights(scaled.sub_(scaled.amax(-1, keepdim=True))).cumsum_(-1)
        tokens.index_copy_(0, inputs.drawn_rows, _draw(sums, sums[:, -1:], uniform)[:, 0])
    if len(inputs.ranked_rows):
        scaled, *settings = _scaled(edited, inputs.settings, inputs.ranked_rows)
        tokens.index_copy_(0, inputs.ranked_rows, _draw_ranked(scaled, ranked_tokens, *settings))
    return tokens


def _edit(values: Tensor, inputs: SamplingInputs) -> Tensor:
    """The logits (rows, width) with biases, penalties and masks; the same tensor without any."""
    if not sum(map(len, (inputs.bias_index, inputs.penalty_index, inputs.masked_rows))):
        return values
    values = values.clone()
    flat = values.view(-1)
    if len(inputs.bias_index):
        flat.index_add_(0, inputs.bias_index, inputs.biases.float())
    if len(inputs.penalty_index):
        seen, divisors = flat.index_select(0, inputs.penalty_index), inputs.divisors.float()
        penalized = torch.where(seen > 0, seen / divisors, seen * divisors)
        flat.index_copy_(0, inputs.penalty_index, penalized.add_(inputs.addends.float()))
    if rows := len(inputs.masked_rows):
        shifts = torch.arange(MASK_BITS, device=values.device)
        forbidden = (inputs.masks[:, None] >> shifts).bitwise_and_(1) == 0
        forbidden = forbidden.view(rows, -1)[:, : values.shape[1]]
        masked = values.index_select(0, inputs.masked_rows).masked_fill_(forbidden, -torch.inf)
        values.index_copy_(0, inputs.masked_rows, masked)
    return values


def _scaled(values: Tensor, settings: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """These rows' logits by their temperatures; then their other settings, (rows, 1) each."""
    if len(rows) < len(values):
        values, settings = values.index_select(0, rows), settings.index_select(0, rows)
    temperatures, *others = settings.split(1, dim=1)
    return values / temperatures.float(), *others


def _weights(shifted: Tensor) -> Tensor:
    """Weights (rows, n) int64 of logits less their row's largest; overwrites the logits."""
    return shifted.exp_().mul_(UNIT).to(torch.int64)


def _draw(sums: Tensor, total: Tensor, uniform: Tensor) -> Tensor:
    """Places (rows, 1) drawn by cumulated weights (rows, n), of which those below `total` count.

    `uniform` (rows, 1) are numbers in [0, 1).
    """
    drawn = torch.minimum((uniform * total).to(torch.int64), total - 1)
    return torch.searchsorted(sums, drawn, right=True).clamp_(max=sums.shape[1] - 1)


def _draw_ranked(
    scaled: Tensor, ranked: int, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Tokens (rows,) drawn from each row's most likely ones, of which `ranked` are sorted."""
    if ranked == scaled.shape[1]:
        best = torch.sort(scaled, dim=-1, descending=True).values
    else:
        best = torch.topk(scaled, ranked).values
    weights = _weights(best - best[:, :1])
    weights.mul_(torch.arange(ranked, device=best.device) < top_k)
    sums = weights.cumsum(-1)
    kept = (sums - weights < top_p * sums[:, -1:]) & (weights >= min_p * weights[:, :1])
    place = _draw(sums, weights.mul_(kept).sum(-1, keepdim=True), uniform)
    # Sorting leaves the order of equal logits open: as many of them are passed over, by id.
    chosen = best.gather(1, place)
    skipped = place - (best > chosen).sum(-1, keepdim=True)
    found = (scaled == chosen).cumsum(-1, dtype=torch.int32)
    return (found <= skipped).sum(-1).clamp_(max=scaled.shape[1] - 1)


def _scores(values: Tensor, rows: Tensor, tokens: Tensor, alternatives: int) -> Tensor:
    """Log-probabilities of the rows' tokens and of the best alternatives, and the ids of these.

    (rows, 1 + 2 * alternatives) float64.
    """
    logprobs = torch.log_softmax(values.index_select(0, rows), -1)
    own = logprobs.gather(1, tokens.index_select(0, rows)[:, None])
    best, ids = torch.topk(logprobs, alternatives)
    return torch.cat([own.double(), best, ids], dim=-1)
