"""Text comes out whole: characters spread over tokens, stop strings across token borders."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.errors import InvalidArtifact, InvalidInput, UnsupportedModel
from deltadock.inference.prompts.generation_config import SamplingDefaults
from deltadock.inference.prompts.tokenizer import TextStream, Tokenizer


def stream(
    tokenizer: Tokenizer, prompt: str, answer: str, stop: tuple[str, ...]
) -> tuple[list[str], bool]:
    """The pieces that come out when `answer` follows `prompt`, and whether it was stopped."""
    stream = TextStream(tokenizer, tokenizer.encode(prompt), stop)
    pieces = []
    for token in tokenizer.encode(answer):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream.stopped


@given(prompt=st.text(max_size=20), answer=st.text(max_size=60))
def test_the_pieces_make_up_the_text(tokenizer: Tokenizer, prompt: str, answer: str) -> None:
    pieces, stopped = stream(tokenizer, prompt, answer, ())
    assert "".join(pieces) == answer
    assert not stopped


@given(
    answer=st.text("abäß", max_size=40),
    stop=st.lists(st.text("abäß", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string(
    tokenizer: Tokenizer, answer: str, stop: list[str]
) -> None:
    pieces, stopped = stream(tokenizer, "x", answer, tuple(stop))
    text = "".join(pieces)
    assert stopped == any(part in answer for part in stop)
    assert not any(part in text for part in stop)
    assert answer.startswith(text)
    if stopped:
        assert any(answer[len(text) :].startswith(part) for part in stop)
    else:
        assert text == answer


def test_a_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, "", "a€b", ())
    assert pieces == ["a", "", "", "€", "b", ""]


def test_a_character_that_never_becomes_whole_is_told_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], ())
    pieces = [stream.push(token) for token in tokenizer.encode("a€")[:-1]]
    assert pieces == ["a", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    pieces, stopped = stream(tokenizer, "", "a<b<end>c", ("<end>",))
    assert pieces == ["a", "", "<b", "", "", "", "", "", ""]
    assert stopped


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 2}}, {2}),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {}}, {2}),
        (
            {
                "config.json": {"eos_token_id": 2},
                "generation_config.json": {"eos_token_id": [3, 4]},
            },
            {3, 4},
        ),
    ],
)
def test_the_generation_config_names_the_end(
    tokenizer_json: str, files: dict[str, object], expected: set[int]
) -> None:
    texts = {name: json.dumps(content) for name, content in files.items()}
    assert Tokenizer({"tokenizer.json": tokenizer_json, **texts}).eos_ids == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, SamplingDefaults(0.6, 0.95, 20)),
        ({"do_sample": True, "min_p": 0.1, "temperature": None}, SamplingDefaults(min_p=0.1)),
        ({"do_sample": False, "temperature": 0.6}, SamplingDefaults(temperature=0.0)),
        ({"repetition_penalty": 1.05}, SamplingDefaults(repetition_penalty=1.05)),
        (
            {"do_sample": False, "repetition_penalty": 1.05},
            SamplingDefaults(temperature=0.0, repetition_penalty=1.05),
        ),
        ({"repetition_penalty": 0}, SamplingDefaults()),
        ({"temperature": "hot", "top_p": 7, "top_k": -1, "min_p": True}, SamplingDefaults()),
    ],
)
def test_the_generation_config_says_how_to_sample(
    tokenizer_json: str, config: dict[str, object], expected: SamplingDefaults
) -> None:
    files = {"tokenizer.json": tokenizer_json, "generation_config.json": json.dumps(config)}
    assert Tokenizer(files).defaults == expected


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="half a surrogate pair"):
        tokenizer.encode("a\ud800")


def test_a_truncating_tokenizer_file_truncates_nothing(tokenizer_json: str) -> None:
    settings = json.loads(tokenizer_json) | {
        "truncation": {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    }
    assert len(Tokenizer({"tokenizer.json": json.dumps(settings)}).encode("abcdef")) == 6


def test_unreadable_tokenizers_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        Tokenizer({})
    with pytest.raises(InvalidArtifact, match="tokenizer"):
        Tokenizer({"tokenizer.json": '{"version": "1.0"}'})
