"""What the SVD-delta kernels cost, read from their machine code, and a model of their time.

    python -m benchmarks.kernel_model [--capability 90] [--variants]

It needs no GPU. Triton compiles each variant; `nvdisasm` and `cuobjdump`, which come with Triton,
give the instructions of its inner loops and outside of them, its registers and its shared memory.
The model:

    A program waits `LOAD` microseconds for each load that needs another's result, on its way to the
    first plane of codes and then for each plane. Of what is not in a plane's loop, an instruction
    of a warp takes `STRAIGHT` cycles: it is fetched for the first time, and few warps hide that. A
    step of a plane takes the longer of `STEP` and the time in which its SM issues the loop's
    instructions. An SM runs as many programs at once as its registers and shared memory hold, and a
    launch takes `LAUNCH` microseconds beside its programs.

The four constants were fitted to the ten times in `MEASURED`, of an H200 and the first kernels,
whose machine code is kept in `MEASURED_CODE`; they explain them within 3 %. The table printed first
shows that. These kernels differ in two ways that nothing has measured: their loops have neither
shared memory nor barriers, and where launches overlap, what a program of the first wave does before
its wait is hidden. So a prediction is a range, from `QUICK` to `SLOW`. It is
printed for decode steps beside bfloat16 low-rank factors of the same bytes and dense deltas, by
what `ALTERNATIVES` measured; for prefill; for one delta against merged weights; and for each
variant of the kernels. A GPU has the last word.
"""

import argparse
import functools
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from benchmarks.kernel import GPU_STEPS, LAYER, SWEEP, Projection, groups_of, name_of
from benchmarks.machine_code import (
    compile_kernel,
    disassemble,
    loads_to_the_stack,
    programs_per_sm,
)
from deltadock.kernels.svd_delta import triton as kernel
from deltadock.kernels.svd_delta.chunks import BLOCK_INPUTS, CHUNK_ROWS
from deltadock.kernels.svd_delta.layout import TILE_RANKS, WARP_INPUTS
from deltadock.kernels.svd_delta.triton.forms import (
    DEFAULT,
    SUM_PARTS,
    UNSPECIALIZED,
    ExpandForm,
    Form,
    Variant,
    form_of,
    parts_of_prepare,
    places_of,
)

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
TENSOR_RATE: Final = 7e8
"""Floating-point operations per microsecond of large bfloat16 products on an H200."""
PLANES: Final = (8, 4, 2, 1)
"""Bits of a plane, in the order in which the kernels walk them."""

MEASURED: Final = {
    ("whole layer", 1, 1): 407, ("whole layer", 8, 1): 410, ("whole layer", 4, 4): 607,
    ("whole layer", 8, 8): 961, ("whole layer", 64, 8): 972, ("whole layer", 16, 16): 1760,
    ("q, k, v", 8, 8): 138, ("o", 8, 8): 84, ("gate, up", 8, 8): 562, ("down", 8, 8): 171,
}  # fmt: skip
"""Microseconds on an H200 (torch 2.11, Triton 3.6), by projections, rows and deltas."""


class Bound(NamedTuple):
    """What the model does not know of these kernels, in microseconds."""

    step: float
    """A step of a loop that waits for memory."""
    load: float
    """A load after the wait, whose words the kernel before or a prefetch left in L2."""
    release: float
    """From the end of a kernel to what the next one does after its wait, where launches overlap."""


QUICK: Final = Bound(0.3, 0.3, 0.5)
"""All words are in L2 when a step needs them."""
SLOW: Final = Bound(STEP, LOAD, LAUNCH)
"""Only what a program does before its wait is hidden."""

ALTERNATIVES: Final = {1: (80, 134), 8: (104, 134)}
"""Microseconds a layer for each delta, by least rows of a delta: bfloat16 low-rank factors of the
same bytes, and dense bfloat16 deltas. Measured on the H200 in steps of 1 to 16 deltas."""
BASE_STEP: Final = 233e6 * 2 / COPY_BANDWIDTH / 0.85
"""Microseconds of a layer's products of a decode step, at 85 % of copy bandwidth."""

TYPES: Final = {"addresses_ptr": "*i64"} | dict.fromkeys(
    ("projected_ptr", "rests_ptr", "scales_ptr"), "*fp32"
)
NUMBERS: Final = (
    "x_stride", "y_stride", "xs_stride", "scales_stride", "h_in", "padded_h_in", "max_tiles",
    "block_count", "output_tiles",
)  # fmt: skip
CONSTANTS: Final = {"LINEARS": 3, "BLOCKS": 4, "VECTOR": True, "EMULATE": False}


def compile_for(
    capability: int,
    function: Any,
    dtype: str,
    form: Form,
) -> Any:
    """Compile as launched for a 16-bit dtype and shapes that are multiples of 128."""
    constants = CONSTANTS | {"OVERLAP": capability >= 90, "WARPS": form.warps}
    if isinstance(form, ExpandForm):
        constants |= {"COLUMNS": form.columns}
    types = TYPES | dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}") | dict.fromkeys(NUMBERS, "i32")
    return compile_kernel(
        capability, function, types, constants,
        unspecialized=UNSPECIALIZED, num_warps=form.warps, maxnreg=form.registers or None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Code:
    """One compiled kernel.

    Attributes:
        warps: of a program.
        loops: instructions of each plane's inner loop, in the order of `PLANES`.
        plane: instructions beside them for each plane.
        common: all other instructions, of what the tiles that a program takes have in common.
        registers: of a thread.
        stack_bytes: of a thread; spilled registers are there.
        shared_bytes: of a program.
        loads: loads that need another's result, on a program's way to its first plane and from its
            last; counted by hand.
        plane_loads: those on the way to a plane's first step.
        shared_in_loops: instructions of the inner loops that are barriers or access shared memory.
        stalls: loads between the wait and the inner loops, or them, that go to the stack at once.
        head: instructions before the wait for the previous kernel; 0 if launches do not overlap.
        head_loads: of `loads` and the first plane's, those before the wait; counted by hand.
        tile: instructions beside them for each tile; of prepare for each plane.
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
    head: int = 0
    head_loads: int = 0
    tile: int = 0
    stalls: int = 0

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM runs at once."""
        return programs_per_sm(self.warps, self.registers, self.shared_bytes)


DEPENDENT_LOADS: Final = {
    "prepare_kernel": (4, 0, 3), "shrink_kernel": (5, 1, 5), "expand_kernel": (5, 1, 4),
}  # fmt: skip
"""`Code.loads`, `Code.plane_loads` and `Code.head_loads`. Prepare: slot, descriptor, scale,
then x. Shrink: slot, descriptors, the linear's, tile, scale; words. Expand: the number of chunks,
slot, descriptor, blocks, then the peaks; words."""
MEASURED_CODES: Final = (
    Code(8, (307, 327, 494, 869), 127, 567, 182, 0, 81_920, 6, 2, 8),
    Code(8, (739, 429, 331, 292), 1_380, 953, 249, 0, 65_536, 5, 3, 16),
)


def read_code(name: str, compiled: Any, warps: int) -> Code:
    """Disassemble a kernel whose inner loops are those of the planes.

    Raises:
        ValueError: the machine code has another number of inner loops.
    """
    code = disassemble(compiled)
    # Programs that have nothing to do wait and exit.
    waits = [
        place
        for place, (name, following) in enumerate(itertools.pairwise(code.operations))
        if name == "ACQBULK" and following != "EXIT"
    ]
    head = waits[0] if waits else 0
    loads, plane_loads, head_loads = DEPENDENT_LOADS[name]
    head_loads = head_loads if waits else 0
    loops = [loop for loop in code.loops if "IMMA" in code.operations[loop]]
    if name == "prepare_kernel":
        (loop,) = code.loops
        tile = loop.stop - loop.start
        return Code(
            warps, (), 0, len(code.operations) - tile, code.registers, code.stack_bytes,
            code.shared_bytes, loads, plane_loads, 0, head, head_loads, tile,
        )  # fmt: skip
    if len(loops) != len(PLANES):
        raise ValueError(f"{name} has {len(loops)} inner loops with products, not {len(PLANES)}.")
    sizes = tuple(loop.stop - loop.start for loop in loops)
    between = (loops[-1].start - loops[0].stop - sum(sizes[1:-1])) // (len(PLANES) - 1)
    shared = sum(
        operation in {"BAR", "LDS", "LDSM", "STS"}
        for loop in loops
        for operation in code.operations[loop]
    )
    around = [
        loop.stop - loop.start
        for loop in code.outer_loops
        if loop.start < loops[0].start and loop.stop > loops[-1].stop
    ]
    stalls = sum(
        place > head and not any(loop.start <= place < loop.stop for loop in loops)
        for place in loads_to_the_stack(code.listing)
    )
    # A program of shrink rarely takes a second tile.
    everything = sum(sizes) + len(PLANES) * between
    tile = min(around) - everything if name == "expand_kernel" else 0
    return Code(
        warps, sizes, between, len(code.operations) - everything - tile,
        code.registers, code.stack_bytes, code.shared_bytes, loads, plane_loads, shared,
        head, head_loads, tile, stalls,
    )  # fmt: skip


SHRINK_INPUTS: Final = [WARP_INPUTS // min(plane, 2) for plane in PLANES]
"""Inputs of a vector that a warp of shrink takes in a step, by plane."""


class Codes(NamedTuple):
    """The kernels of one call, and what they take at a time."""

    shrink: Mapping[Form, Code]
    expand: Mapping[ExpandForm, Code]
    prepare: Mapping[Form, Code] = MappingProxyType({})
    """None: it takes a launch and no more, as the one that was measured."""
    chunk_rows: int = CHUNK_ROWS
    warp_inputs: Sequence[int] = SHRINK_INPUTS
    block_ranks: int = TILE_RANKS
    """Ranks that a warp of expand takes in a step."""
    shared_out: bool = True
    """Whether as many programs as run at once share the tiles of expand."""


@functools.cache
def code_of(name: str, form: Form, capability: int) -> Code:
    """A compiled kernel, for bfloat16."""
    return read_code(name, compile_for(capability, getattr(kernel, name), "bf16", form), form.warps)


def codes(variant: Variant, capability: int) -> Codes:
    """The compiled kernels of a variant."""
    return Codes(
        {form: code_of("shrink_kernel", form, capability) for form in variant.shrink},
        {form: code_of("expand_kernel", form, capability) for form in variant.expand},
        {form: code_of("prepare_kernel", form, capability) for form in variant.prepare},
    )


MEASURED_CODE: Final = Codes(
    {Form(8, 182): MEASURED_CODES[0]}, {ExpandForm(8, 249, 256): MEASURED_CODES[1]},
    chunk_rows=8, warp_inputs=(64, 128, 256, 512), block_ranks=16, shared_out=False,
)  # fmt: skip
"""The kernels that `MEASURED` is of."""

Steps = list[tuple[int, int]]
"""What a program walks for a tile: (plane's bits, steps of its loop)."""
Program = list[list[Steps]]
"""What a program walks: tiles, by what they have in common."""


def shrink_programs(projection: Projection, codes: Codes, form: Form) -> list[Program]:
    """The programs of one chunk's shrink."""
    programs = []
    for h_out in projection.h_outs:
        for group in groups_of(h_out, projection.h_in):
            steps = [
                (plane, -(-projection.h_in // (SUM_PARTS * inputs)) * (SUM_PARTS // form.warps))
                for plane, inputs in zip(PLANES, codes.warp_inputs, strict=True)
                if group.v_bits & plane
            ]
            programs += [[[steps]]] * -(-group.ranks // TILE_RANKS)
    return programs


def expand_tiles(projection: Projection, codes: Codes, form: ExpandForm) -> list[list[Steps]]:
    """The tiles of one chunk's expand, by linear."""
    linears = []
    for h_out in projection.h_outs:
        blocks = dict.fromkeys(PLANES, 0)
        for group in groups_of(h_out, projection.h_in):
            for plane in PLANES:
                if group.u_bits & plane:
                    blocks[plane] += -(-group.ranks // codes.block_ranks)
        steps = [(p, -(-count // form.warps)) for p, count in blocks.items() if count]
        linears.append([steps] * -(-h_out // form.columns))
    return linears


def expand_programs(linears: list[list[Steps]], programs: int) -> list[Program]:
    """At most this many programs, which take as many tiles of all chunks' linears."""
    share = -(-sum(map(len, linears)) // programs)
    tiles = [(number, steps) for number, linear in enumerate(linears) for steps in linear]
    return [
        [
            [steps for _, steps in same]
            for _, same in itertools.groupby(tiles[first : first + share], lambda tile: tile[0])
        ]
        for first in range(0, len(tiles), share)
    ]


def launch_microseconds(
    programs: list[Program], code: Code, bound: Bound, *, overlaps: bool = True
) -> float:
    """Time of one launch: programs are started in order as places on SMs become free.

    Without `overlaps` the kernel before does not let this one start early.
    """
    places = max(1, code.programs_per_sm)
    live = min(places, -(-len(programs) // MULTIPROCESSORS))
    warps = code.warps * live / SCHEDULERS
    straight = max(STRAIGHT, warps) / CLOCK
    issue = {
        plane: instructions * warps / CLOCK
        for plane, instructions in zip(PLANES, code.loops, strict=False)
    }
    after_wait = max(0, code.loads - code.head_loads)
    common = (code.loads - after_wait) * LOAD + after_wait * bound.load + code.common * straight
    beside = code.plane_loads * bound.load + code.plane * straight
    overlaps = overlaps and code.head > 0
    # Of the first wave the head is hidden by the kernel before.
    hidden = code.head_loads * LOAD + code.head * straight if overlaps else 0.0
    ends = [-hidden] * (MULTIPROCESSORS * places)

    def tile_microseconds(steps: Steps) -> float:
        planes = (beside + count * max(bound.step, issue[plane]) for plane, count in steps)
        return code.tile * straight + sum(planes)

    # What follows is in L2: other programs began with it.
    again = common - (code.loads - after_wait) * (LOAD - bound.load)
    for program in programs:
        tiles = sum(tile_microseconds(steps) for same in program for steps in same)
        heapq.heapreplace(ends, ends[0] + common + (len(program) - 1) * again + tiles)
    return (bound.release if overlaps else LAUNCH) + max(0.0, *ends)


def predict(
    projections: Sequence[Projection], rows: int, deltas: int, codes: Codes, bound: Bound
) -> float:
    """Microseconds of the deltas of these projections, rows spread evenly over the deltas."""
    chunks = deltas * -(-rows // deltas // codes.chunk_rows)
    return sum(
        sum(launches_of(projection, rows, chunks, codes, bound)) for projection in projections
    )


def planes_of_v(projection: Projection) -> int:
    """Planes that V of a delta has."""
    groups = [group for h_out in projection.h_outs for group in groups_of(h_out, projection.h_in)]
    return sum(any(group.v_bits & plane for group in groups) for plane in PLANES)


def launches_of(
    projection: Projection,
    rows: int,
    chunks: int,
    codes: Codes,
    bound: Bound,
    overlaps: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[float, float, float]:
    """Microseconds of prepare, shrink and expand; which of them the kernel before lets start early.

    Among deltas alone all of them, but a product of cuBLAS does not do that.
    """
    prepare = LAUNCH
    if codes.prepare:
        prepares = rows * len(projection.h_outs) * -(-projection.h_in // BLOCK_INPUTS)
        form = form_of(tuple(codes.prepare), lambda _: prepares, MULTIPROCESSORS)
        parts = parts_of_prepare(prepares, form, MULTIPROCESSORS)
        planes: list[Steps] = [[]] * (1 if parts > 1 else planes_of_v(projection))
        prepare = launch_microseconds(
            [[planes]] * (parts * prepares), codes.prepare[form], bound, overlaps=overlaps[0]
        )

    def shrinks(form: Form) -> int:
        return chunks * len(shrink_programs(projection, codes, form))

    form = form_of(tuple(codes.shrink), shrinks, MULTIPROCESSORS)
    programs = shrink_programs(projection, codes, form) * chunks
    shrink = launch_microseconds(programs, codes.shrink[form], bound, overlaps=overlaps[1])

    def expands(form: ExpandForm) -> int:
        return chunks * sum(map(len, expand_tiles(projection, codes, form)))

    expand_form = form_of(tuple(codes.expand), expands, MULTIPROCESSORS)
    tiles = expand_tiles(projection, codes, expand_form) * chunks
    most = places_of(expand_form, MULTIPROCESSORS) if codes.shared_out else expands(expand_form)
    programs = expand_programs(tiles, most)
    expand = launch_microseconds(programs, codes.expand[expand_form], bound, overlaps=overlaps[2])
    return prepare, shrink, expand


def predicted_range(rows: int, deltas: int, codes: Codes) -> tuple[float, float]:
    """Microseconds of a layer's deltas, from `QUICK` to `SLOW`."""
    quick, slow = (predict(LAYER, rows, deltas, codes, bound) for bound in (QUICK, SLOW))
    return quick, slow


def alternatives(rows: int, deltas: int) -> tuple[int, int]:
    """Microseconds of a layer's low-rank and dense bfloat16 deltas, from what was measured."""
    low_rank, dense = ALTERNATIVES[8 if rows // deltas >= 8 else 1]
    return low_rank * deltas, dense * deltas


def product_microseconds(m: int, n: int, k: int) -> float:
    """Time of an (m, k) by (k, n) product: tiles of its output in waves over the SMs."""
    times = []
    for columns, share in ((256, 1.0), (128, 0.9), (64, 0.7)):
        waves = -(-(-(-m // 128) * -(-n // columns)) // MULTIPROCESSORS)
        times.append(waves * 2 * 128 * columns * k * MULTIPROCESSORS / (share * TENSOR_RATE))
    memory = 2 * (m * k + k * n + 2 * m * n) / COPY_BANDWIDTH
    return LAUNCH + max(min(times), memory)


UNPACK_INSTRUCTIONS: Final = 19
"""Lane-instructions of the unpacking kernel for a code of 2 bits, by its machine code."""


class Prefill(NamedTuple):
    """Microseconds of a layer's products for the rows of one delta."""

    base: float
    thin: float
    """Unpacking both factors, and two products with them."""
    dense: float
    """Unpacking both factors, and adding their product to the base's weight."""


def prefill(rows: int) -> Prefill:
    """Count a prefill of this many rows."""
    base = thin = dense = 0.0
    for projection in LAYER:
        h_in, ranks = projection.h_in, 0
        base += product_microseconds(rows, sum(projection.h_outs), h_in)
        for h_out in projection.h_outs:
            rank = -(-sum(group.ranks for group in groups_of(h_out, h_in)) // 32) * 32
            ranks += rank
            values = rank * (h_in + h_out)
            lanes = 128 * MULTIPROCESSORS * CLOCK
            unpack = 2 * LAUNCH + max(
                values * UNPACK_INSTRUCTIONS / lanes, 2 * values / (COPY_BANDWIDTH / 2)
            )
            thin += unpack + product_microseconds(rows, h_out, rank)
            dense += unpack + product_microseconds(h_out, h_in, rank)
        thin += product_microseconds(rows, ranks, h_in)
    return Prefill(base, thin, dense)


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


SHRINK_CODES: Final = [TILE_RANKS * inputs for inputs in SHRINK_INPUTS]
"""Codes that a warp of the shrink kernel takes in one step, by plane."""


def expand_codes(form: ExpandForm) -> list[int]:
    """The same of the expand kernel: a block of ranks of a tile of outputs."""
    return [form.columns * TILE_RANKS] * len(PLANES)


def describe(code: Code, codes_of: Sequence[int]) -> str:
    """Costs of a kernel: lane-instructions a code by plane, registers, shared memory, warps."""
    lanes = "/".join(f"{number:.2f}" for number in lane_instructions(code, codes_of))
    return (
        f"{lanes:16} {code.registers:4d} {code.shared_bytes:7d}"
        f" {code.programs_per_sm * code.warps:5d}"
    )


def print_decode(compiled: Codes) -> None:
    """Decode steps beside what was measured and the alternatives."""
    print(
        "\nA layer's deltas, us            of copy   low-rank    dense   (of the same bytes)\n"
        "rows deltas  before  predicted  bandwidth"
    )
    for rows, deltas in sorted(GPU_STEPS, key=lambda step: (step[1], step[0])):
        quick, slow = predicted_range(rows, deltas, compiled)
        others = alternatives(rows, deltas)
        before = MEASURED.get(("whole layer", rows, deltas), "")
        size = deltas * packed_bytes(LAYER) / COPY_BANDWIDTH
        slower = " or ".join(
            name for name, us in zip(("low-rank", "dense"), others, strict=True) if slow > us
        )
        print(
            f"{rows:4d} {deltas:6d} {before:>7} {quick:5.0f}-{slow:<5.0f} {size / slow:4.0%}-"
            f"{size / quick:<4.0%} {others[0]:9d} {others[1]:8d}"
            + (f"   may be slower than {slower}" if slower else "")
        )


def print_prefill() -> None:
    """What the paths of prefill cost, in units of the base's products."""
    print("\nPrefill of one delta, times the base's products")
    print("rows     unpacked factors  dense weight rebuilt")
    for rows in (64, 128, 256, 512, 1024, 2048, 4096):
        base, thin, dense = prefill(rows)
        print(f"{rows:5d} {(base + thin) / base:12.2f}x {(base + dense) / base:14.2f}x")


def print_merged(compiled: Codes) -> None:
    """A layer of a step on one delta against merged weights."""
    print("\nOne delta, a layer's products: packed over merged")
    for rows in (1, 8, 16, 64):
        quick, slow = (1 + us / BASE_STEP for us in predicted_range(rows, 1, compiled))
        print(f"{rows:5d} rows {quick:5.2f}-{slow:.2f}x")
    base, thin, _ = prefill(2048)
    print(f" 2048 rows {(base + thin) / base:5.2f}x")


def print_variants(capability: int) -> None:
    """Each variant's costs and predictions, the fastest first."""
    print(
        "\nA layer's deltas, predicted us, and the fraction of copy bandwidth\n"
        f"{'variant':54} {'1 row':>9} {'8 on 8':>9} {'of copy':>9} {'16 on 16':>9}   "
        "instructions a code, registers, shared bytes, warps an SM"
    )
    rows_of = []
    for variant in SWEEP:
        compiled = codes(variant, capability)
        times = [predicted_range(n, n, compiled) for n in (1, 8, 16)]
        rows_of.append((times[1], name_of(variant), compiled, times))
    for (_, longest), name, compiled, times in sorted(rows_of, key=lambda row: row[0]):
        one, eight, sixteen = (f"{low:.0f}-{high:.0f}" for low, high in times)
        fraction = 8 * packed_bytes(LAYER) / longest / COPY_BANDWIDTH
        described = [describe(code, []) for code in compiled.prepare.values()]
        described += [describe(code, SHRINK_CODES) for code in compiled.shrink.values()]
        described += [describe(code, expand_codes(form)) for form, code in compiled.expand.items()]
        print(
            f"{name:54} {one:>9} {eight:>9} {fraction:9.1%} {sixteen:>9}   {' | '.join(described)}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the fit to what was measured, then predictions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--variants", action="store_true", help="all variants; takes minutes")
    options = parser.parse_args(arguments)
    print("Model against an H200, the first kernels")
    print("projections  rows deltas measured predicted")
    for (name, rows, deltas), measured in MEASURED.items():
        chosen = [each for each in LAYER if name in ("whole layer", each.name)]
        predicted = predict(chosen, rows, deltas, MEASURED_CODE, SLOW)
        print(f"{name:12} {rows:4d} {deltas:6d} {measured:8d} {predicted:9.0f}")
    compiled = codes(DEFAULT, options.capability)
    print_decode(compiled)
    print_prefill()
    print_merged(compiled)
    if options.variants:
        print_variants(options.capability)


if __name__ == "__main__":
    main()
