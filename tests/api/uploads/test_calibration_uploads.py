"""Calibration texts: one UTF-8 file per upload."""

import json

import pytest

from deltadock.api.uploads import receive
from deltadock.errors import InvalidCalibration
from tests.api.support import TEXT, Api, sha256, weights


def test_a_calibration_text_is_stored(api: Api) -> None:
    done = api.upload("calibration", {"text.txt": TEXT})
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
        ("text.jsonl", TEXT),
        ("text.jsonl", b"\n\n"),
        ("text.jsonl", b'{"text": "a"}\n{"prompt": "b"}'),
        ("text.jsonl", b'{"prompt": "a"}\n' * 9),
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


@pytest.mark.parametrize("kind", ["text", "prompt"])
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_lines_are_checked_as_they_arrive(size: int, kind: str) -> None:
    lines = [json.dumps({kind: f"{n} \u00e4 \u2028"}, ensure_ascii=False) for n in range(3)]
    data = "\ufeff{}\n\n{}\r\n{}".format(*lines).encode()
    inspector = receive.CalibrationInspector("text.jsonl")
    for start in range(0, len(data), size):
        inspector.update(data[start : start + size])
    assert inspector.finish()[0].sha256 == sha256(data)


def test_an_invalid_line_is_named() -> None:
    inspector = receive.CalibrationInspector("text.jsonl")
    with pytest.raises(InvalidCalibration, match=r"^Line 3 of the calibration file"):
        inspector.update(b'{"text": "a"}\n\n{"foo": 1}\n')


def test_long_lines_are_left_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "MAX_LINE", 20)
    inspector = receive.CalibrationInspector("text.jsonl")
    inspector.update(b'{"text": "' + b"x" * 20)
    inspector.update(b'"}\nno object\n')
    assert inspector.finish()[0].path == "text.jsonl"
