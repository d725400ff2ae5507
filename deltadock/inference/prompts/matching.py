"""Follows answers through compiled grammars: which tokens can come next.

An answer is followed in a thread while its grammar is tame, and in a process of its own from the
token on whose mask takes longer. The next mask is computed while the model computes the token.
"""

import json
import logging
import os
import select
import socket
import sys
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deltadock.errors import GrammarTooComplex, Unavailable

log = logging.getLogger(__name__)

MASK_SECONDS: Final = 0.005
"""CPU time that an answer's masks may take at once in the node; a tame grammar's take 20 us."""
EARNED_SECONDS: Final = 0.0002
"""What each token adds to it again, up to `MASK_SECONDS`."""
THREADS: Final = ThreadPoolExecutor(2, thread_name_prefix="mask")
"""Compute the masks of tame grammars; XGrammar releases the interpreter."""

LIMIT: Final = b"\0"
"""Received when a limit has ended a process."""
NO_MORE: Final = b""
"""In place of a mask: there will be none."""


def forked(parent: socket.socket, request: str) -> socket.socket:
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
        """The socket of the process of an answer that begins with `tokens`. Raises as `forked`."""
        request = {"ends_itself": self.ends_itself, "tokens": tokens}
        return forked(self._connection, json.dumps(request))

    def matcher(self) -> "TokenMatcher":
        """A matcher for one answer."""
        return TokenMatcher(self)


class ThreadFollower:
    """Follows an answer through a tame grammar.

    Attributes:
        tokens: accepted so far.
        work: computes the next mask.
    """

    def __init__(self, tame: Any, *, ends_itself: bool) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(tame, terminate_without_stop_token=ends_itself)
        self._mask = xgrammar.allocate_token_bitmask(1, tame.tokenizer_info.vocab_size)
        self._left = MASK_SECONDS
        self.tokens: list[int] = []
        self.work: Future[bytes] = THREADS.submit(self._advance, None)

    @property
    def is_slow(self) -> bool:
        """Whether the masks have taken more time than they may."""
        return self._left <= 0

    def accept(self, token: int) -> None:
        """Compute the mask after a token."""
        self.tokens.append(token)
        self._left = min(self._left + EARNED_SECONDS, MASK_SECONDS)
        self.work = THREADS.submit(self._advance, token)

    def message(self) -> bytes | None:
        """The next mask as a process sends it; None: not yet."""
        if not self.work.done():
            return None
        try:
            return self.work.result()
        except Exception:
            log.exception("The next mask of an answer could not be computed")
            return NO_MORE

    def close(self) -> None:
        """Leave the work to end by itself."""

    def _advance(self, token: int | None) -> bytes:
        """Accept a token, in a thread; the next mask."""
        begun = time.thread_time()
        if token is not None:
            self._matcher.accept_token(token)
        complete = bool(self._matcher.is_terminated())
        if not complete:
            self._matcher.fill_next_token_bitmask(self._mask)
        self._left -= time.thread_time() - begun
        mask: bytes = self._mask.numpy().tobytes()
        return bytes([complete]) + mask


class ProcessFollower:
    """Follows an answer in a process of its own, which ends with it."""

    def __init__(self, connection: socket.socket, message_bytes: int) -> None:
        self.connection = connection
        self._message_bytes = message_bytes
        weakref.finalize(self, connection.close)

    def accept(self, token: int) -> None:
        """Send a token."""
        with suppress(OSError):  # the process has ended, as is received next
            self.connection.send(token.to_bytes(4, sys.byteorder))

    def message(self) -> bytes | None:
        """The next mask; None: not yet; empty: the process has ended."""
        try:
            message = self.connection.recv(self._message_bytes)
        except BlockingIOError:
            return None
        except ConnectionError:
            message = NO_MORE
        if not message:
            log.error("The process that computes an answer's masks has ended")
        return message

    def close(self) -> None:
        """End the process."""
        self.connection.close()


class NoFollower:
    """Of an answer that has ended, or that no process could be started for."""

    def accept(self, token: int) -> None:
        """No effect."""

    def message(self) -> bytes:
        """No mask."""
        return NO_MORE

    def close(self) -> None:
        """No effect."""


class TokenMatcher:
    """Follows one answer through a grammar."""

    def __init__(self, grammar: TokenGrammar) -> None:
        self._grammar = grammar
        self._follower: ThreadFollower | ProcessFollower | NoFollower | None = None
        """None until the answer begins."""
        self._message: bytes | None = None
        """The mask as it was received; None: not yet."""

    def start(self) -> None:
        """Begin the answer; no effect if it has begun."""
        self._begun()

    def _begun(self) -> ThreadFollower | ProcessFollower | NoFollower:
        if self._follower is None:
            grammar = self._grammar
            self._follower = (
                self._in_process([])
                if grammar.tame is None
                else ThreadFollower(grammar.tame, ends_itself=grammar.ends_itself)
            )
        return self._follower

    def _in_process(self, tokens: list[int]) -> ProcessFollower | NoFollower:
        try:
            connection = self._grammar.fork(tokens)
        except OSError:
            log.exception("A process for the masks of an answer could not be started")
            return NoFollower()
        return ProcessFollower(connection, self._grammar.message_bytes)

    @property
    def ready(self) -> bool:
        """Whether the mask of the next token is there, or never will be."""
        if self._message is None:
            self._message = self._begun().message()
        return self._message is not None

    @property
    def complete(self) -> bool:
        """Whether the answer is complete, where no token ends it."""
        return bool(self._message and self._message[0])

    @property
    def work(self) -> Future[bytes] | None:
        """What a thread computes."""
        return self._follower.work if isinstance(self._follower, ThreadFollower) else None

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
        follower = self._begun()
        if isinstance(follower, ThreadFollower) and follower.is_slow:
            self._grammar.tame = None  # nor are further answers followed here
            self._follower = self._in_process([*follower.tokens, token])
        else:
            follower.accept(token)

    def close(self) -> None:
        """End the answer, and its process."""
        if self._follower is not None:
            self._follower.close()
        self._follower, self._message = NoFollower(), NO_MORE

    def register(self, poll: select.poll) -> None:
        """Let `poll` return when there is something to receive."""
        if isinstance(self._follower, ProcessFollower):
            poll.register(self._follower.connection, select.POLLIN)


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
