"""The load benchmark runs, and none of its requests fails."""

import pytest

from benchmarks.load import main


@pytest.mark.slow
def test_no_request_fails(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick"])
    printed = capsys.readouterr().out
    errors = next(line for line in printed.splitlines() if line.startswith("errors"))
    assert errors.endswith("met"), printed
