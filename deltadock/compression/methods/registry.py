"""Methods for linear layers by name; `exact`, `lora` and `optimix` have none."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from deltadock.compression.methods import adamix, bitdelta, low_rank, sparse
from deltadock.compression.methods.base import MatrixMethod
from deltadock.compression.methods.fixed_widths import (
    DELTA_COME,
    TOP_2,
    TOP_32,
    fixed_width_method,
)

_METHODS: Final[Mapping[str, MatrixMethod]] = MappingProxyType(
    {
        "adamix": adamix.compress_matrix,
        "delta-come": fixed_width_method(DELTA_COME),
        "topk-2": fixed_width_method(TOP_2),
        "topk-32": fixed_width_method(TOP_32),
        "low-rank": low_rank.compress_matrix,
        "bitdelta": bitdelta.compress_matrix,
        "bitdelta-distilled": bitdelta.compress_matrix,
        "delta-zip": sparse.delta_zip,
        "gpt-zip": sparse.gpt_zip,
    }
)


def matrix_method(name: str) -> MatrixMethod | None:
    """The function that compresses a linear layer; None for methods that do not work by layer."""
    return _METHODS.get(name)
