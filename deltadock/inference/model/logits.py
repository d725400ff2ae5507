"""What a pass says of each row's next token."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Logits(NamedTuple):
    """Logits of a pass's rows, float32; rows of a delta that adds tokens are longer than others.

    The other rows have no place for those tokens, so that nothing can draw one.
    """

    known: Tensor
    """(rows, vocabulary), every row's on the base's tokens."""
    longer: Sequence[tuple[Sequence[int], Tensor]] = ()
    """Of each delta that adds tokens: its n rows, and (n, its own vocabulary)."""

    def rows(self) -> list[Tensor]:
        """Each row's (vocabulary,)."""
        found = list(self.known)
        for numbers, whole in self.longer:
            for number, row in zip(numbers, whole, strict=True):
                found[number] = row
        return found
