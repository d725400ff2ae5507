"""From the scheduler's work to logits: the rows of one pass."""

import torch
from torch import Tensor

from deltadock.inference.engine.decode import Row, StaticDecode
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.attention import Span, make_attention_metadata
from deltadock.inference.model.kv_cache import KVCache
from deltadock.inference.model.logits import Logits
from deltadock.inference.model.model import BaseModel


class ModelRunner:
    """Runs passes of a model over a cache."""

    def __init__(
        self, model: BaseModel, cache: KVCache, max_rows: int, *, static: bool | None = None
    ) -> None:
        """Take passes of up to `max_rows` decoding sequences.

        `static` decodes on buffers that stay in place, by default on a GPU, for its graphs.
        """
        self._model = model
        self._cache = cache
        self._decode: StaticDecode | None = None
        if model.device.type == "cuda" if static is None else static:
            self._decode = StaticDecode(model, cache, max_rows)

    def logits(self, work: list[ScheduledChunk]) -> Logits:
        """Logits of the sequences whose next token can be drawn, a row each.

        The keys and values of all of the work's tokens are in the cache afterwards.
        """
        if self._decode is not None and all(item.end - item.begin == 1 for item in work):
            rows = [
                Row(sequence.tokens[begin], begin, sequence.kv_slot, sequence.delta_slot)
                for sequence, begin, _ in work
            ]
            hidden = self._decode.hidden(rows)
            if hidden is not None:
                return self._last(hidden, work, list(range(len(work))))
        return self._packed(work)

    def _packed(self, work: list[ScheduledChunk]) -> Logits:
        tokens: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        for sequence, begin, end in work:
            spans.append(Span(sequence.kv_slot, len(tokens), len(tokens) + end - begin, begin))
            tokens += sequence.tokens[begin:end]
            slots += [sequence.delta_slot] * (end - begin)
        step = make_attention_metadata(self._cache, spans)
        hidden = self._model.forward(torch.tensor(tokens, device=self._model.device), step, slots)
        return self._last(hidden, work, [span.end - 1 for span in spans])

    def _last(self, hidden: Tensor, work: list[ScheduledChunk], rows: list[int]) -> Logits:
        """Logits of the sequences that sample, whose last rows are `rows`."""
        last = [row for row, item in zip(rows, work, strict=True) if item.samples]
        slots = [item.sequence.delta_slot for item in work if item.samples]
        if len(last) < hidden.shape[1]:
            hidden = hidden[:, last]
        return self._model.logits(hidden, slots)
