"""Writing and reading round-trip, and writing is deterministic."""

from pathlib import Path

import numpy as np
import pytest

from deltadock.artifacts.encodings import Encoded, encode_exact, encode_svd
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.serial import ALIGNMENT
from deltadock.artifacts.writer import write_artifact
from deltadock.errors import InvalidArtifact, MalformedSafetensors
from tests.artifacts.make_golden import MANIFEST, tensors
from tests.artifacts.samples import svd_matrix
from tests.artifacts.support import split


def test_round_trip(tmp_path: Path) -> None:
    path, written = tmp_path / "a.delta", tensors()
    write_artifact(path, written, MANIFEST)
    with Artifact(path) as artifact:
        assert artifact.nbytes == path.stat().st_size
        assert artifact.base_digest == MANIFEST["base_digest"]
        assert artifact.records.keys() == written.keys()
        for name, encoded in written.items():
            read = artifact.encoded(name)
            assert {k: v for k, v in read.record.items() if k != "sha256"} == encoded.record
            assert read.segments.keys() == encoded.segments.keys() == read.record["sha256"].keys()
            for key, data in encoded.segments.items():
                np.testing.assert_array_equal(read.segments[key], data)
                assert not read.segments[key].flags.writeable
            assert artifact.tensor_bytes(name) == encoded.nbytes
        artifact.check_intact()


def test_an_empty_delta_round_trips(tmp_path: Path) -> None:
    write_artifact(tmp_path / "none.delta", {}, MANIFEST)
    with Artifact(tmp_path / "none.delta") as artifact:
        assert artifact.records == {}
        artifact.check_intact()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a.delta", tensors(), MANIFEST)
    shuffled = {
        name: Encoded(
            dict(reversed(encoded.record.items())), dict(reversed(encoded.segments.items()))
        )
        for name, encoded in reversed(tensors().items())
    }
    write_artifact(tmp_path / "b.delta", shuffled, dict(reversed(MANIFEST.items())))
    assert (tmp_path / "a.delta").read_bytes() == (tmp_path / "b.delta").read_bytes()


def test_packed_segments_are_aligned(tmp_path: Path) -> None:
    # With these sizes and names only the writer's order keeps every segment aligned.
    written = {
        "a.odd": encode_exact(np.arange(3, dtype=np.uint8), "U8", (3,)),
        "b.half": encode_exact(np.arange(5, dtype=np.uint16), "BF16", (5,)),
        "c.wide": encode_exact(np.arange(3, dtype=np.int64), "I64", (3,)),
        "z.first": tensors()["proj.weight"],
        "z.second": tensors()["embed.weight"],
    }
    write_artifact(tmp_path / "a.delta", written, MANIFEST)
    file = (tmp_path / "a.delta").read_bytes()
    header, data = split(file)
    del header["__metadata__"]
    start = len(file) - len(data)
    assert start % ALIGNMENT == 0
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        item = {"U8": 1, "BF16": 2, "F16": 2, "U32": 4, "I32": 4, "F32": 4, "I64": 8}
        assert begin % item[entry["dtype"]] == 0, name
        if entry["dtype"] == "U32":
            assert (begin % ALIGNMENT, end % ALIGNMENT) == (0, 0), name


def test_arrays_of_any_memory_layout_are_written_in_row_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_artifact(
        tmp_path / "a.delta",
        {
            "fortran": encode_exact(np.asfortranarray(values), "F32", (3, 4)),
            "strided": Encoded(
                {"kind": "exact", "shape": [3, 2], "dtype": "F32"}, {"data": values[:, ::2]}
            ),
        },
        MANIFEST,
    )
    with Artifact(tmp_path / "a.delta") as artifact:
        np.testing.assert_array_equal(artifact.exact("fortran"), values)
        np.testing.assert_array_equal(artifact.exact("strided"), values[:, ::2])


def test_names_are_not_escaped(tmp_path: Path) -> None:
    """No hash covers how the header spells a name."""
    path = tmp_path / "a.delta"
    exact = encode_exact(np.arange(3, dtype=np.uint8), "U8", (3,))
    write_artifact(path, {"pröj.weight": exact}, MANIFEST)
    assert "pröj.weight:data".encode() in path.read_bytes()
    with Artifact(path) as artifact:
        assert artifact.exact("pröj.weight").tolist() == [0, 1, 2]
    with pytest.raises(MalformedSafetensors, match="UTF-8"):
        write_artifact(path, {"\ud800": exact}, MANIFEST)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.delta"
    unreadable = Encoded({"kind": "lut", "shape": [1], "dtype": "F32"}, {"data": np.zeros(1)})
    with pytest.raises(InvalidArtifact):
        write_artifact(path, {"a": unreadable}, MANIFEST)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_artifact(path, {}, {**MANIFEST, "nominal_bits": float("nan")})
    path.mkdir()  # makes the final rename fail
    with pytest.raises(OSError, match="directory"):
        write_artifact(path, tensors(), MANIFEST)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.delta"
    path.write_bytes(b"older")
    write_artifact(path, tensors(), MANIFEST)
    with Artifact(path) as artifact:
        artifact.check_intact()
    assert list(tmp_path.iterdir()) == [path]


def test_a_large_matrix_takes_little_more_than_its_codes() -> None:
    matrix = svd_matrix(64, 256, 512)
    encoded = encode_svd(matrix, "BF16", {})
    code_bits = int(matrix.u.bits.sum()) * 256 + int(matrix.v.bits.sum()) * 512
    padding = 2 * ALIGNMENT * len(encoded.record["ranks"])
    scales = 64 * (4 + 2 + 2)
    assert encoded.nbytes <= code_bits / 8 + scales + padding
