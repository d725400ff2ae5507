"""Rate limits per tenant, counted in Redis so that all processes of the api share them."""

import time
from typing import Any, Final, Literal, NamedTuple

import structlog
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from deltadock.api.access.caller import Caller
from deltadock.errors import RateLimited
from deltadock.words import counted

log = structlog.get_logger(__name__)

WINDOW_SECONDS: Final = 60
TIMEOUT_SECONDS: Final = 1.0
TTL_ERROR_SECONDS: Final = 1.0
"""Redis tells how long a window lasts in whole seconds."""
RESERVED_SECONDS: Final = 5
"""After so long, what is only reserved may have been given back."""
Unit = Literal["request", "token"]


class Reservation(NamedTuple):
    """Tokens that are counted until this time, at the latest until their answer has ended."""

    tokens: int
    until: float


class Rates:
    """Fixed windows of a minute. If Redis does not answer, requests are not limited."""

    def __init__(self, broker_url: str) -> None:
        self._pool = ConnectionPool.from_url(
            broker_url, socket_connect_timeout=TIMEOUT_SECONDS, socket_timeout=TIMEOUT_SECONDS
        )
        options: dict[str, Any] = {"connection_pool": self._pool}  # not in the library's types
        self._limiter = FixedWindowRateLimiter(
            RedisStorage(
                f"async+{broker_url}",
                implementation="redispy",
                key_prefix="deltadock-rates",
                **options,
            )
        )

    async def count_request(self, caller: Caller) -> dict[str, str]:
        """Count one request; returns the headers that describe the limit.

        Raises:
            RateLimited: the tenant has sent as many requests as it may in this minute.
        """
        limit = caller.requests_per_minute
        return {} if limit is None else await self._count(caller, "request", limit, 1)

    async def check_tokens(self, caller: Caller) -> dict[str, str]:
        """Check that the tenant has tokens left; returns the headers that describe the limit.

        Raises:
            RateLimited: it has used as many tokens as it may in this minute.
        """
        limit = caller.tokens_per_minute
        return {} if limit is None else await self._count(caller, "token", limit, 0)

    async def reserve_tokens(self, caller: Caller, tokens: int) -> Reservation:
        """Count the tokens that an answer may take, until it has ended.

        The last answer may exceed the limit: it is refused only if others have reached it.

        Raises:
            RateLimited: they have, with what is reserved for those that are not at their end.
        """
        limit = caller.tokens_per_minute
        assert limit is not None
        item, key = RateLimitItemPerMinute(limit), ("token", caller.tenant_id)
        try:
            total = await self._add(item, key, tokens)
            reset, _ = await self._limiter.get_window_stats(item, *key)
            if total - tokens >= limit:
                await self._add(item, key, -tokens)
                raise await self._limited(caller, "token", limit, reset)
        except RedisError as error:
            log.warning("tokens_not_counted", error=str(error))
            return Reservation(0, 0.0)
        return Reservation(tokens, reset - TTL_ERROR_SECONDS)

    async def settle_tokens(self, caller: Caller, reserved: Reservation, tokens: int) -> None:
        """Count the tokens that an answer took, instead of those that were reserved for it.

        A reservation counts in its own minute alone, where an answer that lasts longer counts too:
        in another one, nothing is left to give back.
        """
        limit = caller.tokens_per_minute
        more = tokens - reserved.tokens
        is_late = time.time() > reserved.until
        if limit is None or (is_late and more <= 0):
            return
        item = RateLimitItemPerMinute(limit)
        try:
            await self._add(item, ("token", caller.tenant_id), more)
            await self._add(item, _settled(caller), more if is_late else tokens)
        except RedisError as error:
            log.warning("tokens_not_counted", error=str(error))

    async def _add(self, item: RateLimitItemPerMinute, key: tuple[str, ...], tokens: int) -> int:
        """Add to what this minute counts; returns it."""
        storage = self._limiter.storage
        assert isinstance(storage, RedisStorage)
        return await storage.incr(item.key_for(*key), item.get_expiry(), tokens)

    async def _count(self, caller: Caller, unit: Unit, limit: int, cost: int) -> dict[str, str]:
        item, key = RateLimitItemPerMinute(limit), (unit, caller.tenant_id)
        try:
            if cost:
                within = await self._limiter.hit(item, *key, cost=cost)
            else:
                within = await self._limiter.test(item, *key)
            reset, remaining = await self._limiter.get_window_stats(item, *key)
            if not within:
                raise await self._limited(caller, unit, limit, reset)
        except RedisError as error:
            log.warning("rate_not_counted", error=str(error))
            return {}
        return _headers(unit, limit, remaining, reset)

    async def _limited(self, caller: Caller, unit: Unit, limit: int, reset: float) -> RateLimited:
        seconds, why = _seconds(reset), ""
        if unit == "token":
            item = RateLimitItemPerMinute(limit)
            if await self._limiter.storage.get(item.key_for(*_settled(caller))) < limit:
                seconds = min(seconds, RESERVED_SECONDS)
                why = ", and answers that are under way may take those that are left"
        return RateLimited(
            f"Your tenant may use {counted(limit, unit)} a minute{why}. Try again in {seconds} s.",
            headers=_headers(unit, limit, 0, reset) | {"Retry-After": str(seconds)},
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.disconnect()


def _settled(caller: Caller) -> tuple[str, str]:
    """The key of the tokens of a minute that answers took, beside those that may be given back."""
    return "settled-token", caller.tenant_id


def _headers(unit: Unit, limit: int, remaining: int, reset: float) -> dict[str, str]:
    return {
        "RateLimit-Policy": f'"{unit}s";q={limit};w={WINDOW_SECONDS}',
        "RateLimit": f'"{unit}s";r={remaining};t={_seconds(reset)}',
    }


def _seconds(reset: float) -> int:
    return max(1, round(reset - time.time()))
