"""The endpoint plug-in: which delta an engine serves, and swapping another one in.

    GET /v1/deltadock/delta                          {"delta": name, "digest": SHA-256}
    PUT /v1/deltadock/delta {"delta": name or null}  as GET, and "seconds"

vLLM loads it if `VLLM_PLUGINS` names `deltadock`, and guards it with `--api-key` as all of `/v1`.
"""

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from deltadock.errors import DeltadockError, NotFound, error_for
from deltadock_vllm.fetching import fetch_registered
from deltadock_vllm.loader import LOAD_FORMAT

PATH: Final = "/v1/deltadock/delta"
EXTENSION: Final = "deltadock_vllm.swap.DeltaSwap"


class DeltaIn(BaseModel):
    """What to serve: a delta's digest or name in the registry; null: the base."""

    model_config = ConfigDict(extra="forbid")

    delta: str | None


class SwappingEngine:
    """An engine whose weights are replaced between requests, one swap at a time."""

    def __init__(self, engine: EngineClient, delta: str | None) -> None:
        self._engine, self._delta = engine, delta
        self._lock = asyncio.Lock()

    async def served(self) -> dict[str, Any]:
        """The delta by the name that was asked for, and by digest."""
        digests = await self._engine.collective_rpc("deltadock_served")
        return {"delta": self._delta, "digest": digests[0]}

    async def swap(self, delta: str | None) -> dict[str, Any]:
        """Serve another delta: running requests end with the old weights, new ones wait.

        Raises:
            DeltadockError: it cannot be fetched or served; nothing has changed.
        """
        digest = None
        async with self._lock:
            if delta is not None:
                # Names in the registry only: a caller does not choose among the server's files.
                file = await asyncio.to_thread(fetch_registered, delta)
                digest = file.digest
            refusals = await self._engine.collective_rpc("deltadock_refusal", args=(digest,))
            if refusal := next(filter(None, refusals), None):
                raise error_for(refusal["code"], refusal["message"])
            await self._engine.pause_generation(mode="wait", clear_cache=True)
            try:
                seconds = await self._engine.collective_rpc("deltadock_swap", args=(digest,))
            finally:
                await self._engine.resume_generation()
            self._delta = delta
        return {"delta": delta, "digest": digest, "seconds": round(max(seconds), 3)}


class SwapEndpoint:
    """An `EndpointPlugin` of vLLM."""

    name = "deltadock"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Keep the engine, if its load format is Deltadock's and it has the worker extension."""
        if engine_client is None or args.load_format != LOAD_FORMAT:
            return
        if args.worker_extension_cls == EXTENSION:
            delta = (args.model_loader_extra_config or {}).get("delta")
            state.deltadock = SwappingEngine(engine_client, delta)


router = APIRouter()


@router.get(PATH)
async def get_delta(request: Request) -> JSONResponse:
    """The delta that is served."""
    return await _answer(request, lambda engine: engine.served())


@router.put(PATH)
async def put_delta(request: Request, body: DeltaIn) -> JSONResponse:
    """Serve another delta, or the base."""
    return await _answer(request, lambda engine: engine.swap(body.delta))


async def _answer(
    request: Request, ask: Callable[[SwappingEngine], Awaitable[dict[str, Any]]]
) -> JSONResponse:
    """The answer, or the refusal in the form of OpenAI's errors."""
    try:
        engine = getattr(request.app.state, "deltadock", None)
        if engine is None:
            raise NotFound(
                f"This engine swaps no deltas. Start it with --load-format {LOAD_FORMAT} and "
                f"--worker-extension-cls {EXTENSION}."
            )
        return JSONResponse(await ask(engine))
    except DeltadockError as error:
        refusal = {
            "message": error.message,
            "type": error.code,
            "param": "delta",
            "code": error.status,
        }
        return JSONResponse({"error": refusal}, error.status)
