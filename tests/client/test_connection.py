"""Address and key come from arguments, the environment, the login or the home, in this order."""

from pathlib import Path

import pytest

from deltadock.client.connection import (
    find_connection,
    keep_login,
    local_url_path,
    login_path,
    read_login,
)

LOGIN = "https://deltadock.example"
HOME = "http://127.0.0.1:8123"


@pytest.fixture(autouse=True)
def _nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DELTADOCK_API_URL", "DELTADOCK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DELTADOCK_HOME", str(tmp_path / "home"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "api.key").write_text("ddk_home\n")
    local_url_path(home).write_text(f"{HOME}\n")
    return home


@pytest.mark.parametrize("given", [LOGIN, f"{LOGIN}/", f"{LOGIN}/v1", f"{LOGIN}/v1/"])
def test_the_address_of_openais_clients_is_one_too(given: str) -> None:
    assert find_connection(given).url == LOGIN
    keep_login(given, "ddk_x")
    assert read_login() == (LOGIN, "ddk_x")


def test_without_anything_it_is_this_machines() -> None:
    found = find_connection()
    assert (found.url, found.key, found.key_from) == ("http://127.0.0.1:8000", None, "nowhere")


def test_the_home_that_up_made_is_used(home: Path) -> None:
    assert find_connection()[:2] == (HOME, "ddk_home")
    local_url_path(home).unlink()
    assert find_connection()[:2] == ("http://127.0.0.1:8000", None), "it may be another's"


def test_a_login_is_private_and_comes_before_the_home(home: Path) -> None:
    keep_login(f"{LOGIN}/", "ddk_login")
    assert login_path().stat().st_mode & 0o777 == 0o600
    assert read_login() == (LOGIN, "ddk_login")
    assert find_connection()[:2] == (LOGIN, "ddk_login")
    assert find_connection().key_from == "`deltadock login`"


def test_the_environment_comes_before_the_login(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_login(LOGIN, "ddk_login")
    monkeypatch.setenv("DELTADOCK_API_URL", HOME)
    assert find_connection()[:2] == (HOME, None), "a key goes to its own server only"
    monkeypatch.setenv("DELTADOCK_API_KEY", "ddk_environment")
    assert find_connection()[:2] == (HOME, "ddk_environment")
    assert find_connection(LOGIN)[:2] == (LOGIN, "ddk_environment")
    assert find_connection(LOGIN, "ddk_given")[:2] == (LOGIN, "ddk_given")


def test_a_kept_key_goes_with_its_address(home: Path) -> None:
    keep_login(LOGIN, "ddk_login")
    assert find_connection(HOME)[:2] == (HOME, "ddk_home")
    assert find_connection("http://other")[:2] == ("http://other", None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"url": "http://x"}', "\x00"])
def test_a_damaged_login_is_none(content: str) -> None:
    keep_login(LOGIN, "ddk_login")
    login_path().write_text(content)
    assert read_login() is None
