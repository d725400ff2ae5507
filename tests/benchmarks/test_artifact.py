"""The artifact benchmark: true bits at a 7B model's shapes, and what the script prints."""

import pytest

from benchmarks.artifact import main, payload_bits, project, random_block, random_matrix
from deltadock.artifacts.encodings import decode_svd


@pytest.mark.parametrize("grid", ["zeros", "midrise"])
def test_a_7b_file_is_within_two_percent_of_its_codes_and_scales(
    grid: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    block = random_block("zeros" if grid == "zeros" else "midrise")
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
