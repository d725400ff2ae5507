"""Allocates cache slots to sequences and reuses prefixes that earlier sequences left in them.

A sequence reuses the longest matching prefix of the same queue key: tenants share none, and a name
that moves to other weights matches nothing. Two rules keep a broken delta's NaN from spreading (a
masked position is still read, and 0 * NaN is NaN): only tokens that led to finite logits are
shared, and a slot is erased before it passes to another queue key.
"""

import logging
from dataclasses import dataclass
from typing import Final

from deltadock.inference.model.kv_cache import KVCache

log = logging.getLogger(__name__)

NO_KEY: Final = ""
"""Queue key of contents that must be erased before the slot is used again."""


@dataclass(slots=True)
class _SlotContents:
    """Keys and values of the first `confirmed` of `tokens` led to finite logits; the first
    `written` positions may hold anything."""

    queue_key: str
    tokens: list[int]
    confirmed: int
    written: int


class CacheSlots:
    """Allocates the slots of a cache; the least recently used free slot is allocated first."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._contents: dict[int, _SlotContents] = {}
        self._free = dict.fromkeys(range(cache.slots))  # least recently used first
        self.reused_tokens = 0
        """Tokens that sequences found in the cache, since the start."""

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def find(self, queue_key: str, tokens: list[int]) -> tuple[int, int]:
        """Find the longest cached prefix: (slot, length), or (-1, 0) without a match.

        The last token is never part of it: its logits are not in the cache.
        """
        best = (0, False, -1)
        for slot, contents in self._contents.items():
            if contents.queue_key == queue_key:
                count = common_prefix(
                    contents.tokens, tokens, min(contents.confirmed, len(tokens) - 1)
                )
                best = max(best, (count, slot in self._free, slot))
        return (best[2], best[0]) if best[0] else (-1, 0)

    def take(self, queue_key: str, tokens: list[int], *, reuse: bool = True) -> tuple[int, int]:
        """Allocate a slot: (slot, number of the sequence's `tokens` already computed in it).

        Without `reuse` none is, so that all logits are computed.
        `tokens` may grow while the sequence runs; `confirm` marks how many are computed.
        """
        source, count = self.find(queue_key, tokens) if reuse else (-1, 0)
        # Reusing the slot in place would discard a prefix much longer than the shared one.
        if source in self._free and 2 * count >= self._contents[source].confirmed:
            slot = source
        else:
            slot = next(iter(self._free))
        contents = self._contents.get(slot)
        written = contents.written if contents is not None else 0
        if contents is not None and contents.queue_key != queue_key:
            self._cache.erase(slot, 0, written)
            written = 0
        if count and slot != source:
            self._cache.copy(source, slot, count)
        del self._free[slot]
        self._contents[slot] = _SlotContents(queue_key, tokens, count, max(written, count))
        self.reused_tokens += count
        return slot, count

    def confirm(self, slot: int, count: int) -> None:
        """Mark the first `count` tokens in the slot as having led to finite logits."""
        self._contents[slot].confirmed = count

    def release(self, slot: int, written: int, *, keep: bool) -> None:
        """Free a slot in which up to `written` positions were written.

        The confirmed prefix is kept for later sequences if `keep`; everything else is erased. If
        erasing fails, the slot is free all the same, and `take` erases it first.
        """
        contents = self._contents[slot]
        contents.written = max(contents.written, min(written, self._cache.length))
        if not keep:
            contents.confirmed = 0
        try:
            self._cache.erase(slot, contents.confirmed, contents.written)
        except Exception:
            log.exception("A cache slot could not be erased")
            self._contents[slot] = _SlotContents(NO_KEY, [], 0, contents.written)
            self._free[slot] = None
            return
        contents.written = contents.confirmed
        if contents.confirmed:
            contents.tokens = contents.tokens[: contents.confirmed]
            self._free[slot] = None
        else:
            del self._contents[slot]
            self._free = {slot: None, **self._free}


def common_prefix(first: list[int], second: list[int], limit: int) -> int:
    """Length of the common prefix of two token lists, at most `limit`."""
    low, high = 0, min(limit, len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:  # the answer is in [low, high)
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
