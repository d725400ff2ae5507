"""A slot's deltas with a byte a code, in rows that FBGEMM's embedding bags can sum."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deltadock.kernels.pool import COLUMNS, ROW_BYTES, PooledRows, RowPool
from deltadock.kernels.svd_delta import reference
from deltadock.kernels.svd_delta.layout import PackedDelta


class Part(NamedTuple):
    """One linear of those that share their input."""

    ranks: slice
    """Among the products with V."""
    rows: slice
    """Of U: the ranks, once for each block of outputs."""
    outputs: slice
    """Among the products with U."""
    columns: slice
    """Of y."""


@dataclass(frozen=True, eq=False, slots=True)
class CodedSlot:
    """A slot's deltas of the linears that share their input.

    V's vectors lie in blocks of `COLUMNS` ranks, a row an input; U's in blocks of `COLUMNS`
    outputs, a row a rank. Each linear's first rank in V is none of its delta's: it has the code 1
    for every input, and its product is their sum. Indices are int32, in NumPy's arrays, which are
    quicker to join.

    Attributes:
        v: (blocks of ranks * h_in,) numbers of V's rows in `table`.
        v_bags: (blocks of ranks,) where in `v` each begins.
        v_inputs: the input of each row of V.
        firsts: (ranks,) the first rank of each rank's linear.
        zeros: (ranks,) float32, what each rank's codes are more than its values.
        totals: (ranks,) float32, the sum of each rank's values.
        u: (for each linear blocks of outputs * ranks,) numbers of U's rows in `table`.
        u_bags: (blocks of outputs,) where in `u` each begins.
        u_ranks: the rank of each row of U.
        columns: (outputs,) the column of y of each; 0 for the padding of a block.
        row_scale, bias: (outputs,) float32; 0 for the padding of a block.
        parts: the linears that change.
        table: the pool's, or one of its own.
        pooled: what keeps the rows in the pool.
    """

    v: NDArray[np.int32]
    v_bags: NDArray[np.int32]
    v_inputs: NDArray[np.int32]
    firsts: NDArray[np.int32]
    zeros: NDArray[np.float32]
    totals: NDArray[np.float32]
    u: NDArray[np.int32]
    u_bags: NDArray[np.int32]
    u_ranks: NDArray[np.int32]
    columns: NDArray[np.int32]
    row_scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    parts: tuple[Part, ...]
    table: Tensor
    pooled: PooledRows | None

    @property
    def row_count(self) -> int:
        """Rows of V and of U."""
        return len(self.v) + len(self.u)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        fields = (getattr(self, name) for name in self.__slots__)
        arrays = sum(field.nbytes for field in fields if isinstance(field, np.ndarray))
        return arrays + ROW_BYTES * self.row_count


def code_slot(
    deltas: Sequence[PackedDelta | None], h_outs: Sequence[int], pool: RowPool
) -> CodedSlot:
    """Unpack the deltas of linears that share their input, into a pool while it has room.

    None is for a linear that does not change; one at least does.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    parts: list[Part] = []
    rank = row = output = column = 0
    for delta, h_out in zip(deltas, h_outs, strict=True):
        begin, column = column, column + h_out
        if delta is None:
            continue
        blocks = -(-h_out // COLUMNS)
        padding = (0, blocks * COLUMNS - h_out)
        part = Part(
            ranks=slice(rank + 1, rank + 1 + delta.rank),
            rows=slice(row, row + blocks * delta.rank),
            outputs=slice(output, output + blocks * COLUMNS),
            columns=slice(begin, column),
        )
        zeros = reference.zeros(delta, "v")
        v, totals = _v_rows(delta, zeros)
        zeros = _padded(F.pad(zeros, (1, 0)))
        found["v"].append(v)
        begins = _range(rank // COLUMNS, (rank + len(zeros)) // COLUMNS)
        found["v_bags"].append(begins * delta.h_in)
        found["v_inputs"].append(_range(0, delta.h_in).repeat(len(zeros) // COLUMNS))
        found["firsts"].append(torch.full_like(zeros, rank, dtype=torch.int32))
        found["zeros"].append(zeros)
        found["totals"].append(_padded(F.pad(totals, (1, 0))))
        found["u"].append(_u_rows(delta))
        found["u_bags"].append(_range(0, blocks) * delta.rank + row)
        found["u_ranks"].append(_range(part.ranks.start, part.ranks.stop).repeat(blocks))
        found["columns"].append(F.pad(_range(begin, column), padding))
        found["row_scale"].append(F.pad(_or(1.0, delta.numbers("row_scale"), h_out), padding))
        found["bias"].append(F.pad(_or(0.0, delta.numbers("bias"), h_out), padding))
        parts.append(part)
        rank, row, output = rank + len(zeros), part.rows.stop, part.outputs.stop
    joined = {name: torch.cat(tensors) for name, tensors in found.items()}
    v_count = len(joined["v"])
    rows = torch.cat([joined.pop("v"), joined.pop("u")])
    pooled = pool.put(rows)
    numbers = _range(0, len(rows)) if pooled is None else pooled.numbers
    return CodedSlot(
        v=numbers[:v_count].numpy(),
        u=numbers[v_count:].numpy(),
        parts=tuple(parts),
        table=rows if pooled is None else pool.table,
        pooled=pooled,
        **{name: tensor.numpy() for name, tensor in joined.items()},
    )


def _v_rows(delta: PackedDelta, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """V's rows, and the sum of each rank's values, (rank,) float32."""
    codes = reference.codes(delta, "v")
    scale = _or(1.0, delta.numbers("column_scale"), delta.h_in)
    totals = codes.double() @ scale.double() - zeros.double() * scale.double().sum()
    codes = torch.cat([torch.ones(1, delta.h_in), codes])
    return _byte_rows(codes.T, scale, torch.zeros(delta.h_in)), totals.float()


def _u_rows(delta: PackedDelta) -> Tensor:
    bias = -delta.s * reference.zeros(delta, "u")
    return _byte_rows(reference.codes(delta, "u"), delta.s, bias)


def _byte_rows(codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """(blocks of columns * rows, ROW_BYTES) uint8 of codes (rows, columns), with what each row is
    scaled by and has added, float32 (rows,)."""
    rows = len(codes)
    padded = _padded(codes.byte())
    blocks = padded.shape[1] // COLUMNS
    own = torch.stack([scale, bias], dim=1).view(torch.uint8)
    table = [padded.view(rows, blocks, COLUMNS), own[:, None].expand(rows, blocks, own.shape[1])]
    return torch.cat(table, dim=2).transpose(0, 1).flatten(0, 1)


def _padded(tensor: Tensor) -> Tensor:
    """With zeros up to a whole number of blocks, along the last dimension."""
    return F.pad(tensor, (0, -tensor.shape[-1] % COLUMNS))


def _range(begin: int, end: int) -> Tensor:
    return torch.arange(begin, end, dtype=torch.int32)


def _or(value: float, numbers: Tensor | None, size: int) -> Tensor:
    return torch.full((size,), value) if numbers is None else numbers
