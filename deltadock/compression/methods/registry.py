"""Methods for linear layers by name; `exact` and `lora` have none, as they keep what they get."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from deltadock.compression.methods import (
    adamix,
    bitdelta,
    delta_come,
    delta_zip,
    gpt_zip,
    low_rank,
    topk,
)
from deltadock.compression.methods.base import MatrixMethod

_METHODS: Final[Mapping[str, MatrixMethod]] = MappingProxyType(
    {
        "adamix": adamix.compress_matrix,
        "delta-come": delta_come.compress_matrix,
        "topk-2": topk.topk(2),
        "topk-32": topk.topk(32),
        "low-rank": low_rank.compress_matrix,
        "bitdelta": bitdelta.compress_matrix,
        "bitdelta-distilled": bitdelta.compress_matrix,
        "delta-zip": delta_zip.compress_matrix,
        "gpt-zip": gpt_zip.compress_matrix,
    }
)


def matrix_method(name: str) -> MatrixMethod | None:
    """What compresses a linear layer under `name`; None for methods that work in another way."""
    return _METHODS.get(name)
