"""Failed requests end with an error and release their resources."""

from typing import Any

import pytest

from deltadock.inference.engine import engine as engine_module

PROMPTS = [[1, 2, 3], [5] * 17, [7], list(range(20, 60)), [4, 4]]


class Fault:
    """Stands in a method's place and raises while it is active."""

    def __init__(self, original: Any) -> None:
        self.original, self.active = original, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            raise RuntimeError("a fault")
        return self.original(*args, **kwargs)


def patch(monkeypatch: pytest.MonkeyPatch, owner: Any, *names: str) -> list[Fault]:
    faults = [Fault(getattr(owner, name)) for name in names]
    for name, fault in zip(names, faults, strict=True):
        monkeypatch.setattr(owner, name, fault)
    return faults


@pytest.mark.parametrize("more", [(), ("erase",), ("erase", "copy")])
def test_a_failed_pass_ends_its_requests_and_frees_their_slots(
    make_bench: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Also if the cache cannot be erased; afterwards the same requests are answered."""
    bench = make_bench(make_model("llama"), max_sequences=8)
    answers = [bench.run(prompt, slot=index % 2).answer for index, prompt in enumerate(PROMPTS)]
    scheduler = bench.engine._scheduler
    faults = patch(monkeypatch, bench.engine._runner, "logits")
    faults += patch(monkeypatch, scheduler.slots._cache, *more)

    failed = [bench.submit(prompt, slot=index % 2) for index, prompt in enumerate(PROMPTS)]
    bench.finish(*failed)
    assert [outcome.events[-1].error.code for outcome in failed] == ["inference_failed"] * 5
    assert not scheduler.running
    assert scheduler.slots.free == scheduler.slots._cache.slots == 8

    for fault in faults:
        fault.active = False
    again = [bench.submit(prompt, slot=index % 2) for index, prompt in enumerate(PROMPTS)]
    bench.finish(*again)
    assert [outcome.answer for outcome in again] == answers
    assert bench.engine.alive


def test_a_slot_that_could_not_be_erased_is_erased_before_its_next_use(
    make_bench: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(make_model("llama"), max_sequences=1)
    cache = bench.engine._scheduler.slots._cache
    (fault,) = patch(monkeypatch, cache, "erase")
    bench.run(PROMPTS[1])  # ends with tokens that are not confirmed, whose erasure fails
    assert cache._store[:, :, 0].any()
    fault.active = False
    erased: list[tuple[int, int, int]] = []
    monkeypatch.setattr(cache, "erase", lambda *which: (erased.append(which), fault(*which)))
    bench.run(PROMPTS[0])
    assert erased[0][:2] == (0, 0)
    assert erased[0][2] >= len(PROMPTS[1])


@pytest.mark.parametrize("more", [(), ("erase",)])
def test_a_lost_device_stops_the_engine_and_fails_every_request(
    make_bench: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Also where it is noticed while a cache slot is prepared, before any pass."""
    bench = make_bench(make_model("llama"), max_sequences=1)
    bench.run(PROMPTS[0], slot=1)
    patch(monkeypatch, bench.engine._runner, "logits", "check_device")
    patch(monkeypatch, bench.engine._scheduler.slots._cache, *more)
    for count in range(engine_module.MAX_DEVICE_FAILURES):
        assert bench.engine.alive, count
        assert bench.run(PROMPTS[0]).events[-1].error.code == "inference_failed"
    assert bench.engine.device_lost
    assert not bench.engine.alive
    # Later requests fail at once.
    waiting = [bench.submit(prompt) for prompt in PROMPTS]
    bench.finish(*waiting)
    assert {outcome.events[-1].error.code for outcome in waiting} == {"inference_failed"}


def test_a_broken_delta_does_not_count_as_a_lost_device(
    make_bench: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(make_model("llama"))
    (fault,) = patch(monkeypatch, bench.engine._runner, "logits")
    for _ in range(2 * engine_module.MAX_DEVICE_FAILURES):
        assert bench.run(PROMPTS[0]).events[-1].error is not None
    assert bench.engine.alive
    fault.active = False
    assert bench.run(PROMPTS[0]).answer


def test_rows_are_sampled_alone_where_the_batch_cannot_be(
    make_bench: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same random numbers; only what fails alone fails."""
    bench = make_bench(make_model("llama"))
    how = {"temperature": 1.0, "seed": 3}
    answers = [bench.run(prompt, **how).answer for prompt in PROMPTS[:3]]
    sample = engine_module.sample_tokens

    def fail(logits: Any, rows: Any) -> Any:
        if len(rows) > 1 or len(rows[0].tokens) == len(PROMPTS[1]) + 4:
            raise RuntimeError("a fault")
        return sample(logits, rows)

    monkeypatch.setattr(engine_module, "sample_tokens", fail)
    outcomes = [bench.submit(prompt, **how) for prompt in PROMPTS[:3]]
    bench.finish(*outcomes)
    assert [outcome.finish for outcome in outcomes] == ["length", "error", "length"]
    assert [outcomes[n].answer for n in (0, 2)] == [answers[n] for n in (0, 2)]
    assert bench.engine.alive


def test_a_device_lost_while_sampling_stops_the_engine(
    make_bench: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(make_model("llama"))
    patch(monkeypatch, engine_module, "sample_tokens")
    patch(monkeypatch, bench.engine._runner, "check_device")
    for _ in range(engine_module.MAX_DEVICE_FAILURES):
        assert bench.run(PROMPTS[0]).events[-1].error.code == "inference_failed"
    assert bench.engine.device_lost
