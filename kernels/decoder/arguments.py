"""What the operations take besides a pass's rows."""

from typing import NamedTuple

from torch import Tensor


class RowNorm(NamedTuple):
    """RMS normalization with a weight and an epsilon of its own for every slot."""

    weights: Tensor
    """(slots, width), in the dtype of what is normalized."""
    epsilons: Tensor
    """(slots,) float32."""


class Rotation(NamedTuple):
    """Cosines and sines of the rows' positions."""

    cos: Tensor
    """(rows, d), in the dtype of what is rotated."""
    sin: Tensor


class CacheRows(NamedTuple):
    """Where a layer's keys and values of a pass's rows are stored."""

    keys: Tensor
    """(slots, kv_heads, length, d)"""
    values: Tensor
    slots: Tensor
    """(rows,) int64"""
    positions: Tensor
    """(rows,) int64"""
