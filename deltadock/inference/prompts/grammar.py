"""Structured output: only tokens that continue a JSON document, regex or grammar can be sampled."""

import asyncio
import hashlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltadock.errors import GrammarTooComplex, InvalidInput, Unavailable
from deltadock.inference.prompts.fair_slots import FairSlots
from deltadock.inference.prompts.json_schema import has_patterns, not_enforced, without_formats

log = logging.getLogger(__name__)

PROCESS: Final = Path(__file__).with_name("grammar_process.py")
WALL_SECONDS: Final = 60.0
"""Limit of a compilation, beside its CPU time (`grammar_process.COMPILE_SECONDS`): the first one
waits for XGrammar's import."""
MAX_TOKENIZERS: Final = 4
"""Tokenizers, each with its end tokens, whose processes are kept."""
MAX_GRAMMARS: Final = 16
"""Compiled grammars whose processes are kept."""

MAX_COMPILATIONS: Final = 2
"""Grammars that compile at once; others wait."""
MASK_SECONDS: Final = 0.005
"""CPU time that an answer's masks may take at once in the node; a tame grammar's take 20 us."""
EARNED_SECONDS: Final = 0.0002
"""What each token adds to it again, up to `MASK_SECONDS`."""

LIMIT: Final = b"\0"
"""Received when a limit has ended a process."""
MAX_ANSWER: Final = 16384
"""Bytes of what a process says once it has compiled."""
LIBRARIES: Final = frozenset({"LD_LIBRARY_PATH"})
"""What the processes have of the node's environment."""

Key = TypeVar("Key")
Value = TypeVar("Value")
THREADS: Final = ThreadPoolExecutor(2, thread_name_prefix="mask")
"""Compute the masks of tame grammars; XGrammar releases the interpreter."""
GrammarKind = Literal[
    "json_object", "json_schema", "compact_json_schema", "choice", "regex", "ebnf"
]


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
    """Follows one answer through a grammar.

    It does so in a thread while the grammar is tame, and in a process of its own from the token on
    whose mask takes longer. The next mask is computed while the model computes the token.
    """

    def __init__(self, grammar: "TokenGrammar") -> None:
        self._grammar = grammar
        self._tokens: list[int] = []
        """Accepted in this process."""
        self._left = MASK_SECONDS
        self._matcher: Any = None
        """XGrammar's, in this process."""
        self.work: Future[bytes] | None = None
        """What a thread computes."""
        self._connection: socket.socket | None = None
        self._message: bytes | None = None
        """The mask as it was received; empty if the process has ended."""

    def start(self) -> None:
        """Begin the answer; no effect if it has begun."""
        if self._matcher is not None or self._connection is not None or self._message is not None:
            return
        if self._grammar.tame is None:
            self._move()
            return
        import xgrammar

        compiled = self._grammar.tame
        self._matcher = xgrammar.GrammarMatcher(
            compiled, terminate_without_stop_token=self._grammar.ends_itself
        )
        self._mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        self.work = THREADS.submit(self._follow, self._matcher, None)

    def _move(self) -> None:
        """Follow the rest of the answer in a process."""
        self._matcher = None
        try:
            self._connection = self._grammar.fork(self._tokens)
        except OSError:
            log.exception("A process for the masks of an answer could not be started")
            self._message = b""
        else:
            weakref.finalize(self, self._connection.close)

    def _follow(self, matcher: Any, token: int | None) -> bytes:
        """Accept a token, in a thread; the next mask, as a process sends it."""
        begun = time.thread_time()
        if token is not None:
            matcher.accept_token(token)
        complete = bool(matcher.is_terminated())
        if not complete:
            matcher.fill_next_token_bitmask(self._mask)
        self._left -= time.thread_time() - begun
        mask: bytes = self._mask.numpy().tobytes()
        return bytes([complete]) + mask

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token is there, or never will be."""
        self.start()
        if self.work is not None:
            if not self.work.done():
                return False
            try:
                self._message = self.work.result()
            except Exception:
                log.exception("The next mask of an answer could not be computed")
                self._message = b""
            self.work = None
        if self._message is None and self._connection is not None:
            with suppress(BlockingIOError):
                try:
                    self._message = self._connection.recv(self._grammar.message_bytes)
                except ConnectionError:
                    self._message = b""
                if not self._message:
                    log.error("The process that computes an answer's masks has ended")
        return self._message is not None

    @property
    def complete(self) -> bool:
        """Whether the answer is complete, where no token ends it."""
        return bool(self._message and self._message[0])

    def fill(self, words: NDArray[np.int32]) -> None:
        """Write the tokens that can follow to words of zeros: a bit per token, lowest first.

        The mask must be `ready`.

        Raises:
            GrammarTooComplex: it takes more time or memory than allowed.
            Unavailable: its process has ended.
        """
        if self._message == LIMIT:
            raise GrammarTooComplex(
                "The next token that the answer's grammar allows takes more time or memory to find "
                "than allowed. Make it less ambiguous: let each text be derived in one way only."
            )
        if not self._message:
            raise Unavailable("The process that follows the answer's grammar ended. Try again.")
        mask = np.frombuffer(self._message, np.int32, offset=1)
        count = min(len(words), len(mask))
        words[:count] = mask[:count]

    def accept(self, token: int) -> None:
        """Follow a sampled token; a thread or process computes the next mask meanwhile."""
        if not self._message:
            return
        self._message = None
        if self._connection is not None:
            with suppress(OSError):  # the process has ended, as is received next
                self._connection.send(token.to_bytes(4, sys.byteorder))
            return
        self._tokens.append(token)
        if self._left <= 0:
            self._grammar.tame = None  # nor are further answers followed here
            self._move()
            return
        self._left = min(self._left + EARNED_SECONDS, MASK_SECONDS)
        self.work = THREADS.submit(self._follow, self._matcher, token)

    def close(self) -> None:
        """End the answer, and its process."""
        self._matcher = self.work = None
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
        if working := [matcher.work for matcher in late if matcher.work is not None]:
            wait(working, left)
        else:
            poll = select.poll()
            for matcher in late:
                matcher.register(poll)
            poll.poll(left * 1000)
        matchers = late
    return late


class TokenGrammar:
    """A grammar compiled for one tokenizer, in a process of its own, and in this one if `tame`."""

    def __init__(
        self,
        connection: socket.socket,
        tokens: int,
        *,
        ends_itself: bool,
        tame: Any,
    ) -> None:
        """Take a compiled grammar's process, for so many tokens; `tame` is XGrammar's, if it is."""
        self._connection = connection
        self.ends_itself, self.tame = ends_itself, tame
        self.message_bytes = 1 + 4 * -(-tokens // 32)
        weakref.finalize(self, connection.close)

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionError:
            pass
        return False

    def fork(self, tokens: list[int]) -> socket.socket:
        """The socket of the process of an answer that begins with `tokens`. Raises as `_forked`."""
        request = {"ends_itself": self.ends_itself, "tokens": tokens}
        return _forked(self._connection, json.dumps(request))

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


def _is_delimited(kind: GrammarKind, text: str) -> bool:
    """Whether a grammar's texts are JSON without patterns, or choices.

    Of others even a short one may be so ambiguous that a mask takes minutes, after any token.
    """
    if kind in {"json_schema", "compact_json_schema"}:
        return not has_patterns(json.loads(text))
    return kind in {"json_object", "choice"}


def _refused(spec: GrammarSpec, error: str) -> InvalidInput:
    reason = error.strip().splitlines()[0].partition(": ")[2] or error
    return InvalidInput(f"`{spec.param}` cannot be used: {reason.strip()}", param=spec.param)


def _failed() -> NoReturn:
    log.exception("The processes that compile grammars failed")
    raise Unavailable("The grammar could not be compiled: the node's compiler failed. Try again.")


class _Tokenizer:
    """Compiles tame grammars for a tokenizer in this process. Any thread may use it."""

    def __init__(self, spellings: TokenSpellings, end_ids: frozenset[int]) -> None:
        from deltadock.inference.prompts import grammar_process

        self._tokenizer = grammar_process.make_tokenizer(
            {
                "spellings": json.loads(spellings.content),
                "kind": spellings.kind,
                "end_ids": sorted(end_ids),
            }
        )
        self._compile = grammar_process.compile_grammar

    def compile(self, request: dict[str, str]) -> Any:
        return self._compile(self._tokenizer, request)


class GrammarProcesses:
    """Compiles grammars, in processes. Belongs to one event loop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._tokenizers: OrderedDict[tuple[str, frozenset[int]], socket.socket] = OrderedDict()
        self._here: OrderedDict[tuple[str, frozenset[int]], _Tokenizer] = OrderedDict()
        self._grammars: OrderedDict[tuple[Any, ...], TokenGrammar] = OrderedDict()
        self._compiling = FairSlots(MAX_COMPILATIONS)

    async def compile(
        self,
        spellings: TokenSpellings,
        spec: GrammarSpec,
        end_ids: frozenset[int],
        tenant: str | None = None,
    ) -> TokenGrammar:
        """Compile a grammar whose answers end with one of `end_ids`. Cancelling ends the process.

        Tenants whose grammars wait for others take turns.

        Raises:
            InvalidInput: it is invalid, or uses what is not supported.
            GrammarTooComplex: it takes more time or memory than allowed.
            Unavailable: the processes fail.
        """
        end_ids = frozenset(token for token in end_ids if token < spellings.count)
        key = (spellings.digest, end_ids, spec.kind, spec.text)
        if (known := self._grammars.get(key)) is not None and known.alive:
            self._grammars.move_to_end(key)
            return known
        async with self._compiling.slot(tenant):
            grammar = await self._compiled(spellings, spec, end_ids)
        _keep(self._grammars, key, grammar, MAX_GRAMMARS)
        return grammar

    async def _compiled(
        self, spellings: TokenSpellings, spec: GrammarSpec, end_ids: frozenset[int]
    ) -> TokenGrammar:
        text = spec.text
        if spec.kind in {"json_schema", "compact_json_schema"}:
            try:
                text = await asyncio.to_thread(_enforceable, text)
            except ValueError as error:
                raise _refused(spec, str(error)) from error
        request = {"kind": spec.kind, "text": text}
        connection = self._forked(spellings, end_ids, json.dumps(request))
        try:
            answer = await _received(connection)
            if "error" in answer:
                raise _refused(spec, answer["error"])
            tame = None
            if answer["tame"] and _is_delimited(spec.kind, text):
                tame = await self._compile_here(spellings, end_ids, request)
        except BaseException:
            connection.close()
            raise
        return TokenGrammar(connection, spellings.count, ends_itself=not end_ids, tame=tame)

    async def _compile_here(
        self, spellings: TokenSpellings, end_ids: frozenset[int], request: dict[str, str]
    ) -> Any:
        key = (spellings.digest, end_ids)
        if (tokenizer := self._here.get(key)) is None:
            tokenizer = await asyncio.to_thread(_Tokenizer, spellings, end_ids)
        _keep(self._here, key, tokenizer, MAX_TOKENIZERS)
        return await asyncio.to_thread(tokenizer.compile, request)

    def _forked(
        self, spellings: TokenSpellings, end_ids: frozenset[int], request: str
    ) -> socket.socket:
        """The socket of a new grammar's process.

        Raises:
            Unavailable: no process can be started.
        """
        try:
            try:
                return _forked(self._tokenizer(spellings, end_ids), request)
            except ConnectionError:  # that process has ended
                if (old := self._tokenizers.pop((spellings.digest, end_ids), None)) is not None:
                    old.close()
                return _forked(self._tokenizer(spellings, end_ids), request)
        except OSError:
            _failed()

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
        self._here.clear()
        self._grammars.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


async def _received(connection: socket.socket) -> dict[str, Any]:
    """What a grammar's process says once it has compiled.

    Raises:
        GrammarTooComplex: a limit has ended it.
        Unavailable: it has ended otherwise, or says nothing.
    """
    try:
        async with asyncio.timeout(WALL_SECONDS):
            answer = await asyncio.get_running_loop().sock_recv(connection, MAX_ANSWER)
        if not answer:
            raise ConnectionResetError("The process has ended")
    except (TimeoutError, ConnectionError):
        _failed()
    if answer == LIMIT:
        raise GrammarTooComplex(
            "The grammar takes more time or memory to compile than allowed. Make it smaller: fewer "
            "rules, alternatives and repetitions."
        )
    parsed: dict[str, Any] = json.loads(answer)
    return parsed


def _keep(kept: OrderedDict[Key, Value], key: Key, value: Value, limit: int) -> list[Value]:
    """Keep a value as the newest of up to `limit`; the values that are dropped for it."""
    dropped = [kept.pop(key)] if key in kept else []
    kept[key] = value
    return dropped + [kept.popitem(last=False)[1] for _ in range(len(kept) - limit)]
