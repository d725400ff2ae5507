"""Writes tests/data/golden.delta: `python -m tests.artifacts.make_golden`.

Only for a new version of the format. Every value is written out or counted, none is drawn: the
file must never depend on a library's generator.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np

from artifacts.encoding import (
    Encoded,
    SvdMatrix,
    Vectors,
    encode_exact,
    encode_rows,
    encode_svd,
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


def tensors() -> dict[str, Encoded]:
    """One tensor of every kind; the ranks are not yet in the order of their widths."""
    u, v = [2, 5, 3, 8], [2, 8, 3, 8]
    matrix = SvdMatrix(
        u=Vectors(codes(4, 3, u), np.array(u), np.array([2, 16, 4, 127.5], np.float16)),
        s=np.array([0.5, 0.25, -2.0, 1.0], np.float32),
        v=Vectors(codes(4, 5, v), np.array(v), np.array([1, 100, 3.5, 64], np.float16)),
    )
    # Multiples of half a step, the largest 7.5 of them: four bits hold the rows exactly.
    rows = np.zeros((4, 3), np.float32)
    rows[1] = np.array([7.5, -0.5, 2.5]) * 0.25
    rows[3] = np.array([0.5, 1.5, -7.5]) * 0.0625
    bfloat16 = np.array([0x3F80, 0xBF80, 0x4049], np.uint16)  # 1.0, -1.0, 3.140625
    return {
        "proj.weight": encode_svd(matrix, "BF16", {"damping": 0.01}),
        "embed.weight": encode_rows(rows, 4, "BF16", {}),
        "norm.weight": encode_exact(bfloat16, "BF16", (3,)),
        "steps": encode_exact(np.array([-2], np.int64), "I64", ()),
    }


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    write_artifact(GOLDEN, tensors(), MANIFEST)
