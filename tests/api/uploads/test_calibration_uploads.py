"""Calibration texts: one UTF-8 file per upload."""

import pytest

from deltadock.api.uploads import receive
from tests.api.support import TEXT, Api, sha256, weights


def test_a_calibration_text_is_stored(api: Api) -> None:
    done = api.upload("calibration", {"text.jsonl": TEXT})
    assert done["calibration"] == {"digest": sha256(TEXT), "size": len(TEXT)}
    assert done["checkpoint"] is None


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("text.txt", b""),
        ("text.txt", b"too short for any tokenizer"),
        ("text.txt", b"\xff\xfe"),
        ("text.txt", TEXT[:2]),
        ("text.json", TEXT),
        ("model.safetensors", weights()),
    ],
)
def test_rejected_calibration_texts_are_not_stored(api: Api, path: str, data: bytes) -> None:
    upload = api.open_upload("calibration")
    answer = api.put(upload, path, data)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_calibration")
    assert api.staged() == []
    assert api.blobs() == set()
    answer = api.client.post(f"/v1/uploads/{upload}/complete")
    assert (answer.status_code, answer.json()["code"]) == (409, "invalid_calibration")


def test_a_calibration_text_over_the_limit_is_413(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "MAX_CALIBRATION_BYTES", len(TEXT))
    upload = api.open_upload("calibration")
    answer = api.put(upload, "text.txt", TEXT + b"x")
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert "Upload a part" in answer.json()["detail"]
    assert (api.staged(), api.blobs()) == ([], set())
    assert api.put(upload, "text.txt", TEXT).status_code == 200


def test_a_calibration_upload_has_one_text(api: Api) -> None:
    upload = api.open_upload("calibration")
    assert api.put(upload, "a.txt", TEXT).status_code == 200
    assert api.put(upload, "a.txt", TEXT * 2).status_code == 200
    assert api.put(upload, "b.txt", TEXT).json()["code"] == "invalid_calibration"
