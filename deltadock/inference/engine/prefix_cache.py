"""Which sequence is in which cache slot, and what a slot still holds for the next one.

What a sequence leaves in its slot serves the next one of the same model whose tokens begin alike.
Weights are known by digest, so a name that moves to other bytes finds nothing; a cache belongs to
one base. Two rules keep a broken delta's NaN where it is (a masked position is still read, and
0 * NaN is NaN): only what has led to finite logits is shared, and a slot passes from one digest to
another only once it is erased.
"""

from dataclasses import dataclass

from deltadock.inference.model.kv_cache import KVCache


@dataclass(slots=True)
class _Held:
    """A slot's contents: keys and values of the first `confirmed` of `tokens` are known to be good;
    the first `written` positions may hold anything."""

    model_key: str
    tokens: list[int]
    confirmed: int
    written: int


class CacheSlots:
    """Gives the slots of a cache to sequences; the least recently used free one is given first."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._held: dict[int, _Held] = {}
        self._free = dict.fromkeys(range(cache.slots))  # least recently used first
        self.reused_tokens = 0
        """Tokens that sequences found computed, since the start."""

    @property
    def free(self) -> int:
        """How many more sequences fit."""
        return len(self._free)

    def find(self, model_key: str, tokens: list[int]) -> tuple[int, int]:
        """(slot, n): the slot that holds most, n, of the first tokens; (-1, 0) if none does.

        The last token is never among them: its logits are not in the cache.
        """
        best = (0, False, -1)
        for slot, held in self._held.items():
            if held.model_key == model_key:
                count = common_prefix(held.tokens, tokens, min(held.confirmed, len(tokens) - 1))
                best = max(best, (count, slot in self._free, slot))
        return (best[2], best[0]) if best[0] else (-1, 0)

    def take(self, model_key: str, tokens: list[int]) -> tuple[int, int]:
        """A free slot, and how many of the sequence's `tokens` are computed in it already.

        `tokens` may grow while the sequence runs; `confirm` says how far they are computed.
        """
        source, count = self.find(model_key, tokens)
        # Continuing in place would waste a slot that holds much more than what is shared.
        if source in self._free and 2 * count >= self._held[source].confirmed:
            slot = source
        else:
            slot = next(iter(self._free))
        held = self._held.get(slot)
        written = held.written if held is not None else 0
        if held is not None and held.model_key != model_key:
            self._cache.erase(slot, 0, written)
            written = 0
        if count and slot != source:
            self._cache.copy(source, slot, count)
        del self._free[slot]
        self._held[slot] = _Held(model_key, tokens, count, max(written, count))
        self.reused_tokens += count
        return slot, count

    def confirm(self, slot: int, count: int) -> None:
        """The first `count` tokens in the slot have led to finite logits."""
        self._held[slot].confirmed = count

    def give_back(self, slot: int, written: int, *, keep: bool) -> None:
        """Free a slot in which up to `written` positions were written to.

        What is confirmed stays for the next sequence if `keep`; everything else is erased.
        """
        held = self._held[slot]
        held.written = max(held.written, min(written, self._cache.length))
        if not keep:
            held.confirmed = 0
        self._cache.erase(slot, held.confirmed, held.written)
        held.written = held.confirmed
        if held.confirmed:
            held.tokens = held.tokens[: held.confirmed]
            self._free[slot] = None
        else:
            del self._held[slot]
            self._free = {slot: None, **self._free}


def common_prefix(first: list[int], second: list[int], most: int) -> int:
    """With how many equal tokens two lists begin, `most` at most."""
    low, high = 0, min(most, len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:  # the answer is in [low, high)
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
