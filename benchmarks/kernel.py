"""The delta kernel at Qwen2.5-7B's shapes: time, packed bytes, bandwidth, beside its alternatives.

    python -m benchmarks.kernel [--rows 8 16 64] [--deltas 1 4 8 16]

For a whole layer's projections it prints, with and without a CUDA graph, the time of the deltas of
a step; the bandwidth over the packed bytes as a share of a device-to-device copy measured in the
same run; bfloat16 low-rank factors of the same bytes; dense bfloat16 deltas; and the prefill of
2,048 rows of one delta as a multiple of the base's own products. Nothing is timed before the
kernel's results have been checked against float64. `--device cpu` checks a small layer in Triton's
interpreter (TRITON_INTERPRET=1) and times nothing.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.svd_delta import (
    Chunks,
    DeltaTable,
    Group,
    PackedDelta,
    TensorCache,
    pack_delta,
    reference,
    svd_delta,
)
from kernels.svd_delta.layout import segment_words

WIDTHS = ((0.02, 8, 8), (0.28, 3, 3), (0.70, 2, 2))
"""Shares of the ranks and their widths, as the mixed methods choose them at about one bit."""
HIDDEN, INTERMEDIATE, KEY_VALUE = 3584, 18944, 512
TOLERANCE = 5e-3


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
SMALL = (Projection("q, k, v", 150, (70, 40, 33)), Projection("o", 64, (300,)))


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


class Workload:
    """One step's rows at every projection of a layer."""

    def __init__(
        self, layer: Sequence[Projection], rows: int, deltas: int, device: str, dense: int | None
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.tables = []
        for part in layer:
            made = [
                [random_delta(h_out, part.h_in, device, generator) for h_out in part.h_outs]
                for _ in range(deltas)
            ]
            most = max(sum(delta.rank for delta in found) for found in made)
            table = DeltaTable(deltas + 1, part.h_in, part.h_outs, max_rank=most, device=device)
            for slot, found in enumerate(made, 1):
                table.install(slot, *found)
            self.tables.append(table)
        self.row_slots = sorted(1 + row % deltas for row in range(rows))
        self.chunks = Chunks(rows, deltas + 1, self.tables, dense_rows=dense, device=device)
        self.chunks.assign(self.row_slots)
        self.cache = TensorCache(8 << 30)

        def normal(columns: int) -> Tensor:
            made = torch.randn(rows, columns, device=device, generator=generator)
            return made.to(torch.bfloat16)

        self.inputs = [normal(part.h_in) for part in layer]
        self.outputs = [normal(sum(part.h_outs)) * 0 for part in layer]

    @property
    def nbytes(self) -> int:
        """Packed bytes that a step reads."""
        found = [delta for t in self.tables for slot in t.deltas.values() for delta in slot]
        return sum(delta.nbytes for delta in found if delta is not None)

    def run(self) -> None:
        """Add the deltas of all projections."""
        for y, x, table in zip(self.outputs, self.inputs, self.tables, strict=True):
            if x.is_cuda:
                svd_delta(y, x, table, self.chunks, self.cache)
            else:
                from kernels.svd_delta import triton

                triton.svd_delta(y, x, table, self.chunks)

    def error(self) -> float:
        """The largest relative RMS error of a row against float64."""
        self.run()
        worst = 0.0
        for y, x, table in zip(self.outputs, self.inputs, self.tables, strict=True):
            for row in {self.row_slots.index(slot) for slot in set(self.row_slots)}:
                found = []
                for delta in table.deltas[self.row_slots[row]]:
                    assert delta is not None
                    u, s, v, _ = reference.unpack(delta)
                    found.append(u.double() @ (s.double() * (v.double() @ x[row].double())))
                want = torch.cat(found)
                error = (y[row].double() - want).square().sum() / want.square().sum()
                worst = max(worst, float(error.sqrt()))
            y.zero_()
        return worst


def seconds(work: Callable[[], None], *, graph: bool = False, repeats: int = 20) -> float:
    """Median time of a call on the GPU."""
    for _ in range(3):
        work()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        work = captured.replay
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return sorted(times)[repeats // 2]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return float(2 * source.numel() / seconds(copy))


def low_rank_of(work: Workload) -> Callable[[], None]:
    """bfloat16 factors of as many bytes, one pair of products a delta and linear."""
    parts = []
    for y, x, table in zip(work.outputs, work.inputs, work.tables, strict=True):
        for slot, rows in work.chunks.by_slot.items():
            begin = 0
            for delta in table.deltas[slot]:
                assert delta is not None
                rank = max(1, delta.nbytes // 2 // (delta.h_out + delta.h_in))
                v = torch.randn(delta.h_in, rank, device=x.device, dtype=x.dtype)
                u = torch.randn(rank, delta.h_out, device=x.device, dtype=x.dtype)
                parts.append((y[rows, begin : begin + delta.h_out], x[rows], v, u))
                begin += delta.h_out

    def run() -> None:
        for out, x, v, u in parts:
            out.addmm_(x @ v, u)

    return run


def products_of(layer: Sequence[Projection], rows: int, copies: int) -> Callable[[], None]:
    """`copies` dense bfloat16 products of a layer, on `rows` rows each."""

    def normal(height: int, width: int) -> Tensor:
        return torch.randn(height, width, device="cuda", dtype=torch.bfloat16)

    parts = [
        (normal(rows, part.h_in), normal(sum(part.h_outs), part.h_in))
        for _ in range(copies)
        for part in layer
    ]

    def run() -> None:
        for x, weight in parts:
            torch.nn.functional.linear(x, weight)

    return run


def measure(rows: Sequence[int], deltas: Sequence[int]) -> None:
    """Print the tables of a GPU."""
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"device-to-device copy: {bandwidth / 1e12:.2f} TB/s")
    print("rows deltas      MB      us  us graph  of copy  low-rank  dense")
    for count in deltas:
        for total in rows:
            if total < count:
                continue
            work = Workload(LAYER, total, count, "cuda", None)
            error = work.error()
            if error > TOLERANCE:
                raise SystemExit(f"{total} rows, {count} deltas: relative error {error:.1e}")
            plain, graph = seconds(work.run), seconds(work.run, graph=True)
            low_rank = seconds(low_rank_of(work), graph=True)
            dense = seconds(products_of(LAYER, max(1, total // count), count), graph=True)
            share = work.nbytes / graph / bandwidth
            print(
                f"{total:4} {count:6} {work.nbytes / 1e6:7.1f} {plain * 1e6:7.1f}"
                f" {graph * 1e6:9.1f} {share:8.1%} {low_rank / graph:8.2f}x {dense / graph:5.2f}x"
            )
    base = seconds(products_of(LAYER, 2048, 1))
    for threshold in (None, 128):
        work = Workload(LAYER, 2048, 1, "cuda", threshold)
        error = work.error()
        if error > TOLERANCE:
            raise SystemExit(f"prefill: relative error {error:.1e}")
        path = "chunks" if threshold is None else "products"
        ratio = (base + seconds(work.run, repeats=5)) / base
        print(f"prefill of 2,048 rows of one delta by {path}: {ratio:.2f}x of the base's products")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--deltas", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        measure(options.rows, options.deltas)
        return
    error = Workload(SMALL, 3, 2, "cpu", None).error()
    if error > TOLERANCE:
        raise SystemExit(f"relative error {error:.1e}")
    print(f"relative error {error:.1e}: correct; nothing is timed without a GPU")


if __name__ == "__main__":
    main()
