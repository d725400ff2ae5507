"""What the operations take besides a pass's rows."""

from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]
"""Of a gate; `gelu_tanh` is GELU by its tanh approximation."""


class RowNorm(NamedTuple):
    """RMS normalization with a weight and an epsilon of its own for every slot."""

    weights: Tensor
    """(slots, width): in the dtype of what is normalized, which is rounded before it is multiplied;
    or in float32: the product alone is rounded."""
    epsilons: Tensor
    """(slots,) float32."""


class Rotation(NamedTuple):
    """Cosines and sines of the rows' positions.

    They may be narrower than a head, whose other columns are not rotated then.
    """

    cos: Tensor
    """(rows, columns), in the dtype of what is rotated or in float32."""
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
