"""From the scheduler's work to logits: the rows of one pass."""

import torch
from torch import Tensor

from inference.attention import Span, make_step
from inference.kv_cache import KVCache
from inference.model import BaseModel
from inference.scheduler import Work


class Passes:
    """Runs passes of a model over a cache."""

    def __init__(self, model: BaseModel, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    def logits(self, work: list[Work]) -> Tensor:
        """Logits (rows, vocabulary), float32, of the sequences whose next token can be drawn.

        The keys and values of all of the work's tokens are in the cache afterwards.
        """
        tokens: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        for sequence, begin, end in work:
            spans.append(Span(sequence.kv_slot, len(tokens), len(tokens) + end - begin, begin))
            tokens += sequence.tokens[begin:end]
            slots += [sequence.delta_slot] * (end - begin)
        step = make_step(self._cache, spans)
        hidden = self._model.forward(torch.tensor(tokens, device=self._model.device), step, slots)
        last = [span.end - 1 for span, item in zip(spans, work, strict=True) if item.samples]
        if len(last) < len(tokens):
            hidden = hidden[:, last]
        return self._model.logits(hidden, [slots[row] for row in last])
