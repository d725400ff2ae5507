"""Incremental decoding: characters spread over tokens, stop strings across token boundaries."""

import json
import threading
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from deltadock.errors import InvalidArtifact, InvalidInput, UnsupportedModel
from deltadock.inference.prompts.tokenizer import (
    MARKUP,
    REPLACEMENT,
    SamplingDefaults,
    TextStream,
    Tokenizer,
    _StopFinder,
)


def stream(
    tokenizer: Tokenizer, prompt: str, answer: str, stop: tuple[str, ...]
) -> tuple[list[str], bool]:
    """The pieces of text of `answer` after `prompt`, and whether a stop string was found."""
    stream = TextStream(tokenizer, tokenizer.encode(prompt), stop)
    pieces = []
    for token in tokenizer.encode(answer):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream.stopped


@given(prompt=st.text(max_size=20), answer=st.text(max_size=60))
def test_the_pieces_concatenate_to_the_text(tokenizer: Tokenizer, prompt: str, answer: str) -> None:
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


def test_a_character_is_held_back_until_it_is_complete(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, "", "a€b", ())
    assert pieces == ["a", "", "", "€", "b", ""]


def test_an_incomplete_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [], ())
    pieces = [stream.push(token) for token in tokenizer.encode("a€")[:-1]]
    assert pieces == ["a", "", ""]
    assert stream.finish() == REPLACEMENT


@given(st.binary(max_size=120), st.sampled_from([b"", b"\xe2", b"\xe2\x82", b"\xf0\x9f"]))
@example(b"\xe2" * 40 + b"\x82\xac", b"")
def test_bytes_that_are_no_text_are_replaced_as_they_come(
    tokenizer: Tokenizer, answer: bytes, again: bytes
) -> None:
    by_byte = {tokenizer.token_bytes(token): token for token in range(256)}
    tokens = [by_byte[bytes([byte])] for byte in answer + again * 50]
    stream = TextStream(tokenizer, [], ())
    pieces = [stream.push(token) for token in tokens]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(tokens)
    assert max(map(len, pieces), default=0) <= 34


def seconds_of(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> float:
    """CPU time of decoding."""
    stream = TextStream(tokenizer, [], stop)
    begun = time.thread_time()
    for token in tokens:
        stream.push(token)
    assert not stream.stopped
    return time.thread_time() - begun


@pytest.mark.parametrize("kind", ["byte", "special", "unknown"])
def test_tokens_without_text_take_no_more_time_the_more_there_are(
    tokenizer: Tokenizer, kind: str
) -> None:
    """All sequences share the thread that decodes."""
    token = {"byte": tokenizer.encode("€")[0], "special": 258, "unknown": 5000}[kind]
    assert seconds_of(tokenizer, [token] * 8000) < 1


def test_stop_strings_take_no_more_time_the_longer_they_are(tokenizer: Tokenizer) -> None:
    letter = tokenizer.encode("a")
    almost = tuple("a" * 2000 + "b" * number for number in range(1, 16))
    assert seconds_of(tokenizer, letter * 8000, ("a" * 9000, *almost)) < 1


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=6), st.integers(1, 4))
def test_a_stop_string_is_found_where_it_first_ends(text: str, stop: str, size: int) -> None:
    finder = _StopFinder(stop)
    for begin in range(0, len(text), size):
        end = finder.find_end(text[begin : begin + size])
        whole = text[: begin + size]
        if end is not None:
            assert whole[: begin + end].endswith(stop)
            assert whole.find(stop) == begin + end - len(stop)
            return
        assert stop not in whole
        overlaps = (length for length in range(len(stop)) if whole.endswith(stop[:length]))
        assert finder.matched == max(overlaps)


def test_text_that_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    pieces, stopped = stream(tokenizer, "", "a<b<end>c", ("<end>",))
    assert pieces == ["a", "", "<b", "", "", "", "", "", ""]
    assert stopped


def test_a_stop_string_found_at_the_end_ends_the_text(tokenizer: Tokenizer) -> None:
    for stop in (REPLACEMENT, "b" + REPLACEMENT):
        stream = TextStream(tokenizer, [], (stop,))
        pieces = [stream.push(token) for token in tokenizer.encode("ab€")[:-1]]
        pieces.append(stream.finish())
        assert "".join(pieces) == "ab".removesuffix(stop[:-1])
        assert stream.stopped


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama's: `▁` is a space, and characters outside the vocabulary are byte tokens."""
    pieces = ["<unk>", "<s>", "▁", "a", "b", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    tokenizer = FastTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return Tokenizer({"tokenizer.json": tokenizer.to_str()})


CHARACTERS = st.text("ab é€😀👍", max_size=12)


@given(prompt=CHARACTERS, answer=CHARACTERS)
@example(prompt="😀😀", answer="😀 a👍b")
@example(prompt="", answer="😀")
def test_byte_fallback_tokens_become_whole_characters(
    byte_fallback: Tokenizer, prompt: str, answer: str
) -> None:
    prefix, whole = (byte_fallback.encode(text) for text in (prompt, prompt + answer))
    stream = TextStream(byte_fallback, prefix, ())
    pieces = [stream.push(token) for token in whole[len(prefix) :]]
    assume(whole[: len(prefix)] == prefix)
    assert "".join([*pieces, stream.finish()]) == answer


def test_an_invalid_byte_does_not_garble_the_text_before_it(byte_fallback: Tokenizer) -> None:
    euro, smile = byte_fallback.encode("€")[1:], byte_fallback.encode("😀")[1:]
    stream = TextStream(byte_fallback, byte_fallback.encode("a"), ())
    pieces = [stream.push(token) for token in (*euro, *smile[:2], 3, *smile)]
    assert "".join([*pieces, stream.finish()]) == f"€{2 * REPLACEMENT}a😀"


@pytest.mark.parametrize("kind", ["tokenizer", "byte_fallback"])
def test_a_prompt_may_end_inside_a_character(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    *start, last = tokenizer.encode("a€")
    completed = TextStream(tokenizer, start, ())
    assert completed.push(last) == "€"
    broken = TextStream(tokenizer, start, ())
    assert "".join([*map(broken.push, tokenizer.encode("b")[-1:]), broken.finish()]) == "b"


def test_a_prompts_trailing_replacement_character_is_not_part_of_the_answer(
    tokenizer: Tokenizer,
) -> None:
    pieces, _ = stream(tokenizer, f"a{REPLACEMENT}", "bc", ())
    assert "".join(pieces) == "bc"


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
def test_eos_ids_come_from_the_generation_config(
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
def test_sampling_defaults_come_from_the_generation_config(
    tokenizer_json: str, config: dict[str, object], expected: SamplingDefaults
) -> None:
    files = {"tokenizer.json": tokenizer_json, "generation_config.json": json.dumps(config)}
    assert Tokenizer(files).defaults == expected


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="half a surrogate pair"):
        tokenizer.encode("a\ud800")


def test_a_long_text_does_not_stop_other_threads(tokenizer: Tokenizer) -> None:
    encoding = threading.Thread(target=tokenizer.encode, args=("some words " * 30_000,))
    turns = 0
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10, "one or two, if it kept the interpreter's lock"


def test_truncation_in_the_tokenizer_file_is_ignored(tokenizer_json: str) -> None:
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


@pytest.fixture(scope="module")
def with_markup() -> Tokenizer:
    """A byte-level tokenizer with control tokens, markup and its own end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = FastTokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", *MARKUP])
    config = {"eos_token": "<|im_end|>"}
    return Tokenizer(
        {
            "tokenizer.json": tokenizer.to_str(),
            "tokenizer_config.json": json.dumps(config),
            "generation_config.json": json.dumps({"eos_token_id": 7}),
        }
    )


def test_the_tokenizers_end_token_ends_an_answer_too(with_markup: Tokenizer) -> None:
    """A chat fine-tune's generation config often names the base's end token only."""
    [end] = with_markup.encode("<|im_end|>")
    assert with_markup.eos_ids == {7, end}


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_end|>", "a"),
        ("a<|im_end|>", ""),
        ("<|im_end|>b", "a"),
        ("im_end|>b<tool", "a"),
        ("b<tool_call>", "a"),
        ("nothing", "ab<tool_call>c</tool_call>"),
    ],
)
def test_stop_strings_may_contain_special_tokens(
    with_markup: Tokenizer, stop: str, text: str
) -> None:
    """Control tokens are omitted from the answer; markup that clients parse is not."""
    answer = "a<|im_end|>b<tool_call>c</tool_call>"
    pieces, stopped = stream(with_markup, "<|im_start|>", answer, (stop,))
    assert stopped == (stop != "nothing")
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    "answer",
    [
        "[THINK]a[/THINK][TOOL_CALLS]f[CALL_ID]x[ARGS]{}",
        "<|tool_call|>[]<|/tool_call|>",
        "<function_calls>f()</function_calls>",
        "<start_function_call>call:f{a:<escape>b<escape>}<end_function_call>",
    ],
)
def test_markup_of_calls_and_thoughts_is_part_of_the_answer(
    with_markup: Tokenizer, answer: str
) -> None:
    tokens = with_markup.encode(answer)
    assert len(tokens) < len(answer)
    pieces, _ = stream(with_markup, "<|im_start|>", answer, ())
    assert "".join(pieces) == answer


def test_special_tokens_are_shown_on_request(with_markup: Tokenizer) -> None:
    stream = TextStream(with_markup, [], (), skip_special_tokens=False)
    tokens = with_markup.encode("a<|im_end|>b")
    assert "".join([*map(stream.push, tokens), stream.finish()]) == "a<|im_end|>b"


@given(text=st.text(max_size=30))
def test_the_tokens_bytes_concatenate_to_the_text(with_markup: Tokenizer, text: str) -> None:
    tokens = with_markup.encode(text)
    assert b"".join(map(with_markup.token_bytes, tokens)) == text.encode()


def test_tokens_that_differ_in_a_space_have_different_texts(byte_fallback: Tokenizer) -> None:
    assert [byte_fallback.token_text(token) for token in (3, 5)] == ["a", " a"]
    euro = byte_fallback.encode("€")[-3:]
    assert b"".join(map(byte_fallback.token_bytes, euro)) == "€".encode()
    assert byte_fallback.token_text(euro[0]) == r"bytes:\xe2"
