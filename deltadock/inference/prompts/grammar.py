"""Structured output: only tokens that continue a JSON document, regex or grammar can be sampled."""

import asyncio
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltadock.errors import GrammarTooComplex, InvalidInput
from deltadock.inference.prompts.json_schema import not_enforced, without_formats

PROCESS: Final = Path(__file__).with_name("grammar_process.py")
WALL_SECONDS: Final = 60.0
"""Limit of a compilation, beside its CPU time (`grammar_process.COMPILE_SECONDS`): the first one
waits for XGrammar's import."""
MAX_TOKENIZERS: Final = 4
"""Tokenizers, each with its end tokens, whose processes are kept."""
MAX_GRAMMARS: Final = 16
"""Compiled grammars whose processes are kept."""

MAX_ANSWER: Final = 16384
"""Bytes of what a process says once it has compiled."""
LIBRARIES: Final = frozenset({"LD_LIBRARY_PATH"})
"""What the processes have of the node's environment."""

Key = TypeVar("Key")
Value = TypeVar("Value")
GrammarKind = Literal["json_object", "json_schema", "compact_json_schema", "regex", "ebnf"]


class GrammarSpec(NamedTuple):
    """A grammar as a request gives it; `json_object` is any JSON object, and has no text."""

    kind: GrammarKind
    text: str
    param: str
    """The request's field, for errors."""


class TokenSpellings:
    """How a tokenizer spells its tokens.

    Attributes:
        count: number of tokens.
        digest: SHA-256 of the spellings.
        content: the spellings, as JSON.
    """

    def __init__(
        self, spellings: Sequence[str], kind: Literal["BYTE_LEVEL", "BYTE_FALLBACK", "RAW"]
    ) -> None:
        """Take the spellings by id; empty for special tokens, which match nothing."""
        self.count = len(spellings)
        self.kind = kind
        self.content = json.dumps(spellings)
        self.digest = hashlib.sha256(f"{kind}{self.content}".encode()).hexdigest()


def _forked(parent: socket.socket, request: str) -> socket.socket:
    """The socket of a process that `parent`'s forks for a request; closing it ends the process.

    Raises:
        OSError: the parent has ended, or there are no files left.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs, os.fdopen(os.memfd_create("request"), "wb") as file:
            file.write(request.encode())
            file.flush()
            socket.send_fds(parent, [b"f"], [theirs.fileno(), file.fileno()])
    except BaseException:
        ours.close()
        raise
    ours.setblocking(False)
    return ours


class TokenMatcher:
    """Follows one answer through a grammar, in a process of its own."""

    def __init__(self, grammar: "TokenGrammar") -> None:
        self._grammar = grammar
        self._connection: socket.socket | None = None
        self._message: bytes | None = None
        """The mask as it was received; empty if the process has ended."""

    def start(self) -> None:
        """Begin the answer, whose first mask is computed then; no effect if it has begun."""
        if self._connection is not None or self._message is not None:
            return
        try:
            self._connection = self._grammar.fork()
        except OSError:
            self._message = b""
        else:
            weakref.finalize(self, self._connection.close)

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token is there, or never will be."""
        if self._message is None:
            self.start()
        if self._message is None and self._connection is not None:
            with suppress(BlockingIOError):
                try:
                    self._message = self._connection.recv(self._grammar.message_bytes)
                except ConnectionError:
                    self._message = b""
        return self._message is not None

    @property
    def complete(self) -> bool:
        """Whether the answer is complete, where no token ends it."""
        return bool(self._message and self._message[0])

    def fill(self, words: NDArray[np.int32]) -> None:
        """Write the tokens that can follow to words of zeros: a bit per token, lowest first.

        The mask must be `ready`.

        Raises:
            GrammarTooComplex: its process has ended.
        """
        if not self._message:
            raise GrammarTooComplex(
                "The next token that the answer's grammar allows takes more time or memory to find "
                "than allowed. Make it less ambiguous: let each text be derived in one way only."
            )
        mask = np.frombuffer(self._message, np.int32, offset=1)
        count = min(len(words), len(mask))
        words[:count] = mask[:count]

    def accept(self, token: int) -> None:
        """Follow a sampled token; the next mask is computed meanwhile."""
        if self._connection is not None and self._message:
            self._message = None
            with suppress(OSError):  # the process has ended, as is received next
                self._connection.send(token.to_bytes(4, sys.byteorder))

    def close(self) -> None:
        """End the answer's process."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._message = None, b""

    def register(self, poll: select.poll) -> None:
        """Let `poll` return when there is something to receive."""
        if self._connection is not None:
            poll.register(self._connection, select.POLLIN)


def await_masks(matchers: Iterable[TokenMatcher], seconds: float) -> list[TokenMatcher]:
    """Wait for the masks of all of `matchers`; those whose is not there after some seconds."""
    deadline = time.monotonic() + seconds
    while late := [matcher for matcher in matchers if not matcher.ready]:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        poll = select.poll()
        for matcher in late:
            matcher.register(poll)
        poll.poll(left * 1000)
        matchers = late
    return late


class TokenGrammar:
    """A grammar compiled for one tokenizer, in a process of its own."""

    def __init__(self, connection: socket.socket, tokens: int, *, ends_itself: bool) -> None:
        """Take a compiled grammar's process, for so many tokens."""
        self._connection = connection
        self._request = json.dumps({"ends_itself": ends_itself})
        self.message_bytes = 1 + 4 * -(-tokens // 32)
        weakref.finalize(self, connection.close)

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        try:
            return bool(self._connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except ConnectionError:
            return False

    def fork(self) -> socket.socket:
        """The socket of a new answer's process. Raises as `_forked`."""
        return _forked(self._connection, self._request)

    def matcher(self) -> TokenMatcher:
        """A matcher for one answer."""
        return TokenMatcher(self)


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


def _refused(spec: GrammarSpec, error: str) -> InvalidInput:
    reason = error.strip().splitlines()[0].partition(": ")[2] or error
    return InvalidInput(f"`{spec.param}` cannot be used: {reason.strip()}", param=spec.param)


class GrammarProcesses:
    """The processes that compile grammars. Belongs to one event loop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._tokenizers: OrderedDict[tuple[str, frozenset[int]], socket.socket] = OrderedDict()
        self._grammars: OrderedDict[tuple[Any, ...], TokenGrammar] = OrderedDict()

    async def compile(
        self, spellings: TokenSpellings, spec: GrammarSpec, end_ids: frozenset[int]
    ) -> TokenGrammar:
        """Compile a grammar whose answers end with one of `end_ids`. Cancelling ends the process.

        Raises:
            InvalidInput: it is invalid, or uses what is not supported.
            GrammarTooComplex: it takes more time or memory than allowed.
        """
        end_ids = frozenset(token for token in end_ids if token < spellings.count)
        key = (spellings.digest, end_ids, spec.kind, spec.text)
        if (known := self._grammars.get(key)) is not None and known.alive:
            self._grammars.move_to_end(key)
            return known
        text = spec.text
        if spec.kind in {"json_schema", "compact_json_schema"}:
            try:
                text = await asyncio.to_thread(_enforceable, text)
            except ValueError as error:
                raise _refused(spec, str(error)) from error
        request = json.dumps({"kind": spec.kind, "text": text})
        try:
            connection = _forked(self._tokenizer(spellings, end_ids), request)
        except ConnectionError:  # that process has ended
            self._tokenizers.pop((spellings.digest, end_ids)).close()
            connection = _forked(self._tokenizer(spellings, end_ids), request)
        try:
            answer = await _received(connection)
        except BaseException:
            connection.close()
            raise
        if "error" in answer:
            connection.close()
            raise _refused(spec, answer["error"])
        grammar = TokenGrammar(connection, spellings.count, ends_itself=not end_ids)
        _keep(self._grammars, key, grammar, MAX_GRAMMARS)
        return grammar

    def _tokenizer(self, spellings: TokenSpellings, end_ids: frozenset[int]) -> socket.socket:
        """The socket of a tokenizer's process. Raises as `_forked`."""
        key = (spellings.digest, end_ids)
        if key not in self._tokenizers:
            ends = json.dumps(sorted(end_ids))
            fields = f'"kind": "{spellings.kind}", "end_ids": {ends}'
            request = f'{{{fields}, "spellings": {spellings.content}}}'
            connection = _forked(self._first(), request)
            for old in _keep(self._tokenizers, key, connection, MAX_TOKENIZERS):
                old.close()
        self._tokenizers.move_to_end(key)
        return self._tokenizers[key]

    def _first(self) -> socket.socket:
        """The socket of the process that all others are forked from."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", PROCESS, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in LIBRARIES & os.environ.keys()},
                    start_new_session=True,  # Ctrl-C must not reach it
                )
        return self._control

    def close(self) -> None:
        """End the processes; those that compute are killed."""
        for connection in self._tokenizers.values():
            connection.close()
        self._tokenizers.clear()
        self._grammars.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


async def _received(connection: socket.socket) -> dict[str, str]:
    """What a grammar's process says once it has compiled.

    Raises:
        GrammarTooComplex: it was killed.
    """
    answer = b""
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(WALL_SECONDS):
            answer = await asyncio.get_running_loop().sock_recv(connection, MAX_ANSWER)
    if not answer:
        raise GrammarTooComplex(
            "The grammar takes more time or memory to compile than allowed. Make it smaller: fewer "
            "rules, alternatives and repetitions."
        )
    parsed: dict[str, str] = json.loads(answer)
    return parsed


def _keep(kept: OrderedDict[Key, Value], key: Key, value: Value, limit: int) -> list[Value]:
    """Keep a value as the newest of up to `limit`; the values that are dropped for it."""
    dropped = [kept.pop(key)] if key in kept else []
    kept[key] = value
    return dropped + [kept.popitem(last=False)[1] for _ in range(len(kept) - limit)]
