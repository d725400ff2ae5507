"""Layers of random deltas at a model's shapes, and steps over them with what they must give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltadock.kernels.svd_delta import (
    Chunks,
    DeltaTable,
    Group,
    PackedDelta,
    TensorCache,
    pack_delta,
    reference,
    svd_delta,
    triton,
)
from deltadock.kernels.svd_delta.factors import add_products
from deltadock.kernels.svd_delta.layout import segment_words

WIDTHS = ((0.02, 8, 8), (0.28, 3, 3), (0.70, 2, 2))
"""Shares of the ranks and their widths, as the mixed methods choose them at about one bit."""
HIDDEN, INTERMEDIATE, KEY_VALUE = 3584, 18944, 512
TOLERANCE = 5e-3
"""Relative RMS error of a row of bfloat16."""
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Projection:
    """Linears that share an input."""

    name: str
    h_in: int
    h_outs: tuple[int, ...]


LAYER = (
    Projection("q, k, v", HIDDEN, (HIDDEN, KEY_VALUE, KEY_VALUE)),
    Projection("o", HIDDEN, (HIDDEN,)),
    Projection("gate, up", HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    Projection("down", INTERMEDIATE, (HIDDEN,)),
)
SMALL = (Projection("q, k", 150, (70, 40)), Projection("o", 64, (30,)))


def random_delta(h_out: int, h_in: int, device: str, generator: torch.Generator) -> PackedDelta:
    """A delta of one bit a weight with random codes."""
    mean = sum(share * (v + u) / 2 for share, v, u in WIDTHS)
    rank = max(3, int(h_out * h_in / mean / (h_out + h_in)))
    groups = [Group(max(1, int(share * rank)), v, u) for share, v, u in WIDTHS]

    def words(columns: int, side: int) -> Tensor:
        count = sum(segment_words(group.ranks, columns, group[side]) for group in groups)
        return torch.randint(
            -(2**31), 2**31, (count,), dtype=torch.int32, device=device, generator=generator
        )

    ranks = sum(group.ranks for group in groups)
    sizes = torch.cat([torch.full((n,), 2.0 ** (-v - u)) for n, v, u in groups])
    return pack_delta(
        (h_out, h_in),
        groups,
        s=sizes.to(device) / (h_in * ranks) ** 0.5,
        v=words(h_in, 1),
        u=words(h_out, 2),
        row_scale=torch.ones(h_out, device=device),
        column_scale=torch.ones(h_in, device=device),
    )


class Layers:
    """Some layers of the same shapes, each with its own deltas in slots 1 to `deltas`."""

    def __init__(self, parts: Sequence[Projection], deltas: int, copies: int, device: str) -> None:
        self.parts, self.deltas, self.copies, self.device = parts, deltas, copies, device
        self.name = parts[0].name if len(parts) == 1 else "whole layer"
        self.generator = torch.Generator(device).manual_seed(0)
        self.tables = [[self._table(part) for part in parts] for _ in range(copies)]
        self.inputs = [self.normal(CHECKED_ROWS, part.h_in) for part in parts]

    def _table(self, part: Projection) -> DeltaTable:
        made = [
            [random_delta(h_out, part.h_in, self.device, self.generator) for h_out in part.h_outs]
            for _ in range(self.deltas)
        ]
        most = max(sum(delta.rank for delta in found) for found in made)
        table = DeltaTable(
            self.deltas + 1, part.h_in, part.h_outs, max_rank=most, device=self.device
        )
        for slot, found in enumerate(made, 1):
            table.install(slot, *found)
        return table

    def normal(self, height: int, width: int) -> Tensor:
        """Normal numbers, bfloat16."""
        made = torch.randn(height, width, device=self.device, generator=self.generator)
        return made.to(torch.bfloat16)

    @property
    def delta_bytes(self) -> int:
        """Packed bytes of one delta in one layer."""
        found = [delta for table in self.tables[0] for delta in table.deltas[1]]
        return sum(delta.nbytes for delta in found if delta is not None)

    def base_products(self, rows: int) -> Callable[[], None]:
        """The base's own products of one layer."""
        parts = [
            (self.normal(rows, part.h_in), self.normal(sum(part.h_outs), part.h_in))
            for part in self.parts
        ]

        def run() -> None:
            for x, weight in parts:
                torch.nn.functional.linear(x, weight)

        return run


class Step:
    """The deltas of one step: `rows` rows on `deltas` slots in turn, at every layer."""

    def __init__(
        self, layers: Layers, rows: int, deltas: int, dense_rows: int | None = None
    ) -> None:
        self.layers = layers
        self.row_slots = sorted(1 + row % deltas for row in range(rows))
        self.deltas = deltas
        tables = [table for layer in layers.tables for table in layer]
        self.chunks = Chunks(
            rows, layers.deltas + 1, tables, dense_rows=dense_rows, device=layers.device
        )
        self.chunks.assign(self.row_slots)
        self.cache = TensorCache(8 << 30)
        repeats = -(-rows // CHECKED_ROWS)
        self.inputs = [x.repeat(repeats, 1)[:rows].contiguous() for x in layers.inputs]
        self.outputs = [
            x.new_zeros(rows, sum(part.h_outs))
            for x, part in zip(self.inputs, layers.parts, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Packed bytes that the step reads in one layer."""
        return self.deltas * self.layers.delta_bytes

    def run(self) -> None:
        """Add the deltas of all projections of all layers."""
        for layer in self.layers.tables:
            self._add(layer)

    def _add(self, layer: Sequence[DeltaTable], *, emulate: bool | None = None) -> None:
        for y, x, table in zip(self.outputs, self.inputs, layer, strict=True):
            if x.is_cuda and emulate is None:
                svd_delta(y, x, table, self.chunks, self.cache)
                continue
            triton.svd_delta(y, x, table, self.chunks, emulate=emulate)
            if self.chunks.dense:
                add_products(y, x, table, self.chunks.dense, self.cache)

    def error(self, *, emulate: bool | None = None) -> float:
        """The largest relative RMS error against float64 of a row of the first layer."""
        layer = self.layers.tables[0]
        for y in self.outputs:
            y.fill_(0)
        self._add(layer, emulate=emulate)
        worst = 0.0
        for y, x, table in zip(self.outputs, self.inputs, layer, strict=True):
            for slot in range(1, self.deltas + 1):
                rows = [row for row, own in enumerate(self.row_slots) if own == slot]
                rows = rows[:: max(1, len(rows) // 4)]
                want = torch.cat(
                    [_product(x[rows], delta) for delta in table.deltas[slot] if delta], dim=1
                )
                error = (y[rows].double() - want).square().sum(dim=1) / want.square().sum(dim=1)
                worst = max(worst, float(error.sqrt().nan_to_num(torch.inf).max()))
        return worst


def _product(x: Tensor, delta: PackedDelta) -> Tensor:
    u, s, v, _ = reference.unpack(delta)
    found: Tensor = ((x.double() @ v.double().T) * s.double()) @ u.double().T
    return found
