"""Virtual token counters as a state machine, and their bound between backlogged deltas."""

from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltadock.inference.engine.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, VirtualTokenCounters
from deltadock.inference.engine.scheduler import Scheduler
from deltadock.inference.prompts.tokenizer import Tokenizer
from tests.inference.scheduling import make_cache, make_sequence, run_pass

NAMES = st.sampled_from(["base", "one", "two"])


class CountersMachine(RuleBasedStateMachine):
    """Any order of arrivals, service and departures."""

    def __init__(self) -> None:
        super().__init__()
        self.counters = VirtualTokenCounters()
        self.present: Counter[str] = Counter()
        self.reserved: defaultdict[str, int] = defaultdict(int)

    def active(self) -> list[str]:
        return [name for name, count in self.present.items() if count]

    @rule(name=NAMES)
    def arrive(self, name: str) -> None:
        others = [self.counters.served(other) for other in self.active()]
        self.counters.add_sequence(name)
        if not self.present[name] and others:
            assert self.counters.served(name) >= min(others), "idle time gives no credit"
        self.present[name] += 1

    @precondition(lambda self: self.active())
    @rule(data=st.data(), tokens=st.integers(1, 50))
    def reserve(self, data: st.DataObject, tokens: int) -> None:
        name = data.draw(st.sampled_from(self.active()))
        before = self.counters.level(name)
        self.counters.reserve(name, tokens)
        self.reserved[name] += tokens
        assert self.counters.level(name) == before + PROMPT_WEIGHT * tokens

    @precondition(lambda self: any(self.reserved.values()))
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        name = data.draw(
            st.sampled_from([name for name, reserved in self.reserved.items() if reserved])
        )
        level, served = self.counters.level(name), self.counters.served(name)
        tokens = data.draw(st.integers(1, self.reserved[name]))
        self.counters.charge_prompt(name, tokens)
        self.reserved[name] -= tokens
        assert self.counters.level(name) == level, "already counted by reserve"
        assert self.counters.served(name) == served + PROMPT_WEIGHT * tokens

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.active()))
        before = self.counters.served(name)
        self.counters.charge_output(name)
        assert self.counters.served(name) == before + OUTPUT_WEIGHT

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.active()))
        if self.present[name] == 1 and self.reserved[name]:
            self.counters.reserve(name, -self.reserved.pop(name))
        before = self.counters.served(name)
        self.present[name] -= 1
        self.counters.remove_sequence(name)
        others = [self.counters.served(other) for other in self.active()]
        if others and not self.present[name] and before > min(others):
            assert self.counters.served(name) == before, "leaving does not reduce the counter"

    @invariant()
    def only_needed_accounts_are_kept(self) -> None:
        kept = self.counters._accounts
        assert kept.keys() >= set(self.active())
        if not self.active():
            assert not kept


TestCounters = CountersMachine.TestCase
TestCounters.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=2, max_size=4),
    places=st.integers(1, 6),
    budget=st.integers(4, 32),
)
@settings(deadline=None, max_examples=60)
def test_backlogged_deltas_get_equal_service(
    tokenizer: Tokenizer, shapes: list[tuple[int, int]], places: int, budget: int
) -> None:
    scheduler = Scheduler(make_cache(places, 128), budget, places)
    longest = max(PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * answer for prompt, answer in shapes)
    for _ in range(150):
        waiting = Counter(sequence.queue_key for sequence in scheduler.waiting)
        for slot, (prompt, answer) in enumerate(shapes):
            for _ in range(waiting[f"digest-{slot}"], places + 1):
                scheduler.add(make_sequence(tokenizer, prompt, slot, max_tokens=answer))
        run_pass(scheduler)
        levels = [scheduler.counters.level(f"digest-{slot}") for slot in range(len(shapes))]
        assert max(levels) - min(levels) <= places * longest
