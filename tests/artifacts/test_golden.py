"""The format is stable: golden files, byte for byte, and their decoded values.

If a test here fails, files that users have stored are read or written differently.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from deltadock.artifacts.encodings import (
    DELTA_ENCODINGS,
    decode_dense,
    decode_svd,
    parts,
    stored_array,
)
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from tests.artifacts import plain_reader
from tests.artifacts.make_golden import (
    FILES,
    GOLDEN,
    MANIFEST,
    VOCABULARY,
    WIDE,
    WIDE_MANIFEST,
    tensors,
    wide_tensors,
)

SHA256 = "e94eff32b0ad065aa9e126ed64fafe9f32e274f933c00c7fadb2e93e9744e541"
WIDE_SHA256 = "3b09ac42219dba60ce7489c7c65aafb43485be393564de0027a6b54709a57a45"
# Ranks by falling width: (8, 8), (8, 5), (3, 3), (2, 2) bits of V and U.
U_COLUMNS = [[-109.5, -102.5, -95.5], [-8, -1, 6], [1, 0, -1], [1, 0, -1]]
S = [1.0, 0.25, -2.0, 0.5]
V_ROWS = [
    [-46, -39, -32, -25, -18],
    [-92, -85, -78, -71, -64],
    [1.5, 0.5, -0.5, -1.5, -2.5],
    [2, 1, 0, -1, 2],
]
DENSE = [
    [5219, 4440, 3661, 2882, 2105],
    [4738, 4018.75, 3299.5, 2580.25, 1861],
    [4257, 3597.5, 2938, 2278.5, 1617],
]
# Codes of 2, none, 4 and 2 bits; scales 0.25, 0.0625 and 0.125; columns times 1, 2 and 0.5.
ROWS = [
    [1.5 * 0.25, 0.5 * 0.25 * 2, -0.5 * 0.25 * 0.5],
    [0, 0, 0],
    [5.5 * 0.0625, -3.5 * 0.0625 * 2, 3.5 * 0.0625 * 0.5],
    [0.5 * 0.125, -0.5 * 0.125 * 2, -1.5 * 0.125 * 0.5],
]
SIGNS = [[0.375, -0.375, 0.375, -0.375, 0.375], [-0.375, 0.375, -0.375, 0.375, -0.375]]
LOW_RANK = [[0.25, -1, 1, -8.5, 3], [0.625, 1.5, 0.5, 11.75, -0.5], [0.125, 0.5, 0, 4, -0.5]]
PRUNED = [
    [1.5, 0.5, 0, 0, 1.5 * 0.5, 0],
    [0, 0.25 * 1.5, 0, 0.25 * -0.5, 0, 0],
    [-0.5, 0, 0, 0.5, -0.5 * 4, -1.5 * 4],
]


def test_the_writer_reproduces_the_golden_bytes(tmp_path: Path) -> None:
    write_artifact(tmp_path / "new.delta", tensors(), MANIFEST)
    assert (tmp_path / "new.delta").read_bytes() == GOLDEN.read_bytes()
    write_artifact(tmp_path / "wide.delta", wide_tensors(), WIDE_MANIFEST)
    assert (tmp_path / "wide.delta").read_bytes() == WIDE.read_bytes()


@pytest.mark.parametrize("path", [GOLDEN, WIDE, FILES])
def test_a_file_that_was_read_is_written_byte_for_byte(path: Path, tmp_path: Path) -> None:
    """Including keys that this version does not know."""
    with Artifact(path) as artifact:
        again = {name: artifact.encoded(name) for name in artifact.records}
        write_artifact(tmp_path / "again.delta", again, artifact.manifest)
    assert (tmp_path / "again.delta").read_bytes() == path.read_bytes()


def test_deflated_files_are_read() -> None:
    with Artifact(FILES) as artifact:
        assert artifact.header.metadata["format"] == "deltadock/1.1"
        assert artifact.files == {"tokenizer.json": VOCABULARY, "config.json": "{}"}


def test_the_reader_decodes_the_golden_values() -> None:
    with Artifact(GOLDEN) as artifact:
        assert artifact.digest == SHA256
        assert {key: artifact.manifest[key] for key in MANIFEST} == MANIFEST
        factors = artifact.factors("proj.weight")
        assert factors.u.T.tolist() == U_COLUMNS
        assert factors.s.tolist() == S
        assert factors.v.tolist() == V_ROWS
        assert artifact.dense("proj.weight").tolist() == DENSE
        assert artifact.dense("embed.weight").tolist() == ROWS
        assert artifact.dense("alias.weight").tolist() == ROWS
        assert artifact.dense("signs.weight")[:2].tolist() == SIGNS
        assert artifact.dense("lora.weight").tolist() == LOW_RANK
        assert artifact.dense("pruned.weight").tolist() == PRUNED
        assert artifact.exact("norm.weight").tolist() == [0x3F80, 0xBF80, 0x4049]
        assert artifact.exact("steps").tolist() == -2
        assert artifact.records["proj.weight"]["damping"] == 0.01
        assert list(artifact.damaged()) == []


def test_the_golden_file_has_every_encoding() -> None:
    with Artifact(GOLDEN) as artifact:
        kinds = {record["kind"] for record in artifact.records.values()}
        assert kinds == DELTA_ENCODINGS | {"exact", "new-rows", "alias"}
        assert any("deflated" in record for record in artifact.records.values())


def test_the_wide_file_has_every_width_and_dtype() -> None:
    with Artifact(WIDE) as artifact:
        assert artifact.digest == WIDE_SHA256
        assert {key: artifact.manifest[key] for key in WIDE_MANIFEST} == WIDE_MANIFEST
        assert artifact.binary_files == {"tokenizer.model": b"\0\1\xff"}
        matrix = decode_svd(artifact.encoded("every.width"))
        assert matrix.v.bits.tolist() == [8, 8, 7, 6, 5, 4, 3, 2, 1]
        assert matrix.u.bits.tolist() == [8, 1, 2, 3, 4, 5, 6, 7, 8]
        # Code (3 + 5 i + 7 j) mod 2^bits of rank i, entry j; scales (i + 1) / 16, (70 - j) / 64.
        entry = sum(
            s
            / 1024
            * ((3 + 5 * i + 7 * 36) % 2**u - (2**u - 1) / 2)
            * ((3 + 5 * i + 7 * 69) % 2**v - (2**v - 1) / 2)
            for i, (s, u, v) in enumerate(
                zip([2, -1, 0.5, 0.25, 1, 2, 4, -8, 16], matrix.u.bits, matrix.v.bits, strict=True)
            )
        )
        dense = artifact.dense("every.width")
        assert dense[36, 69] == pytest.approx(entry * 37 / 16 / 64, rel=1e-5)
        dtypes = {record["dtype"] for record in artifact.records.values()}
        assert dtypes == set(plain_reader.FORMS) - {"I64"}
        assert list(artifact.damaged()) == []


def test_any_safetensors_reader_finds_the_segments() -> None:
    with safe_open(str(GOLDEN), framework="np") as file:
        assert file.metadata()["format"] == "deltadock/1"
        assert file.get_tensor("proj.weight:s").tolist() == S
        assert file.get_slice("norm.weight:data").get_dtype() == "BF16"
        assert file.get_tensor("embed.weight:index").tolist() == [2, 0, 3]
        assert file.get_slice("both.weight:1/scale").get_dtype() == "F32"


@pytest.mark.parametrize("path", [GOLDEN, WIDE])
def test_the_plain_reader_decodes_the_golden_files(path: Path) -> None:
    """A reader written from docs/format.md alone decodes every tensor."""
    found = plain_reader.read(path.read_bytes())
    with Artifact(path) as artifact:
        assert found.keys() == artifact.records.keys()
        for name in artifact.records:
            encoded = artifact.resolved(name)
            if encoded.record["kind"] == "exact":
                assert found[name] == artifact.exact(name).ravel().tolist()
            elif encoded.record["kind"] == "new-rows":
                (part,) = parts(encoded)
                delta, data = found[name]
                assert data == stored_array(encoded).ravel().tolist()
                if part is None:
                    assert delta is None
                else:
                    np.testing.assert_allclose(delta, decode_dense(part), rtol=1e-6)
            else:
                np.testing.assert_allclose(found[name], artifact.dense(name), rtol=2e-6, atol=1e-6)
