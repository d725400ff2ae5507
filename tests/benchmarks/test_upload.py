"""The upload benchmark prints its table."""

import pytest

from benchmarks.upload import main


def test_it_prints_a_line_per_store(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--mib", "18", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines[2:]] == [
        "folder",
        "S3, presigned",
        "S3, through the api",
    ]
