"""Read files of calibration text, render them through the chat template, and tokenize them."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deltadock.artifacts.checkpoint import CONFIG, TOKENIZER_FILES, VOCABULARY_FILES
from deltadock.artifacts.tokenizers import open_tokenizer
from deltadock.compression.options import CALIBRATION_SUFFIXES, check_text_tokens
from deltadock.errors import InvalidCalibration, InvalidCheckpoint

MAX_CHARACTERS: Final = 4_000_000
"""Tokenizing takes hundreds of bytes per character; longer texts are subsampled."""
PIECE_CHARACTERS: Final = 40_000

RECORD_FIELDS: Final = "`text`, `messages`, `prompt` and `completion`, or `prompt`"
TWO_HELD_OUT: Final = "one to calibrate, one to choose between outcomes, one to report"

Turns = str | list[dict[str, Any]]
"""Plain text, or messages with `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Text:
    """Running text: one stream of tokens (n,) int64, of which windows are held out."""

    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Conversations:
    """Separate documents, each a stream of tokens (n,) int64; whole documents are held out."""

    documents: list[Tensor]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts (n,) int64 for the fine-tuned model to continue."""

    prompts: list[Tensor]


Material = Text | Conversations | Prompts


def load_tokenizer(checkpoint: Path, base: Path | None = None) -> Any:
    """Load the checkpoint's tokenizer.

    Args:
        checkpoint: its folder.
        base: the folder whose tokenizer it inherits; None: it has its own.

    Raises:
        InvalidCheckpoint: there is none, or it cannot be loaded.
    """
    if base is not None:
        with tempfile.TemporaryDirectory(prefix="deltadock-tokenizer-") as name:
            for folder in (base, checkpoint):
                for file in TOKENIZER_FILES | {CONFIG}:
                    if (folder / file).is_file():
                        shutil.copyfile(folder / file, Path(name, file))
            return load_tokenizer(Path(name))
    if not any((checkpoint / name).is_file() for name in VOCABULARY_FILES):
        # transformers would create an empty one.
        raise InvalidCheckpoint(
            "The fine-tune has no tokenizer; put its tokenizer.json and tokenizer_config.json "
            "beside the weights."
        )
    try:
        tokenizer = open_tokenizer(checkpoint)
    except Exception as error:  # the library raises nothing more specific
        raise InvalidCheckpoint(f"The fine-tune's tokenizer cannot be loaded: {error}") from error
    # A corpus is longer than a model's context: no truncation, no warning.
    tokenizer.model_max_length = 1 << 60
    return tokenizer


def encode(tokenizer: Any, text: str) -> Tensor:
    """Tokenize `text`, (n,) int64; special tokens only where the text contains them."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def read_source(path: Path, tokenizer: Any, seed: int) -> Material:
    """Read and tokenize a file; longer files than calibration can use are subsampled by `seed`.

    Raises:
        InvalidCalibration: named otherwise, empty, too short, not UTF-8, or with an invalid line
            (named by number).
    """
    if path.suffix not in CALIBRATION_SUFFIXES:
        raise InvalidCalibration(
            f"A calibration text is a .txt or .jsonl file, and {path.name!r} is neither: "
            "rename it. The first is plain text, the second has a JSON object per line."
        )
    content = _read(path)
    if path.suffix == ".txt":
        return Text(_enough(encode(tokenizer, excerpt(content, seed))))
    records = [_Record.of(number, record) for number, record in _lines(content)]
    if not records:
        raise InvalidCalibration("The calibration file has no lines.")
    kind = records[0].kind
    for record in records:
        if record.kind != kind:
            raise InvalidCalibration(
                f"Line {record.number} of the calibration file has {record.kind}, but the lines "
                f"before it {kind}. Give each kind a file of its own."
            )
    if kind == "text":
        text = "\n".join(dict.fromkeys(str(record.prompt) for record in records))
        return Text(_enough(encode(tokenizer, excerpt(text, seed))))
    chosen = _some(records, lambda record: record.characters, seed)
    documents = [encode(tokenizer, record.render(tokenizer)) for record in chosen]
    # One that is in the file twice would be held out and trained on.
    distinct = {document.numpy().tobytes(): document for document in documents if document.numel()}
    documents = list(distinct.values())
    if kind == "prompt":
        if len(documents) < 3:
            raise InvalidCalibration(
                f"At least three different prompts are needed: {TWO_HELD_OUT}."
            )
        return Prompts(documents)
    if len(documents) < 3:
        raise InvalidCalibration(
            f"At least three different conversations are needed: {TWO_HELD_OUT}."
        )
    _enough(torch.cat(documents))
    return Conversations(documents)


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def excerpt(text: str, seed: int) -> str:
    """`text`, or random pieces of it if it is longer than calibration can use."""
    if len(text) <= MAX_CHARACTERS:
        return text
    pieces = len(text) // PIECE_CHARACTERS
    order = torch.randperm(pieces, generator=torch.Generator().manual_seed(seed))
    chosen = order[: MAX_CHARACTERS // PIECE_CHARACTERS].sort().values.tolist()
    return "".join(text[k * PIECE_CHARACTERS : (k + 1) * PIECE_CHARACTERS] for k in chosen)


def _some(
    records: Sequence["_Record"], size: Callable[["_Record"], int], seed: int
) -> list["_Record"]:
    """A random subset of `records` of the size that calibration can use, in order."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = []
    total = 0
    for index in order.tolist():
        total += size(records[index])
        if chosen and total > MAX_CHARACTERS:
            break
        chosen.append(index)
    return [records[index] for index in sorted(chosen)]


def _enough(tokens: Tensor) -> Tensor:
    check_text_tokens(tokens.numel())
    return tokens


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidCalibration(
            f"The calibration file is not UTF-8 text (byte {error.start}). Convert it first."
        ) from error


def _lines(content: str) -> Iterator[tuple[int, object]]:
    """Each line's number and JSON value; lines end with newlines only."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidCalibration(
                f"Line {number} of the calibration file is not a JSON object."
            ) from error


@dataclass(frozen=True, slots=True)
class _Record:
    """One line: the prompt, and the model's completion."""

    number: int
    kind: str
    prompt: Turns
    completion: Turns = ""
    tools: list[dict[str, Any]] | None = None
    """The functions that may be called in the conversation."""

    @classmethod
    def of(cls, number: int, record: object) -> "_Record":
        """Parse a line.

        Raises:
            InvalidCalibration: it has none of the fields of `RECORD_FIELDS`, or of other types.
        """
        if isinstance(record, dict):
            tools = record.get("tools") or None
            if not (tools is None or _are_objects(tools)):
                raise InvalidCalibration(
                    f"`tools` in line {number} of the calibration file is not a list of objects."
                )
            match record:
                case {"text": str(text)}:
                    return cls(number, "text", _utf8(text, number))
                case {"messages": messages} if _is_turns(messages):
                    return cls(number, "conversations", _plain(messages, number), tools=tools)
                case {"prompt": str(prompt), "completion": str(completion)}:
                    return cls(number, "conversations", prompt, completion)
                case {"prompt": prompt, "completion": completion} if _is_turns(
                    prompt
                ) and _is_turns(completion):
                    turns = _plain([*prompt, *completion], number)
                    return cls(number, "conversations", turns, tools=tools)
                case {"prompt": str(prompt)} if "completion" not in record:
                    return cls(number, "prompt", prompt)
                case {"prompt": prompt} if "completion" not in record and _is_turns(prompt):
                    return cls(number, "prompt", _plain(prompt, number), tools=tools)
        raise InvalidCalibration(
            f"Line {number} of the calibration file is not an object with {RECORD_FIELDS}."
        )

    @property
    def characters(self) -> int:
        """Approximate length of the rendered line."""
        return sum(
            len(part) if isinstance(part, str) else sum(len(str(turn)) for turn in part)
            for part in (self.prompt, self.completion, self.tools or ())
        )

    def render(self, tokenizer: Any) -> str:
        """Render the line as text, messages through the chat template.

        Raises:
            InvalidCalibration: there is no template, or it refuses the messages.
        """
        if isinstance(self.prompt, str):
            end = "" if self.kind == "prompt" else tokenizer.eos_token or ""
            return _utf8(f"{self.prompt}{self.completion}{end}", self.number)
        if not tokenizer.chat_template:
            raise InvalidCalibration(
                f"Line {self.number} of the calibration file holds messages, but the fine-tune's "
                "tokenizer has no chat template. Write them out as `prompt` and `completion`."
            )
        turns = self.prompt
        try:
            if "developer" not in tokenizer.get_chat_template(tools=self.tools):
                # OpenAI's newer name for the system role, as on nodes.
                turns = [
                    turn | {"role": turn["role"].replace("developer", "system")} for turn in turns
                ]
            text = tokenizer.apply_chat_template(
                turns,
                tools=self.tools,
                tokenize=False,
                add_generation_prompt=self.kind == "prompt",
            )
        except Exception as error:
            # A template is code of the fine-tune, run in transformers' sandbox.
            raise InvalidCalibration(
                f"The fine-tune's chat template refuses line {self.number} of the calibration "
                f"file: {error}"
            ) from error
        return _utf8(str(text), self.number)


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_turns(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value)
    )


def _plain(turns: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Messages as nodes give them to chat templates (`openai.chat.Message.plain`).

    Other roles and fields than a node's are left as they are: the template may know them.

    Raises:
        InvalidCalibration: a content is no text, or missing in a turn that is not the model's.
    """
    plain = []
    for turn in turns:
        fields = {name: value for name, value in turn.items() if value is not None}
        content = fields.get("content", "" if turn["role"] == "assistant" else None)
        if isinstance(content, list) and all(map(_is_text_part, content)):
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise InvalidCalibration(
                f"Line {number} of the calibration file has a message of the role {turn['role']!r} "
                "whose `content` is neither a string nor a list of parts of type text."
            )
        calls = fields.pop("tool_calls", [])
        if not _are_objects(calls):
            raise InvalidCalibration(
                f"Line {number} of the calibration file has `tool_calls` that are not a list of "
                "objects."
            )
        more = {"tool_calls": [_plain_call(call) for call in calls]} if calls else {}
        plain.append({**fields, "content": content, **more})
    return plain


def _is_text_part(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """A call with parsed arguments, which OpenAI writes as a string of JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments: Any = function["arguments"]
    with suppress(ValueError):  # a template gets what the file has
        arguments = json.loads(arguments or "{}")
    return call | {"function": function | {"arguments": arguments}}


def _utf8(text: str, number: int) -> str:
    """Return `text` if it is valid UTF-8: JSON may contain half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidCalibration(
            f"Line {number} of the calibration file holds half a surrogate pair, which is no text."
        ) from error
    return text
