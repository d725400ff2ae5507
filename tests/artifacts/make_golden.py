"""Writes tests/data/golden*.delta: `python -m tests.artifacts.make_golden`.

Only for a new version of the format. Every value is written out or counted, none is drawn: the
file must never depend on a library's generator.
"""

import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from deltadock.artifacts.encodings import (
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
from deltadock.artifacts.encodings.packing import CodeArray
from deltadock.artifacts.manifest import WITH_DEFLATED_FILES, stored_file
from deltadock.artifacts.writer import write_artifact

DATA: Final = Path(__file__).parents[1] / "data"

GOLDEN: Final = DATA / "golden.delta"
"""One tensor of every kind."""

WIDE: Final = DATA / "golden-wide.delta"
"""What kinds have besides: every width, long vectors, other dtypes, compositions of others."""

FILES: Final = DATA / "golden-files.delta"
"""Format 1.1: a deflated tokenizer. Read, but not written again from its text: zlibs differ."""

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


def every_width() -> Encoded:
    """As optimix makes them: U and V each with widths 8 to 1 of its own, over several words."""
    v, u = np.array([8, 8, 7, 6, 5, 4, 3, 2, 1]), np.array([8, 1, 2, 3, 4, 5, 6, 7, 8])
    matrix = SvdMatrix(
        u=Vectors(codes(9, 37, u.tolist()), u, None),
        s=np.array([2, -1, 0.5, 0.25, 1, 2, 4, -8, 16]) / 1024,
        v=Vectors(codes(9, 70, v.tolist()), v, None),
    )
    row_scale = np.arange(1, 38) / 16
    return encode_svd(matrix, "BF16", {"colour": "blue"}, row_scale, np.arange(70, 0, -1) / 64)


def all_rows() -> Encoded:
    """Every row is stored, in order, with a scale of its own: nothing needs an index."""
    widths = [8, 7, 6, 5, 4, 3, 2, 1]
    scale = 2.0 ** -np.arange(8)
    return encode_rows(codes(8, 33, widths), np.array(widths), scale, "F16")


def unchanged_rows() -> Encoded:
    """No row has a delta."""
    return encode_rows(codes(2, 5, [1, 1]), np.zeros(2, np.int64), np.ones(2), "BF16")


def no_ranks() -> Encoded:
    """A decomposition of nothing."""
    nothing = np.zeros(0, np.int64)
    matrix = SvdMatrix(
        u=Vectors(np.zeros((0, 3), np.uint8), nothing, np.zeros(0, np.float16)),
        s=np.zeros(0, np.float32),
        v=Vectors(np.zeros((0, 5), np.uint8), nothing, np.zeros(0, np.float16)),
    )
    return encode_svd(matrix, "BF16")


def lora(factor_dtype: str) -> Encoded:
    u = np.array([[1.5], [-2], [0.125]], np.float32)
    v = np.array([[1, 0, 0.5, -1, 4]], np.float32)
    return encode_low_rank(u, v, -0.25, "BF16", None, factor_dtype)


def wide_tensors() -> dict[str, Encoded]:
    """What `tensors` lacks."""
    bytes_of = np.arange(24, dtype=np.uint8)
    thinned = stored(sparse()[1])
    added = np.array([[0x3F80, 0xBF80, 0x4049, 0, 0x8000]], np.uint16)
    dtypes = {
        "BOOL": np.array([True, False]), "U8": bytes_of[:3], "I8": -bytes_of[:3].view(np.int8),
        "F8_E4M3": bytes_of[:5], "F8_E5M2": bytes_of[5:9], "U16": bytes_of.view("<u2")[:3],
        "I16": -bytes_of.view("<i2")[:3], "F16": np.array([1, -2], np.float16),
        "U32": bytes_of.view("<u4")[:3], "I32": -bytes_of.view("<i4")[:3],
        "F32": np.array([[1, -0.5]], np.float32), "U64": bytes_of.view("<u8"),
        "F64": np.array([1, -0.1]),
    }  # fmt: skip
    exact = {
        f"exact.{dtype}": encode_exact(values, dtype, values.shape)
        for dtype, values in dtypes.items()
    }
    return {
        **exact,
        "added.weight": encode_new_rows(None, added, 3, "BF16"),
        "empty.weight": encode_exact(np.zeros((0, 4), np.float32), "F32", (0, 4)),
        "every.width": every_width(),
        "f16.lora": lora("F16"),
        "f32.lora": lora("F32"),
        "grown.weight": encode_new_rows(encode_sum([signs(), no_ranks()]), added, 3, "BF16"),
        "no.ranks": no_ranks(),
        "packed.experts": stored(encode_stack([signs(), None, encode_transposed(transposed())])),
        "packed.new": stored(encode_new_rows(signs(), added, 3, "BF16")),
        "part.deflated": encode_stack([None, thinned]),
        "rows.all": all_rows(),
        "rows.none": unchanged_rows(),
        "same.é": encode_alias("exact.F32", (1, 2), "F32"),
        "stack.of.sums": encode_stack([encode_sum([signs(), centred(), lora("BF16")])] * 2),
    }


def transposed() -> Encoded:
    """A (5, 3) delta, of which the transpose is stored."""
    return encode_rows(codes(5, 3, [2] * 5), np.full(5, 2), np.full(5, 0.5), "BF16")


WIDE_MANIFEST: Final[dict[str, Any]] = {
    **MANIFEST,
    "method": "optimix",
    "nominal_bits": None,
    "calibration": None,
    "binary_files": {"tokenizer.model": "AAH/"},
    "colour": {"blue": [1, 2.5, "é"]},
}

VOCABULARY: Final = "".join(f'"täglich {number}",' for number in range(1000))
"""A text that is long enough to be deflated."""

FILES_MANIFEST: Final[dict[str, Any]] = {
    **MANIFEST,
    "format": WITH_DEFLATED_FILES,
    "files": {"tokenizer.json": stored_file(VOCABULARY), "config.json": "{}"},
}


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    write_artifact(FILES, {}, FILES_MANIFEST)
    write_artifact(GOLDEN, tensors(), MANIFEST)
    write_artifact(WIDE, wide_tensors(), WIDE_MANIFEST)
