"""`deltadock backup`, `restore` and `audit export`, from the command line."""

import json
from pathlib import Path

from deltadock.settings import Settings
from deltadock.storage.blobs import make_blob_store
from deltadock.storage.database import Database, migrate
from tests import seed
from tests.cli.support import Command


def test_a_registry_moves_to_another_home(deltadock: Command, tmp_path: Path) -> None:
    old, new, file = tmp_path / "old", tmp_path / "new", tmp_path / "registry[old].backup"
    settings = Settings(home=old)
    migrate(settings.sqlalchemy_url)
    blobs = make_blob_store(settings)
    blobs.prepare()
    database = Database(settings.sqlalchemy_url)
    seed.seed(database, blobs)
    database.dispose()
    key = deltadock("keys", "create", "--name", "ci", "--home", old).stdout.strip()

    outcome = deltadock("backup", file, "--home", old, "--json")
    assert json.loads(outcome.stdout)["rows"]["api_keys"] == 1
    second = tmp_path / "second[bold].backup"
    assert f"to {second}." in deltadock("backup", second, "--home", old).stdout, "no markup"
    again = deltadock("backup", file, "--home", old)
    assert (again.code, "exists already" in again.stderr) == (1, True)

    outcome = deltadock("restore", file, "--home", new)
    missing = [line for line in outcome.stdout.splitlines() if line.startswith("missing ")]
    assert outcome.code == 1, "the blobs are still in the old home"
    assert len(missing) >= len(seed.READY)
    assert key[:12] in deltadock("keys", "list", "--home", new).stdout
    twice = deltadock("restore", file, "--home", new)
    assert (twice.code, "not empty" in twice.stderr) == (1, True)

    lines = deltadock("audit", "export", "--home", new).stdout.splitlines()
    created, restored = (json.loads(line) for line in lines[-2:])
    assert (created["action"], created["origin"]) == ("key.create", "command")
    assert created["key_name"] is None
    assert (restored["action"], restored["object"]) == ("database.restore", file.name)
