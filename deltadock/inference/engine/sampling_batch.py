"""What the rows of a pass ask of the sampler, copied to the device in one tensor."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltadock.inference.engine.sampling import SamplingRow

MASK_BITS: Final = 64
"""Tokens in a word of a grammar's mask."""


class SamplingInputs(NamedTuple):
    """Tensors on the device, with no elements for what no row asks for.

    `..._rows` are row numbers, int64; `..._index` counts through the logits of all rows.
    """

    settings: Tensor
    """(rows, 5) float64: temperature, uniform random number, top_k, top_p, min_p."""
    drawn_rows: Tensor
    """Rows that draw from all of their tokens."""
    ranked_rows: Tensor
    """Rows that draw from their most likely tokens."""
    scored_rows: Tensor
    """Rows that want log-probabilities."""
    masked_rows: Tensor
    masks: Tensor
    """(masked rows * words) int64: a bit per token, 0 where it cannot follow."""
    bias_index: Tensor
    biases: Tensor
    """float64, added first."""
    penalty_index: Tensor
    divisors: Tensor
    """float64 repetition penalties: divide positive logits and multiply negative ones."""
    addends: Tensor
    """float64: the frequency and presence penalties, negated."""


class SamplingBatch:
    """Collects what the rows ask for.

    A row that fails here is sampled like one that asks for nothing; `errors` has why it failed.
    """

    def __init__(self, rows: Sequence[SamplingRow], lengths: Sequence[int], width: int) -> None:
        """Read the rows, whose vocabularies have these lengths, and draw their random numbers.

        `width` is the number of logits per row.
        """
        self.errors: dict[int, Exception] = {}
        self.scored: list[int] = []
        self.alternatives = 0
        """The most that a row asks for."""
        self.ranked_tokens = 0
        """Tokens of a row that have to be ranked at most."""
        self._width = width
        self._settings = np.zeros((len(rows), 5))
        self._drawn: list[int] = []
        self._ranked: list[int] = []
        self._masked: list[int] = []
        self._masks: list[NDArray[np.int64]] = []
        self._bias_index: list[int] = []
        self._biases: list[float] = []
        self._penalty_index: list[NDArray[np.int64]] = []
        self._divisors: list[NDArray[np.float64]] = []
        self._addends: list[NDArray[np.floating[Any]]] = []
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            try:
                self._add(number, row, length)
            except Exception as error:  # noqa: BLE001  (that request's, which fails with it)
                self.errors[number] = error

    @property
    def edits(self) -> bool:
        """Whether a row changes its logits."""
        return bool(self._bias_index or self._penalty_index or self._masked)

    @property
    def only_greedy(self) -> bool:
        """Whether all rows want their most likely token, and nothing else."""
        return not (self.edits or self._drawn or self._ranked or self.scored)

    def _add(self, number: int, row: SamplingRow, length: int) -> None:
        params, first = row.params, number * self._width
        tokens = params.logit_bias.keys()
        if tokens and not 0 <= min(tokens) <= max(tokens) < length:
            raise ValueError(f"A bias is for a token that is not one of the {length}.")
        if params.logprobs is not None and params.logprobs > length:
            raise ValueError(
                f"{params.logprobs} log-probabilities of {length} tokens are asked for."
            )
        if row.matcher is not None:
            mask = np.zeros(-(-self._width // MASK_BITS), np.int64)
            row.matcher.fill(mask.view(np.int32))
            self._masked.append(number)
            self._masks.append(mask)
        self._bias_index += [first + token for token in params.logit_bias]
        self._biases += params.logit_bias.values()
        if row.counts is not None:
            row.counts.update(row.tokens)
            counts = row.counts.counts.astype(np.float32)
            frequency = np.float32(params.frequency_penalty)
            presence = np.float32(params.presence_penalty)
            self._penalty_index.append(first + row.counts.ids)
            self._divisors.append(np.full(len(counts), params.repetition_penalty))
            self._addends.append(-frequency * counts - presence * (counts > 0))
        if params.logprobs is not None:
            self.scored.append(number)
            self.alternatives = max(self.alternatives, params.logprobs)
        if row.draws is not None:
            top_k = params.top_k if 0 < params.top_k < length else self._width
            uniform = row.draws.at(len(row.tokens) - row.prompt_length)
            settings = (params.temperature, uniform, top_k, params.top_p, params.min_p)
            self._settings[number] = settings
            if params.filters(length):
                self._ranked.append(number)
                self.ranked_tokens = max(self.ranked_tokens, top_k)
            else:
                self._drawn.append(number)

    def to(self, device: torch.device) -> SamplingInputs:
        """Copy everything to the device, without waiting for it."""
        rows = (self._drawn, self._ranked, self.scored, self._masked)
        arrays = [
            self._settings,
            *(np.array(numbers, np.int64) for numbers in rows),
            _joined(self._masks, np.int64),
            np.array(self._bias_index, np.int64),
            np.array(self._biases, np.float64),
            _joined(self._penalty_index, np.int64),
            _joined(self._divisors, np.float64),
            _joined(self._addends, np.float64),
        ]
        sent = _copied(arrays, device)
        return SamplingInputs(sent[0].view(self._settings.shape), *sent[1:])


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.number[Any]]) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _copied(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays of int64 and float64 as vectors on the device, by one copy."""
    sizes = [array.size for array in arrays]
    source = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel().view(np.int64) for array in arrays], out=source.numpy())
    parts = source.to(device, non_blocking=True).split(sizes)
    return [
        part.view(torch.float64) if array.dtype == np.float64 else part
        for part, array in zip(parts, arrays, strict=True)
    ]
