"""What the SVD-delta kernels cost, read from their machine code, and a model of their time.

    python -m benchmarks.kernel_model [--capability 90]

It needs no GPU. Triton compiles each variant; `nvdisasm` and `cuobjdump`, which come with Triton,
give the instructions of its inner loops, its registers and its shared memory. The model:

    A program takes `PROGRAM` microseconds, `PLANE` for each plane of codes that it walks, and for
    each step of a plane the longer of `STEP` and the time in which its SM issues the loop's
    instructions. An SM runs as many programs at once as its registers and shared memory hold, and
    a launch `LAUNCH` microseconds beside its programs.

The four constants were fitted to the ten times in `MEASURED`, of an H200 (one variant: eight warps,
two and three stages), which they explain within a tenth. The table printed first shows that; then
each variant's prediction for a layer of Qwen2.5-7B. For other variants than the measured one the
constants are assumed to stay; a GPU has the last word.
"""

import argparse
import functools
import heapq
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel import LAYER, SWEEP, Projection, groups_of, name_of
from deltadock.kernels.svd_delta import triton as kernel
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS, SUM_COLUMNS
from deltadock.kernels.svd_delta.layout import BLOCK_RANKS, TILE_COLUMNS, TILE_RANKS
from deltadock.kernels.svd_delta.triton import DEFAULT, UNSPECIALIZED, Variant

PROGRAM: Final = 8.0
PLANE: Final = 6.0
STEP: Final = 1.5
LAUNCH: Final = 4.0
"""Microseconds."""
MULTIPROCESSORS: Final = 132
CLOCK: Final = 1755.0
"""Cycles per microsecond."""
SCHEDULERS: Final = 4
"""Warp instructions that an SM issues in a cycle."""
REGISTERS: Final = 65_536
SHARED_BYTES: Final = 232_448
WARPS: Final = 64
"""Registers, shared memory and warps of an SM."""
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
    "TERMS": 1,
    "WORDS": DEFAULT.shrink_words,
    "ALIGNED": True,
    "EMULATE": False,
}


def compile_for(
    capability: int, function: Any, dtype: str, warps: int, stages: int, words: int | None = None
) -> Any:
    """Compile as launched for a 16-bit dtype and shapes that are multiples of 128."""
    names = function.arg_names
    constants = {name: CONSTANTS[name] for name in names if name in CONSTANTS}
    if "WARPS" in names:
        constants["WARPS"] = warps
    if words is not None:
        constants["WORDS"] = words
    if dtype == "fp16" and "TERMS" in constants:
        constants["TERMS"] = 2
    types = TYPES | dict.fromkeys(("x_ptr", "xs_ptr", "y_ptr"), f"*{dtype}")
    types |= dict.fromkeys((*NUMBERS, "sum_count"), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and name not in UNSPECIALIZED
    }
    return triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


@dataclass(frozen=True, slots=True)
class Code:
    """One compiled kernel.

    Attributes:
        warps: of a program.
        loops: instructions of each plane's inner loop, in the order of `PLANES`.
        registers: of a thread.
        stack_bytes: of a thread; spilled registers are there.
        shared_bytes: of a program.
    """

    warps: int
    loops: tuple[int, ...]
    registers: int
    stack_bytes: int
    shared_bytes: int

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM runs at once; registers come in units of 256 a warp."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        by_shared = SHARED_BYTES // (self.shared_bytes + 1024)
        return min(REGISTERS // registers, by_shared, WARPS // self.warps)


def read_code(name: str, compiled: Any, warps: int) -> Code:
    """Disassemble a kernel whose inner loops are those of the planes.

    Raises:
        ValueError: the machine code has another number of inner loops.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    found = re.search(rf"{name}:\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"{name} is not in the machine code: {usage}")
    loops = [size for size, products in inner_loops(listing) if products]
    if len(loops) != len(PLANES):
        raise ValueError(f"{name} has {len(loops)} inner loops with products, not {len(PLANES)}.")
    return Code(warps, tuple(loops), int(found[1]), int(found[2]), compiled.metadata.shared)


def _output(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def inner_loops(listing: str) -> Iterator[tuple[int, int]]:
    """Instructions, and matrix products among them, of each innermost loop, in order."""
    labels: dict[str, int] = {}
    count, products, last_end = 0, 0, -1
    starts: list[int] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            count += 1
            starts.append(products)
            products += "HMMA" in instruction[1]
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            begin = labels.get(jump[1]) if jump else None
            # A jump to itself ends the program; a loop around a loop is not an inner one.
            if begin is not None and last_end < begin < count - 1:
                yield count - begin, products - starts[begin]
                last_end = count


@functools.cache
def codes(variant: Variant, capability: int) -> tuple[Code, Code]:
    """The compiled shrink and expand kernels, for bfloat16."""
    shrink = compile_for(
        capability, kernel.shrink_kernel, "bf16",
        variant.shrink_warps, variant.shrink_stages, variant.shrink_words,
    )  # fmt: skip
    expand = compile_for(
        capability, kernel.expand_kernel, "bf16", variant.expand_warps, variant.expand_stages
    )
    return (
        read_code("shrink_kernel", shrink, variant.shrink_warps),
        read_code("expand_kernel", expand, variant.expand_warps),
    )


Steps = list[tuple[int, int]]
"""What a program walks: (plane's bits, steps of its loop)."""


def shrink_programs(projection: Projection, variant: Variant) -> list[Steps]:
    """The programs of one delta's shrink."""
    programs = []
    inputs = 2 * variant.shrink_words * variant.shrink_warps * 32
    for h_out in projection.h_outs:
        for group in groups_of(h_out, projection.h_in):
            steps = [
                (plane, -(-projection.h_in * plane // inputs))
                for plane in PLANES
                if group.v_bits & plane
            ]
            programs += [steps] * -(-group.ranks // TILE_RANKS)
    return programs


def expand_programs(projection: Projection, variant: Variant) -> list[Steps]:
    """The programs of one delta's expand."""
    programs = []
    for h_out in projection.h_outs:
        blocks = dict.fromkeys(PLANES, 0)
        for group in groups_of(h_out, projection.h_in):
            for plane in PLANES:
                if group.u_bits & plane:
                    blocks[plane] += -(-group.ranks // BLOCK_RANKS)
        steps = [(p, -(-count // variant.expand_warps)) for p, count in blocks.items() if count]
        programs += [steps] * -(-h_out // TILE_COLUMNS)
    return programs


def launch_microseconds(programs: list[Steps], code: Code, chunks: int) -> float:
    """Time of one launch: programs are started in order as places on SMs become free."""
    places = max(1, code.programs_per_sm)
    issue = {
        plane: instructions * code.warps * places / SCHEDULERS / CLOCK
        for plane, instructions in zip(PLANES, code.loops, strict=True)
    }
    ends = [0.0] * (MULTIPROCESSORS * places)
    for steps in programs * chunks:
        work = sum(PLANE + count * max(STEP, issue[plane]) for plane, count in steps)
        heapq.heapreplace(ends, ends[0] + PROGRAM + work)
    return LAUNCH + max(ends)


def predict(
    projections: Sequence[Projection], rows: int, deltas: int, variant: Variant, capability: int
) -> float:
    """Microseconds of the deltas of these projections, rows spread evenly over the deltas."""
    shrink, expand = codes(variant, capability)
    chunks = deltas * -(-rows // deltas // CHUNK_ROWS)
    return sum(
        LAUNCH  # prepare
        + launch_microseconds(shrink_programs(projection, variant), shrink, chunks)
        + launch_microseconds(expand_programs(projection, variant), expand, chunks)
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


def shrink_codes(words: int) -> list[int]:
    """Codes that a warp of the shrink kernel takes in one step, by plane."""
    return [TILE_RANKS * 2 * words * 32 // plane for plane in PLANES]


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
    print("Model against an H200, default variant\nprojections  rows deltas measured predicted")
    for (name, rows, deltas), measured in MEASURED.items():
        chosen = [each for each in LAYER if name in ("whole layer", each.name)]
        predicted = predict(chosen, rows, deltas, DEFAULT, 90)
        print(f"{name:12} {rows:4d} {deltas:6d} {measured:8d} {predicted:9.0f}")
    print(
        "\nA layer's projections, predicted us, and the fraction of copy bandwidth\n"
        f"{'variant':24} {'1 row':>7} {'8 on 8':>7} {'of copy':>8} {'16 on 16':>9}   "
        "instructions a code, registers, shared bytes, warps an SM"
    )
    rows_of = []
    for variant in SWEEP:
        times = [predict(LAYER, n, n, variant, capability) for n in (1, 8, 16)]
        rows_of.append((times[1], variant, times))
    for _, variant, times in sorted(rows_of, key=lambda row: row[0]):
        fraction = 8 * packed_bytes(LAYER) / times[1] / COPY_BANDWIDTH
        shrink, expand = codes(variant, capability)
        print(
            f"{name_of(variant):24} {times[0]:7.0f} {times[1]:7.0f} {fraction:8.1%}"
            f" {times[2]:9.0f}   "
            f"{describe(shrink, shrink_codes(variant.shrink_words))} | "
            f"{describe(expand, EXPAND_CODES)}"
        )


if __name__ == "__main__":
    main()
