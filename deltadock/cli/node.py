"""`deltadock node`: one inference node, registered with an api or standalone."""

import json
import os
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from deltadock.artifacts.checkpoint import CONFIG
from deltadock.artifacts.reader import Artifact
from deltadock.cli.output import output
from deltadock.cli.system import SECRET_FILE
from deltadock.errors import InvalidCheckpoint
from deltadock.settings import get_settings
from deltadock.storage.blobs import make_blob_store
from deltadock.trust import kept_secret


def node(base: Path | None, api: str | None, deltas: Sequence[Path], host: str, port: int) -> None:
    """Replace this process with an inference node; arguments override settings.

    Args:
        base: base checkpoint folder; None: the setting, else the base that requests name.
        api: URL of the api to register with; None: the setting, else standalone.
        deltas: delta files to load at startup.
        host, port: address to listen on.

    Raises:
        InvalidCheckpoint: `base` is not a checkpoint folder.
        InvalidArtifact: a file is not a delta.
    """
    environment = dict(os.environ)
    base = base or get_settings().node_base
    if base is not None:
        if not (base / CONFIG).is_file():
            raise InvalidCheckpoint(f"{base} is not a checkpoint folder: it has no {CONFIG}.")
        output.print(f"{base} is served as model {base.resolve().name}", soft_wrap=True)
        environment["DELTADOCK_NODE_BASE"] = str(base.resolve())
    if api is not None:
        environment["DELTADOCK_API_URL"] = api
        secret_file = get_settings().home / SECRET_FILE  # written by `deltadock up`
        if secret_file.is_file():
            environment.setdefault("DELTADOCK_NODE_SECRET", kept_secret(secret_file))
    if deltas:
        taken = None if base is None else base.resolve().name
        environment["DELTADOCK_NODE_DELTAS"] = json.dumps(_store(deltas, taken))
    command = [
        *(sys.executable, "-P", "-m", "deltadock.inference.server"),
        *("--host", host, "--port", str(port)),
    ]
    os.execve(sys.executable, command, environment)  # signals reach the node directly


def _store(deltas: Sequence[Path], taken: str | None) -> dict[str, str]:
    """Put delta files into the blob store and print their model names; returns digests by name.

    A file's name without its suffix, with a number if another file or the base (`taken`) has it.
    """
    blobs = make_blob_store(get_settings())
    blobs.prepare()
    digests: dict[str, str] = {}
    for path in deltas:
        with Artifact(path):
            digest = blobs.put_file(path)
        names = chain([path.stem], (f"{path.stem}-{number}" for number in count(2)))
        name = next(name for name in names if name not in {taken, *digests})
        digests[name] = digest
        output.print(f"{path} is served as model {name} ({digest})", soft_wrap=True)
    return digests
