"""Truncated and inconsistent delta files are rejected; damage is detected."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltadock.artifacts.reader import Artifact
from deltadock.errors import InvalidArtifact
from tests.artifacts.edits import DATA_OFFSET, FILE, drop, put, rewritten
from tests.artifacts.make_golden import GOLDEN, WIDE
from tests.artifacts.support import container, entry, split
from tests.artifacts.use import use

WIDE_FILE = WIDE.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.delta"


def test_the_unedited_file_is_read(path: Path) -> None:
    path.write_bytes(rewritten(lambda _header, _manifest: None))
    use(path)


def test_truncations_are_rejected(path: Path) -> None:
    path.write_bytes(FILE)
    edges = {*range(20), *range(DATA_OFFSET - 20, DATA_OFFSET + 20), len(FILE) - 1}
    with path.open("r+b") as stream:
        for length in sorted({*edges, *range(0, len(FILE), 13)}, reverse=True):
            stream.truncate(length)
            with pytest.raises(InvalidArtifact):
                Artifact(path)


def test_a_header_cut_off_in_its_padding_is_rejected(path: Path) -> None:
    def without_tensors(header: Any, manifest: Any) -> None:
        manifest["tensors"] = {}
        for name in header.keys() - {"__metadata__"}:
            del header[name]

    file = rewritten(without_tensors, b"")
    padded = (len(file) - 8 + 64).to_bytes(8, "little") + file[8:] + b" " * 64
    path.write_bytes(padded)
    use(path)
    path.write_bytes(padded[:-1])
    with pytest.raises(InvalidArtifact):
        Artifact(path)


@pytest.mark.parametrize("extra", [b"\0", b" " * 4096, FILE])
def test_trailing_bytes_are_rejected(path: Path, extra: bytes) -> None:
    path.write_bytes(FILE + extra)
    with pytest.raises(InvalidArtifact, match="announced"):
        Artifact(path)


def test_every_changed_byte_of_the_header_is_rejected(path: Path) -> None:
    path.write_bytes(FILE)
    refused = 0
    with path.open("r+b", buffering=0) as stream:
        for position in range(DATA_OFFSET):
            stream.seek(position)
            stream.write(bytes([FILE[position] ^ 1 << position % 8]))
            try:
                use(path)
            except InvalidArtifact:
                refused += 1
            stream.seek(position)
            stream.write(FILE[position : position + 1])
    use(path)
    assert refused == DATA_OFFSET


def flips() -> Iterator[tuple[str, int]]:
    """A few positions in every segment."""
    header, _ = split(FILE)
    for name, spec in header.items():
        if name != "__metadata__":
            begin, end = spec["data_offsets"]
            yield from ((name, at) for at in {begin, (begin + end) // 2, end - 1})


@pytest.mark.parametrize(("segment", "at"), list(flips()))
def test_a_flipped_bit_in_a_segment_is_detected(path: Path, segment: str, at: int) -> None:
    file = bytearray(FILE)
    file[DATA_OFFSET + at] ^= 1 << at % 8
    path.write_bytes(file)
    with Artifact(path) as artifact:
        assert list(artifact.damaged()) == [segment]
        with pytest.raises(InvalidArtifact, match=f"'{segment}' first"):
            artifact.check_intact()


@given(st.integers(0, 8 * len(WIDE_FILE) - 1))
@example(0)
@example(8 * WIDE_FILE.index(b" " * 8))
def test_a_flipped_bit_anywhere_is_detected(bit: int) -> None:
    """In the header's length, its text, its padding, the manifest, the data."""
    file = bytearray(WIDE_FILE)
    file[bit // 8] ^= 1 << bit % 8
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.delta"
        path.write_bytes(file)
        with pytest.raises(InvalidArtifact), Artifact(path) as artifact:
            artifact.check_intact()


@pytest.mark.parametrize("header", [{}, {"w": entry("U8", [1], 0, 1)}])
def test_a_checkpoint_is_rejected(path: Path, header: Any) -> None:
    path.write_bytes(container({**header, "__metadata__": {"format": "pt"}}, b"1" * len(header)))
    with pytest.raises(InvalidArtifact, match="checkpoint"):
        Artifact(path)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x04}q\0.", b"\0" * 64])
def test_other_files_are_rejected(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidArtifact, match="no delta file"):
        Artifact(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(InvalidArtifact, match=r"a\.delta"):
        Artifact(path)


UNSAFE_NAMES = [
    "../config.json",
    "/etc/config.json",
    "a/b.json",
    "..",
    ".",
    "",
    ".bashrc",
    "a\\b.json",
    "modeling.py",
    "pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "run.sh",
    "a\nb.json",
    "a\0.json",
    "\ud800.json",
    "x" * 251 + ".json",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
@pytest.mark.parametrize("text", ["{}", None])
def test_included_files_need_safe_names(path: Path, name: str, text: str | None) -> None:
    path.write_bytes(rewritten(lambda _, manifest: manifest["files"].update({name: text})))
    with pytest.raises(InvalidArtifact, match="may carry"):
        Artifact(path)


@pytest.mark.parametrize("text", [1, {}, ["{}"], True, "\udcff"])
def test_included_files_that_are_not_text_are_rejected(path: Path, text: object) -> None:
    path.write_bytes(rewritten(lambda _, manifest: manifest["files"].update({"a.json": text})))
    with pytest.raises(InvalidArtifact, match="may carry"):
        Artifact(path)


NO_SEGMENTS = {
    "kind": "alias",
    "of": "proj.weight",
    "shape": [3, 5],
    "dtype": "BF16",
    "sha256": {},
}

INCONSISTENCIES: dict[str, Callable[[Any, Any], object]] = {
    "no metadata": lambda header, _: header.pop("__metadata__"),
    "no manifest": lambda header, _: header["__metadata__"].pop("manifest"),
    "no base": drop("base_digest"),
    "no method": drop("method"),
    "no tensors": drop("tensors"),
    "no files": drop("files"),
    "no size": drop("checkpoint_bytes"),
    "no bits": drop("nominal_bits"),
    "base a number": put("base_digest", value=1),
    "tensors a list": put("tensors", value=[]),
    "files a list": put("files", value=[]),
    "size negative": put("checkpoint_bytes", value=-1),
    "size without end": put("parameters", value=10**4000),
    "bits NaN": put("nominal_bits", value=float("nan")),
    "bits text": put("nominal_bits", value="1"),
    "matrices a list": put("matrices", value=[]),
    "matrices of numbers": put("matrices", value={"proj.weight": 1}),
    "record null": put("tensors", "steps", value=None),
    "record of another kind": put("tensors", "steps", "kind", value="rows"),
    "record of another dtype": put("tensors", "norm.weight", "dtype", value="F16"),
    "record of another shape": put("tensors", "norm.weight", "shape", value=[4]),
    "rows too long": put("tensors", "embed.weight", "shape", value=[4, 300]),
    "shape too large": put("tensors", "proj.weight", "shape", value=[3, 500]),
    "ranks missing": put("tensors", "proj.weight", "ranks", value=[]),
    "ranks without end": put(
        "tensors", "proj.weight", "ranks", value=[{"count": 10**12, "v_bits": 8, "u_bits": 8}]
    ),
    "hashes missing": drop("tensors", "norm.weight", "sha256"),
    "hashes a list": put("tensors", "norm.weight", "sha256", value=[]),
    "segments of no record": drop("tensors", "embed.weight"),
    "record without segments": put(
        "tensors", "ghost", value={"kind": "exact", "shape": [1], "dtype": "U8", "sha256": {}}
    ),
    "alias of nothing": put("tensors", "alias.weight", "of", value="ghost"),
    "alias of itself": put("tensors", "alias.weight", "of", value="alias.weight"),
    "alias of another shape": put("tensors", "alias.weight", "of", value="proj.weight"),
    "alias of another dtype": put("tensors", "alias.weight", "dtype", value="F16"),
    "alias with a segment": put("tensors", "signs.weight", value=NO_SEGMENTS),
    "part of another shape": put("tensors", "both.weight", "parts", 0, "shape", value=[5, 3]),
    "part missing": put("tensors", "both.weight", "parts", value=[]),
    "part of another kind": put("tensors", "both.weight", "parts", 1, "kind", value="svd"),
    "stack longer": put("tensors", "experts.weight", "shape", value=[4, 3, 5]),
    "deflated of another size": put("tensors", "thinned.weight", "deflated", "codes", value=20),
    "not deflated": drop("tensors", "thinned.weight", "deflated"),
    "base without rows": put("tensors", "new.weight", "base_rows", value=0),
    "another grid": put("tensors", "scaled.weight", "grid", value="zeros"),
    "no row scale": drop("tensors", "scaled.weight", "row_scale"),
    "one scale for all": put("tensors", "embed.weight", "scale", value="shared"),
    "no index": drop("tensors", "embed.weight", "index"),
    "more ranks": put("tensors", "lora.weight", "rank", value=3),
    "factors of another dtype": put("tensors", "lora.weight", "factor_dtype", value="F16"),
    "wider groups": put("tensors", "pruned.weight", "group", value=128),
}


@pytest.mark.parametrize("name", INCONSISTENCIES)
def test_inconsistent_records_are_rejected(path: Path, name: str) -> None:
    path.write_bytes(rewritten(INCONSISTENCIES[name]))
    with pytest.raises(InvalidArtifact):
        Artifact(path)


@pytest.mark.parametrize("manifest", ["", "[]", "{", "null", '"x"', "[" * 100_000])
def test_an_unreadable_manifest_is_rejected(path: Path, manifest: str) -> None:
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    metadata = {"format": "deltadock/1", "manifest": manifest, "manifest_sha256": digest}
    path.write_bytes(container({"__metadata__": metadata}))
    with pytest.raises(InvalidArtifact, match="manifest"):
        Artifact(path)


def test_an_extra_segment_is_rejected(path: Path) -> None:
    size = len(FILE) - DATA_OFFSET
    extra = entry("U8", [4], size, size + 4)
    file = rewritten(lambda header, _: header.update({"norm.weight:more": extra}),
                     FILE[DATA_OFFSET:] + b"1234")  # fmt: skip
    path.write_bytes(file)
    with pytest.raises(InvalidArtifact, match="belongs to no tensor"):
        Artifact(path)


def test_a_missing_segment_is_rejected(path: Path) -> None:
    def without_the_last(header: Any, _manifest: Any) -> None:
        last = max(header.keys() - {"__metadata__"}, key=lambda k: header[k]["data_offsets"])
        del header[last]

    _, data = split(FILE)
    header, _ = split(FILE)
    del header["__metadata__"]
    end = max(spec["data_offsets"][0] for spec in header.values())
    path.write_bytes(rewritten(without_the_last, data[:end]))
    with pytest.raises(InvalidArtifact, match="is missing"):
        Artifact(path)


def test_reading_a_tensor_by_another_encoding_fails() -> None:
    with Artifact(GOLDEN) as artifact:
        with pytest.raises(KeyError, match=r"norm\.weight is stored as exact"):
            artifact.factors("norm.weight")
        with pytest.raises(KeyError, match=r"proj\.weight is stored as svd"):
            artifact.exact("proj.weight")


def test_arrays_outlive_the_file(path: Path) -> None:
    path.write_bytes(FILE)
    with Artifact(path) as artifact:
        kept = artifact.exact("norm.weight")
    path.unlink()
    np.testing.assert_array_equal(kept, [0x3F80, 0xBF80, 0x4049])


def test_arrays_are_views_of_the_map() -> None:
    """Two arrays of one segment share memory: nothing is copied."""
    with Artifact(GOLDEN) as artifact:
        one, two = (artifact.segment("proj.weight:v") for _ in range(2))
        assert one.size
        assert np.shares_memory(one, two)
        assert not one.flags.owndata
        assert not one.flags.writeable
        encoded = artifact.encoded("proj.weight").segments["v"]
        assert np.shares_memory(one, encoded)


@pytest.mark.parametrize(
    "segment", ["pruned.weight:positions", "thinned.weight:bitmap", "embed.weight:index"]
)
def test_codes_that_contradict_their_record_are_rejected(tmp_path: Path, segment: str) -> None:
    header, _ = split(FILE)
    begin, end = header[segment]["data_offsets"]
    file = bytearray(FILE)
    file[DATA_OFFSET + begin : DATA_OFFSET + end] = b"\xff" * (end - begin)
    path = tmp_path / "a.delta"
    path.write_bytes(file)
    with Artifact(path) as artifact, pytest.raises(InvalidArtifact):
        artifact.dense(segment.partition(":")[0])


def test_an_alias_reads_as_its_target() -> None:
    with Artifact(GOLDEN) as artifact:
        np.testing.assert_array_equal(
            artifact.dense("alias.weight"), artifact.dense("embed.weight")
        )
        assert artifact.tensor_bytes("alias.weight") == 0


@pytest.mark.parametrize("name", ["norm.weight", "new.weight"])
def test_a_tensor_without_a_delta_cannot_be_decoded(name: str) -> None:
    with Artifact(GOLDEN) as artifact, pytest.raises(InvalidArtifact, match="no delta"):
        artifact.dense(name)
