"""Every attack in attacks/ is rejected in bounded memory and time."""

import importlib
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from deltadock.errors import InvalidArtifact
from tests.artifacts.attacks.registry import ATTACKS, DEFUSED
from tests.artifacts.mutations import MUTATIONS
from tests.artifacts.use import use

for module in ("header", "manifest", "records", "segments"):
    importlib.import_module(f"tests.artifacts.attacks.{module}")

PER_BYTE = 40
"""Maximum bytes of memory that reading takes per byte of the header."""

FIXED_BYTES = 8 << 20
"""Additional memory: decoding a tensor of `use`'s largest size to float32."""

pytestmark = pytest.mark.timeout(60)


def peak_of(path: Path) -> int:
    """Peak memory while everything in a file is used."""
    tracemalloc.start()
    try:
        use(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < PER_BYTE * path.stat().st_size + FIXED_BYTES
    return peak


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_rejected(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.delta"
    path.write_bytes(ATTACKS[name]())
    with pytest.raises(InvalidArtifact) as refused:
        peak_of(path)
    assert len(refused.value.message) < 1000, "a message does not repeat what was sent"
    assert refused.value.message.isprintable()


@pytest.mark.parametrize("name", DEFUSED)
def test_a_harmless_file_takes_little_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.delta"
    path.write_bytes(DEFUSED[name]())
    assert peak_of(path) < FIXED_BYTES


def test_fuzzing_finds_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a separate process with limited memory."""
    command = [sys.executable, "-m", "tests.artifacts.fuzz", "--cases", "2000"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2,000 cases, 0 findings" in done.stdout
    for mutation in MUTATIONS:
        assert f"{mutation.__name__.strip('_')}: refused" in done.stdout
