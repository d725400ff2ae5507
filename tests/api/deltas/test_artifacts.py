"""Artifact downloads follow RFC 9110: ranges and conditional requests."""

import hashlib
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltadock.api.deltas.download import requested_range
from deltadock.errors import DamagedBlob, RangeNotSatisfiable
from deltadock.storage.blobs.local import LocalBlobStore
from tests.api.support import Api

ARTIFACT = bytes(range(256)) * 10
SIZE = len(ARTIFACT)


@pytest.fixture
def url(api: Api) -> str:
    delta = api.delta()
    api.make_ready(delta, ARTIFACT)
    return f"/v1/deltas/{delta['id']}/artifact"


def test_a_full_download(api: Api, url: str) -> None:
    answer = api.client.get(url)
    assert answer.status_code == 200
    assert answer.content == ARTIFACT
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["repr-digest"].startswith("sha-256=:")
    assert answer.headers["content-disposition"].endswith('.delta"')
    head = api.client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "accept-ranges", "content-type"):
        assert head.headers[name] == answer.headers[name]


def test_a_range_returns_206_with_these_bytes(api: Api, url: str) -> None:
    for header, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, SIZE),
        ("bytes=-100", SIZE - 100, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        (f"bytes=5-{SIZE * 2}", 5, SIZE),
        (f"bytes=0-{'9' * 1000}", 0, SIZE),
        ("BYTES=1-2", 1, 3),
    ):
        answer = api.client.get(url, headers={"Range": header})
        assert answer.status_code == 206
        assert answer.content == ARTIFACT[start:end]
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert answer.headers["content-length"] == str(end - start)


def test_a_range_past_the_end_is_416(api: Api, url: str) -> None:
    for header in (f"bytes={SIZE}-", "bytes=-0", f"bytes={'9' * 1000}-"):
        answer = api.client.get(url, headers={"Range": header})
        assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{SIZE}"


def test_headers_without_a_single_valid_range_are_ignored(api: Api, url: str) -> None:
    for header in (
        "bytes=-",
        "bytes=5-2",
        "bytes=a-b",
        "bytes=0-1,5-6",
        "items=0-1",
        "bytes 0-1",
        "bytes=--1",
    ):
        answer = api.client.get(url, headers={"Range": header})
        assert (answer.status_code, answer.content) == (200, ARTIFACT)


def test_if_match_of_another_version_is_412(api: Api, url: str) -> None:
    """So a download that resumes after a name has moved is not spliced of two versions."""
    etag = api.client.head(url).headers["etag"]
    for other in ('"other"', f"W/{etag}", '"x", "y"'):
        answer = api.client.get(url, headers={"If-Match": other, "Range": "bytes=5-"})
        assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
        assert api.client.head(url, headers={"If-Match": other}).status_code == 412
        both = {"If-Match": other, "If-None-Match": etag}
        assert api.client.get(url, headers=both).status_code == 412
    for known in (etag, f'"x", {etag}', "*"):
        answer = api.client.get(url, headers={"If-Match": known, "Range": "bytes=5-"})
        assert (answer.status_code, answer.content) == (206, ARTIFACT[5:])


def test_conditional_requests(api: Api, url: str) -> None:
    etag = api.client.head(url).headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = api.client.get(url, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert api.client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    part = {"Range": "bytes=0-1"}
    assert api.client.get(url, headers=part | {"If-Range": etag}).status_code == 206
    for other in ('"other"', f"W/{etag}", "Sun, 22 Nov 2026 12:00:00 GMT"):
        assert api.client.get(url, headers=part | {"If-Range": other}).status_code == 200
    assert api.client.head(url, headers=part).headers["content-length"] == str(SIZE)


def test_an_interrupted_download_resumes(api: Api, url: str) -> None:
    first = api.client.get(url, headers={"Range": "bytes=0-999"})
    rest = api.client.get(url, headers={"Range": "bytes=1000-", "If-Range": first.headers["etag"]})
    assert first.content + rest.content == ARTIFACT


def test_a_store_that_fails_is_never_taken_for_the_end(
    api: Api, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = api.resources.settings.blob_folder / "blobs" / hashlib.sha256(ARTIFACT).hexdigest()
    monkeypatch.setattr(LocalBlobStore, "size", lambda *_: SIZE)
    path.chmod(0o644)
    path.write_bytes(b"")  # damaged before the first byte of the answer
    answer = api.client.get(url, headers={"Range": "bytes=10-"})
    assert (answer.status_code, answer.json()["code"]) == (DamagedBlob.status, DamagedBlob.code)
    path.write_bytes(ARTIFACT[:1000])  # and after it
    with pytest.raises(httpx.RemoteProtocolError):
        api.client.get(url, headers={"Range": "bytes=10-"})


def test_an_unfinished_delta_has_no_artifact(api: Api) -> None:
    answer = api.client.get(f"/v1/deltas/{api.delta()['id']}/artifact")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_ready")


@given(
    size=st.integers(0, 50),
    first=st.one_of(st.none(), st.integers(0, 60)),
    last=st.one_of(st.none(), st.integers(0, 60)),
)
def test_range_parsing_follows_the_rfc(size: int, first: int | None, last: int | None) -> None:
    def text(number: Any) -> str:
        return "" if number is None else str(number)

    data = list(range(size))
    if first is None:
        expected = data[-last:] if last else []
    else:
        expected = data[first:] if last is None else data[first : last + 1]
    ignored = (first is None and last is None) or (
        first is not None and last is not None and last < first
    )
    try:
        part = requested_range({"range": f"bytes={text(first)}-{text(last)}"}, size, '"etag"')
    except RangeNotSatisfiable:
        assert not ignored
        assert expected == []
    else:
        assert (part is None) == ignored
        if part is not None:
            assert data[part.start : part.end] == expected != []
