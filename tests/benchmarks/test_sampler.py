"""The sampler's benchmark runs and counts operators of both ways."""

import pytest

from benchmarks.sampler import SETTINGS, main


def test_every_setting_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--vocabularies", "300", "--rows", "1", "3"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("x")]
    assert len(lines) == 2 * len(SETTINGS)
    for one, three in zip(lines[::2], lines[1::2], strict=True):
        assert int(three[1]) >= int(one[1]), "row by row"
        assert int(three[2]) == int(one[2]), "together"
