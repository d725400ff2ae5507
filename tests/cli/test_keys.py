"""`deltadock keys`, and the key that `deltadock up` makes for its own machine."""

from pathlib import Path

import pytest

from deltadock.api.access.authentication import Authenticator
from deltadock.cli.key_store import ensure_local_key
from deltadock.cli.system import check_host
from deltadock.errors import Forbidden, Unauthorized
from deltadock.settings import Settings
from deltadock.storage.api_keys import local_key_path
from deltadock.storage.database import Database
from tests.cli.support import Command


def test_keys_are_made_listed_rotated_and_revoked(deltadock: Command, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    home = ("--home", tmp_path)
    first = deltadock("keys", "create", "--name", "ci", "--days", 2, *home)
    assert "read write infer, of tenant local" in first.stderr
    key = first.stdout.strip()
    database = Database(settings.sqlalchemy_url)
    authenticator = Authenticator(database, settings)
    assert not authenticator.caller_of_key(key).scopes & {"admin"}
    listed = deltadock("keys", "ls", *home).stdout
    assert key[:12] in listed
    assert key not in listed
    second = deltadock("keys", "rotate", key[:12], "--grace-hours", 0, *home)
    authenticator.forget()
    assert authenticator.caller_of_key(second.stdout.strip())
    with pytest.raises(Unauthorized, match="expired"):
        authenticator.caller_of_key(key)
    assert deltadock("keys", "revoke", second.stdout[:12], *home).code == 0
    authenticator.forget()
    with pytest.raises(Unauthorized, match="revoked"):
        authenticator.caller_of_key(second.stdout.strip())
    database.dispose()


def test_a_key_is_revoked_by_its_name_if_no_other_has_it(
    deltadock: Command, tmp_path: Path
) -> None:
    home = ("--home", tmp_path)
    made = [deltadock("keys", "create", "--name", "ci", *home).stdout for _ in range(2)]
    refused = deltadock("keys", "revoke", "ci", *home)
    assert (refused.code, "2 keys have the name 'ci': give an id" in refused.stderr) == (1, True)
    assert deltadock("keys", "revoke", made[0][:12], *home).code == 0
    assert f"{made[1][:12]} (ci) is revoked" in deltadock("keys", "revoke", "ci", *home).stderr
    assert deltadock("keys", "revoke", "ci", *home).code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "--name", "x", "--scopes", "read,root"), "There is no scope root"),
        (("create", "--name", "x", "--tenant", "acme"), "There is no tenant 'acme'"),
        (("create", "--name", "x", "--days", 0), "The key would have expired already"),
        (("revoke", "ddk_12345678"), "There is no key 'ddk_12345678'"),
    ],
)
def test_refusals(
    deltadock: Command, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    assert deltadock("keys", "create", "--name", "ci", "--home", tmp_path).code == 0
    outcome = deltadock("keys", *arguments, "--home", tmp_path)
    assert outcome.code == 1
    assert message in outcome.stderr


def test_the_local_key_is_kept_private_and_replaced_if_invalid(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    first = ensure_local_key(settings)
    path = local_key_path(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key.secret").stat().st_mode & 0o777 == 0o600
    assert ensure_local_key(settings) == first
    path.write_text("ddk_broken")
    assert ensure_local_key(settings) != first
    assert path.stat().st_mode & 0o777 == 0o600


def test_up_listens_elsewhere_only_if_a_key_was_made(deltadock: Command, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    local = ensure_local_key(settings)
    check_host("127.0.0.1", settings, local)
    with pytest.raises(Forbidden, match="deltadock keys create"):
        check_host("0.0.0.0", settings, local)
    made = deltadock("keys", "create", "--name", "team", "--home", tmp_path).stdout
    check_host("0.0.0.0", settings, local)
    deltadock("keys", "revoke", made[:12], "--home", tmp_path)
    with pytest.raises(Forbidden):
        check_host("0.0.0.0", settings, local)
