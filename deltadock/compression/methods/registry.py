"""Methods for linear layers by name; `exact`, `lora` and `optimix` have none."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from deltadock.compression.methods import bitdelta, sparse
from deltadock.compression.methods.adamix import AdaMix
from deltadock.compression.methods.base import Direct, MatrixMethod
from deltadock.compression.methods.fixed_widths import DELTA_COME, TOP_2, TOP_32, FixedWidths
from deltadock.compression.methods.low_rank import LowRank

_METHODS: Final[Mapping[str, MatrixMethod]] = MappingProxyType(
    {
        "adamix": AdaMix(),
        "delta-come": FixedWidths(DELTA_COME),
        "topk-2": FixedWidths(TOP_2),
        "topk-32": FixedWidths(TOP_32),
        "low-rank": LowRank(),
        "bitdelta": Direct(bitdelta.compress),
        "bitdelta-distilled": Direct(bitdelta.compress),
        "delta-zip": Direct(sparse.delta_zip),
        "gpt-zip": Direct(sparse.gpt_zip),
    }
)


def matrix_method(name: str) -> MatrixMethod | None:
    """The method for linear layers; None for methods that do not work by layer."""
    return _METHODS.get(name)
