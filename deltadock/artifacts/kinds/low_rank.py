"""`low-rank`: delta = scaling * u @ v, float factors as they are; also how a LoRA adapter lies."""

from typing import Any

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.kinds.record import (
    FLOAT_DTYPES,
    Details,
    Encoded,
    Expected,
    FloatArray,
    Record,
    check_rank,
    count_of,
    from_raw,
    make_record,
    matrix_shape,
    number_of,
    to_raw,
)
from deltadock.artifacts.kinds.svd import Factors
from deltadock.errors import InvalidArtifact


def encode_low_rank(
    u: npt.NDArray[Any],
    v: npt.NDArray[Any],
    scaling: float,
    dtype: str,
    details: Details | None = None,
    factor_dtype: str = "BF16",
) -> Encoded:
    """Encode float factors.

    Args:
        u, v: (h_out, r) and (r, h_in); raw data of `factor_dtype` (bfloat16 as uint16), which is
            kept bit for bit, or any other float type, which is rounded to it.
        scaling: factor of the product.
        dtype: the fine-tuned tensor's dtype.
        details: further keys of the record.
        factor_dtype: "BF16", "F16" or "F32".

    Raises:
        ValueError: the factors do not fit each other, or are of a type that holds no factors.
    """
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
        raise ValueError(f"Factors of shapes {u.shape} and {v.shape} have no product.")
    if factor_dtype not in FLOAT_DTYPES:
        raise ValueError(f"Factors are stored in {', '.join(sorted(FLOAT_DTYPES))}.")
    raw = np.dtype(np.uint16) if factor_dtype == "BF16" else None
    if any(factor.dtype.kind != "f" and factor.dtype != raw for factor in (u, v)):
        raise ValueError(f"Factors of types {u.dtype} and {v.dtype} are not {factor_dtype}.")
    record = make_record(
        "low-rank",
        (u.shape[0], v.shape[1]),
        dtype,
        details,
        rank=u.shape[1],
        scaling=float(scaling),
        factor_dtype=factor_dtype,
    )
    return Encoded(record, {"u": to_raw(u, factor_dtype), "v": to_raw(v, factor_dtype)})


def decode_factors(encoded: Encoded) -> Factors:
    """Float32 factors; `s` is the scaling, once for every rank."""
    record = encoded.record
    u, v = (from_raw(encoded.segments[side], record["factor_dtype"]) for side in ("u", "v"))
    return Factors(u, np.full(record["rank"], record["scaling"], np.float32), v)


def decode(encoded: Encoded) -> FloatArray:
    """The delta (h_out, h_in) float32."""
    return decode_factors(encoded).dense()


def expected(record: Record) -> Expected:
    """The segments that a record implies."""
    h_out, h_in = matrix_shape(record)
    rank, dtype = count_of(record["rank"]), record["factor_dtype"]
    check_rank(rank, (h_out, h_in))
    number_of(record["scaling"])
    if dtype not in FLOAT_DTYPES:
        raise InvalidArtifact("A record's factors are of a dtype that holds no factors.")
    return {"u": (dtype, (h_out, rank)), "v": (dtype, (rank, h_in))}
