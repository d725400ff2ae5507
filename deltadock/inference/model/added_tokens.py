"""Tokens that a delta adds to the base's vocabulary, and logits of different lengths.

The added rows of embedding and head are stored per slot, beside the base's, and are read for rows
of that slot only. Both lookups run outside of CUDA graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadock.errors import InvalidArtifact
from deltadock.inference.model.routing import Routing
from deltadock.inference.model.weight_deltas import NewRows, TensorDelta

EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"
PADDING: Final = torch.finfo(torch.float32).min
"""Logit of a token that a row's vocabulary does not have: less than any that it has, and finite."""


class Logits(NamedTuple):
    """Float32 logits of a pass's rows; those of a delta that adds tokens are longer than others."""

    values: Tensor
    """(rows, longest vocabulary); beyond a row's own vocabulary is `PADDING`."""
    lengths: Sequence[int]
    """Each row's vocabulary."""

    def row(self, number: int) -> "Logits":
        """One row alone."""
        return Logits(self.values[number : number + 1], self.lengths[number : number + 1])

    def rows(self) -> list[Tensor]:
        """Each row's logits, (vocabulary,)."""
        return [row[:length] for row, length in zip(self.values, self.lengths, strict=True)]


class _AddedRows(NamedTuple):
    """One delta's added rows, in token order; the same tensor twice if they are tied."""

    embedding: Tensor
    """(added, hidden)"""
    head: Tensor
    """(added, hidden)"""


class AddedTokens:
    """The tokens beyond the base's `vocabulary`, by slot."""

    def __init__(self, vocabulary: int, routing: Routing, *, tied: bool) -> None:
        self._vocabulary, self._routing, self._tied = vocabulary, routing, tied
        self._added: dict[int, _AddedRows] = {}

    def count(self, deltas: Mapping[str, TensorDelta]) -> int:
        """How many tokens a delta adds.

        Raises:
            InvalidArtifact: embedding and head gain different numbers of rows, or a tensor gains
                rows that has no row per token.
        """
        counts = {
            name: len(delta.added) for name, delta in deltas.items() if isinstance(delta, NewRows)
        }
        if others := counts.keys() - {EMBEDDING, LM_HEAD}:
            raise InvalidArtifact(
                f"The delta adds rows to {min(others)!r}, which does not have one row per token."
            )
        if not self._tied or LM_HEAD in deltas:
            counts = {name: counts.get(name, 0) for name in (EMBEDDING, LM_HEAD)}
        if len(set(counts.values())) > 1:
            raise InvalidArtifact(
                f"The delta adds {counts[EMBEDDING]} tokens to the embedding, but "
                f"{counts[LM_HEAD]} to the head. Call resize_token_embeddings on the fine-tune, "
                "save it and compress it again."
            )
        return max(counts.values(), default=0)

    def install(self, slot: int, deltas: Mapping[str, TensorDelta]) -> None:
        """Enable the tokens that the prepared deltas of `slot` add, if any."""
        tables = [deltas.get(name) for name in (EMBEDDING, LM_HEAD)]
        added = [delta.added for delta in tables if isinstance(delta, NewRows)]
        if added and len(added[0]):
            self._added[slot] = _AddedRows(added[0], added[-1])

    def remove(self, slot: int) -> None:
        """Remove the tokens of `slot`, if it has any."""
        self._added.pop(slot, None)

    def vocabulary(self, slot: int) -> int:
        """Vocabulary size of the rows of `slot`."""
        added = self._added.get(slot)
        return self._vocabulary + (0 if added is None else len(added.embedding))

    def embed(self, tokens: Tensor, embedding: Callable[[Tensor], Tensor]) -> Tensor:
        """(1, rows, hidden) of `tokens` (rows,); `embedding` knows the base's tokens only."""
        if not self._added:
            return embedding(tokens[None])
        embedded = embedding(tokens.clamp(max=self._vocabulary - 1)[None])
        for _, rows, added in self._present():
            index = tokens[rows, None] - self._vocabulary
            new = F.embedding(index[:, 0].clamp(min=0), added.embedding)
            embedded[0, rows] = torch.where(index < 0, embedded[0, rows], new)
        return embedded

    def logits(
        self,
        base: Tensor,
        hidden: Tensor,
        slots: Sequence[int],
        finish: Callable[[Tensor], Tensor],
    ) -> Logits:
        """Extend the head's products by those of the rows' added tokens.

        Args:
            base: (rows, vocabulary) float32, over the base's tokens.
            hidden: (rows, hidden).
            slots: each row's slot.
            finish: what makes logits of products, which it may overwrite.
        """
        base = finish(base)
        lengths = [self.vocabulary(slot) for slot in slots]
        present = self._present()
        if present:
            base = F.pad(base, (0, max(lengths) - self._vocabulary), value=PADDING)
        for slot, rows, added in present:
            new = F.linear(hidden[rows], added.head).float()
            base[rows, self._vocabulary : self.vocabulary(slot)] = finish(new)
        return Logits(base, lengths)

    def _present(self) -> list[tuple[int, slice | Tensor, _AddedRows]]:
        """The current pass's slots that add tokens, with their rows and tables."""
        return [
            (slot, rows, self._added[slot])
            for slot, rows in self._routing.chunks.by_slot.items()
            if slot in self._added
        ]
