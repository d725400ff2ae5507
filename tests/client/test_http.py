"""The client's error handling; its requests are tested in tests/system."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deltadock.cli.processes import free_ports
from deltadock.client.http import Client, error_of
from deltadock.errors import DeltadockError, InvalidCheckpoint, Unavailable


def tree(kind: type[DeltadockError] = DeltadockError) -> Iterator[type[DeltadockError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


def answer(**arguments: object) -> httpx.Response:
    request = httpx.Request("GET", "http://deltadock/v1/x")
    return httpx.Response(502, request=request, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.code)
def test_a_problem_body_becomes_the_error_class_of_its_code(kind: type[DeltadockError]) -> None:
    error = error_of(answer(json={"code": kind.code, "detail": "what to do"}))
    assert (type(error), error.message) == (kind, "what to do")


def test_an_unknown_code_is_in_the_message() -> None:
    error = error_of(answer(json={"code": "new_thing", "detail": "what to do"}))
    assert "new_thing: what to do" in error.message


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'"text"'])
def test_a_proxys_error_page_is_unavailable(body: bytes) -> None:
    error = error_of(answer(content=body))
    assert isinstance(error, Unavailable)
    assert "502" in error.message


def test_a_failed_connection_is_unavailable(tmp_path: Path) -> None:
    with Client(f"http://127.0.0.1:{free_ports(1)[0]}") as client:
        with pytest.raises(Unavailable, match="does not answer"):
            client.job("job_x")
        with pytest.raises(InvalidCheckpoint, match=r"no \.safetensors file"):
            client.upload_folder(tmp_path)
