"""A model's tokenizer, chat format and generation config; incremental decoding of its output."""

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from deltadock.errors import InvalidArtifact, InvalidInput, UnsupportedModel
from deltadock.inference.prompts.chat import chat_format
from deltadock.inference.prompts.grammar import TokenSpellings

GENERATION_CONFIG: Final = "generation_config.json"
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    GENERATION_CONFIG, "config.json",
)  # fmt: skip
"""The text files of a checkpoint that the node reads. A tokenizer.json is data, never code."""

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
MAX_CHARACTER_TOKENS: Final = 4
"""A character's UTF-8 bytes are spread over at most this many tokens."""
MAX_PENDING_TOKENS: Final = 32
"""So many tokens that complete no character are no text: they are decoded as they are."""
CONTEXT_TOKENS: Final = 16
"""Tokens of the prompt in whose context the output is decoded."""

MARKUP: Final = frozenset(
    {
        "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "[TOOL_CALLS]",
        "[CALL_ID]", "[ARGS]", "<|python_tag|>", "<|tool_call|>", "<|/tool_call|>",
        "<function_calls>", "</function_calls>", "<start_function_call>", "<end_function_call>",
        "<escape>", "<think>", "</think>", "[THINK]", "[/THINK]",
    }
)  # fmt: skip
"""Special tokens of some tokenizers that are part of the answer: clients parse them."""

BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How byte-fallback tokenizers spell a byte."""


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as in GPT-2's tokenizer:
    printable Latin-1 characters are themselves, the other bytes are shifted beyond U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + number): byte for number, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


BYTE_CHARACTERS: Final = _byte_characters()


def read_tokenizer_files(folder: Path) -> dict[str, str]:
    """Read those of TOKENIZER_FILES that a checkpoint folder has."""
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: path.read_text("utf-8") for path in paths if path.is_file()}


class Tokenizer:
    """One model's tokenizer, chat format and generation config, from its files' text."""

    def __init__(self, files: Mapping[str, str]) -> None:
        """`files` maps names of TOKENIZER_FILES to their text; others are ignored.

        Raises:
            UnsupportedModel: there is no tokenizer.json.
            InvalidArtifact: a file cannot be parsed.
        """
        if "tokenizer.json" not in files:
            raise UnsupportedModel(
                "The checkpoint has no tokenizer.json. Save its tokenizer again with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        try:
            self._tokenizer: Any = FastTokenizer.from_str(files["tokenizer.json"])
            self._special = {
                number: token.content
                for number, token in self._tokenizer.get_added_tokens_decoder().items()
                if token.special
            }
            decoder = json.dumps(json.loads(files["tokenizer.json"]).get("decoder"))
            self._byte_level = '"ByteLevel"' in decoder
            self._byte_fallback = '"ByteFallback"' in decoder
            self.chat = chat_format(files)
            self.eos_ids = _eos_ids(files) | self._own_eos_id()
            self.defaults = _sampling_defaults(files)
        except Exception as error:  # the library raises nothing more specific
            raise InvalidArtifact(f"The tokenizer files cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; `special_tokens` adds the model's own, such as BOS.

        Raises:
            InvalidInput: the text contains a lone surrogate, as JSON allows.
        """
        try:
            # Only batches are encoded without the interpreter's lock: a long text takes seconds.
            [encoding] = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=special_tokens
            )
        except TypeError as error:
            raise InvalidInput(
                "A text contains half a surrogate pair, which is not a character; leave it out."
            ) from error
        ids: list[int] = encoding.ids
        return ids

    def offsets(self, text: str) -> list[int]:
        """Where each token of `encode(text)` begins in the text, in characters."""
        [encoding] = self._tokenizer.encode_batch([text])
        return [begin for begin, _ in encoding.offsets]

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, of which a text has at most so many per token.

        Unless the tokenizer drops characters or takes a run of unknown ones for one token.
        """
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text without special tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _own_eos_id(self) -> frozenset[int]:
        """The tokenizer's end-of-sequence token, which ends the turns of many chat models whose
        generation config names the base's."""
        token = self.chat.special_tokens.get("eos_token")
        number = None if token is None else self._tokenizer.token_to_id(token)
        return frozenset() if number is None else frozenset({number})

    @cached_property
    def spellings(self) -> TokenSpellings:
        """The tokens as grammars of structured output match them; made on first use."""
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        pieces = [self._tokenizer.id_to_token(n) or "" for n in range(max(numbers, default=-1) + 1)]
        for number in self._special.keys() & range(len(pieces)):
            pieces[number] = ""
        if self._byte_level:
            return TokenSpellings(pieces, "BYTE_LEVEL")
        return TokenSpellings(pieces, "BYTE_FALLBACK" if self._byte_fallback else "RAW")

    def special_text(self, token: int) -> str | None:
        """The text of a special token, None for others."""
        return self._special.get(token)

    def is_hidden(self, token: int) -> bool:
        """Whether a token is no part of the answer, unless special tokens are asked for."""
        special = self._special.get(token)
        return special is not None and special not in MARKUP

    def decode_step(self, stream: DecodeStream, token: int) -> str | None:
        """The text that `token` completes, None if it completes no character.

        Raises:
            Exception: the text before this token has changed, since its bytes are not UTF-8.
        """
        text: str | None = stream.step(self._tokenizer, token)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, special tokens included; UTF-8 or a part of it."""
        special = self._special.get(token)
        if special is not None:
            return special.encode()
        piece: str = self._tokenizer.id_to_token(token) or ""
        if self._byte_level and all(character in BYTE_CHARACTERS for character in piece):
            return bytes(BYTE_CHARACTERS[character] for character in piece)
        if found := BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(found[1])
        # Twice, since many tokenizers drop the space before a text's first token.
        once, twice = (
            self._tokenizer.decode(tokens, skip_special_tokens=False)
            for tokens in ([token], [token, token])
        )
        return bytes(twice[len(once) :].encode())

    def continues_character(self, token: int) -> bool:
        """Whether a token begins inside a character of UTF-8."""
        return 0x80 <= self.token_bytes(token)[:1].ljust(1)[0] < 0xC0

    def token_text(self, token: int) -> str:
        """A token as text; OpenAI's notation `bytes:\\xe2\\x82` for parts of a character."""
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextStream:
    """Decodes one sequence's tokens incrementally.

    A character whose bytes are spread over several tokens is held back until it is complete, and
    text that may begin a stop string until it is known not to. Stop strings may contain special
    tokens, which are no part of the answer unless they are `MARKUP`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        """Decode what follows `prompt`; `skip_special_tokens` hides special tokens."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._pending: list[int] = []
        """Tokens that have not completed a character."""
        self._context: list[int] = []
        """Tokens before them, which are complete."""
        self._stops = [_StopFinder(text) for text in stop]
        self._held_back: deque[tuple[str, bool]] = deque()
        """Pieces of text, and whether each is part of the answer."""
        self._held = 0
        """Characters held back."""
        self.stopped = False
        """Whether a stop string has been generated; the text ends before it."""
        begin = max(len(prompt) - CONTEXT_TOKENS, 0)
        while 0 < begin < len(prompt) and tokenizer.continues_character(prompt[begin]):
            begin += 1
        self._start(list(prompt[begin:]))

    def _start(self, prompt: list[int]) -> None:
        """Decode in the context of the prompt: spaces depend on the tokens before them.

        DecodeStream needs a context of complete characters. A prompt's last tokens may be an
        incomplete one, which the output completes: they are pending. `_prompt_tail` is their text
        so far; if it remains invalid, it belongs to the prompt and is not output.
        """
        self._prompt_tail = ""
        for length in range(len(prompt), max(len(prompt) - MAX_CHARACTER_TOKENS, -1), -1):
            text = self._tokenizer.decode(prompt[:length])
            if not text.endswith(REPLACEMENT):
                self._continue(prompt[:length], prompt[length:])
                self._prompt_tail = self._tokenizer.decode(prompt[length:])
                return
        self._continue([], [])

    def _continue(self, context: list[int], pending: list[int]) -> str:
        """Go on after `context`, which is output, and `pending`; the text that these complete."""
        self._context, self._pending = context, []
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        return "".join(self._decode(token) or "" for token in pending)

    def push(self, token: int) -> str:
        """Append a token; returns the text that is final now."""
        special = self._tokenizer.special_text(token)
        if special is None:
            text = self._decode(token)
            if not text:
                return ""
            released = self._release(text.removeprefix(self._prompt_tail))
            self._prompt_tail = ""
            return released
        visible = not (self._skip_special_tokens and self._tokenizer.is_hidden(token))
        return self._release(special, visible=visible)

    def _decode(self, token: int) -> str | None:
        self._pending.append(token)
        try:
            text = self._tokenizer.decode_step(self._stream, token)
        except Exception:  # noqa: BLE001 (the library raises nothing more specific)
            # A byte-fallback decoder replaces a whole run of bytes if one of them is invalid,
            # even text that is already output: continue without that context.
            text = self._tokenizer.decode(self._pending)
            self._continue(self._pending, [])
        if text:
            self._context, self._pending = self._pending, []
        elif len(self._pending) > MAX_PENDING_TOKENS:
            return self._decode_pending()
        return text

    def _decode_pending(self) -> str:
        """The pending tokens' text, without those at the end that may begin a character.

        Each token decodes all pending ones, so that their number must have a limit.
        """
        begin = len(self._pending)
        for index in range(begin - 1, begin - MAX_CHARACTER_TOKENS, -1):
            if not self._tokenizer.continues_character(self._pending[index]):
                begin = index
                break
        text = self._tokenizer.decode(self._pending[:begin])
        return text + self._continue(self._context, self._pending[begin:])

    def _release(self, text: str, *, visible: bool = True) -> str:
        """Append a piece of text; what is final then."""
        ends = [(finder, finder.find_end(text)) for finder in self._stops]
        begins = [self._held + end - len(finder.stop) for finder, end in ends if end is not None]
        self._held_back.append((text, visible))
        self._held += len(text)
        if begins:
            self.stopped = True
            return self._take(min(begins))
        return self._take(self._held - max((finder.matched for finder in self._stops), default=0))

    def _take(self, length: int) -> str:
        """The answer's part of the first `length` characters held back, which are dropped."""
        taken = []
        self._held -= length
        while length:
            piece, visible = self._held_back.popleft()
            if visible:
                taken.append(piece[:length])
            if piece[length:]:
                self._held_back.appendleft((piece[length:], visible))
            length -= min(length, len(piece))
        return "".join(taken)

    def finish(self) -> str:
        """The text still held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._pending).removeprefix(self._prompt_tail)
        text = self._release(text)
        return text if self.stopped else text + self._take(self._held)


class _StopFinder:
    """Finds a string in a text that comes in pieces (Knuth, Morris and Pratt, 1977).

    The time per character does not depend on the string's length, which has no limit.

    Attributes:
        stop: the string.
        matched: characters of its beginning with which the text ends.
    """

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        self._borders = [0]
        """By length of a beginning, less 1, of the next shorter beginning that ends it; as far as
        the text has matched."""

    def find_end(self, text: str) -> int | None:
        """Append to the text; where in `text` the string ends, if it does."""
        for index, character in enumerate(text):
            self.matched = self._step(self.matched, character)
            if self.matched == len(self.stop):
                return index + 1
        return None

    def _step(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._border(matched)
        return matched + (self.stop[matched] == character)

    def _border(self, length: int) -> int:
        while len(self._borders) < length:
            added = self.stop[len(self._borders)]
            self._borders.append(self._step(self._borders[-1], added))
        return self._borders[length - 1]


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling settings for requests that name none; the defaults here are OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def _eos_ids(files: Mapping[str, str]) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json, else of config.json, as in transformers."""
    for name in (GENERATION_CONFIG, "config.json"):
        eos = _read_json(files, name).get("eos_token_id")
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset()


def _sampling_defaults(files: Mapping[str, str]) -> SamplingDefaults:
    """The sampling settings of generation_config.json; greedy if it has `do_sample: false`.

    Values out of range are ignored. The repetition penalty applies to greedy decoding too.
    """
    config = _read_json(files, GENERATION_CONFIG)
    repetition = _number(config, "repetition_penalty", 0.1, 10.0, 1.0)
    if config.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0, repetition_penalty=repetition)
    return SamplingDefaults(
        temperature=_number(config, "temperature", 0.0, 2.0, 1.0),
        top_p=_number(config, "top_p", 1e-6, 1.0, 1.0),
        top_k=int(_number(config, "top_k", 0, 2**31, 0)),
        min_p=_number(config, "min_p", 0.0, 1.0, 0.0),
        repetition_penalty=repetition,
    )


def _read_json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(files.get(name, "{}"))
    return parsed


def _number(config: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = config.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return default
    return value if low <= value <= high else default
