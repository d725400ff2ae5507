"""`deltadock node`: one inference node, for an api or alone."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from deltadock.artifacts.checkpoint import CONFIG
from deltadock.artifacts.reader import Artifact
from deltadock.cli.system import SECRET_FILE
from deltadock.errors import InvalidCheckpoint
from deltadock.settings import get_settings
from deltadock.storage.blobs import make_blob_store


def node(base: Path | None, api: str | None, deltas: Sequence[Path], host: str, port: int) -> None:
    """Become a node; settings of the environment hold where nothing is given.

    Args:
        base: folder of the base that it serves; None: it adopts what requests name.
        api: address of the api that it registers with; None: it serves alone.
        deltas: delta files that it loads at its start.
        host, port: where it listens.

    Raises:
        InvalidCheckpoint: the folder is not a base's.
        InvalidArtifact: a file is no delta.
    """
    environment = dict(os.environ)
    if base is not None:
        if not (base / CONFIG).is_file():
            raise InvalidCheckpoint(f"{base} is no checkpoint folder: it has no {CONFIG}.")
        Console().print(f"{base} is the model {base.resolve().name}", soft_wrap=True)
        environment["DELTADOCK_NODE_BASE"] = str(base.resolve())
    if api is not None:
        environment["DELTADOCK_API_URL"] = api
        own = get_settings().home / SECRET_FILE  # of a `deltadock up` with the same home
        if own.is_file():
            environment.setdefault("DELTADOCK_NODE_SECRET", own.read_text(encoding="utf-8"))
    if deltas:
        environment["DELTADOCK_NODE_DELTAS"] = json.dumps(_store(deltas))
    command = [
        sys.executable,
        "-P",
        "-m",
        "deltadock.inference.server",
        "--host",
        host,
        "--port",
        str(port),
    ]
    os.execve(sys.executable, command, environment)  # signals reach the node itself


def _store(deltas: Sequence[Path]) -> list[str]:
    """Put delta files where the node finds them, and say by which name; their digests."""
    console = Console()
    blobs = make_blob_store(get_settings())
    blobs.prepare()
    digests = []
    for path in deltas:
        with Artifact.open(path):
            digests.append(blobs.put_file(path))
        console.print(f"{path} is the model {digests[-1]}", soft_wrap=True)
    return digests
