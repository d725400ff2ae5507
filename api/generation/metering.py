"""Counts the tokens of a forwarded answer, as the node reports them."""

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Final, Self

import anyio
import httpx

from deltadock.api.access import Caller
from deltadock.api.access.rates import Rates, Reservation
from deltadock.openai.fields import PROMPT_TOKENS_HEADER

ANSWER_TOKENS: Final = 1024
"""Reserved for an answer whose length the request does not bound."""
TOKEN_CHARACTERS: Final = 4
"""Of a request's JSON, about."""
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
        cls, rates: Rates, caller: Caller, body: dict[str, Any]
    ) -> AsyncIterator[Self | None]:
        """A meter for the request of a caller whose tokens are limited.

        It is charged if the block raises; else whoever ends the answer charges it.

        Raises:
            RateLimited: too much is used or reserved.
        """
        if caller.tokens_per_minute is None:
            yield None
            return
        reserved = await rates.reserve_tokens(caller, _most_tokens(body))
        meter = cls(rates, caller, body, reserved)
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
        if self._is_stream:
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
            self.measure(_total_tokens(whole) or 0)
            yield whole
        await self.charge()

    def _shows(self, event: bytes) -> bool:
        data = event.strip().removeprefix(b"data:").strip()
        if b'"usage"' not in data or (tokens := _total_tokens(data)) is None:
            # A chat's first chunks have roles, and no tokens.
            self._tokens += b'"choices"' in data and b'"role"' not in data
            return True
        self._tokens = tokens
        return not (self._hides_usage and not json.loads(data).get("choices"))


def _most_tokens(body: dict[str, Any]) -> int:
    """About how many tokens a request takes at most: an estimate, as the api has no tokenizer."""
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    if most is None:
        most = ANSWER_TOKENS
    prompts, answers = body.get("prompt"), body.get("n") or 1
    if isinstance(prompts, list) and not isinstance(prompts[0], int):  # not one of token ids
        answers *= len(prompts)
    return len(json.dumps(body)) // TOKEN_CHARACTERS + answers * int(most)


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
        return int(json.loads(text)["usage"]["total_tokens"])
    except (ValueError, KeyError, TypeError):  # such as an error's body
        return None
