"""`low-rank`: delta = scaling * u @ v with float factors, as in a LoRA adapter."""

from typing import Any

import numpy as np
import numpy.typing as npt

from deltadock.artifacts.encodings.record import (
    FLOAT_DTYPES,
    DecodedFactors,
    Details,
    Encoded,
    FloatArray,
    Record,
    SegmentSpecs,
    check_rank,
    count_of,
    decode_floats,
    encode_floats,
    make_record,
    matrix_shape,
    number_of,
)
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
        u, v: (h_out, r) and (r, h_in); either already in `factor_dtype` (bfloat16 as uint16) and
            stored unchanged, or another float type, which is rounded.
        scaling: scale of the product.
        dtype: the fine-tuned tensor's safetensors dtype.
        details: additional keys of the record.
        factor_dtype: "BF16", "F16" or "F32".

    Raises:
        ValueError: the shapes do not multiply, or a type is not a supported float type.
    """
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
        raise ValueError(f"Factors of shapes {u.shape} and {v.shape} have no product.")
    if factor_dtype not in FLOAT_DTYPES:
        raise ValueError(f"Factors are stored in {', '.join(sorted(FLOAT_DTYPES))}.")
    bits = np.dtype(np.uint16) if factor_dtype == "BF16" else None
    if any(factor.dtype.kind != "f" and factor.dtype != bits for factor in (u, v)):
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
    return Encoded(
        record, {"u": encode_floats(u, factor_dtype), "v": encode_floats(v, factor_dtype)}
    )


def decode_factors(encoded: Encoded) -> DecodedFactors:
    """Float32 factors; every entry of `s` is the scaling."""
    record = encoded.record
    u, v = (decode_floats(encoded.segments[side], record["factor_dtype"]) for side in ("u", "v"))
    return DecodedFactors(u, np.full(record["rank"], record["scaling"], np.float32), v)


def decode(encoded: Encoded) -> FloatArray:
    """Decode the delta, (h_out, h_in) float32."""
    return decode_factors(encoded).dense()


def segment_specs(record: Record) -> SegmentSpecs:
    """The segments that a record implies, after validating it."""
    h_out, h_in = matrix_shape(record)
    rank, dtype = count_of(record["rank"]), record["factor_dtype"]
    check_rank(rank, (h_out, h_in))
    number_of(record["scaling"])
    if dtype not in FLOAT_DTYPES:
        raise InvalidArtifact("A record's factors are of a dtype that holds no factors.")
    return {"u": (dtype, (h_out, rank)), "v": (dtype, (rank, h_in))}
