"""A chat fine-tune with added tokens, served beside its base."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from tests.inference.conftest import VOCABULARY
from tests.inference.support import (
    PROMPT,
    RunningNode,
    Site,
    expected_text,
    start,
    write_delta,
)

BEGIN, END, CALL = range(VOCABULARY, VOCABULARY + 3)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK: Any = [{"role": "user", "content": "Hällo"}]


@dataclass
class Chatty:
    """A delta that adds two special tokens and one of plain text, and its merged checkpoint."""

    artifact: str
    folder: Path

    def tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(prompt)
        return ids

    def text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    @property
    def _tokenizer(self) -> Any:
        return PreTrainedTokenizerFast(tokenizer_file=str(self.folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def chatty(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Chatty:
    home, base = tmp_path_factory.mktemp("chatty"), site.home / "base-0"
    tokenizer = FastTokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<call>", normalized=False)])
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": VOCABULARY + 3}
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps({"eos_token_id": END}),
        "chat_template.jinja": TEMPLATE,
    }
    rng = np.random.default_rng(0)
    added = {
        name: rng.normal(0, scale, (3, 32)).astype(np.float32)
        for name, scale in (("model.embed_tokens.weight", 0.5), ("lm_head.weight", 0.8))
    }
    path, digest = home / "a.delta", scan_folder(base).weights_digest
    write_delta(path, site.models[None], digest, 7, added=added, **files)
    merge(base, path, home / "merged")
    return Chatty(site.blobs.put_file(path), home / "merged")


@pytest.fixture(scope="module")
def node(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with start(site, tmp_path_factory.mktemp("home")) as running:
        yield running


def test_chat_with_added_tokens(
    site: Site, node: RunningNode, chatty: Chatty, generate: Any
) -> None:
    """The answer contains added tokens and ends with one; the base's answers do not change."""
    prompt = "<|im_start|>user\nHällo<|im_end|>\n<|im_start|>assistant\n"
    ids = chatty.tokens(prompt)
    assert [token for token in ids if token >= VOCABULARY] == [BEGIN, END, BEGIN]
    model = AutoModelForCausalLM.from_pretrained(chatty.folder)
    answer = generate(model, ids, 60)
    answer = answer[: answer.index(END)]
    assert {BEGIN, CALL} <= set(answer)

    async def ask(artifact: str | None) -> Any:
        headers = {"Deltadock-Base": site.base}
        if artifact is not None:
            headers["Deltadock-Artifact"] = artifact
        async with openai.AsyncOpenAI(
            base_url=f"{node.url}/v1", api_key="none", default_headers=headers, max_retries=0
        ) as client:
            arguments: Any = {"model": "m", "temperature": 0, "max_tokens": 60}
            if artifact == chatty.artifact:
                return await client.chat.completions.create(messages=TALK, **arguments)
            return await client.completions.create(prompt=PROMPT, **arguments)

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*map(ask, (None, chatty.artifact, site.artifacts[0])))

    base, chat, plain = asyncio.run(ask_all())
    assert chat.choices[0].message.content == chatty.text(answer)
    assert chat.choices[0].finish_reason == "stop"
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (len(ids), len(answer) + 1)
    assert "<call>" in chat.choices[0].message.content
    assert "<|im" not in chat.choices[0].message.content
    assert base.choices[0].text == expected_text(site, None, generate, 60)
    assert plain.choices[0].text == expected_text(site, site.artifacts[0], generate, 60)


def test_added_tokens_are_valid_for_their_delta_only(
    site: Site, node: RunningNode, chatty: Chatty
) -> None:
    arguments: Any = {"model": "m", "max_tokens": 1}
    with node.client(site.base, chatty.artifact) as client:
        assert client.completions.create(prompt=[CALL, 1, BEGIN], **arguments).choices
    for artifact, tokens, most in (
        (None, [BEGIN], VOCABULARY - 1),
        (site.artifacts[0], [1, CALL], VOCABULARY - 1),
        (chatty.artifact, [CALL + 1], CALL),
    ):
        with (
            node.client(site.base, artifact) as client,
            pytest.raises(openai.BadRequestError, match=rf"the model has 0 to {most}\."),
        ):
            client.completions.create(prompt=tokens, **arguments)


def test_an_adapter_without_config_gets_its_vocabulary_from_its_rows(
    site: Site, node: RunningNode, tmp_path: Path
) -> None:
    """Without a config.json, the number of added rows is the number of added tokens."""
    rows = np.ones((2, 32), np.float32)
    added = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), rows)
    digest = scan_folder(site.home / "base-0").weights_digest
    path = write_delta(tmp_path / "a.delta", site.models[None], digest, 8, added=added)
    with node.client(site.base, site.blobs.put_file(path)) as client:
        assert client.completions.create(model="m", prompt=[END, 1], max_tokens=1).choices
        with pytest.raises(openai.BadRequestError, match=rf"the model has 0 to {END}\."):
            client.completions.create(model="m", prompt=[CALL], max_tokens=1)
