"""What the SVD-delta kernels cost, read from their machine code, and a model of their time.

    python -m benchmarks.kernel_model [--capability 90]

It needs no GPU. Triton compiles each variant; `nvdisasm` and `cuobjdump`, which come with Triton,
give the instructions of its inner loops and outside of them, its registers and its shared memory.
The model:

    A program waits `LOAD` microseconds for each load that needs another's result, on its way to the
    first plane of codes and then for each plane. Of what it executes once, an instruction of a warp
    takes `STRAIGHT` cycles: it is fetched for the first time, and few warps hide that. A step of a
    plane takes the longer of `STEP` and the time in which its SM issues the loop's instructions. An
    SM runs as many programs at once as its registers and shared memory hold, and a launch takes
    `LAUNCH` microseconds beside its programs.

The four constants were fitted to the ten times in `MEASURED`, of an H200 and the kernels before
these, whose machine code is kept in `MEASURED_CODE`; they explain them within 3 %. The table
printed first shows that; then each variant's prediction for a layer of Qwen2.5-7B, from a step of
one `LOAD` to the measured `STEP`, whose pipeline went through shared memory with barriers: these
kernels have neither. A GPU has the last word.
"""

import argparse
import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.kernel import LAYER, SWEEP, Projection, groups_of, name_of
from benchmarks.machine_code import compile_kernel, disassemble, programs_per_sm
from deltadock.kernels.svd_delta import triton as kernel
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS, SUM_COLUMNS
from deltadock.kernels.svd_delta.layout import BLOCK_RANKS, SEGMENTS, TILE_COLUMNS, TILE_RANKS
from deltadock.kernels.svd_delta.triton import UNSPECIALIZED, Variant

LOAD: Final = 0.87
STEP: Final = 1.47
LAUNCH: Final = 1.75
"""Microseconds."""
STRAIGHT: Final = 7.36
"""Cycles."""
MULTIPROCESSORS: Final = 132
CLOCK: Final = 1755.0
"""Cycles per microsecond."""
SCHEDULERS: Final = 4
"""Warp instructions that an SM issues in a cycle."""
COPY_BANDWIDTH: Final = 4.19e6
"""Bytes per microsecond, reads plus writes, of the H200 that `MEASURED` is from."""
PLANES: Final = (8, 4, 2, 1)
"""Bits of a plane, in the order in which the kernels walk them."""

MEASURED: Final = {
    ("whole layer", 1, 1): 407, ("whole layer", 8, 1): 410, ("whole layer", 4, 4): 607,
    ("whole layer", 8, 8): 961, ("whole layer", 64, 8): 972, ("whole layer", 16, 16): 1760,
    ("q, k, v", 8, 8): 138, ("o", 8, 8): 84, ("gate, up", 8, 8): 562, ("down", 8, 8): 171,
}  # fmt: skip
"""Microseconds on an H200 (torch 2.11, Triton 3.6), by projections, rows and deltas."""

TYPES: Final = {"addresses_ptr": "*i64", "projected_ptr": "*fp32", "sums_ptr": "*fp32"}
NUMBERS: Final = (
    "x_stride", "y_stride", "xs_stride", "sums_stride", "h_in", "padded_h_in", "max_rank",
)  # fmt: skip
CONSTANTS: Final = {
    "LINEARS": 3,
    "BLOCK_M": CHUNK_ROWS,
    "BLOCK_K": SUM_COLUMNS,
    "BLOCK_R": TILE_RANKS,
    "SUMS": 4,
    "EMULATE": False,
}


def compile_for(
    capability: int, function: Any, dtype: str, warps: int, registers: int | None = None
) -> Any:
    """Compile as launched for a 16-bit dtype and shapes that are multiples of 128."""
    constants = CONSTANTS | {"WARPS": warps, "TERMS": 2 if dtype == "fp16" else 1}
    types = TYPES | dict.fromkeys(("x_ptr", "xs_ptr", "y_ptr"), f"*{dtype}")
    types |= dict.fromkeys((*NUMBERS, "sum_count"), "i32")
    return compile_kernel(
        capability, function, types, constants,
        unspecialized=UNSPECIALIZED, num_warps=warps, maxnreg=registers,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Code:
    """One compiled kernel.

    Attributes:
        warps: of a program.
        loops: instructions of each plane's inner loop, in the order of `PLANES`.
        plane: instructions beside them for each plane.
        common: all other instructions.
        registers: of a thread.
        stack_bytes: of a thread; spilled registers are there.
        shared_bytes: of a program.
        loads: loads that need another's result, on a program's way to its first plane and from its
            last; counted by hand.
        plane_loads: those on the way to a plane's first step.
        shared_in_loops: instructions of the inner loops that are barriers or access shared memory.
    """

    warps: int
    loops: tuple[int, ...]
    plane: int
    common: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    loads: int
    plane_loads: int
    shared_in_loops: int

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM runs at once."""
        return programs_per_sm(self.warps, self.registers, self.shared_bytes)


DEPENDENT_LOADS: Final = {"shrink_kernel": (5, 1), "expand_kernel": (5, 2)}
"""`Code.loads` and `Code.plane_loads`. Shrink: slot, descriptor, tile, then the sums and offset;
words. Expand: slot, descriptor, address, then the scale and y; block, words."""
MEASURED_CODE: Final = (
    Code(8, (307, 327, 494, 869), 127, 567, 182, 0, 81_920, 6, 2, 8),
    Code(8, (739, 429, 331, 292), 1_380, 953, 249, 0, 65_536, 5, 3, 16),
)
"""The shrink and expand kernels that `MEASURED` is of."""


def read_code(name: str, compiled: Any, warps: int) -> Code:
    """Disassemble a kernel whose inner loops are those of the planes.

    Raises:
        ValueError: the machine code has another number of inner loops.
    """
    code = disassemble(compiled)
    loops = [loop for loop in code.loops if "HMMA" in code.operations[loop]]
    if len(loops) != len(PLANES):
        raise ValueError(f"{name} has {len(loops)} inner loops with products, not {len(PLANES)}.")
    sizes = tuple(loop.stop - loop.start for loop in loops)
    between = (loops[-1].start - loops[0].stop - sum(sizes[1:-1])) // (len(PLANES) - 1)
    shared = sum(
        operation in {"BAR", "LDS", "LDSM", "STS"}
        for loop in loops
        for operation in code.operations[loop]
    )
    return Code(
        warps, sizes, between, len(code.operations) - sum(sizes) - len(PLANES) * between,
        code.registers, code.stack_bytes, code.shared_bytes, *DEPENDENT_LOADS[name], shared,
    )  # fmt: skip


Codes = tuple[Code, Code]
"""Shrink and expand."""


@functools.cache
def codes(variant: Variant, capability: int) -> Codes:
    """The compiled kernels, for bfloat16."""
    shrink = compile_for(
        capability, kernel.shrink_kernel, "bf16", variant.shrink_warps, variant.shrink_registers
    )
    expand = compile_for(
        capability, kernel.expand_kernel, "bf16", variant.expand_warps, variant.expand_registers
    )
    return (
        read_code("shrink_kernel", shrink, variant.shrink_warps),
        read_code("expand_kernel", expand, variant.expand_warps),
    )


Steps = list[tuple[int, int]]
"""What a program walks: (plane's bits, steps of its loop)."""


def shrink_programs(projection: Projection, warps: int) -> list[Steps]:
    """The programs of one delta's shrink."""
    programs = []
    inputs = 2 * SEGMENTS * warps * 32
    for h_out in projection.h_outs:
        for group in groups_of(h_out, projection.h_in):
            steps = [
                (plane, -(-projection.h_in * plane // inputs))
                for plane in PLANES
                if group.v_bits & plane
            ]
            programs += [steps] * -(-group.ranks // TILE_RANKS)
    return programs


def expand_programs(projection: Projection, warps: int) -> list[Steps]:
    """The programs of one delta's expand."""
    programs = []
    for h_out in projection.h_outs:
        blocks = dict.fromkeys(PLANES, 0)
        for group in groups_of(h_out, projection.h_in):
            for plane in PLANES:
                if group.u_bits & plane:
                    blocks[plane] += -(-group.ranks // BLOCK_RANKS)
        steps = [(p, -(-count // warps)) for p, count in blocks.items() if count]
        programs += [steps] * -(-h_out // TILE_COLUMNS)
    return programs


def launch_microseconds(programs: list[Steps], code: Code, chunks: int, step: float) -> float:
    """Time of one launch: programs are started in order as places on SMs become free."""
    programs = programs * chunks
    places = max(1, code.programs_per_sm)
    live = min(places, -(-len(programs) // MULTIPROCESSORS))
    warps = code.warps * live / SCHEDULERS
    straight = max(STRAIGHT, warps) / CLOCK
    issue = {
        plane: instructions * warps / CLOCK
        for plane, instructions in zip(PLANES, code.loops, strict=True)
    }
    common = code.loads * LOAD + code.common * straight
    beside = code.plane_loads * LOAD + code.plane * straight
    ends = [0.0] * (MULTIPROCESSORS * places)
    for steps in programs:
        work = sum(beside + count * max(step, issue[plane]) for plane, count in steps)
        heapq.heapreplace(ends, ends[0] + common + work)
    return LAUNCH + max(ends)


def predict(
    projections: Sequence[Projection], rows: int, deltas: int, codes: Codes, step: float = STEP
) -> float:
    """Microseconds of the deltas of these projections, rows spread evenly over the deltas."""
    shrink, expand = codes
    chunks = deltas * -(-rows // deltas // CHUNK_ROWS)
    return sum(
        LAUNCH  # prepare
        + launch_microseconds(shrink_programs(projection, shrink.warps), shrink, chunks, step)
        + launch_microseconds(expand_programs(projection, expand.warps), expand, chunks, step)
        for projection in projections
    )


def packed_bytes(projections: Sequence[Projection]) -> float:
    """Bytes of one delta's codes."""
    return sum(
        group.ranks * (projection.h_in * group.v_bits + h_out * group.u_bits) / 8
        for projection in projections
        for h_out in projection.h_outs
        for group in groups_of(h_out, projection.h_in)
    )


def lane_instructions(code: Code, codes_of: Sequence[int]) -> list[float]:
    """Instructions of a lane for each code, by plane; a warp's step has `codes_of` codes."""
    return [
        32 * instructions / number
        for instructions, number in zip(code.loops, codes_of, strict=True)
    ]


SHRINK_CODES: Final = [TILE_RANKS * 2 * SEGMENTS * 32 // plane for plane in PLANES]
"""Codes that a warp of the shrink kernel takes in one step, by plane."""
EXPAND_CODES: Final = [TILE_COLUMNS * BLOCK_RANKS] * len(PLANES)
"""The same of the expand kernel: a block of ranks of a tile of outputs."""


def describe(code: Code, codes_of: Sequence[int]) -> str:
    """Costs of a kernel: lane-instructions a code by plane, registers, shared memory, warps."""
    lanes = "/".join(f"{number:.1f}" for number in lane_instructions(code, codes_of))
    return (
        f"{lanes:16} {code.registers:4d} {code.shared_bytes:7d}"
        f" {code.programs_per_sm * code.warps:5d}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the fit to what was measured, then each variant's costs and predictions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capability", type=int, default=90)
    capability = parser.parse_args(arguments).capability
    print("Model against an H200, the kernels before these")
    print("projections  rows deltas measured predicted")
    for (name, rows, deltas), measured in MEASURED.items():
        chosen = [each for each in LAYER if name in ("whole layer", each.name)]
        predicted = predict(chosen, rows, deltas, MEASURED_CODE)
        print(f"{name:12} {rows:4d} {deltas:6d} {measured:8d} {predicted:9.0f}")
    print(
        "\nA layer's projections, predicted us, and the fraction of copy bandwidth\n"
        f"{'variant':16} {'1 row':>9} {'8 on 8':>9} {'of copy':>9} {'16 on 16':>9}   "
        "instructions a code, registers, shared bytes, warps an SM"
    )
    rows_of = []
    for variant in SWEEP:
        compiled = codes(variant, capability)
        times = [
            (predict(LAYER, n, n, compiled, LOAD), predict(LAYER, n, n, compiled))
            for n in (1, 8, 16)
        ]
        rows_of.append((times[1], name_of(variant), compiled, times))
    for (_, longest), name, (shrink, expand), times in sorted(rows_of, key=lambda row: row[0]):
        one, eight, sixteen = (f"{low:.0f}-{high:.0f}" for low, high in times)
        fraction = 8 * packed_bytes(LAYER) / longest / COPY_BANDWIDTH
        print(
            f"{name:16} {one:>9} {eight:>9} {fraction:9.1%} {sixteen:>9}   "
            f"{describe(shrink, SHRINK_CODES)} | {describe(expand, EXPAND_CODES)}"
        )


if __name__ == "__main__":
    main()
