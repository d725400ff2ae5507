"""`deltadock node` passes its options to the process that it execs."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltadock.cli.node import node
from deltadock.cli.system import node_secret
from deltadock.errors import DeltadockError, InvalidCheckpoint
from deltadock.settings import Settings, get_settings
from deltadock.storage.blobs import make_blob_store
from tests.cli.support import Delta


@pytest.fixture
def execs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The recorded `os.execve` calls."""
    calls: list[Any] = []
    monkeypatch.setenv("DELTADOCK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    get_settings.cache_clear()
    yield calls
    get_settings.cache_clear()


def test_options_become_settings(
    execs: list[Any], delta: Delta, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    node(tmp_path, "http://api:8000", [delta.path], "0.0.0.0", 8200)
    [(program, command, environment)] = execs
    assert program == sys.executable
    assert command[1:4] == ["-P", "-m", "deltadock.inference.server"]
    assert command[4:] == ["--host", "0.0.0.0", "--port", "8200"]
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    settings = Settings()
    assert (settings.node_base, settings.api_url) == (tmp_path, "http://api:8000")
    [(name, digest)] = settings.node_deltas.items()
    assert json.loads(environment["DELTADOCK_NODE_DELTAS"]) == {name: digest}
    assert name == delta.path.stem
    assert make_blob_store(settings).size(digest) == delta.path.stat().st_size


def test_names_of_files_are_unique(
    execs: list[Any], delta: Delta, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "a.b" / name for name in ("maths.delta", "a.delta", "maths.bin", "maths")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(delta.path.read_bytes())
    base = tmp_path / "a"
    base.mkdir()
    (base / "config.json").write_text("{}")
    node(base, None, paths, "127.0.0.1", 8100)
    [(_, _, environment)] = execs
    digests = json.loads(environment["DELTADOCK_NODE_DELTAS"])
    assert list(digests) == ["maths", "a-2", "maths-2", "maths-3"]
    assert f"{paths[1]} is served as model a-2 ({digests['a-2']})" in capsys.readouterr().out


def test_a_folder_without_config_is_refused(execs: list[Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"has no config\.json"):
        node(tmp_path, None, [], "127.0.0.1", 8100)
    assert execs == []


def test_a_file_that_is_not_a_delta_is_refused(execs: list[Any], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no delta")
    with pytest.raises(DeltadockError):
        node(None, None, [tmp_path / "text"], "127.0.0.1", 8100)
    assert execs == []


def test_the_secret_of_deltadock_up_is_found(
    execs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DELTADOCK_NODE_SECRET", raising=False)
    home = tmp_path / "home"
    secret = node_secret(home)
    assert node_secret(home) == secret
    assert (home / "node.secret").stat().st_mode & 0o777 == 0o600
    node(None, "http://127.0.0.1:8000", [], "127.0.0.1", 8100)
    monkeypatch.setenv("DELTADOCK_NODE_SECRET", "the api's")
    get_settings.cache_clear()
    node(None, "http://127.0.0.1:8000", [], "127.0.0.1", 8100)
    found = [environment["DELTADOCK_NODE_SECRET"] for _, _, environment in execs]
    assert found == [secret, "the api's"]
    assert node_secret(home) == "the api's"
