"""Counts the tokens of a forwarded answer, as the node reports them."""

import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Final, Self

import anyio
import httpx

from deltadock.api.access import Caller
from deltadock.api.access.rates import Rates, Reservation
from deltadock.api.dependencies import Resources
from deltadock.model_target import ModelTarget
from deltadock.openai.fields import PROMPT_TOKENS_HEADER

ANSWER_TOKENS: Final = 1024
"""Reserved for an answer whose length the request does not bound."""
TOKEN_CHARACTERS: Final = 4
"""Of a request's JSON, about."""
RESPONSE_DELTA: Final = re.compile(
    rb'"type": ?"response\.(output_text|function_call_arguments)\.delta"'
)
"""In the data of events that have a token of /v1/responses."""
WHOLE_USAGE: Final = re.compile(rb'"total_tokens": ?(\d+)\}\}\s*\Z')
"""At the end of a whole answer."""
USAGE_BYTES: Final = 64
ASK_SECONDS: Final = 5.0
"""How long a node is asked for the usage of an answer that nobody waits for."""


class Meter:
    """Passes an answer on, and charges its tokens to the caller's tenant.

    What it may take is reserved while it lasts, so that answers at once keep the limit together.

    A stream reports its usage in a last chunk, which the client sees if it has asked for it. One
    that is broken off before that is charged its prompt, which its head names, and a token per
    chunk. If the client leaves before the answer has begun, the node says what it has made of it.
    """

    @classmethod
    @asynccontextmanager
    async def of(
        cls, resources: Resources, caller: Caller, target: ModelTarget, body: dict[str, Any]
    ) -> AsyncIterator[Self | None]:
        """A meter for the request of a caller whose tokens are limited.

        It is charged if the block raises; else whoever ends the answer charges it.

        Raises:
            RateLimited: too much is used or reserved.
        """
        if caller.tokens_per_minute is None:
            yield None
            return
        most = _most_tokens(body, await resources.fleet.longest_context(target))
        reserved = await resources.rates.reserve_tokens(caller, most)
        meter = cls(resources.rates, caller, body, reserved)
        try:
            yield meter
        except BaseException:
            await meter.charge()
            raise

    def __init__(
        self, rates: Rates, caller: Caller, body: dict[str, Any], reserved: Reservation
    ) -> None:
        """Ask the node for the usage of a stream, by changing `body`."""
        self.name = secrets.token_hex(16)
        """The request's, for the nodes."""
        self._rates = rates
        self._caller = caller
        self._reserved = reserved
        self._is_stream = bool(body.get("stream"))
        self._tokens = 0
        self._hides_usage = False
        if self._is_stream and "input" not in body:  # a response's last event has it anyway
            options = body.get("stream_options") or {}
            self._hides_usage = not options.get("include_usage")
            body["stream_options"] = {**options, "include_usage": True}

    def begin(self, head: httpx.Headers) -> None:
        """A node has begun its answer: another's, which broke off before it, no longer counts."""
        self._tokens = int(head.get(PROMPT_TOKENS_HEADER, 0))

    async def end(self, http: httpx.AsyncClient, node: str, headers: Mapping[str, str]) -> None:
        """End the request at the node with this URL, whose client is gone, and charge for it."""
        url = f"{node}/v1/generations/{self.name}"
        with anyio.CancelScope(shield=True), suppress(httpx.HTTPError):
            answer = await http.delete(url, headers=headers, timeout=ASK_SECONDS)
            if answer.status_code == HTTPStatus.OK:
                self._tokens = answer.json()["total_tokens"]
        await self.charge()

    def measure(self, tokens: int) -> None:
        """A whole answer took so many tokens."""
        self._tokens = tokens

    async def charge(self) -> None:
        """Charge what is known and not yet charged, once the answer has ended or is broken off."""
        tokens, self._tokens = self._tokens, 0
        reserved, self._reserved = self._reserved, Reservation(0, 0.0)
        with anyio.CancelScope(shield=True):
            await self._rates.settle_tokens(self._caller, reserved, tokens)

    async def pass_on(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The answer, for the client; a complete one is charged before the client sees its end."""
        if self._is_stream:
            async for event in _events(chunks):
                if self._shows(event):
                    yield event
        else:
            whole = b"".join([chunk async for chunk in chunks])
            self.measure(_whole_tokens(whole))
            yield whole
        await self.charge()

    def _shows(self, event: bytes) -> bool:
        data = event.partition(b"data:")[2].strip()
        if b'"usage"' not in data or (tokens := _total_tokens(data)) is None:
            # A chat's first chunks have roles, and no tokens.
            is_of_chat = b'"choices"' in data and b'"role"' not in data
            self._tokens += is_of_chat or RESPONSE_DELTA.search(data) is not None
            return True
        self._tokens = tokens
        return not (self._hides_usage and not json.loads(data).get("choices"))


def _most_tokens(body: dict[str, Any], context: int | None) -> int:
    """About how many tokens a request takes at most: an estimate, as the api has no tokenizer.

    An answer and its prompt have at most `context` together.
    """
    limits = ("max_completion_tokens", "max_output_tokens", "max_tokens")
    most = next(filter(None, map(body.get, limits)), None)
    if most is None:
        most = ANSWER_TOKENS
    prompts, answers = body.get("prompt"), body.get("n") or 1
    if isinstance(prompts, list) and not isinstance(prompts[0], int):  # not one of token ids
        answers *= len(prompts)
    estimate = len(json.dumps(body)) // TOKEN_CHARACTERS + answers * int(most)
    return estimate if context is None else min(estimate, answers * context)


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Server-sent events, each with the empty line that ends it."""
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield event + b"\n\n"
    if rest:
        yield rest


def _total_tokens(text: bytes) -> int | None:
    try:
        event = json.loads(text)
        return int(event.get("response", event)["usage"]["total_tokens"])
    except (ValueError, KeyError, TypeError, AttributeError):  # such as an error's body
        return None


def _whole_tokens(text: bytes) -> int:
    """What a whole answer reports; its usage comes last, and to parse it all may take long."""
    found = WHOLE_USAGE.search(text[-USAGE_BYTES:])
    return 0 if found is None else int(found[1])
