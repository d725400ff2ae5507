"""Scratch storage of tensors in memory and on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltadock import host_memory
from deltadock.compression.scratch import Scratch

TENSORS = {
    "bfloat16": torch.randn(7, 5).bfloat16(),
    "float64": torch.randn(3, 4, 2, dtype=torch.float64),
    "int64": torch.arange(12),
    "turned": torch.randn(6, 9).t(),
    "part": torch.randn(10, 10)[2:5],
    "empty": torch.zeros(0, 4),
    "number": torch.tensor(3.5),
    "graph": torch.randn(4, requires_grad=True) * 2,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def same(actual: Tensor, put: Tensor) -> bool:
    return actual.dtype == put.dtype and torch.equal(actual, put.detach())


@pytest.mark.parametrize("memory", [0, 200, 1 << 20])
def test_get_returns_the_stored_tensor(memory: int, folder: Path) -> None:
    with Scratch(memory) as scratch:
        for key, tensor in TENSORS.items():
            assert key not in scratch
            scratch.put(key, tensor)
            assert key in scratch
        for key, tensor in reversed(TENSORS.items()):
            assert same(scratch.get(key), tensor), key
            assert not scratch.get(key, "cpu").requires_grad
    assert list(folder.iterdir()) == []


def test_tensors_beyond_the_memory_limit_go_to_disk(folder: Path) -> None:
    with Scratch(1000) as scratch:
        for number in range(5):
            scratch.put(f"{number}", torch.full((100,), float(number)))  # 400 bytes each
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == 3
        assert [float(scratch.get(f"{n}")[0]) for n in range(5)] == [0, 1, 2, 3, 4]
        # Small tensors still fit in memory.
        scratch.put("small", torch.zeros(10))
        assert len([path for path in folder.rglob("*") if path.is_file()]) == 3
    assert list(folder.iterdir()) == []


def test_files_can_be_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with Scratch(0, parent=elsewhere) as scratch:
        scratch.put("a", torch.ones(3))
        assert list(folder.iterdir()) == []
        assert [path.name for path in elsewhere.rglob("*.safetensors")] == ["0.safetensors"]
    assert list(elsewhere.iterdir()) == []


def test_files_are_removed_after_an_exception(folder: Path) -> None:
    scratch = Scratch(0)

    def fail() -> None:
        with scratch:
            scratch.put("a", torch.ones(3))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(folder.iterdir()) == []
    assert "a" not in scratch


def test_an_unknown_key_raises() -> None:
    with Scratch() as scratch, pytest.raises(KeyError):
        scratch.get("a")


def test_tensors_stay_on_their_device_while_they_fit() -> None:
    with Scratch(0, device_bytes=100) as scratch:
        scratch.put("small", torch.empty(5, 5, device="meta").t()[:2])
        kept = scratch.get("small", "meta")
        assert kept.is_meta
        assert kept.untyped_storage().nbytes() == 40, "not the whole of a view"


@pytest.mark.parametrize(("limit", "smaller"), [("4096\n", True), ("max\n", False), (None, False)])
def test_a_control_group_limits_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, smaller: bool
) -> None:
    """A container of 32 GB on a machine of 512 GB would be killed at a quarter of the machine's."""
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit)
    monkeypatch.setattr(host_memory, "GROUP", tmp_path)
    assert (host_memory.total_memory() == 4096) == smaller
