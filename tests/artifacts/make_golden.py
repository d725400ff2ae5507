"""Writes tests/data/golden.delta: `python -m tests.artifacts.make_golden`.

Only for a new version of the format. Every value is written out or counted, none is drawn: the
file must never depend on a library's generator.
"""

import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from artifacts.encoding import (
    Encoded,
    SvdMatrix,
    Vectors,
    encode_alias,
    encode_exact,
    encode_low_rank,
    encode_new_rows,
    encode_rows,
    encode_sparse,
    encode_sparse24,
    encode_stack,
    encode_sum,
    encode_svd,
    encode_transposed,
)
from artifacts.packing import CodeArray
from artifacts.writer import write_artifact

GOLDEN: Final = Path(__file__).parents[1] / "data" / "golden.delta"

MANIFEST: Final[dict[str, Any]] = {
    "base_digest": "b" * 64,
    "finetuned_digest": "f" * 64,
    "model_type": "qwen2",
    "method": "adamix",
    "nominal_bits": 1.0,
    "settings": {"solver": "exact", "embedding_bits": 4},
    "seed": 7,
    "calibration": {"sha256": "c" * 64, "tokens": 4096, "seed": 7},
    "checkpoint_bytes": 200,
    "parameters": 100,
    "version": "0.1.0",
    "files": {"chat_template.jinja": "{{ m }}: é\n", "generation_config.json": None},
    "matrices": {"proj.weight": {"error": 0.25, "damping": 0.01, "fallbacks": []}},
}


def codes(rows: int, columns: int, widths: list[int]) -> CodeArray:
    """Code of row i and column j: (3 + 5 i + 7 j) modulo what the row's width holds."""
    i, j = np.arange(rows)[:, None], np.arange(columns)[None]
    found: CodeArray = ((3 + 5 * i + 7 * j) % 2 ** np.array(widths)[:, None]).astype(np.uint8)
    return found


def with_zeros() -> Encoded:
    """A decomposition on grids with zero points; the ranks are not in the order of widths."""
    u, v = [2, 5, 3, 8], [2, 8, 3, 8]
    matrix = SvdMatrix(
        u=Vectors(codes(4, 3, u), np.array(u), np.array([2, 16, 4, 127.5], np.float16)),
        s=np.array([0.5, 0.25, -2.0, 1.0], np.float32),
        v=Vectors(codes(4, 5, v), np.array(v), np.array([1, 100, 3.5, 64], np.float16)),
    )
    return encode_svd(matrix, "BF16", {"damping": 0.01})


def centred() -> Encoded:
    """A decomposition on mid-rise grids, with a scale for each row and column."""
    u, v = [1, 4, 6], [7, 4, 1]
    matrix = SvdMatrix(
        u=Vectors(codes(3, 3, u), np.array(u), None),
        s=np.array([0.0625, -0.5, 0.25], np.float32),
        v=Vectors(codes(3, 5, v), np.array(v), None),
    )
    return encode_svd(matrix, "BF16", {}, np.array([1, 0.5, -2]), np.array([1, 0.25, 1, 0.5, 2]))


def rows() -> Encoded:
    """Rows of several widths, the second without a delta."""
    widths = [2, 0, 4, 2]
    scale = np.array([0.25, 1, 0.0625, 0.125])
    stored = codes(4, 3, [max(width, 1) for width in widths])
    return encode_rows(stored, np.array(widths), scale, "BF16", {}, np.array([1, 2, 0.5]))


def signs() -> Encoded:
    """One bit an entry, and one scale for all."""
    return encode_rows(codes(3, 5, [1] * 3), np.ones(3, np.int64), np.array([0.75]), "BF16")


def sparse() -> tuple[Encoded, Encoded]:
    """A 2:4 sparse matrix whose last columns are no four, and one of any sparsity."""
    mask = np.array([[1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1]], np.bool_)
    scale = np.array([[1, 0.5], [0.25, 2], [1, 4]])
    return (
        encode_sparse24(codes(3, 6, [2] * 3), mask, scale, 2, 4, "BF16"),
        encode_sparse(codes(3, 6, [3] * 3), ~mask, scale, 3, 4, "BF16"),
    )


def stored(encoded: Encoded) -> Encoded:
    """`encoded` deflated by hand, in blocks that compress nothing: no library's choice is in it."""
    segments = {}
    for key, data in encoded.segments.items():
        raw = data.tobytes()
        size = len(raw).to_bytes(2, "little")
        block = b"\x78\x01\x01" + size + bytes(255 - byte for byte in size) + raw
        segments[key] = np.frombuffer(block + zlib.adler32(raw).to_bytes(4, "big"), np.uint8)
    sizes = {key: len(data) for key, data in segments.items()}
    return Encoded({**encoded.record, "deflated": sizes}, segments)


def tensors() -> dict[str, Encoded]:
    """One tensor of every kind."""
    bfloat16 = np.array([0x3F80, 0xBF80, 0x4049], np.uint16)  # 1.0, -1.0, 3.140625
    u = np.array([[1, -2], [0.5, 3], [0, 1]], np.float32)
    v = np.array([[1, 0, 2, -1, 4], [0.25, 1, 0, 8, -1]], np.float32)
    pruned, thinned = sparse()
    return {
        "alias.weight": encode_alias("embed.weight", (4, 3), "BF16"),
        "both.weight": encode_sum([centred(), signs()]),
        "conv.weight": encode_transposed(centred()),
        "embed.weight": rows(),
        "experts.weight": encode_stack([signs(), None, centred()]),
        "lora.weight": encode_low_rank(u, v, 0.5, "BF16"),
        "new.weight": encode_new_rows(rows(), np.stack([bfloat16, bfloat16[::-1]]), 4, "BF16"),
        "norm.weight": encode_exact(bfloat16, "BF16", (3,)),
        "proj.weight": with_zeros(),
        "pruned.weight": pruned,
        "scaled.weight": centred(),
        "signs.weight": signs(),
        "steps": encode_exact(np.array([-2], np.int64), "I64", ()),
        "thinned.weight": stored(thinned),
    }


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    write_artifact(GOLDEN, tensors(), MANIFEST)
