"""A running api for the client and the commands: SQLite, a folder, a broker and a stub node."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from deltadock.api.main import create_app
from deltadock.settings import Settings
from deltadock.storage.database import migrate
from tests.api.support import (
    CONFIG,
    TEXT,
    Api,
    StandInNode,
    bearer,
    issue_key,
    serving,
    weights,
)


@dataclass
class Service:
    """A running Deltadock without a worker: `api.make_ready` ends jobs as one does."""

    url: str
    key: str
    api: Api
    node: StandInNode


@contextmanager
def running_service(folder: Path, broker_url: str) -> Iterator[Service]:
    """Run an api with one base, `tiny`, and a stub node."""
    settings = Settings(home=folder, broker_url=broker_url)
    migrate(settings.sqlalchemy_url)
    app, node, key = create_app(settings), StandInNode(), issue_key(settings)
    with (
        serving(node.app()) as node_url,
        serving(app) as url,
        httpx.Client(base_url=url, timeout=30, headers=bearer(key)) as http,
    ):
        api = Api(http, app.state.resources)
        api.base()
        api.register(node_url)
        yield Service(url, key, api, node)


def write_finetune(folder: Path, seed: int = 1) -> Path:
    """A fine-tune of `tiny`, with a file that is not the model's."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(weights(seed))
    (folder / "trainer_state.json").write_text("{}")
    return folder


def write_text(path: Path) -> Path:
    """A calibration text."""
    path.write_bytes(TEXT)
    return path


def empty(folder: Path) -> Path:
    """The folder, emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
