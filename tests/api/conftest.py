"""A new api per test: SQLite, a blob folder, a real broker, a stub node."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltadock.api.main import create_app
from deltadock.settings import Settings
from tests.api.support import Api, StandInNode, bearer, issue_key, serving


@pytest.fixture
def node() -> StandInNode:
    return StandInNode()


@pytest.fixture
def node_url(node: StandInNode) -> Iterator[str]:
    with serving(node.app()) as url:
        yield url


@pytest.fixture
def settings_fields() -> dict[str, Any]:
    """Settings that a test module overrides."""
    return {}


@pytest.fixture
def settings(tmp_path: Path, broker_url: str, settings_fields: dict[str, Any]) -> Settings:
    fields = {"home": tmp_path / "home", "broker_url": broker_url}
    return Settings.model_validate(fields | settings_fields)


@pytest.fixture
def api(settings: Settings, migrated_file: Path) -> Iterator[Api]:
    settings.home.mkdir(parents=True)
    shutil.copy(migrated_file, settings.home)
    app = create_app(settings)
    headers = bearer(issue_key(settings))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30, headers=headers) as client:
        yield Api(client, app.state.resources)
