"""A model of a decode step of the node at Qwen2.5-7B's shape on an H200, launch by launch.

    python -m benchmarks.step_model

It needs no GPU. Products of the base read their weights at 85 % of copy bandwidth. The deltas'
launches and those between the products take what `benchmarks.kernel_model` makes of their machine
code, from `QUICK` to `SLOW`; a kernel of cuBLAS does not let the next one start early. Printed is
what a step takes with the launches between the products one after another, as they were, and
overlapping; then with products of the base by `kernels/linear`, which let the next launch start
early, if they read as fast as cuBLAS's, and what they bring to L2 ahead during the launch before;
and whether it would pay to put a layer's `prepare` and `shrink` on a second stream, beside the
base's product of the same inputs:

    Both read memory at 85 % of copy bandwidth together. `expand` follows two kernels, one of
    cuBLAS, so that what it does before its wait is no longer hidden. cuBLAS's kernels for few rows
    (`nvjet`) have one program of 384 threads on each SM. If it has 168 registers a thread, it takes
    all of an SM: `prepare` and `shrink` run before it or after it, and only a launch is hidden. Up
    to 136 leave room for one program of `shrink`, of the five that an SM runs without it.

The host's part of a step, embeddings and sampling are not counted. A GPU has the last word.
"""

import functools
from dataclasses import replace
from typing import Final, NamedTuple

from benchmarks.decoder import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, compile_operation
from benchmarks.decoder import compile_for as compile_attention
from benchmarks.kernel import LAYER, Projection, groups_of
from benchmarks.kernel_model import (
    COPY_BANDWIDTH,
    LAUNCH,
    MULTIPROCESSORS,
    QUICK,
    SLOW,
    Bound,
    Code,
    Codes,
    codes,
    launch_microseconds,
    launches_of,
    packed_bytes,
)
from benchmarks.linear import FORMS
from benchmarks.linear import compile_for as compile_linear
from benchmarks.machine_code import SHARED_BYTES, MachineCode
from deltadock.kernels.decoder.triton import GATED_COLUMNS
from deltadock.kernels.linear.triton import CHUNK, LEAST_ROWS, LINE, Form
from deltadock.kernels.svd_delta.triton.forms import DEFAULT

LAYERS: Final = 28
VOCABULARY: Final = 152_064
READING: Final = 0.85
"""Of copy bandwidth, what products of the base are given."""
SPLITS: Final = 4
"""Programs that share a row of some 200 tokens, for each key head."""
STEPS: Final = ((1, 0), (12, 0), (1, 1), (8, 8), (12, 12), (16, 16))
"""(rows, deltas)"""


BEFORE: Final = {
    "q, k, v": "norm of the next layer", "o": "combine", "gate, up": "norm of the MLP",
    "down": "gate",
}  # fmt: skip
"""The launch before each product."""


class Between(NamedTuple):
    """A launch of a layer between its products."""

    code: Code
    loads_at_once: int
    """Its dependent loads if there is no wait."""
    programs: int
    """For each row."""
    after_product: bool
    """Whether it follows a product of the base, or the deltas of that product."""


def code_of(machine: MachineCode, loads: int, head_loads: int) -> Code:
    """Its instructions, and its dependent loads, counted by hand."""
    return Code(
        machine.warps, (), 0, len(machine.operations), machine.registers, machine.stack_bytes,
        machine.shared_bytes, loads, 0, 0, machine.operations.index("ACQBULK"), head_loads,
    )  # fmt: skip


@functools.cache
def between() -> dict[str, Between]:
    """All of them.

    Loads that wait for one another: of norms slot, weights, then x; of the rotation positions, then
    x; of attention length, slot, keys, and length, parts.
    """
    norm = compile_operation(
        90, "rms_norm_kernel", 8, {"WIDTH": HIDDEN, "BLOCK": 4096, "ADD": True}
    )
    rotate = compile_operation(
        90,
        "rotate_and_store_kernel",
        1,
        {"WIDTH": 128, "ROTATED": 128, "BLOCK": 64, "REST": 1, "NORM": False},
    )
    gate = compile_operation(90, "gated_kernel", 4, {"BLOCK": GATED_COLUMNS, "SILU": True})
    split, combine = compile_attention(90)
    return {
        "rotate": Between(code_of(rotate, 2, 1), 1, HEADS + 2 * KV_HEADS, after_product=True),
        "split": Between(code_of(split, 3, 2), 3, KV_HEADS * SPLITS, after_product=False),
        "combine": Between(code_of(combine, 2, 1), 2, HEADS, after_product=False),
        "norm of the MLP": Between(code_of(norm, 3, 2), 2, 1, after_product=True),
        "gate": Between(
            code_of(gate, 1, 0), 1, -(-INTERMEDIATE // GATED_COLUMNS), after_product=True
        ),
        "norm of the next layer": Between(code_of(norm, 3, 2), 2, 1, after_product=True),
    }


def between_microseconds(
    rows: int, deltas: int, bound: Bound, *, overlap: bool, after_products: bool = False
) -> dict[str, float]:
    """The launches of a layer between its products.

    Where launches overlap those that follow a product of the base do so `after_products` only.
    """
    times = {}
    for name, each in between().items():
        overlaps = overlap and (deltas > 0 or after_products or not each.after_product)
        code = each.code if overlaps else replace(each.code, loads=each.loads_at_once)
        programs = each.programs * rows
        times[name] = launch_microseconds([[[[]]]] * programs, code, bound, overlaps=overlaps)
    return times


def product_microseconds(projection: Projection) -> float:
    """The base's product of few rows."""
    return 2 * projection.h_in * sum(projection.h_outs) / COPY_BANDWIDTH / READING


def read_ahead_microseconds(projection: Projection, form: Form) -> float:
    """Of that, what our kernel's first programs ask for before their wait."""
    code = compile_linear(90, form, LEAST_ROWS)
    columns = min(sum(projection.h_outs), MULTIPROCESSORS * code.programs_per_sm * form.columns)
    numbers = form.warps * form.chunks * CHUNK + form.lines * LINE
    return 2 * columns * min(projection.h_in, numbers) / COPY_BANDWIDTH / READING


def v_bytes(projection: Projection) -> float:
    """Bytes that shrink reads for one delta."""
    return sum(
        group.ranks * projection.h_in * group.v_bits / 8
        for h_out in projection.h_outs
        for group in groups_of(h_out, projection.h_in)
    )


class Layer(NamedTuple):
    """Microseconds of a layer."""

    products: float
    deltas: float
    between: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def layer(
    rows: int,
    deltas: int,
    compiled: Codes,
    bound: Bound,
    *,
    overlap: bool = True,
    after_products: bool = False,
) -> Layer:
    """A layer of a step on one stream.

    With `after_products` the base's products overlap with the launches before and after them.
    """
    chunks = deltas * -(-rows // max(deltas, 1) // compiled.chunk_rows)
    added = sum(
        sum(launches_of(each, rows, chunks, compiled, bound, (after_products, True, True)))
        for each in LAYER
        if deltas
    )
    small = between_microseconds(
        rows, deltas, bound, overlap=overlap, after_products=after_products
    )
    products = sum(map(product_microseconds, LAYER))
    if after_products:
        products -= sum(
            min(small[BEFORE[each.name]], read_ahead_microseconds(each, FORMS[0])) for each in LAYER
        )
    return Layer(products, added, sum(small.values()))


def saved_by_a_second_stream(
    rows: int, deltas: int, compiled: Codes, bound: Bound, room: int | None
) -> float:
    """Microseconds of a layer; negative: lost.

    `room`: programs of shrink that an SM has room for beside the base's product; None: all.
    """
    chunks = deltas * -(-rows // deltas // compiled.chunk_rows)
    beside = compiled
    if room is not None:
        limit = SHARED_BYTES // max(room, 1) - 1024
        limited = {
            form: replace(code, shared_bytes=limit) for form, code in compiled.shrink.items()
        }
        beside = compiled._replace(shrink=limited)
    saved = 0.0
    for each in LAYER:
        product = product_microseconds(each)
        one_stream = launches_of(each, rows, chunks, compiled, bound, (False, True, True))
        *_, expand = launches_of(each, rows, chunks, compiled, bound, (False, True, False))
        if room == 0:
            both = product + sum(one_stream[:2]) - LAUNCH
        else:
            second = sum(launches_of(each, rows, chunks, beside, bound, (False, True, False))[:2])
            memory = product + deltas * v_bytes(each) / COPY_BANDWIDTH / READING
            # What is left when the product has ended runs as without it.
            left = max(0.0, 1 - product / second) * sum(one_stream[:2])
            both = max(product + left, memory)
        saved += product + sum(one_stream) - both - expand
    return saved


def step_milliseconds(of_layer: float) -> float:
    """A step whose layers take so many microseconds, with the head."""
    head = 2 * HIDDEN * VOCABULARY / COPY_BANDWIDTH / READING
    return (LAYERS * of_layer + head) / 1e3


def roofline_milliseconds(deltas: int) -> float:
    """Reading the base, without embeddings, and the deltas at copy bandwidth."""
    base = sum(2 * each.h_in * sum(each.h_outs) for each in LAYER)
    read = LAYERS * (base + deltas * packed_bytes(LAYER)) + 2 * HIDDEN * VOCABULARY
    return read / COPY_BANDWIDTH / 1e3


def main() -> None:
    """Print the steps."""
    compiled = codes(DEFAULT, 90)
    print(
        "A layer, us; a step, ms; of the roofline; both with products that overlap; of a step saved"
    )
    print(
        "by a second stream, if an SM has room for 0, 1 or all programs of shrink beside a base's"
    )
    print("product\n")
    print(
        "rows deltas     products deltas  between        step      roofline  overlapping     0"
        "       1     all"
    )
    for rows, deltas in STEPS:
        for name, bound in (("quick", QUICK), ("slow", SLOW)):
            before = layer(rows, deltas, compiled, bound, overlap=False)
            now = layer(rows, deltas, compiled, bound)
            step = step_milliseconds(now.total)
            ours = layer(rows, deltas, compiled, bound, after_products=True)
            overlapping = step_milliseconds(ours.total)
            roofline = roofline_milliseconds(deltas)
            line = (
                f"{rows:4d} {deltas:6d} {name:6} {now.products:6.0f} {now.deltas:7.0f}"
                f" {before.between:6.1f} -> {now.between:4.1f}"
                f" {step_milliseconds(before.total):6.2f} -> {step:5.2f}"
                f" {roofline / step:8.0%} {overlapping:7.2f} {roofline / overlapping:4.0%}"
            )
            if deltas:
                for room in (0, 1, None):
                    saved = saved_by_a_second_stream(rows, deltas, compiled, bound, room)
                    line += f" {saved * LAYERS / 1e3 / step:7.1%}"
            print(line)


if __name__ == "__main__":
    main()
