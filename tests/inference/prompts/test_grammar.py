"""Processes of grammars: a hostile grammar fails alone, and nothing of it is left."""

import asyncio
import os
import signal
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from deltadock.errors import GrammarTooComplex, InvalidInput, Unavailable
from deltadock.inference.prompts.grammar import MAX_COMPILATIONS, GrammarSpec
from deltadock.inference.prompts.grammar_process import limited
from deltadock.inference.prompts.matching import ThreadFollower, TokenMatcher, await_masks
from tests.inference.grammars import AMBIGUOUS, END, LARGE, SLOW, Grammars, allowed
from tests.waiting import wait_until

A, B, QUOTE = b'ab"'
STRING = GrammarSpec("json_schema", '{"type": "string"}', "guided_json")


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
    assert grammars.processes._first is not None
    return set(descendants(grammars.processes._first.process.pid))


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


def test_a_tame_grammar_has_no_process_for_an_answer(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.inference.prompts.matching.MASK_SECONDS", 60)
    grammar = grammars.compile(STRING)
    before = running(grammars)
    follow(grammar.matcher(), [QUOTE, *[A, B] * 20, QUOTE, END])
    assert running(grammars) <= before


@pytest.mark.parametrize(
    ("spec", "tame"),
    [
        (STRING, True),
        (GrammarSpec("json_object", "", "response_format"), True),
        (GrammarSpec("choice", 'root ::= "a" | "b"', "guided_choice"), True),
        (ebnf('root ::= "a" | "b"'), False),
        (GrammarSpec("regex", "(a|aa)*b", "guided_regex"), False),
        (GrammarSpec("json_schema", '{"items": {"type": "string", "pattern": "a"}}', ""), False),
    ],
)
def test_only_a_grammar_that_is_not_ambiguous_is_tame(
    grammars: Grammars, spec: GrammarSpec, tame: bool
) -> None:
    """One short text, of an ambiguous grammar that was fast so far, took 4 s for the next mask."""
    assert (grammars.compile(spec).tame is not None) is tame


def test_a_slow_mask_of_a_tame_grammar_holds_nothing_up(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, advance = threading.Event(), ThreadFollower._advance

    def slow(*arguments: Any) -> bytes:
        assert go_on.wait(60)
        return advance(*arguments)

    monkeypatch.setattr(ThreadFollower, "_advance", slow)
    matcher = grammars.compile(STRING).matcher()
    assert await_masks([matcher], 0.001) == [matcher]
    go_on.set()
    follow(matcher, [QUOTE, A])


def test_a_mask_that_cannot_be_computed_fails_its_answer(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadFollower, "_advance", lambda *_: 1 / 0)
    matcher = grammars.compile(STRING).matcher()
    with pytest.raises(Unavailable):
        allowed(matcher)


def test_a_slow_grammar_has_its_masks_from_a_process(grammars: Grammars) -> None:
    assert grammars.compile(ebnf(SLOW)).tame is None
    assert grammars.allows(ebnf(SLOW), "abba")


def test_an_answer_that_becomes_slow_goes_on_in_a_process(grammars: Grammars) -> None:
    """And so do the grammar's further answers."""
    grammar = grammars.compile(STRING)
    before = running(grammars)
    matcher = grammar.matcher()
    follow(matcher, [QUOTE])
    assert A in allowed(matcher)
    assert running(grammars) <= before
    assert isinstance(matcher._follower, ThreadFollower)
    matcher._follower._left = 0
    matcher.accept(A)
    assert B in allowed(matcher)
    assert len(running(grammars) - before) == 1
    follow(matcher, [B, QUOTE, END])
    other = grammar.matcher()
    follow(other, [QUOTE])
    assert len(running(grammars) - before) == 2
    for one in (matcher, other):
        one.close()


def test_processes_that_fail_are_not_the_grammars_fault(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("deltadock.inference.prompts.grammar.PROCESS", tmp_path / "missing.py")
    broken = Grammars()
    with pytest.raises(Unavailable):
        broken.compile(ebnf('root ::= "a"'))
    broken.processes.close()

    before = running(grammars)
    matcher = grammars.compile(ebnf(SLOW)).matcher()
    assert not await_masks([matcher], 60)
    for process in running(grammars) - before:
        os.kill(process, signal.SIGKILL)
    matcher.accept(A)
    with pytest.raises(Unavailable):
        allowed(matcher)


def test_memory_that_runs_out_in_the_library_is_a_limit() -> None:
    with pytest.raises(MemoryError), limited(60):
        raise RuntimeError("std::bad_alloc")
    with pytest.raises(RuntimeError, match="EBNF"), limited(60):
        raise RuntimeError("EBNF")


def test_an_invalid_grammar_is_refused(grammars: Grammars) -> None:
    with pytest.raises(InvalidInput, match="guided_grammar"):
        grammars.compile(ebnf("root ::= "))


def test_few_grammars_compile_at_once(grammars: Grammars) -> None:
    """And they give way to the engine."""
    assert grammars.allows(ebnf('root ::= "a"'), "a")
    before = running(grammars)

    async def compile_many() -> int:
        compiling = [
            asyncio.create_task(
                grammars.processes.compile(
                    grammars.spellings, ebnf(f'{LARGE} "{number}"'), frozenset({END}), tenant
                )
            )
            for number, tenant in enumerate(("many", "many", "many", "one", "one"))
        ]
        while len(running(grammars) - before) < MAX_COMPILATIONS:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        new = running(grammars) - before
        assert all(os.getpriority(os.PRIO_PROCESS, process) >= 10 for process in new)
        for task in compiling:
            task.cancel()
        await asyncio.gather(*compiling, return_exceptions=True)
        return len(new)

    assert asyncio.run(compile_many()) == MAX_COMPILATIONS
    wait_until(lambda: running(grammars) <= before)


def test_a_tenant_leaves_a_compilation_to_others(grammars: Grammars) -> None:
    assert grammars.allows(ebnf('root ::= "a"'), "a")

    async def compile_many() -> None:
        slow = [
            asyncio.create_task(
                grammars.processes.compile(
                    grammars.spellings, ebnf(f'{LARGE} "{number}"'), frozenset({END}), "many"
                )
            )
            for number in range(4)
        ]
        await asyncio.sleep(0)
        await grammars.processes.compile(
            grammars.spellings, ebnf('root ::= "another"'), frozenset({END}), "other"
        )
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    asyncio.run(compile_many())


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
    grammar = grammars.compile(ebnf(SLOW))
    before = running(grammars)
    matcher = grammar.matcher()
    assert allowed(matcher) == {A, B, END}
    assert len(running(grammars) - before) == 1
    matcher.close()
    wait_until(lambda: running(grammars) <= before)
    assert matcher.ready
    with pytest.raises(Unavailable):
        allowed(matcher)


def test_processes_that_were_killed_are_replaced(grammars: Grammars) -> None:
    spec = ebnf('root ::= "a" "b"')
    assert grammars.allows(spec, "ab")
    first = grammars.processes._first
    assert first is not None
    killed = {first.process.pid, *running(grammars)}
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


def test_a_compiler_that_reads_nothing_is_never_waited_for() -> None:
    """Its socket takes few requests while it imports XGrammar, and the loop serves everybody."""
    grammars = Grammars()
    processes = grammars.processes
    processes._control()
    assert processes._first is not None
    processes._first.process.send_signal(signal.SIGSTOP)

    def fill() -> None:
        with ExitStack() as sockets:
            for token in range(2000):
                ends = frozenset({token})
                sockets.enter_context(processes._forked(grammars.spellings, ends, "{}"))

    try:
        with pytest.raises(Unavailable, match="compiler failed"):
            fill()
    finally:
        processes.close()
