"""Compiles grammars: JSON documents, regexes and others, of which answers are made."""

import asyncio
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeVar

from deltadock.errors import GrammarTooComplex, InvalidInput, Unavailable
from deltadock.inference.prompts.fair_slots import FairSlots
from deltadock.inference.prompts.json_schema import has_patterns, not_enforced, without_formats
from deltadock.inference.prompts.matching import LIMIT, TokenGrammar, forked

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
MAX_ANSWER: Final = 16384
"""Bytes of what a process says once it has compiled."""
LIBRARIES: Final = frozenset({"LD_LIBRARY_PATH"})
"""What the processes have of the node's environment."""

Key = TypeVar("Key")
Value = TypeVar("Value")
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


class _FirstProcess(NamedTuple):
    """The process that all others are forked from, and its socket."""

    process: subprocess.Popen[bytes]
    control: socket.socket


class GrammarProcesses:
    """Compiles grammars, in processes. Belongs to one event loop."""

    def __init__(self) -> None:
        self._first: _FirstProcess | None = None
        self._tokenizers: OrderedDict[tuple[str, frozenset[int]], socket.socket] = OrderedDict()
        self._here: OrderedDict[tuple[str, frozenset[int]], _Tokenizer] = OrderedDict()
        self._grammars: OrderedDict[tuple[Any, ...], TokenGrammar] = OrderedDict()
        self._compiling = FairSlots(MAX_COMPILATIONS, MAX_COMPILATIONS - 1)

    async def compile(
        self,
        spellings: TokenSpellings,
        spec: GrammarSpec,
        end_ids: frozenset[int],
        tenant: str | None = None,
    ) -> TokenGrammar:
        """Compile a grammar whose answers end with one of `end_ids`. Cancelling ends the process.

        Tenants whose grammars wait for others take turns, and one leaves a compilation to others.

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
                return forked(self._tokenizer(spellings, end_ids), request)
            except ConnectionError:  # that process has ended
                if (old := self._tokenizers.pop((spellings.digest, end_ids), None)) is not None:
                    old.close()
                return forked(self._tokenizer(spellings, end_ids), request)
        except OSError:
            _failed()

    def _tokenizer(self, spellings: TokenSpellings, end_ids: frozenset[int]) -> socket.socket:
        """The socket of a tokenizer's process. Raises as `forked`."""
        key = (spellings.digest, end_ids)
        if key not in self._tokenizers:
            ends = json.dumps(sorted(end_ids))
            fields = f'"kind": "{spellings.kind}", "end_ids": {ends}'
            request = f'{{{fields}, "spellings": {spellings.content}}}'
            connection = forked(self._control(), request)
            for old in _keep(self._tokenizers, key, connection, MAX_TOKENIZERS):
                old.close()
        self._tokenizers.move_to_end(key)
        return self._tokenizers[key]

    def _control(self) -> socket.socket:
        """The socket of the process that all others are forked from."""
        if self._first is not None and self._first.process.poll() is not None:
            self.close()
        if self._first is None:
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            control.setblocking(False)  # a few requests fill it until XGrammar is imported
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-I", PROCESS, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in LIBRARIES & os.environ.keys()},
                    start_new_session=True,  # Ctrl-C must not reach it
                )
            self._first = _FirstProcess(process, control)
        return self._first.control

    def close(self) -> None:
        """End the processes; those that compute are killed."""
        for connection in self._tokenizers.values():
            connection.close()
        self._tokenizers.clear()
        self._here.clear()
        self._grammars.clear()
        if self._first is not None:
            self._first.control.close()
            self._first.process.kill()
            self._first.process.wait()
            self._first = None


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
