"""Compiles grammars and computes masks in processes, which a hostile grammar may kill.

Each process is forked from the one before it: the first has imported XGrammar, a tokenizer's has
its tokens, a grammar's has compiled it, and an answer's follows one answer. The kernel limits their
memory and CPU time. They end when their node closes their sockets: a grammar's even while it
compiles, an answer's with the mask that it computes. A request is a byte with two files: the new
process's socket, and its request as JSON. A process says on its child's socket if a limit ended it.
"""

import fcntl
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import xgrammar

COMPILE_SECONDS: Final = 5.0
"""CPU time in which a grammar must compile; the kernel kills the process beyond it."""
MASK_SECONDS: Final = 1.0
"""CPU time that an answer's masks may take at once; a tame grammar's take about 20 us."""
EARNED_SECONDS: Final = 0.01
"""What each token adds to it again, up to `MASK_SECONDS`."""
NICENESS: Final = 10
"""The engine's passes come first."""
MEMORY_BYTES: Final = 512 * 2**20
"""What a process may allocate beyond what it was forked with."""
LIMIT: Final = b"\0"
"""Says of a process that a limit has ended it."""
LIMIT_EXIT: Final = 2
"""The exit status of a process that has no memory left."""
LIMIT_SIGNALS: Final = frozenset({signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV})
"""How others end: out of time, or of memory in C++, which aborts or crashes."""
TAME_COMPILE_SECONDS: Final = 0.1
"""CPU time in which a tame grammar compiles, also where it has 128,000 tokens."""
TAME_MASK_SECONDS: Final = 0.005
"""CPU time of its first mask, which fills caches: about 0.1 ms."""
TAME_BYTES: Final = 16 * 2**20
"""What it takes in memory once compiled."""
MAX_WHITESPACE: Final = 8
"""Characters of whitespace between two tokens of JSON: a model could fill its answer with it."""

Stage = Callable[[socket.socket, Any], None]
"""What a new process does with its socket and its request."""


def fork_for_each(control: socket.socket, stage: Stage) -> None:
    """Fork a process for each request, until `control` is closed."""
    children: dict[int, socket.socket] = {}

    def reap(*_: object) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                with children.pop(ended[0]) as connection, suppress(ConnectionError):
                    code = os.waitstatus_to_exitcode(ended[1])
                    if code == LIMIT_EXIT or -code in LIMIT_SIGNALS:
                        connection.send(LIMIT)

    signal.signal(signal.SIGCHLD, reap)
    while files := socket.recv_fds(control, 1, 2)[1]:
        connection = socket.socket(fileno=files[0])
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        if child := os.fork():
            os.close(files[1])
            children[child] = connection
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            continue
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for other in (control, *children.values()):
                other.close()
            size = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            limit = size * resource.getpagesize() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
            with os.fdopen(files[1], "rb") as request:
                request.seek(0)
                content = json.load(request)
            stage(connection, content)
        except ConnectionError:
            pass  # nobody waits for it any more
        except MemoryError:
            os._exit(LIMIT_EXIT)
        except BaseException:  # noqa: BLE001 (the process ends; its parent's stack is not its own)
            traceback.print_exc()
        finally:
            os._exit(0)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End the process if the block takes more CPU time.

    The signal has no handler, so it ends it inside one long C++ call too.

    Raises:
        MemoryError: there is no memory left, also where XGrammar says so by a `RuntimeError`.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except RuntimeError as error:
        if "bad_alloc" in str(error):
            raise MemoryError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextmanager
def while_connected(connection: socket.socket) -> Iterator[None]:
    """End the process if the other end of its socket, which sends nothing, is closed in the block.

    Raises:
        BrokenPipeError: it is closed already.
    """
    flags = fcntl.fcntl(connection, fcntl.F_GETFL)
    fcntl.fcntl(connection, fcntl.F_SETFL, flags | os.O_ASYNC)
    poll = select.poll()
    poll.register(connection, 0)
    if poll.poll(0):
        raise BrokenPipeError
    yield
    fcntl.fcntl(connection, fcntl.F_SETFL, flags)


def make_tokenizer(request: Any) -> Any:
    """XGrammar's tokenizer: `spellings` by token id, of a `kind`; `end_ids` end an answer."""
    return xgrammar.TokenizerInfo(
        request["spellings"],
        vocab_type=xgrammar.VocabType[request["kind"]],
        stop_token_ids=request["end_ids"] or None,
    )


def compile_grammar(tokenizer: Any, request: Any) -> Any:
    """A `text` of a `kind`, compiled.

    Raises:
        RuntimeError: it is invalid.
        ValueError: it is invalid.
    """
    # No cache: compiled grammars end with their process, or with the last answer that uses them.
    compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
    compile_with: dict[str, Any] = {
        "json_object": lambda _: compiler.compile_json_schema(
            '{"type": "object"}', strict_mode=False, max_whitespace_cnt=MAX_WHITESPACE
        ),
        "json_schema": partial(compiler.compile_json_schema, max_whitespace_cnt=MAX_WHITESPACE),
        "compact_json_schema": partial(compiler.compile_json_schema, any_whitespace=False),
        "regex": compiler.compile_regex,
        "choice": compiler.compile_grammar,
        "ebnf": compiler.compile_grammar,
    }
    return compile_with[request["kind"]](request["text"])


def serve_tokenizer(connection: socket.socket, request: Any) -> None:
    """Prepare a tokenizer, as `make_tokenizer` takes it."""
    fork_for_each(connection, partial(serve_grammar, make_tokenizer(request)))


def serve_grammar(tokenizer: Any, connection: socket.socket, request: Any) -> None:
    """Compile a grammar, as `compile_grammar` takes it; says whether it is `tame`, or the `error`.

    A tame one compiles again as fast, and has no slow masks at its beginning.
    """
    try:
        with limited(COMPILE_SECONDS), while_connected(connection):
            begun = time.process_time()
            compiled = compile_grammar(tokenizer, request)
            compile_seconds = time.process_time() - begun
            mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
            begun = time.process_time()
            xgrammar.GrammarMatcher(
                compiled, terminate_without_stop_token=True
            ).fill_next_token_bitmask(mask)
            mask_seconds = time.process_time() - begun
    except (RuntimeError, ValueError) as error:
        connection.send(json.dumps({"error": str(error)[:1000]}).encode())
        return
    tame = (
        compile_seconds <= TAME_COMPILE_SECONDS
        and mask_seconds <= TAME_MASK_SECONDS
        and compiled.memory_size_bytes <= TAME_BYTES
    )
    connection.send(json.dumps({"tame": tame}).encode())
    fork_for_each(connection, partial(serve_answer, compiled))


def serve_answer(compiled: Any, connection: socket.socket, request: Any) -> None:
    """Send the mask after `tokens`, then one after each token, of four bytes, that is received.

    A mask is a byte, 1 where the answer is complete, and 32-bit words of a bit per token, lowest
    first. The answer `ends_itself` as soon as it can, where no token may end it.
    """
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=request["ends_itself"])
    mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
    with limited(MASK_SECONDS + EARNED_SECONDS * len(request["tokens"])):
        for accepted in request["tokens"]:
            matcher.accept_token(accepted)
    left, token = MASK_SECONDS, b""
    while True:
        begun = time.process_time()
        with limited(left):
            if token:
                matcher.accept_token(int.from_bytes(token, sys.byteorder))
            complete = matcher.is_terminated()
            if not complete:
                matcher.fill_next_token_bitmask(mask)
        left -= time.process_time() - begun
        left = min(max(left, 0) + EARNED_SECONDS, MASK_SECONDS)
        connection.send(bytes([complete]) + mask.numpy().tobytes())
        token = connection.recv(4)
        if not token:
            return


def main() -> None:
    """Serve the socket whose number is the argument."""
    os.nice(NICENESS)
    gc.freeze()  # a collection would copy the memory that processes share
    fork_for_each(socket.socket(fileno=int(sys.argv[1])), serve_tokenizer)


if __name__ == "__main__":
    main()
