"""Grammars for a tokenizer with a token per byte, and some words."""

import asyncio
from collections.abc import Sequence
from itertools import product
from typing import Final

import numpy as np

from deltadock.inference.prompts.grammar import GrammarProcesses, GrammarSpec, TokenSpellings
from deltadock.inference.prompts.matching import TokenGrammar, TokenMatcher, await_masks
from deltadock.inference.prompts.tokenizer import BYTE_CHARACTERS

END: Final = 256
"""The token that ends an answer."""
AMBIGUOUS: Final = 'root ::= s\ns ::= "a" s | "a" s s | "a" s s s | "a"'
"""The longer a text, the more ways there are to derive it."""
SLOW: Final = "root ::= " + " ".join(['("a" | "b")*'] * 150)
"""Its masks take milliseconds each."""
LARGE: Final = "root ::= " + " ".join(['("a" | "b")*'] * 3000)
"""Takes minutes to compile, with tokens of which it matches a part."""
WORDS: Final = ["".join(word) for word in product("ab", "ab", "abcdefgh", "cdefgh")]
"""Further tokens, such as these."""


class Grammars:
    """Compiles grammars, and follows texts through them."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.processes = GrammarProcesses()
        characters = {byte: character for character, byte in BYTE_CHARACTERS.items()}
        bytes_ = [characters[byte] for byte in range(END)]
        self.spellings = TokenSpellings([*bytes_, "", *words], "BYTE_LEVEL")

    def compile(self, spec: GrammarSpec) -> TokenGrammar:
        return asyncio.run(self.processes.compile(self.spellings, spec, frozenset({END})))

    def allows(self, spec: GrammarSpec | None, text: str) -> bool:
        """Whether an answer may be this text."""
        assert spec is not None
        matcher = self.compile(spec).matcher()
        for token in (*text.encode(), END):
            if token not in allowed(matcher):
                return False
            matcher.accept(token)
        return True


def allowed(matcher: TokenMatcher) -> set[int]:
    """The tokens that can follow."""
    assert not await_masks([matcher], 60)
    words = np.zeros(-(-(END + 1) // 32), np.int32)
    matcher.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(bits[: END + 1].nonzero()[0].tolist())
