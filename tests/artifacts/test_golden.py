"""The format does not move: one stored file, its bytes and what they mean.

If a test here fails, files that people have stored are no longer read or written as they were.
"""

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import safe_open

from artifacts.reader import Artifact
from artifacts.writer import write_artifact
from tests.artifacts.make_golden import GOLDEN, MANIFEST, tensors
from tests.artifacts.support import split

SHA256 = "f395b82b705963fab120b01567267c69feb4f1fac497856f767b4873c5196ff9"
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
EMBED_ROWS = [[0, 0, 0], [1.875, -0.125, 0.625], [0, 0, 0], [0.03125, 0.09375, -0.46875]]


def test_the_writer_writes_these_bytes(tmp_path: Path) -> None:
    write_artifact(tmp_path / "new.delta", tensors(), MANIFEST)
    assert (tmp_path / "new.delta").read_bytes() == GOLDEN.read_bytes()


def test_the_reader_reads_these_numbers() -> None:
    with Artifact(GOLDEN) as artifact:
        assert artifact.digest == SHA256
        assert {key: artifact.manifest[key] for key in MANIFEST} == MANIFEST
        factors = artifact.factors("proj.weight")
        assert factors.u.T.tolist() == U_COLUMNS
        assert factors.s.tolist() == S
        assert factors.v.tolist() == V_ROWS
        assert artifact.dense("proj.weight").tolist() == DENSE
        assert artifact.dense("embed.weight").tolist() == EMBED_ROWS
        assert artifact.exact("norm.weight").tolist() == [0x3F80, 0xBF80, 0x4049]
        assert artifact.exact("steps").tolist() == -2
        assert artifact.records["proj.weight"]["damping"] == 0.01
        assert list(artifact.damaged()) == []


def test_any_safetensors_reader_finds_the_segments() -> None:
    with safe_open(str(GOLDEN), framework="np") as file:
        assert file.metadata()["format"] == "deltadock/1"
        assert file.get_tensor("proj.weight:s").tolist() == S
        assert file.get_slice("norm.weight:data").get_dtype() == "BF16"
        assert file.get_tensor("embed.weight:index").tolist() == [1, 3]


def test_docs_format_is_enough_to_decode_it() -> None:
    """An SVD decoded from the bytes as docs/format.md tells it, with nothing of this project."""
    header, data = split(GOLDEN.read_bytes())
    record = json.loads(header["__metadata__"]["manifest"])["tensors"]["proj.weight"]

    def numbers(segment: str, form: str) -> list[Any]:
        begin, end = header[f"proj.weight:{segment}"]["data_offsets"]
        return [value for (value,) in struct.iter_unpack(form, data[begin:end])]

    def vectors(side: str, columns: int) -> list[list[float]]:
        words, zero = numbers(side, "<I"), numbers(f"{side}.zero", "<e")
        found: list[list[float]] = []
        for run in record["ranks"]:
            bits, rows = run[f"{side}_bits"], [[0] * columns for _ in range(run["count"])]
            start = 0
            for plane in {2: [2], 3: [2, 1], 5: [4, 1], 8: [8]}[bits]:
                bits -= plane
                for row in rows:
                    for e in range(columns):
                        word = words[start + e * plane // 32]
                        code = word >> plane * (e % (32 // plane)) & (2**plane - 1)
                        row[e] += code << bits
                    start += -(-columns * plane // 32)
            words = words[-(-start // 32) * 32 :]
            found += [[code - zero[len(found) + i] for code in row] for i, row in enumerate(rows)]
        assert words == []
        return found

    assert record["shape"] == [3, 5]
    assert (vectors("u", 3), numbers("s", "<f"), vectors("v", 5)) == (U_COLUMNS, S, V_ROWS)
