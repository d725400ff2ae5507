"""Offsets of tokens in the text of a completion; streams whose clients leave."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from deltadock.inference.engine.sampler import SampledToken
from deltadock.inference.http.replies import CompletionReply, StreamedReply, _LogprobsWriter
from deltadock.inference.prompts.tokenizer import Tokenizer
from deltadock.openai.completions import CompletionLogprobs, CompletionRequest

PIECES = ["<unk>", "\u2581", "a", "b", "\u2581a", "\u2581b"]


@pytest.mark.parametrize("as_tokens", [False, True])
def test_offsets_where_the_first_space_is_dropped(as_tokens: bool) -> None:
    model = models.BPE(
        {piece: number for number, piece in enumerate(PIECES)},
        [("\u2581", "a"), ("\u2581", "b")],
        unk_token="<unk>",
    )
    fast = FastTokenizer(model)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer({"tokenizer.json": fast.to_str()})
    prompt = tokenizer.encode("ab a")
    writer, scores = _LogprobsWriter(tokenizer, hidden=True), CompletionLogprobs()
    writer.add_prompt(scores, [*map(SampledToken, prompt)], prompt if as_tokens else "ab a")
    writer.add(scores, [SampledToken(5)])
    assert scores.tokens == [" a", "b", " a", " b"]
    assert scores.text_offset == [0, 1, 2, 4]


class Cancellable:
    """A generation without events that counts its cancellations."""

    prompt_tokens, cancelled = 1, 0

    async def events(self) -> AsyncGenerator[Any]:
        raise AssertionError("the client has left before")
        yield

    def cancel(self) -> None:
        self.cancelled += 1


def test_a_client_that_leaves_before_the_first_event_ends_the_generation() -> None:
    """While the socket is full of an earlier answer, the head of this one waits."""
    generation = Cancellable()
    request = CompletionRequest(model="m", prompt="a", stream=True)
    reply: Any = CompletionReply(request, generation)  # type: ignore[arg-type]

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(StreamedReply(reply)(scope, receive, send))
    assert generation.cancelled
