"""The distinct tokens of a sequence and their counts, which penalties depend on."""

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Follows a growing sequence: each token is read once."""

    def __init__(self, begin: int, prompt_length: int) -> None:
        """Count the tokens from position `begin` on; those of the prompt count zero times."""
        self._read, self._prompt_length = begin, prompt_length
        self._places: dict[int, int] = {}
        self._ids, self._counts = array("q"), array("q")

    def update(self, tokens: Sequence[int]) -> None:
        """Read the tokens that were appended to the sequence's `tokens` since the last call."""
        for position in range(self._read, len(tokens)):
            token = tokens[position]
            place = self._places.setdefault(token, len(self._ids))
            if place == len(self._ids):
                self._ids.append(token)
                self._counts.append(0)
            self._counts[place] += position >= self._prompt_length
        self._read = len(tokens)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The distinct tokens, in the order of their first appearance; a copy."""
        return np.array(self._ids, dtype=np.int64)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often the answer has each of `ids`; a copy."""
        return np.array(self._counts, dtype=np.int64)
