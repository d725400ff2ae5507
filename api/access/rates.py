"""Rate limits per tenant, counted in Redis so that all processes of the api share them."""

import time
from typing import Any, Final, Literal

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
Unit = Literal["request", "token"]


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

    async def charge_tokens(self, caller: Caller, tokens: int) -> None:
        """Count tokens that an answer took; the last answer may exceed the limit."""
        if caller.tokens_per_minute is not None and tokens > 0:
            item = RateLimitItemPerMinute(caller.tokens_per_minute)
            try:
                await self._limiter.hit(item, "token", caller.tenant_id, cost=tokens)
            except RedisError as error:
                log.warning("tokens_not_counted", error=str(error))

    async def _count(self, caller: Caller, unit: Unit, limit: int, cost: int) -> dict[str, str]:
        item, key = RateLimitItemPerMinute(limit), (unit, caller.tenant_id)
        try:
            if cost:
                within = await self._limiter.hit(item, *key, cost=cost)
            else:
                within = await self._limiter.test(item, *key)
            reset, remaining = await self._limiter.get_window_stats(item, *key)
        except RedisError as error:
            log.warning("rate_not_counted", error=str(error))
            return {}
        seconds = max(1, round(reset - time.time()))
        headers = {
            "RateLimit-Policy": f'"{unit}s";q={limit};w={WINDOW_SECONDS}',
            "RateLimit": f'"{unit}s";r={remaining};t={seconds}',
        }
        if not within:
            raise RateLimited(
                f"Your tenant may use {counted(limit, unit)} a minute. Try again in {seconds} s.",
                headers=headers | {"Retry-After": str(seconds)},
            )
        return headers

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.disconnect()
