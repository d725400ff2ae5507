"""Processes of grammars: a hostile grammar fails alone, and nothing of it is left."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from deltadock.errors import GrammarTooComplex
from deltadock.inference.prompts.grammar import GrammarSpec, TokenMatcher, await_masks
from tests.inference.grammars import AMBIGUOUS, END, LARGE, Grammars, allowed
from tests.waiting import wait_until

A, B = b"ab"


def ebnf(text: str) -> GrammarSpec:
    return GrammarSpec("ebnf", text, "guided_grammar")


def follow(matcher: TokenMatcher, tokens: list[int]) -> None:
    for token in tokens:
        assert token in allowed(matcher)
        matcher.accept(token)


def descendants(process: int) -> list[int]:
    """The processes that a process has forked, and those that these have."""
    with suppress(FileNotFoundError):
        children = Path(f"/proc/{process}/task/{process}/children").read_text("ascii").split()
        return [one for child in map(int, children) for one in (child, *descendants(child))]
    return []


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may still be listed, as a zombie."""
    with suppress(FileNotFoundError):
        return ") Z " not in Path(f"/proc/{process}/stat").read_text("utf-8")
    return False


def running(grammars: Grammars) -> set[int]:
    assert grammars.processes._process is not None
    return set(descendants(grammars.processes._process.pid))


def test_an_answer_whose_masks_take_too_long_fails_alone(grammars: Grammars) -> None:
    grammar = grammars.compile(ebnf(AMBIGUOUS))
    long, short = grammar.matcher(), grammar.matcher()
    assert allowed(short) == {A}
    with pytest.raises(GrammarTooComplex, match="less ambiguous"):
        follow(long, [A] * 500)
    short.accept(A)
    assert allowed(short) == {A, END}
    assert allowed(grammar.matcher()) == {A}


def test_a_tame_grammar_has_masks_for_any_number_of_tokens(grammars: Grammars) -> None:
    """Their time is limited at once, not in all."""
    matcher = grammars.compile(ebnf('root ::= ("a" | "b")*')).matcher()
    follow(matcher, [A, B] * 1500)
    assert allowed(matcher) == {A, B, END}


def test_a_grammar_that_takes_too_long_to_compile_is_refused(grammars: Grammars) -> None:
    with pytest.raises(GrammarTooComplex, match="compile"):
        grammars.compile(ebnf(LARGE))
    assert grammars.allows(ebnf('root ::= "ab"'), "ab")


def test_a_cancelled_compilation_ends(grammars: Grammars) -> None:
    assert grammars.allows(ebnf('root ::= "a"'), "a")
    before = running(grammars)

    async def cancel() -> None:
        compiling = asyncio.create_task(
            grammars.processes.compile(grammars.spellings, ebnf(LARGE), frozenset({END}))
        )
        while not compiling.done() and running(grammars) <= before:
            await asyncio.sleep(0.01)
        assert compiling.cancel()
        with suppress(asyncio.CancelledError):
            await compiling

    asyncio.run(cancel())
    wait_until(lambda: running(grammars) <= before)


def test_a_closed_matcher_leaves_no_process(grammars: Grammars) -> None:
    grammar = grammars.compile(ebnf('root ::= "a" root | "b"'))
    before = running(grammars)
    matcher = grammar.matcher()
    assert allowed(matcher) == {A, B}
    assert len(running(grammars) - before) == 1
    matcher.close()
    wait_until(lambda: running(grammars) <= before)
    assert matcher.ready
    with pytest.raises(GrammarTooComplex):
        allowed(matcher)


def test_processes_that_were_killed_are_replaced(grammars: Grammars) -> None:
    spec = ebnf('root ::= "a" "b"')
    assert grammars.allows(spec, "ab")
    first = grammars.processes._process
    assert first is not None
    killed = {first.pid, *running(grammars)}
    for process in killed:
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, killed)))
    assert grammars.allows(spec, "ab")


def test_an_answer_that_no_token_ends_ends_itself() -> None:
    grammars = Grammars()
    spec = ebnf('root ::= "a" "b"')
    compiling = grammars.processes.compile(grammars.spellings, spec, frozenset())
    matcher = asyncio.run(compiling).matcher()
    for token in (A, B):
        assert allowed(matcher) == {token}
        assert not matcher.complete
        matcher.accept(token)
    assert not await_masks([matcher], 60)
    assert matcher.complete
    grammars.processes.close()
