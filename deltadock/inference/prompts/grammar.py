"""Structured output: only tokens that continue a JSON document, regex or grammar can be sampled."""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltadock.errors import InvalidInput
from deltadock.inference.prompts.json_schema import not_enforced, without_formats

CACHE_BYTES: Final = 64 * 2**20
"""Compiled grammars kept per tokenizer."""
MAX_WHITESPACE: Final = 8
"""Characters of whitespace between two tokens of JSON: a model could fill its answer with it."""

GrammarKind = Literal["json_object", "json_schema", "compact_json_schema", "regex", "ebnf"]


class GrammarSpec(NamedTuple):
    """A grammar as a request gives it; `json_object` is any JSON object, and has no text."""

    kind: GrammarKind
    text: str
    param: str
    """The request's field, for errors."""


class TokenMatcher:
    """Follows one answer through a grammar."""

    def __init__(self, compiled: Any, *, ends_itself: bool) -> None:
        """Begin an answer; it `ends_itself` as soon as it can, where no token may end it."""
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=ends_itself)
        self._mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self._words: NDArray[np.int32] = self._mask[0].numpy()

    def fill(self, words: NDArray[np.int32]) -> None:
        """Write the tokens that can follow to words of zeros: a bit per token, lowest first."""
        self._matcher.fill_next_token_bitmask(self._mask)
        count = min(len(words), len(self._words))
        words[:count] = self._words[:count]

    def accept(self, token: int) -> bool:
        """Follow a sampled token; whether the answer is complete."""
        self._matcher.accept_token(token)
        return bool(self._matcher.is_terminated())


class TokenGrammar:
    """A grammar compiled for one tokenizer."""

    def __init__(self, compiled: Any, *, ends_itself: bool) -> None:
        self._compiled, self._ends_itself = compiled, ends_itself

    def matcher(self) -> TokenMatcher:
        """A matcher for one answer."""
        return TokenMatcher(self._compiled, ends_itself=self._ends_itself)


def _enforceable(text: str) -> str:
    """A JSON schema that a grammar enforces as a whole.

    Raises:
        ValueError: it is no JSON, or has a keyword that no grammar enforces.
    """
    try:
        schema = json.loads(text)
        if found := not_enforced(schema):
            raise ValueError(f"JSON schema: {found} cannot be enforced; leave it out.")
        return json.dumps(without_formats(schema))
    except RecursionError as error:
        raise ValueError("JSON schema: it is nested too deeply.") from error


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Any thread may use it."""

    def __init__(
        self, pieces: Sequence[str], vocabulary: Literal["byte_level", "byte_fallback", "raw"]
    ) -> None:
        """Take the tokens' spellings, by id; empty for special tokens, which match nothing."""
        self._pieces, self._vocabulary = pieces, vocabulary
        self._compilers: dict[frozenset[int], Any] = {}
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec, end_ids: frozenset[int]) -> TokenGrammar:
        """Compile a grammar whose answers end with one of `end_ids`. Blocks.

        Raises:
            InvalidInput: it is invalid, or uses what is not supported.
        """
        end_ids = frozenset(token for token in end_ids if token < len(self._pieces))
        compiler = self._compiler(end_ids)
        compile_with: Mapping[GrammarKind, Any] = {
            "json_object": lambda _: compiler.compile_json_schema(
                '{"type": "object"}', strict_mode=False, max_whitespace_cnt=MAX_WHITESPACE
            ),
            "json_schema": lambda text: compiler.compile_json_schema(
                _enforceable(text), max_whitespace_cnt=MAX_WHITESPACE
            ),
            "compact_json_schema": lambda text: compiler.compile_json_schema(
                _enforceable(text), any_whitespace=False
            ),
            "regex": compiler.compile_regex,
            "ebnf": compiler.compile_grammar,
        }
        try:
            compiled = compile_with[spec.kind](spec.text)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].partition(": ")[2] or str(error)
            raise InvalidInput(
                f"`{spec.param}` cannot be used: {reason.strip()}", param=spec.param
            ) from error
        return TokenGrammar(compiled, ends_itself=not end_ids)

    def _compiler(self, end_ids: frozenset[int]) -> Any:
        import xgrammar

        with self._lock:
            if end_ids not in self._compilers:
                kinds = {
                    "byte_level": xgrammar.VocabType.BYTE_LEVEL,
                    "byte_fallback": xgrammar.VocabType.BYTE_FALLBACK,
                    "raw": xgrammar.VocabType.RAW,
                }
                tokenizer = xgrammar.TokenizerInfo(
                    list(self._pieces),
                    vocab_type=kinds[self._vocabulary],
                    stop_token_ids=sorted(end_ids) or None,
                )
                self._compilers.clear()  # a tokenizer's end tokens seldom change
                self._compilers[end_ids] = xgrammar.GrammarCompiler(
                    tokenizer, max_threads=1, cache_limit_bytes=CACHE_BYTES
                )
            return self._compilers[end_ids]
