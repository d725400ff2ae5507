"""CPU path: the deltas of all slots in two calls of FBGEMM's 8-bit embedding-bag kernel.

A decode step is bound by reading the deltas, and one byte per code is a quarter of float32. An
embedding bag is a weighted sum of rows of a byte table, each with a scale and a bias:
`sum_i w_i (scale_i * code_i + bias_i)`. A product with V is one bag per `COLUMNS` ranks, over the
inputs; a product with U is one bag per `COLUMNS` outputs, over the ranks. Slots with `MATMUL_ROWS`
rows or more, or without room in the pool, use matrix products instead; otherwise a row's result
does not depend on the other rows in the batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deltadock.kernels.cache import COLUMNS, ROW_BYTES, PooledRows, RowPool, TensorCache
from deltadock.kernels.svd_delta import reference
from deltadock.kernels.svd_delta.chunks import Chunks, RowIndex
from deltadock.kernels.svd_delta.layout import DeltaTable, PackedDelta

MATMUL_ROWS: Final = 12
"""Rows of one slot from which its codes are converted to float32 for matrix products."""


class LinearSlices(NamedTuple):
    """Where one linear of several that share an input lies in an `EmbeddingBagSlot`."""

    ranks: slice
    """In the products with V."""
    rows: slice
    """In U's rows: the ranks, once per block of outputs."""
    outputs: slice
    """In the products with U."""
    columns: slice
    """In y."""


@dataclass(frozen=True, eq=False, slots=True)
class EmbeddingBagSlot:
    """A slot's deltas of the linears that share an input, as rows for the embedding-bag kernel.

    V's vectors are stored in blocks of `COLUMNS` ranks, one row per input; U's in blocks of
    `COLUMNS` outputs, one row per rank. Each linear has an additional first rank in V, whose codes
    are all 1: its product is the sum of the inputs. Indices are int32 NumPy arrays, which
    concatenate faster than tensors.

    Attributes:
        v: (rank blocks * h_in,) row numbers of V in `table`.
        v_bags: (rank blocks,) offset in `v` of each bag.
        v_inputs: input of each row of V.
        sum_ranks: (ranks,) for each rank, its linear's rank of ones.
        zeros: (ranks,) float32 zero point of each rank.
        value_sums: (ranks,) float32 sum of each rank's values.
        u: (per linear output blocks * ranks,) row numbers of U in `table`.
        u_bags: (output blocks,) offset in `u` of each bag.
        u_ranks: rank of each row of U.
        columns: (outputs,) column of y; 0 in a block's padding.
        row_scale, bias: (outputs,) float32; 0 in a block's padding.
        linears: the linears that have a delta.
        table: the pool's table, or a private one.
        pooled: keeps the rows allocated in the pool; None for a private table.
    """

    v: NDArray[np.int32]
    v_bags: NDArray[np.int32]
    v_inputs: NDArray[np.int32]
    sum_ranks: NDArray[np.int32]
    zeros: NDArray[np.float32]
    value_sums: NDArray[np.float32]
    u: NDArray[np.int32]
    u_bags: NDArray[np.int32]
    u_ranks: NDArray[np.int32]
    columns: NDArray[np.int32]
    row_scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    linears: tuple[LinearSlices, ...]
    table: Tensor
    pooled: PooledRows | None

    @property
    def row_count(self) -> int:
        """Rows of V and U."""
        return len(self.v) + len(self.u)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        fields = (getattr(self, name) for name in self.__slots__)
        arrays = sum(field.nbytes for field in fields if isinstance(field, np.ndarray))
        return arrays + ROW_BYTES * self.row_count


SlotRows = list[tuple[EmbeddingBagSlot, list[int]]]
"""Slots, each with the numbers of its rows in the batch."""


def svd_delta(y: Tensor, x: Tensor, table: DeltaTable, chunks: Chunks, cache: TensorCache) -> None:
    """Add each row's delta to `y` in place; see `deltadock.kernels.svd_delta.svd_delta`."""
    bag_slots: SlotRows = []
    for slot, rows in chunks.members.items():
        if (deltas := table.deltas.get(slot)) is None:
            continue
        unpack = partial(unpack_slot, deltas, table.h_outs, cache.pool)
        unpacked = cache.get(deltas, unpack)
        if unpacked.pooled is None and cache.pool.has_room(unpacked.row_count):
            cache.discard(deltas)
            unpacked = cache.get(deltas, unpack)  # the pool was full when it was unpacked
        if len(rows) < MATMUL_ROWS and unpacked.pooled is not None:
            bag_slots.append((unpacked, rows))
        else:
            _add_products(y, x, unpacked, chunks.by_slot[slot])
    if not bag_slots:
        table.cpu_plan = None  # it references rows of the pool
        return
    if (plan := table.cpu_plan) is None or not plan.matches(bag_slots, y):
        plan = table.cpu_plan = EmbeddingBagPlan(bag_slots, x, y)
    plan.add(y, x, cache.pool)


def unpack_slot(
    deltas: Sequence[PackedDelta | None], h_outs: Sequence[int], pool: RowPool
) -> EmbeddingBagSlot:
    """Unpack the deltas of linears that share an input, into the pool if it has room.

    None is an unchanged linear; at least one must have a delta.
    """
    arrays: dict[str, list[Tensor]] = defaultdict(list)
    linears: list[LinearSlices] = []
    rank = row = output = column = 0
    for delta, h_out in zip(deltas, h_outs, strict=True):
        begin, column = column, column + h_out
        if delta is None:
            continue
        blocks = -(-h_out // COLUMNS)
        padding = (0, blocks * COLUMNS - h_out)
        linear = LinearSlices(
            ranks=slice(rank + 1, rank + 1 + delta.rank),
            rows=slice(row, row + blocks * delta.rank),
            outputs=slice(output, output + blocks * COLUMNS),
            columns=slice(begin, column),
        )
        zeros = reference.zero_points(delta, "v")
        v, value_sums = _v_rows(delta, zeros)
        zeros = _pad_columns(F.pad(zeros, (1, 0)))
        arrays["v"].append(v)
        first_blocks = _range(rank // COLUMNS, (rank + len(zeros)) // COLUMNS)
        arrays["v_bags"].append(first_blocks * delta.h_in)
        arrays["v_inputs"].append(_range(0, delta.h_in).repeat(len(zeros) // COLUMNS))
        arrays["sum_ranks"].append(torch.full_like(zeros, rank, dtype=torch.int32))
        arrays["zeros"].append(zeros)
        arrays["value_sums"].append(_pad_columns(F.pad(value_sums, (1, 0))))
        arrays["u"].append(_u_rows(delta))
        arrays["u_bags"].append(_range(0, blocks) * delta.rank + row)
        arrays["u_ranks"].append(_range(linear.ranks.start, linear.ranks.stop).repeat(blocks))
        arrays["columns"].append(F.pad(_range(begin, column), padding))
        row_scale = _or_full(delta.floats("row_scale"), h_out, 1.0)
        arrays["row_scale"].append(F.pad(row_scale, padding))
        arrays["bias"].append(F.pad(_or_full(delta.floats("bias"), h_out, 0.0), padding))
        linears.append(linear)
        rank, row, output = rank + len(zeros), linear.rows.stop, linear.outputs.stop
    joined = {name: torch.cat(tensors) for name, tensors in arrays.items()}
    v_count = len(joined["v"])
    rows = torch.cat([joined.pop("v"), joined.pop("u")])
    pooled = pool.put(rows)
    numbers = _range(0, len(rows)) if pooled is None else pooled.numbers
    return EmbeddingBagSlot(
        v=numbers[:v_count].numpy(),
        u=numbers[v_count:].numpy(),
        linears=tuple(linears),
        table=rows if pooled is None else pool.table,
        pooled=pooled,
        **{name: tensor.numpy() for name, tensor in joined.items()},
    )


def _v_rows(delta: PackedDelta, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """V's byte rows, and the sum of each rank's values, (rank,) float32."""
    codes = reference.codes(delta, "v")
    scale = _or_full(delta.floats("column_scale"), delta.h_in, 1.0)
    value_sums = codes.double() @ scale.double() - zeros.double() * scale.double().sum()
    codes = torch.cat([torch.ones(1, delta.h_in), codes])
    return _byte_rows(codes.T, scale, torch.zeros(delta.h_in)), value_sums.float()


def _u_rows(delta: PackedDelta) -> Tensor:
    bias = -delta.s * reference.zero_points(delta, "u")
    return _byte_rows(reference.codes(delta, "u"), delta.s, bias)


def _byte_rows(codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Codes (rows, columns) in FBGEMM's format, (column blocks * rows, ROW_BYTES) uint8.

    `scale` and `bias` are (rows,) float32.
    """
    rows = len(codes)
    padded = _pad_columns(codes.byte())
    blocks = padded.shape[1] // COLUMNS
    scales = torch.stack([scale, bias], dim=1).view(torch.uint8)
    table = [
        padded.view(rows, blocks, COLUMNS),
        scales[:, None].expand(rows, blocks, scales.shape[1]),
    ]
    return torch.cat(table, dim=2).transpose(0, 1).flatten(0, 1)


def _pad_columns(tensor: Tensor) -> Tensor:
    """Zero-pad the last dimension to a multiple of `COLUMNS`."""
    return F.pad(tensor, (0, -tensor.shape[-1] % COLUMNS))


def _range(begin: int, end: int) -> Tensor:
    return torch.arange(begin, end, dtype=torch.int32)


def _or_full(values: Tensor | None, size: int, default: float) -> Tensor:
    return torch.full((size,), default) if values is None else values


class EmbeddingBagPlan:
    """Indices, weights and destinations of a step's bags, for the linears of one table.

    Steps whose batch is unchanged reuse it.
    """

    def __init__(self, bag_slots: SlotRows, x: Tensor, y: Tensor) -> None:
        self._key = bag_slots, y.stride()
        slots = [slot for slot, numbers in bag_slots for _ in numbers]
        rows = np.array([row for _, numbers in bag_slots for row in numbers])

        def joined(name: str, shifts: NDArray[Any] | None = None) -> Tensor:
            """The field `name` of all rows' slots, each row's increased by its shift."""
            arrays = [getattr(slot, name) for slot in slots]
            whole = np.concatenate(arrays)
            if shifts is not None:
                whole += np.repeat(shifts.astype(np.int32), [len(array) for array in arrays])
            return torch.from_numpy(whole)

        def starts(name: str) -> NDArray[Any]:
            """The offset of each row's slot in `joined(name)`."""
            return np.cumsum([0, *(len(getattr(slot, name)) for slot in slots[:-1])])

        ranks = starts("zeros")
        self._v = joined("v"), joined("v_bags", starts("v")), joined("v_inputs", rows * x.shape[1])
        self._u = joined("u"), joined("u_bags", starts("u")), joined("u_ranks", ranks)
        self._sum_ranks, self._zeros = joined("sum_ranks", ranks), joined("zeros")
        self._value_sums = joined("value_sums")
        self._rank_rows = torch.from_numpy(rows.repeat([len(slot.zeros) for slot in slots]))
        self._columns = joined("columns", rows * y.stride(0))
        self._row_scale, self._bias = joined("row_scale"), joined("bias")

    def matches(self, bag_slots: SlotRows, y: Tensor) -> bool:
        """Whether it was built for the same rows, deltas and output strides."""
        return self._key == (bag_slots, y.stride())

    def add(self, y: Tensor, x: Tensor, pool: RowPool) -> None:
        """Add the deltas to `y` in place."""
        x, means = subtract_means(x)
        sums = _weighted_bags(pool, *self._v, x.flatten())
        projected = torch.addcmul(
            sums, sums.index_select(0, self._sum_ranks), self._zeros, value=-1
        )
        projected.addcmul_(means.index_select(0, self._rank_rows), self._value_sums)
        out = _weighted_bags(pool, *self._u, projected)
        added = torch.addcmul(self._bias, out, self._row_scale)
        _flatten_rows(y).index_add_(0, self._columns, added.to(y.dtype))


def subtract_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, h_in) minus their means, and the means (n,); float32.

    Codes are non-negative, so that a mean in the inputs would dominate the float32 sums and cost
    precision in the rest.
    """
    x = x.float()
    means = x.mean(1)
    return x - means[:, None], means


def _weighted_bags(
    pool: RowPool, rows: Tensor, bags: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """Bags of the pool's rows (n,), weighted with `weights[indices]`; (bags * COLUMNS,) float32."""
    return sum_bags(pool.table, rows, bags, weights.index_select(0, indices)).flatten()


def sum_bags(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum table rows (n,) int32 by bag, (bags, COLUMNS) float32; `bags` are offsets into `rows`."""
    sums: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        table, rows, bags, per_sample_weights=weights
    )
    return sums


def _flatten_rows(rows: Tensor) -> Tensor:
    """The memory from the first row to the end of the last, gaps included, as a vector."""
    count, columns = rows.shape
    return rows.as_strided(((count - 1) * rows.stride(0) + columns,), (1,))


def _add_products(y: Tensor, x: Tensor, slot: EmbeddingBagSlot, rows: RowIndex) -> None:
    """Add one slot's deltas by matrix products with float32 copies of its vectors."""
    sum_ranks, zeros, value_sums, row_scale, bias = map(
        torch.from_numpy,
        (slot.sum_ranks, slot.zeros, slot.value_sums, slot.row_scale, slot.bias),
    )
    x, means = subtract_means(x[rows])
    sums = _join_blocks(x @ _dequantize(slot.table, slot.v, x.shape[1]))
    projected = torch.addcmul(sums, sums.index_select(1, sum_ranks), zeros, value=-1)
    projected += means[:, None] * value_sums
    for linear in slot.linears:
        added = bias[linear.outputs]
        if rank := linear.ranks.stop - linear.ranks.start:
            u = _dequantize(slot.table, slot.u[linear.rows], rank)
            out = _join_blocks(projected[:, linear.ranks] @ u)
            added = torch.addcmul(added, out, row_scale[linear.outputs])
        width = linear.columns.stop - linear.columns.start
        y[rows, linear.columns] += added[..., :width]


def _dequantize(table: Tensor, numbers: NDArray[np.int32], height: int) -> Tensor:
    """Rows of the table as float32 blocks, (n, height, COLUMNS)."""
    one_row_bags = torch.arange(len(numbers), dtype=torch.int32)
    return sum_bags(table, torch.from_numpy(numbers), one_row_bags).view(-1, height, COLUMNS)


def _join_blocks(blocks: Tensor) -> Tensor:
    """(blocks, n, COLUMNS) to (n, blocks * COLUMNS)."""
    return blocks.transpose(0, 1).flatten(1)
