"""Tokens that a delta adds to the base's vocabulary.

Their rows of embedding and head lie beside the base's and are read for rows of that delta's slot
alone. Both are looked up outside of CUDA graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadock.errors import InvalidArtifact
from deltadock.inference.model.logits import Logits
from deltadock.inference.model.routing import Routing
from deltadock.inference.model.weight_deltas import NewRows, TensorDelta

EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"


class _Tables(NamedTuple):
    """One delta's, in token order; one tensor if they are tied."""

    embedding: Tensor
    """(added, hidden)"""
    head: Tensor
    """(added, hidden)"""


class AddedTokens:
    """The tokens past the base's `vocabulary`, by slot."""

    def __init__(self, vocabulary: int, routing: Routing, *, tied: bool) -> None:
        self._vocabulary, self._routing, self._tied = vocabulary, routing, tied
        self._tables: dict[int, _Tables] = {}

    def count(self, changes: Mapping[str, TensorDelta]) -> int:
        """How many tokens a delta adds.

        Raises:
            InvalidArtifact: not as many to the embedding as to the head, or rows to what has none
                for a token.
        """
        counts = {
            name: len(change.added)
            for name, change in changes.items()
            if isinstance(change, NewRows)
        }
        if others := counts.keys() - {EMBEDDING, LM_HEAD}:
            raise InvalidArtifact(
                f"The delta adds rows to {min(others)!r}, which has not one for each token."
            )
        if not self._tied:
            counts = {name: counts.get(name, 0) for name in (EMBEDDING, LM_HEAD)}
        if len(set(counts.values())) > 1:
            raise InvalidArtifact(
                f"The delta adds {counts[EMBEDDING]} tokens to the embedding, but "
                f"{counts[LM_HEAD]} to the head. Call resize_token_embeddings on the fine-tune, "
                "save it and compress it again."
            )
        return max(counts.values(), default=0)

    def install(self, slot: int, changes: Mapping[str, TensorDelta]) -> None:
        """Let the rows of `slot` use the tokens that its prepared changes add, if any."""
        found = [changes.get(name) for name in (EMBEDDING, LM_HEAD)]
        added = [change.added for change in found if isinstance(change, NewRows)]
        if added and len(added[0]):
            self._tables[slot] = _Tables(added[0], added[-1])

    def remove(self, slot: int) -> None:
        """Forget the tokens of `slot`, if there are any."""
        self._tables.pop(slot, None)

    def vocabulary(self, slot: int) -> int:
        """Tokens that the rows of `slot` know."""
        tables = self._tables.get(slot)
        return self._vocabulary + (0 if tables is None else len(tables.embedding))

    def embed(self, tokens: Tensor, embedding: Callable[[Tensor], Tensor]) -> Tensor:
        """(1, rows, hidden) of `tokens` (rows,), by an embedding that knows the base's alone."""
        if not self._tables:
            return embedding(tokens[None])
        embedded = embedding(tokens.clamp(max=self._vocabulary - 1)[None])
        for _, rows, tables in self._present():
            own = tokens[rows, None] - self._vocabulary
            found = F.embedding(own[:, 0].clamp(min=0), tables.embedding)
            embedded[0, rows] = torch.where(own < 0, embedded[0, rows], found)
        return embedded

    def logits(self, known: Tensor, hidden: Tensor, slots: Sequence[int]) -> Logits:
        """Add what the rows' own tokens get.

        Args:
            known: (rows, vocabulary) float32, on the base's tokens.
            hidden: (rows, hidden).
            slots: each row's.
        """
        longer = []
        for slot, rows, tables in self._present():
            added = F.linear(hidden[rows], tables.head).float()
            numbers = [row for row, own in enumerate(slots) if own == slot]
            longer.append((numbers, torch.cat([known[rows], added], dim=-1)))
        return Logits(known, longer)

    def _present(self) -> list[tuple[int, slice | Tensor, _Tables]]:
        """Of the pass at hand: slots that add tokens, their rows, their tables."""
        return [
            (slot, rows, self._tables[slot])
            for slot, rows in self._routing.chunks.by_slot.items()
            if slot in self._tables
        ]
