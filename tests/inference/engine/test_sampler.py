"""Sampling a batch equals sampling each row alone, by the rules of transformers and OpenAI."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltadock.inference.engine.sampler import sample_tokens
from deltadock.inference.engine.sampling import (
    SampledToken,
    SamplingParams,
    SamplingRow,
    make_draws,
)
from deltadock.inference.model.added_tokens import PADDING, Logits
from tests.inference.engine import row_sampler
from tests.inference.operators import counted_operators

VOCABULARY = 97
PROMPT, ANSWER = [3, 3, 5, 8], [5, 9, 9, 9, 11]
GREEDY = SamplingRow(SamplingParams(temperature=0))


class Numbers:
    """A random number that is given."""

    def __init__(self, value: float) -> None:
        self.value = value

    def at(self, position: int) -> float:
        return self.value


class Allowed:
    """A matcher that allows the same tokens at every step."""

    def __init__(self, allowed: Iterable[int]) -> None:
        self.ids = list(allowed)

    def fill(self, words: Any) -> None:
        for token in self.ids:
            if token < 32 * len(words):
                words[token // 32] |= np.uint32(1 << token % 32).view(np.int32)


def make_row(
    params: SamplingParams,
    tokens: list[int] | None = None,
    prompt_length: int = 0,
    draws: Any = None,
    matcher: Any = None,
) -> SamplingRow:
    counts = params.token_counts(prompt_length)
    return SamplingRow(params, tokens or [], prompt_length, draws, counts, matcher)


def padded(rows: list[Tensor]) -> Logits:
    """Logits of rows with these vocabularies."""
    lengths = [len(row) for row in rows]
    values = torch.full((len(rows), max(lengths)), PADDING)
    for row, logits in zip(values, rows, strict=True):
        row[: len(logits)] = logits
    return Logits(values, lengths)


def ids(sampled: list[Any]) -> list[int]:
    return [token.id for token in sampled]


def random_logits(seed: int, length: int = VOCABULARY, scale: float = 2) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_match_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Random numbers at equal distances sample each token as often as its probability says."""
    logits = random_logits(0)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = scores[0].softmax(-1)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    count = 1000
    rows = [make_row(params, draws=Numbers((n + 0.5) / count)) for n in range(count)]
    drawn = ids(sample_tokens(padded([logits] * count), rows))
    shares = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY) / count
    torch.testing.assert_close(shares, expected, rtol=0, atol=1.01 / count)
    assert not shares[expected == 0].any()


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("logit_bias", [{}, {5: 100.0, 9: -100.0, 20: 0.5}])
def test_bias_and_repetition_penalty_match_transformers(
    repetition_penalty: float, logit_bias: dict[int, float]
) -> None:
    logits = random_logits(0)
    expected, tokens = logits[None], torch.tensor([PROMPT + ANSWER])
    if logit_bias:
        biases = [[[token], bias] for token, bias in logit_bias.items()]
        expected = SequenceBiasLogitsProcessor(biases)(tokens, expected)
    expected = RepetitionPenaltyLogitsProcessor(repetition_penalty)(tokens, expected)
    params = SamplingParams(repetition_penalty=repetition_penalty, logit_bias=logit_bias)
    torch.testing.assert_close(edited(logits, params, ANSWER), expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("frequency", [0, 0.5, -2.0])
@pytest.mark.parametrize("presence", [0, 1.5, -0.25])
@pytest.mark.parametrize("answer", [[], ANSWER])
def test_frequency_and_presence_penalties_match_openais_formula(
    frequency: float, presence: float, answer: list[int]
) -> None:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c of the answer alone."""
    logits = random_logits(0)
    expected = logits.clone()
    for token, count in Counter(answer).items():
        expected[token] += -count * frequency - float(count > 0) * presence
    params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
    torch.testing.assert_close(edited(logits, params, answer), expected)


def edited(logits: Tensor, params: SamplingParams, answer: list[int]) -> Tensor:
    """What sampling makes of the logits that follow `PROMPT` and this answer."""
    from deltadock.inference.engine.sampler import _edit
    from deltadock.inference.engine.sampling_batch import SamplingBatch

    row = make_row(params, PROMPT + answer, len(PROMPT))
    batch = SamplingBatch([GREEDY, row], [len(logits)] * 2, len(logits))
    both = torch.stack([logits, logits])
    plain, changed = _edit(both, batch.to(both.device))
    torch.testing.assert_close(plain, logits, rtol=0, atol=0)
    return changed


LENGTHS = (VOCABULARY, VOCABULARY + 3, VOCABULARY + 40)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-40, 0.5, 1.0, 1.9]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 0, 1, 5, VOCABULARY - 1, VOCABULARY, 500]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.1, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.3]),
    presence_penalty=st.sampled_from([0.0, 0.3, -0.6]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-9, 9, width=32)),
    seed=st.integers(-9, 9),
    logprobs=st.sampled_from([None, None, 0, 3]),
)
CASES = st.tuples(
    PARAMS,
    st.sampled_from(LENGTHS),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    st.one_of(st.none(), st.sets(st.integers(0, max(LENGTHS) + 99), min_size=1)),
    st.sampled_from([0.0] * 7 + [torch.nan, torch.inf, -torch.inf]),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(CASES, min_size=1, max_size=7), st.integers(0, 2**31))
def test_a_batch_equals_its_rows(cases: list[Any], seed: int) -> None:
    """Three steps of any mixture of settings, vocabularies, grammars and broken rows."""
    rows, generators, sequences = [], [], []
    for params, _, prompt, allowed, _ in cases:
        tokens = list(prompt)
        matcher = None if allowed is None else Allowed({*allowed, 0})
        rows.append(make_row(params, tokens, len(prompt), make_draws(params, 0), matcher))
        sequences.append(tokens)
        generators.append(torch.Generator().manual_seed(params.seed % 2**63))
    for step in range(3):
        logits = []
        for number, (_, length, _, _, broken) in enumerate(cases):
            values = random_logits(seed + 100 * step + number, length)
            values[number] += broken
            logits.append(values)
        sampled = sample_tokens(padded(logits), rows)
        for values, token, case, tokens, generator in zip(
            logits, sampled, cases, sequences, generators, strict=True
        ):
            params, length, prompt, allowed, broken = case
            if broken != 0:
                assert isinstance(token, FloatingPointError)
                tokens.append(0)  # generators advance with the sequence
                if generator is not None:
                    torch.rand((), generator=generator)
                continue
            mask = None
            if allowed is not None:
                mask = torch.zeros(length, dtype=torch.bool)
                mask[[item for item in {*allowed, 0} if item < length]] = True
            expected = row_sampler.sample(
                values,
                params,
                tokens,
                len(prompt),
                generator=None if params.temperature < 1e-5 else generator,
                allowed=mask,
            )
            assert isinstance(token, SampledToken)
            assert token.id == expected.id
            assert [item for item, _ in token.top] == [item for item, _ in expected.top]
            scores = [(it.logprob, *(score for _, score in it.top)) for it in (token, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-6)
            tokens.append(token.id)


TIED = [
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(temperature=0.8, seed=2, top_k=5),
    SamplingParams(temperature=1.5, seed=3, top_p=0.6),
    SamplingParams(temperature=1.5, seed=4, top_k=40, min_p=0.1),
]


@pytest.mark.parametrize("params", TIED)
def test_a_token_depends_on_no_other_row(params: SamplingParams) -> None:
    """Nor on the rows' order or padding; though many logits are equal, as those of bfloat16 are."""
    others = [*TIED, SamplingParams(top_p=0.99), SamplingParams(top_k=VOCABULARY - 1)]
    crowd = [(random_logits(9 + n, VOCABULARY + 20 * n), it) for n, it in enumerate(others)]

    def tokens(before: int, after: int) -> list[int]:
        sequence: list[int] = []
        row = make_row(params, sequence, 0, make_draws(params, 0))
        found = []
        for step in range(40):
            mine = random_logits(step).round()
            batch = [*crowd[:before], (mine, None), *crowd[len(crowd) - after :]]
            rows = [
                row if it is None else make_row(it, draws=make_draws(it, step)) for _, it in batch
            ]
            found.append(ids(sample_tokens(padded([logits for logits, _ in batch]), rows))[before])
            sequence.append(0)
        return found

    alone = tokens(0, 0)
    assert len(set(alone)) > 1
    assert tokens(0, 6) == tokens(3, 1) == tokens(2, 0) == alone


def test_equal_logits_are_ranked_by_id() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[[7, 50]] = 1
    for number, token in ((0.01, 7), (0.49, 50), (0.75, 0), (0.99, 1)):
        params = SamplingParams(top_k=4)
        sampled = sample_tokens(
            Logits(logits[None], [VOCABULARY]), [make_row(params, draws=Numbers(number))]
        )
        assert ids(sampled) == [token]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_penalties_change_the_sample_but_not_the_log_probability(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    params = SamplingParams(temperature=temperature, logit_bias={2: 100.0}, logprobs=1)
    row = make_row(params, [0], 1, make_draws(params, 0))
    biased, plain = sample_tokens(padded([logits, logits]), [row, GREEDY])
    assert isinstance(biased, SampledToken)
    assert biased.id == 2
    assert biased.logprob == pytest.approx(float(logits.log_softmax(-1)[2]))
    assert biased.top[0][0] == 0
    assert plain == SampledToken(0), "a bias affects its own row only"


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert make_draws(SamplingParams(temperature=temperature), 0) is None


def test_unseeded_requests_differ() -> None:
    first, second = (make_draws(SamplingParams(), 0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert [first.at(n) for n in range(4)] != [second.at(n) for n in range(4)]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_the_numbers_of_a_seed_are_those_of_a_generator(seed: int) -> None:
    """One at a time, for any 64-bit seed and choice."""
    draws = make_draws(SamplingParams(seed=seed), 3)
    assert draws is not None
    generator = torch.Generator().manual_seed((seed + 3) % 2**63)
    for position in range(100):
        expected = torch.rand((), generator=generator, dtype=torch.float64)
        assert draws.at(position) == draws.at(position) == float(expected)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.9)])
def test_tokens_without_probability_are_never_sampled(
    params: SamplingParams, number: float
) -> None:
    logits = torch.zeros(VOCABULARY)
    allowed = Allowed(range(5, 90))
    row = make_row(params, draws=Numbers(number), matcher=allowed)
    assert ids(sample_tokens(padded([logits, torch.zeros(200)]), [row, GREEDY]))[0] in allowed.ids


class BrokenMatcher:
    """A grammar whose matcher fails."""

    def fill(self, words: Any) -> None:
        raise RuntimeError("a fault")


@pytest.mark.parametrize(
    "broken",
    [
        make_row(SamplingParams(temperature=0), matcher=BrokenMatcher()),
        make_row(SamplingParams(temperature=0, logit_bias={VOCABULARY: 1.0})),
        make_row(SamplingParams(temperature=0, logit_bias={-1: 1.0})),
        make_row(SamplingParams(temperature=0, logprobs=VOCABULARY + 1)),
    ],
)
def test_a_row_that_cannot_be_sampled_fails_alone(broken: SamplingRow) -> None:
    logits = [random_logits(n) for n in range(3)]
    rows = [GREEDY, broken, GREEDY]
    first, failed, last = sample_tokens(padded(logits), rows)
    assert [first, last] == [SampledToken(int(logits[n].argmax())) for n in (0, 2)]
    assert isinstance(failed, RuntimeError | ValueError)


MIXTURES = {
    "greedy": [SamplingParams(temperature=0)],
    "drawn": [SamplingParams()],
    "top_k": [SamplingParams(top_k=20, top_p=0.8, repetition_penalty=1.05)],
    "top_p": [SamplingParams(top_p=0.9)],
    "everything": [
        SamplingParams(temperature=0, logprobs=5),
        SamplingParams(frequency_penalty=0.3, presence_penalty=0.1, logit_bias={4: 2.0}),
        SamplingParams(top_p=0.8, logprobs=2),
        SamplingParams(top_k=20, min_p=0.1, repetition_penalty=1.1),
    ],
}
BOUNDS = {"greedy": 5, "drawn": 25, "top_k": 55, "top_p": 45, "everything": 95}
"""Operators of a step."""


@pytest.mark.parametrize("mixture", MIXTURES)
def test_operators_and_copies_of_a_step_do_not_depend_on_the_rows(
    mixture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for rows in (len(MIXTURES[mixture]), 16):
        params = MIXTURES[mixture] * (rows // len(MIXTURES[mixture]))
        matcher: Any = Allowed(range(50)) if mixture == "everything" else None
        batch = [make_row(it, PROMPT + ANSWER, 4, make_draws(it, 0), matcher) for it in params]
        logits = padded([random_logits(n) for n in range(rows)])
        sample_tokens(logits, batch)  # draws more random numbers than one
        with torch.inference_mode(), counted_operators(monkeypatch) as counted:
            sample_tokens(logits, batch)
        assert counted.reads == 1
        counts.append(counted.by_name)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= BOUNDS[mixture]
