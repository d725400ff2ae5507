"""Text to tokens and back, one token at a time: incremental detokenisation and stop strings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as FastTokenizer

from deltadock.errors import InvalidArtifact, InvalidInput, UnsupportedModel
from deltadock.inference.prompts.chat import chat_format
from deltadock.inference.prompts.generation_config import eos_ids, sampling_defaults

TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json", "config.json",
)  # fmt: skip
"""What the node reads of a checkpoint's text files. A tokenizer.json is data, never code."""

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
CONTEXT: Final = 6
"""Tokens already turned into text that are decoded again with new ones: spaces depend on them."""
WINDOW: Final = 16


def read_tokenizer_files(folder: Path) -> dict[str, str]:
    """The text of each of TOKENIZER_FILES that a checkpoint folder has."""
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: path.read_text("utf-8") for path in paths if path.is_file()}


class Tokenizer:
    """One model's tokenizer, chat format and generation config, from its files' text."""

    def __init__(self, files: Mapping[str, str]) -> None:
        """`files` maps names of TOKENIZER_FILES to their text; others are ignored.

        Raises:
            UnsupportedModel: there is no tokenizer.json.
            InvalidArtifact: a file is not what its name says.
        """
        if "tokenizer.json" not in files:
            raise UnsupportedModel(
                "The checkpoint has no tokenizer.json. Save its tokenizer again with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        try:
            self._tokenizer: Any = FastTokenizer.from_str(files["tokenizer.json"])
            self.eos_ids = eos_ids(files)
            self.chat = chat_format(files)
            self.defaults = sampling_defaults(files)
        except Exception as error:  # the library raises nothing more specific
            raise InvalidArtifact(f"The tokenizer files cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; `special_tokens` adds the model's own (a BOS where it has one).

        Raises:
            InvalidInput: the text holds half a surrogate pair, as JSON allows.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        except TypeError as error:
            raise InvalidInput(
                "A text holds half a surrogate pair, which is no character; leave it out."
            ) from error
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text without special tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """One token for a person to read, special tokens included."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text


class TextStream:
    """Turns one sequence's tokens into text as they come.

    A character whose bytes are spread over tokens is held back until it is whole, and text that
    may be the beginning of a stop string until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-CONTEXT:])
        self._begin = 0
        self._known = tokenizer.decode(self._tokens)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """A stop string has come; the text ends just before it."""

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is certain now."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens[self._begin :])
        if text.endswith(REPLACEMENT) or len(text) <= len(self._known):
            return ""
        self._held += text[len(self._known) :]
        self._begin, self._known = self._advance(text)
        return self._release()

    def _advance(self, text: str) -> tuple[int, str]:
        """Forget old tokens now and then, keeping the last few as the context of the next ones."""
        if len(self._tokens) - self._begin <= WINDOW:
            return self._begin, text
        begin = len(self._tokens) - CONTEXT
        return begin, self._tokenizer.decode(self._tokens[begin:])

    def _release(self) -> str:
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """The text still held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._tokens[self._begin :])
        self._held += text[len(self._known) :]
        return self._release() + self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
