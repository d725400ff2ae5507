"""`exact`: the fine-tuned tensor itself, byte for byte."""

from typing import Any

import numpy.typing as npt

from deltadock.artifacts.kinds.record import Encoded, Expected, Record, make_record, shape_of


def encode_exact(raw: npt.NDArray[Any], dtype: str, shape: tuple[int, ...]) -> Encoded:
    """Encode a tensor byte for byte; `raw` holds its data in numpy's type for `dtype`."""
    return Encoded(make_record("exact", shape, dtype, None), {"data": raw.reshape(shape)})


def expected(record: Record) -> Expected:
    """The segments that a record implies."""
    return {"data": (record["dtype"], shape_of(record))}
