"""Blocking work on requests: one of a delta and tenant at a time, others beside it."""

import asyncio
import threading
from contextlib import suppress
from pathlib import Path

from deltadock.inference.node import InferenceNode
from deltadock.model_target import ModelTarget
from deltadock.settings import Settings
from deltadock.storage.blobs.local import LocalBlobStore

OWN, OTHER = (ModelTarget("0" * 64, "1" * 64, tenant) for tenant in ("own", "other"))


def test_work_of_a_cancelled_request_holds_up_its_tenant_alone(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        begun.set()
        go_on.wait(30)
        order.append("slow")

    async def run() -> None:
        node = InferenceNode(Settings(home=tmp_path), LocalBlobStore(tmp_path / "blobs"))
        cancelled = asyncio.create_task(node._encode(OWN, slow))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        cancelled.cancel()
        with suppress(asyncio.CancelledError):
            await cancelled
        later = asyncio.create_task(node._encode(OWN, lambda: order.append("own")))
        await node._encode(OTHER, lambda: order.append("other"))
        go_on.set()
        await later
        await node.stop()

    asyncio.run(run())
    assert order == ["other", "slow", "own"]
