"""The limit on the bodies of requests to the api and the nodes."""

import re
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltadock.errors import TooLarge

MAX_BODY_BYTES: Final = 8 << 20
"""Of all bodies but uploaded files, which are streamed."""

_FILE: Final = re.compile(r"/v1/uploads/[^/]+/")


class BodyLimit:
    """Rejects bodies over `MAX_BODY_BYTES`, except files, which have their own limit."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"] == "PUT" and _FILE.match(scope["path"])):
            await self.app(scope, receive, send)
            return
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                # FastAPI wraps other exceptions that are raised while it reads the body.
                raise HTTPException(
                    TooLarge.status, f"The body is larger than {MAX_BODY_BYTES} bytes."
                )
            return message

        await self.app(scope, bounded_receive, send)
