"""Segments in a device's memory are those of the file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import TORCH_DTYPES, load_segments
from deltadock.errors import InvalidArtifact
from tests.artifacts.edits import rewritten
from tests.artifacts.make_golden import GOLDEN, WIDE

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [GOLDEN, WIDE])
@pytest.mark.parametrize("chunk", [32 << 20, 1000])
def test_they_are_the_files(
    device: str, path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltadock.artifacts.tensors.CHUNK_BYTES", chunk)
    with Artifact(path) as artifact:
        segments = load_segments(artifact, device)
        assert list(segments) == [spec.name for spec in artifact.header.tensors]
        for spec in artifact.header.tensors:
            tensor = segments[spec.name]
            assert (tensor.dtype, tensor.shape) == (TORCH_DTYPES[spec.dtype], spec.shape)
            assert raw(tensor) == artifact.segment(spec.name).tobytes()
    words = segments.get("proj.weight:v", segments.get("every.width:v"))
    assert words is not None
    assert words.data_ptr() % 64 == 0
    starts = {tensor.untyped_storage().data_ptr() for tensor in segments.values()}
    assert len(starts) == 1, "one allocation"


def test_a_file_whose_segments_are_not_aligned_is_loaded_too(tmp_path: Path) -> None:
    path = tmp_path / "a.delta"

    # Another order: three bytes of text first, so that nothing after them is aligned.
    def edit(header: object, manifest: object) -> None:
        assert isinstance(header, dict)
        specs = {name: spec for name, spec in header.items() if name != "__metadata__"}
        order = sorted(specs, key=lambda name: (specs[name]["dtype"] != "U8", name))
        position = 0
        for name in order:
            begin, end = specs[name]["data_offsets"]
            specs[name]["data_offsets"] = [position, position + end - begin]
            position += end - begin
            pieces.append(data[begin:end])

    data = GOLDEN.read_bytes()[8 + int.from_bytes(GOLDEN.read_bytes()[:8], "little") :]
    pieces: list[bytes] = []
    rewritten(edit)
    moved = b"".join(pieces)
    pieces.clear()
    path.write_bytes(rewritten(edit, moved))
    with Artifact(path) as artifact:
        artifact.check_intact()
        assert any(spec.begin % 2 for spec in artifact.header.tensors if spec.dtype != "U8")
        for name, tensor in load_segments(artifact, "cpu").items():
            assert raw(tensor) == artifact.segment(name).tobytes()


def test_a_file_that_was_cut_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.delta"
    path.write_bytes(GOLDEN.read_bytes())
    with Artifact(path) as artifact:
        shorter = tmp_path / "b.delta"
        shorter.write_bytes(GOLDEN.read_bytes()[:-1])
        shorter.replace(path)
        with pytest.raises(InvalidArtifact, match="shorter"):
            load_segments(artifact, "cpu")


def test_arrays_are_views_of_the_map() -> None:
    """Zero copies: what two arrays of one segment show is the same memory."""
    with Artifact(GOLDEN) as artifact:
        one, two = (artifact.segment("proj.weight:v") for _ in range(2))
        assert one.size
        assert np.shares_memory(one, two)
        assert not one.flags.owndata
        assert not one.flags.writeable
        encoded = artifact.encoded("proj.weight").segments["v"]
        assert np.shares_memory(one, encoded)
