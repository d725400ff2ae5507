"""What the node's endpoints ask for: the node, the weights that headers name, a trusted caller."""

import asyncio
import re
from collections.abc import Coroutine
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Header, Path, Request

from deltadock.errors import Cancelled, InvalidInput
from deltadock.inference.node import Node
from deltadock.inference.request import Target
from deltadock.trust import check_trusted

DIGEST: Final = re.compile(r"[0-9a-f]{64}")

Result = TypeVar("Result")


def get_node(request: Request) -> Node:
    """The node of this process."""
    node: Node = request.app.state.node
    return node


NodeDep = Annotated[Node, Depends(get_node)]


def named_base(
    base: Annotated[str | None, Header(alias="Deltadock-Base")] = None,
) -> str | None:
    """The base's digest, where the request names one."""
    if base is not None and not DIGEST.fullmatch(base):
        raise InvalidInput("Deltadock-Base must be a SHA-256 digest in lower-case hex.")
    return base


NamedBase = Annotated[str | None, Depends(named_base)]


def named_target(
    base: NamedBase,
    artifact: Annotated[str | None, Header(alias="Deltadock-Artifact")] = None,
) -> Target | None:
    """The weights that the headers name, or None without headers."""
    if artifact is not None and (base is None or not DIGEST.fullmatch(artifact)):
        raise InvalidInput(
            "Deltadock-Artifact must be a SHA-256 digest in lower-case hex, beside Deltadock-Base."
        )
    return None if base is None else Target(base, artifact)


NamedTarget = Annotated[Target | None, Depends(named_target)]


def artifact_digest(digest: Annotated[str, Path(description="The artifact's SHA-256.")]) -> str:
    """A delta's artifact, by digest."""
    if not DIGEST.fullmatch(digest):
        raise InvalidInput(f"{digest!r} is not a SHA-256 digest in lower-case hex.")
    return digest


ArtifactDigest = Annotated[str, Depends(artifact_digest)]


def only_trusted(request: Request, node: NodeDep) -> None:
    """Refuse who neither brings the secret nor, where there is none, asks from this machine."""
    check_trusted(
        node.settings.node_secret,
        request.headers.get("Authorization"),
        request.client.host if request.client is not None else None,
    )


def only_with_secret(request: Request, node: NodeDep) -> None:
    """Where there is a secret, refuse who does not bring it."""
    if node.settings.node_secret is not None:
        only_trusted(request, node)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    watching = asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("The client went away.")
    finally:
        watching.cancel()
        working.cancel()
