"""Calibration from files and mixtures: formats, held-out text, invalid input."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from deltadock.compression.calibration.sources import Conversations, excerpt, read_source
from deltadock.compression.calibration.windows import (
    CalibrationSet,
    _split,
    load_calibration,
    read_windows,
)
from deltadock.compression.options import CalibrationOptions, Source
from deltadock.errors import InvalidCalibration, InvalidCheckpoint
from deltadock.openai.chat import Message
from tests.compression.conftest import save_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with only a byte-level tokenizer."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_tokenizer(folder)
    return folder


@pytest.fixture
def chat(checkpoint: Path) -> Path:
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    return checkpoint


def lines(path: Path, records: Sequence[object]) -> Source:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return Source(path)


def load(
    checkpoint: Path, *sources: Source, seed: int = 0, tokens: int = 4096, length: int = 32
) -> CalibrationSet:
    options = CalibrationOptions(tokens, length)
    return load_calibration(sources, checkpoint, 1 << 20, seed, options)


def words(checkpoint: Path, windows: Tensor) -> str:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return str(tokenizer.decode(windows.flatten()))


def numbered(count: int) -> str:
    return "".join(f"{n:05d} " for n in range(count))


def test_text_is_split_into_disjoint_windows(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(numbered(2000))
    calibration = load(checkpoint, Source(path), length=30)
    parts = calibration.train, calibration.choose, calibration.report
    assert [part.shape for part in parts] == [(136, 30), (8, 30), (17, 30)]
    assert calibration.train.dtype == torch.int64
    numbers = [number for part in parts for number in words(checkpoint, part).split()]
    assert len(set(numbers)) == len(numbers), "no part shares text with another"
    assert calibration.tokens == 136 * 30
    assert calibration.sources == [
        {
            "kind": "text",
            "sha256": calibration.sources[0]["sha256"],
            "weight": 1.0,
            "tokens": 136 * 30,
            "choose": 8 * 30,
            "report": 17 * 30,
        }
    ]


def test_the_shortest_text_has_a_window_of_each_part(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(numbered(43)[:256])
    for seed in range(3):
        calibration = load(checkpoint, Source(path), seed=seed)
        parts = calibration.train, calibration.choose, calibration.report
        assert [part.shape for part in parts] == [(14, 16), (1, 16), (1, 16)]
        assert len(torch.cat(parts).unique(dim=0)) == 16


@pytest.mark.parametrize("sizes", [(40, 35, 25), (900, 90, 10), (1, 1, 300), (50,) * 7])
def test_every_part_gets_a_conversation(sizes: tuple[int, ...]) -> None:
    documents = [torch.full((size,), k) for k, size in enumerate(sizes)]
    for seed in range(10):
        parts = _split(Conversations(documents), seed).parts
        held = [set(part.tolist()) for part in parts]
        assert all(held)
        assert set.union(*held) == set(range(len(sizes)))
        assert sum(map(len, held)) == len(sizes), "no conversation is in two parts"
        assert parts[0].numel() >= max(sizes) or parts[0].numel() >= sum(sizes) / 3


def test_the_hash_depends_on_text_seed_and_sizes(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(numbered(2000))
    first, again = (load(checkpoint, Source(path)) for _ in range(2))
    assert first.sha256 == again.sha256
    assert torch.equal(first.train, again.train)
    others = [
        load(checkpoint, Source(path), seed=1),
        load(checkpoint, Source(path), tokens=2048),
        load(checkpoint, Source(path), length=64),
    ]
    assert len({first.sha256, *(other.sha256 for other in others)}) == 4


def test_windows_are_shorter_for_short_contexts_and_short_texts(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(numbered(2000))
    calibration = load_calibration([Source(path)], checkpoint, 24, 0)
    assert calibration.train.shape[1] == 24
    path.write_text(numbered(100))
    assert load(checkpoint, Source(path), length=2048).train.shape[1] == 600 // 16


def test_jsonl_texts_are_concatenated(checkpoint: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "text.jsonl", [{"text": f"line\u2028 {n:04d}"} for n in range(300)])
    calibration = load(checkpoint, source)
    assert calibration.sources[0]["kind"] == "text"
    assert "0001\nline\u2028 0002" in words(checkpoint, read_windows(source.path, checkpoint, 32))


def conversation(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"question {number:04d}?"},
            {"role": "assistant", "content": f"answer {number:04d}!"},
        ]
    }


def test_messages_are_rendered_with_the_chat_template(chat: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "chat.jsonl", [conversation(n) for n in range(60)])
    calibration = load(chat, source)
    assert calibration.sources[0]["kind"] == "conversations"
    text = words(chat, read_windows(source.path, chat, 32))
    assert "[user]question 0003?[end][assistant]answer 0003![end][user]question 0004?" in text


def test_whole_conversations_are_held_out(chat: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "chat.jsonl", [conversation(n) for n in range(200)])
    calibration = load(chat, source)

    def numbers(windows: Tensor) -> set[str]:
        text = words(chat, windows)
        return {
            text[at + 9 : at + 13] for at in range(len(text)) if text.startswith("question ", at)
        }

    train, choose, report = map(
        numbers, (calibration.train, calibration.choose, calibration.report)
    )
    assert len(train) > 5 * len(report) > 5 * len(choose) > 0
    assert not train & choose | train & report | choose & report


def test_equal_lines_count_once(chat: Path, tmp_path: Path) -> None:
    several = [conversation(n) for n in range(50)]
    once, often = (
        load(chat, lines(tmp_path / f"{times}.jsonl", several * times)) for times in (1, 4)
    )
    assert once.sha256 == often.sha256
    texts = [{"text": f"line {n:04d}"} for n in range(300)]
    once, often = (
        load(chat, lines(tmp_path / f"text-{times}.jsonl", texts * times)) for times in (1, 4)
    )
    assert once.sha256 == often.sha256
    with pytest.raises(InvalidCalibration, match="three different"):
        load(chat, lines(tmp_path / "same.jsonl", several[:2] * 50))


def test_a_long_conversation_calibrates_and_short_ones_are_held_out(
    chat: Path, tmp_path: Path
) -> None:
    long = {"messages": [{"role": "user", "content": numbered(1000)}]}
    source = lines(tmp_path / "chat.jsonl", [long, conversation(1), conversation(2)])
    for seed in range(5):
        calibration = load(chat, source, seed=seed)
        asked = [words(chat, part)[:40] for part in (calibration.choose, calibration.report)]
        assert all("question" in text for text in asked)
        assert asked[0] != asked[1]
        assert "question" not in words(chat, calibration.train)


def test_prompts_and_completions_are_joined(checkpoint: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"Q{n:03d}:", "completion": f" A{n:03d}."} for n in range(100)]
    source = lines(tmp_path / "pairs.jsonl", records)
    assert "Q003: A003.Q004: A004." in words(checkpoint, read_windows(source.path, checkpoint, 32))


def test_prompts_may_be_messages(chat: Path, tmp_path: Path) -> None:
    turns = [conversation(n)["messages"] for n in range(60)]
    records = [{"prompt": turn[:1], "completion": turn[1:]} for turn in turns]
    same = [{"messages": turn} for turn in turns]
    first = load(chat, lines(tmp_path / "a.jsonl", records))
    assert first.sha256 == load(chat, lines(tmp_path / "b.jsonl", same)).sha256


TOOL_TEMPLATE = (
    "{% for tool in tools or () %}<{{ tool.function.name }}>{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or () %}{{ call.function.arguments.city }}{% endfor %}"
    "{% endfor %}"
)


def test_messages_are_read_as_nodes_read_them(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    plain = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("Rain", "in Rome?")]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function",
             "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        ]},
    ]  # fmt: skip
    messages = [Message.model_validate(turn).plain() for turn in plain]
    messages[0]["role"] = "system"  # as on nodes, where a template does not know the other
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert expected == "<weather>[system]Be brief.[user]Rain\nin Rome?[assistant]Rome"
    records = [
        {"messages": [*plain, {"role": "tool", "content": str(n)}], "tools": tools}
        for n in range(60)
    ]
    source = lines(tmp_path / "tools.jsonl", records)
    assert source.path is not None
    found = read_source(source.path, tokenizer, seed=0)
    assert isinstance(found, Conversations)
    assert tokenizer.decode(found.documents[7]) == f"{expected}[tool]7"


def test_a_mixture_has_its_proportions(chat: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(numbered(3000))
    talk = lines(tmp_path / "chat.jsonl", [conversation(n) for n in range(500)])
    calibration = load(chat, Source(text, 3.0), Source(talk.path, 1.0))
    assert [source["tokens"] for source in calibration.sources] == [3072, 1024]
    assert [source["choose"] for source in calibration.sources] == [6 * 32, 2 * 32]
    assert [source["report"] for source in calibration.sources] == [12 * 32, 4 * 32]
    assert sum(source["tokens"] for source in calibration.sources) == calibration.tokens
    assert (calibration.choose.numel(), calibration.report.numel()) == (8 * 32, 16 * 32)
    swapped = load(chat, Source(talk.path, 1.0), Source(text, 3.0))
    assert swapped.sha256 != calibration.sha256


def test_a_short_source_is_used_completely(checkpoint: Path, tmp_path: Path) -> None:
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text(numbered(3000))
    short.write_text(numbered(50))
    calibration = load(checkpoint, Source(long), Source(short))
    assert [source["tokens"] for source in calibration.sources] == [2048, 7 * 32]


def test_long_texts_are_sampled_by_seed() -> None:
    text = "".join(f"{n:07d} " for n in range(700_000))
    first, second = excerpt(text, 0), excerpt(text, 1)
    assert len(first) == len(second) == 4_000_000
    assert first == excerpt(text, 0) != second
    assert excerpt("short", 3) == "short"


def test_long_jsonl_files_are_sampled_by_seed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.compression.calibration.sources.MAX_CHARACTERS", 2000)
    records = [{"prompt": f"Q{n:04d}", "completion": f"A{n:04d}"} for n in range(1000)]
    path = lines(tmp_path / "pairs.jsonl", records).path
    first, second = (load(checkpoint, Source(path), seed=seed) for seed in (0, 1))
    assert first.sha256 != second.sha256
    assert first.sha256 == load(checkpoint, Source(path)).sha256
    parts = first.train, first.choose, first.report
    assert 1000 < sum(part.numel() for part in parts) <= 2000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "0 tokens; at least 256"),
        ("a.txt", b"too short", "at least 256"),
        ("a.txt", b"fine " * 99 + b"\xff", "not UTF-8 text .byte 495"),
        ("a.jsonl", b"", "no lines"),
        ("a.jsonl", b"\n \n", "no lines"),
        ("a.jsonl", b"\xff\xfe{}", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', "Line 3 .* `text`"),
        ("a.jsonl", b'{"text": "a"}\n{', "Line 2 .* JSON"),
        ("a.jsonl", b"[" * 100_000, "Line 1 .* JSON"),
        ("a.jsonl", b'["text"]', "Line 1"),
        ("a.jsonl", b'{"text": 7}', "Line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}', "Line 1 .* surrogate"),
        ("a.jsonl", b'{"messages": []}', "Line 1"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}', "Line 1"),
        ("a.jsonl", b'{"messages": "hello"}', "Line 1"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": null}]}', "Line 1 .* 'user'"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "Line 1 .* parts of type text",
        ),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "tool_calls": 7}]}', "`tool_calls`"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}], "tools": 7}', "`tools`"),
        ("a.ndjson", b'{"text": "a"}', "'a.ndjson' is neither"),
        ("a.JSONL", b'{"text": "a"}', "'a.JSONL' is neither"),
        ("chats.json", b"[]", "'chats.json' is neither"),
        ("a.jsonl", b'{"prompt": "a", "completion": [{"role": "x"}]}', "Line 1"),
        ("a.jsonl", b'{"prompt": "a", "completion": null}', "Line 1"),
        ("a.jsonl", b'{"completion": "a"}', "Line 1"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "a", "completion": "b"}', "Line 2 .* has conv"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}', "three different conversations"),
        (
            "a.jsonl",
            b"".join(b'{"prompt": "%d", "completion": "b"}\n' % number for number in range(9)),
            "18 tokens; at least 256",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}', "three different prompts"),
    ],
)
def test_unusable_files_are_rejected(
    checkpoint: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidCalibration, match=said):
        load(checkpoint, Source(path))


def test_messages_need_a_chat_template(checkpoint: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "chat.jsonl", [conversation(n) for n in range(60)])
    with pytest.raises(InvalidCalibration, match=r"Line 1 .* no chat template"):
        load(checkpoint, source)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.nothing.here }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% for %}",
    ],
    ids=["refuses", "undefined", "leaves the sandbox", "no template"],
)
def test_a_failing_template_is_rejected_with_the_line(
    checkpoint: Path, tmp_path: Path, template: str
) -> None:
    (checkpoint / "chat_template.jinja").write_text(template)
    source = lines(tmp_path / "chat.jsonl", [conversation(n) for n in range(60)])
    with pytest.raises(InvalidCalibration, match="template refuses line 1"):
        load(checkpoint, source)


def test_files_too_short_for_a_window_are_rejected(checkpoint: Path, tmp_path: Path) -> None:
    short = [{"prompt": letter, "completion": "b"} for letter in "ac"]
    records = [{"prompt": numbered(100), "completion": ""}, *short]
    source = lines(tmp_path / "pairs.jsonl", records)
    with pytest.raises(InvalidCalibration, match=r"windows of 2 tokens only.* one to report"):
        load(checkpoint, source)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_weights_are_rejected(checkpoint: Path, tmp_path: Path, weight: float) -> None:
    path = tmp_path / "text.txt"
    path.write_text(numbered(500))
    with pytest.raises(InvalidCalibration, match="weight"):
        load(checkpoint, Source(path, weight))


@pytest.mark.parametrize("sizes", [(255, 32), (1 << 25, 32), (4096, 15), (4096, 1 << 18)])
def test_invalid_sizes_are_rejected(
    checkpoint: Path, tmp_path: Path, sizes: tuple[int, int]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(numbered(500))
    with pytest.raises(InvalidCalibration, match="not "):
        load(checkpoint, Source(path), tokens=sizes[0], length=sizes[1])


def test_a_checkpoint_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(numbered(500))
    with pytest.raises(InvalidCheckpoint, match="tokenizer"):
        load(tmp_path, Source(path))


def test_a_tokenizer_that_cannot_be_read_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(InvalidCheckpoint, match="tokenizer cannot be loaded"):
        load(tmp_path)


def test_prompts_alone_cannot_be_read_as_windows(checkpoint: Path, tmp_path: Path) -> None:
    source = lines(tmp_path / "prompts.jsonl", [{"prompt": letter} for letter in "abc"])
    with pytest.raises(InvalidCalibration, match="prompts alone"):
        read_windows(source.path, checkpoint, 32)
