"""The artifact benchmark: file overhead, and the printed tables."""

import pytest

from benchmarks.artifact import main, payload_bits, project, random_block, random_matrix
from deltadock.artifacts.encodings import decode_svd


@pytest.mark.parametrize("grid", ["zeros", "midrise"])
def test_overhead_is_below_two_percent_even_at_a_quarter_of_a_7b_models_width(
    grid: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The overhead falls with size: the full width would take 16 times as long and be easier.
    block = random_block("zeros" if grid == "zeros" else "midrise", shrink=4)
    size = project(block, tmp_path_factory.mktemp("sizes"))
    assert 0.95 < size.payload < 1.05
    assert 0 < size.overhead < 0.02


def test_the_payload_is_codes_and_scales() -> None:
    encoded = random_matrix((48, 64), "midrise", 2.0, seed=0)
    matrix = decode_svd(encoded)
    codes = int(matrix.u.bits.sum()) * 48 + int(matrix.v.bits.sum()) * 64
    assert payload_bits(encoded) == codes + 16 * (len(matrix.s) + 48 + 64)
    assert 1.5 < codes / (48 * 64) < 2.5


def test_it_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--shrink", "32", "--layers", "2", "--repeats", "1", "--cold", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "midrise" in out
    assert "of the plain read" in out
    assert "page cache dropped" in out
