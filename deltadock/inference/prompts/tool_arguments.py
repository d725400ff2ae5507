"""The arguments of a tool call that come in pieces, as JSON: where they end, and what they are.

Families write them as JSON, as Python's keyword arguments (OLMo) or in a notation of their own
(FunctionGemma).
"""

import json
import re
from abc import ABC, abstractmethod
from typing import ClassVar, Final

TOKENS: Final = re.compile(r'[^"{}\[\]<]+|["{}\[\]<]')
"""JSON outside strings."""
STRING: Final = re.compile(r'(?:[^"\\]++|\\.)++', re.DOTALL)
"""Characters of a JSON string."""
NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
BRACKETS: Final = {"{": 1, "[": 1, "}": -1, "]": -1}


class Arguments(ABC):
    """Takes the text from a call's first bracket on."""

    @abstractmethod
    def push(self, text: str) -> tuple[str, str | None]:
        """The JSON that the next text adds, and, once they have ended, the text after them."""


class JsonArguments(Arguments):
    """Arguments in JSON: what the model wrote, be it valid or not.

    They end with their last bracket or, if some are missing, at markup outside strings.
    """

    def __init__(self, depth: int = 0) -> None:
        """Begin inside `depth` brackets."""
        self._depth = depth
        self._in_string = self._escaped = False

    def push(self, text: str) -> tuple[str, str | None]:
        """As `Arguments.push`."""
        place = 0
        while place < len(text):
            if self._in_string:
                place = self._skip_string(text, place)
                continue
            token = TOKENS.match(text, place)
            assert token is not None
            if token[0] == "<":
                return text[:place], text[place:]
            place = token.end()
            self._in_string = token[0] == '"'
            self._depth += BRACKETS.get(token[0], 0)
            if self._depth <= 0:
                return text[:place], text[place:]
        return text, None

    def _skip_string(self, text: str, place: int) -> int:
        """Where the next token begins: the string's other characters, an escape or its end."""
        if not self._escaped:
            if (found := STRING.match(text, place)) is not None:
                return found.end()
            self._escaped = text[place] == "\\"
            self._in_string = self._escaped
        else:
            self._escaped = False
        return place + 1


class TranslatedArguments(Arguments):
    """Arguments whose brackets, commas, keys and strings are not JSON's."""

    brackets: ClassVar[dict[str, str]]
    """JSON's bracket for each."""
    quotes: ClassVar[tuple[str, ...]]
    """Begin and end strings."""
    key_end: ClassVar[str]
    """Stands between a key without quotes and its value."""
    word: ClassVar[re.Pattern[str]]
    """A key without quotes, or a value that is no string."""

    def __init__(self) -> None:
        self._text = ""
        """What is not translated yet."""
        self._depth = 0
        self._quote: str | None = None
        """Ends the string that has begun."""

    def push(self, text: str) -> tuple[str, str | None]:
        """As `Arguments.push`."""
        self._text += text
        pieces = []
        while self._text:
            piece = self._outside() if self._quote is None else self._inside(self._quote)
            if piece is None:
                break
            pieces.append(piece)
            if not self._depth:
                return "".join(pieces), self._text
        return "".join(pieces), None

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _outside(self) -> str | None:
        """The JSON of the next token outside strings; None: it may not be whole."""
        text = self._text
        if text[0].isspace():
            self._text = text.lstrip()
            return ""
        if text[0] in self.brackets:
            opens = text[0] in "([{"
            self._depth += 1 if opens else -1
            bracket = self.brackets[self._take(1)]
            if self._depth == opens:  # the outermost ones, which are an object's
                return "{" if opens else "}"
            return bracket
        if text[0] in ",:":
            return self._take(1) + " "
        for quote in self.quotes:
            if text.startswith(quote):
                self._quote = self._take(len(quote))
                return '"'
            if quote.startswith(text):
                return None
        found = self.word.match(text)
        if found is None:
            return json.dumps(self._take(1))
        if found.end() == len(text):
            return None
        self._text = text[found.end() :]
        word = found[0].strip()
        if (rest := self._text.lstrip()).startswith(self.key_end):
            self._text = rest[1:]
            return json.dumps(word, ensure_ascii=False) + ": "
        if not rest:
            self._text = text  # whether it is a key is not known
            return None
        return self._value(word)

    def _value(self, word: str) -> str:
        if word in {"true", "false", "null"} or NUMBER.fullmatch(word):
            return word
        return json.dumps(word, ensure_ascii=False)

    def _inside(self, quote: str) -> str | None:
        """The JSON of the next part of a string; None: it may not be whole."""
        if self._text.startswith(quote):
            self._take(len(quote))
            self._quote = None
            return '"'
        end = self._text.find(quote[0], 1)
        if quote.startswith(self._text):
            return None
        return _escaped(self._take(len(self._text) if end < 0 else end))


def _escaped(text: str) -> str:
    """Text as it stands in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class GemmaArguments(TranslatedArguments):
    """FunctionGemma's: `{city:<escape>Paris<escape>,days:2}`."""

    brackets: ClassVar = {"{": "{", "}": "}", "[": "[", "]": "]"}
    quotes = ("<escape>",)
    key_end = ":"
    word = re.compile(r"[^\[\]{},:<]+")


class PythonArguments(TranslatedArguments):
    """Keyword arguments of Python, whose values may be JSON: `(city="Paris", days=2)`."""

    brackets: ClassVar = {"(": "[", ")": "]", "{": "{", "}": "}", "[": "[", "]": "]"}
    quotes = ('"', "'")
    key_end = "="
    word = re.compile(r"[^\s()\[\]{},:=\"']+")
    constants: Final = {"True": "true", "False": "false", "None": "null"}

    def _value(self, word: str) -> str:
        return self.constants.get(word) or super()._value(word)

    def _inside(self, quote: str) -> str | None:
        text = self._text
        if text[0] != "\\":
            end = min((i for c in (quote, "\\") if (i := text.find(c)) > 0), default=len(text))
            return super()._inside(quote) if text[0] == quote else _escaped(self._take(end))
        if len(text) < 2 or (text[1] == "x" and len(text) < 4):
            return None
        escaped = self._take(2)
        if escaped == "\\x":
            return "\\u00" + self._take(2)
        if escaped == "\\'":
            return "'"
        return escaped if escaped[1] in '"\\/bfnrtu' else _escaped(escaped)
