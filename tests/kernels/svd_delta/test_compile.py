"""The kernels compile without a GPU, within budgets of registers and instructions."""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.kernel import LAYER
from benchmarks.kernel_model import (
    MEASURED,
    MEASURED_CODE,
    QUICK,
    SHRINK_CODES,
    SLOW,
    UNPACK_INSTRUCTIONS,
    alternatives,
    codes,
    compile_for,
    expand_codes,
    expand_programs,
    expand_tiles,
    lane_instructions,
    predict,
    predicted_range,
    prefill,
    read_code,
    shrink_programs,
)
from benchmarks.machine_code import (
    compile_kernel,
    disassemble,
    loads_to_the_stack,
    loops_of,
)
from deltadock.kernels.operands import PAIRED
from deltadock.kernels.svd_delta import products
from deltadock.kernels.svd_delta import triton as kernel
from deltadock.kernels.svd_delta.layout import TILE_RANKS
from deltadock.kernels.svd_delta.triton import USUAL_SHARE
from deltadock.kernels.svd_delta.triton.forms import (
    DEFAULT,
    ExpandForm,
    Form,
    form_of,
    parts_of_prepare,
    places_of,
)
from tests.kernels.waits import check_accesses_after_the_wait

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


BOUNDS: dict[Form, tuple[int, int, int, tuple[float, ...]]] = {
    Form(8, 80): (160, 4_096, 1_020, (0.7, 0.77, 0.9, 0.78)),
    Form(4, 96): (80, 4_096, 1_050, (0.7, 0.77, 0.9, 0.78)),
    ExpandForm(8, 80, 64): (192, 8_192, 960, (2.5, 2.3, 2.2, 2.2)),
    ExpandForm(8, 80, 128): (320, 8_192, 1_130, (1.95, 1.9, 1.7, 1.6)),
    ExpandForm(4, 168, 256): (160, 8_192, 1_200, (1.3, 1.4, 1.2, 1.1)),
}
"""Of each form: bytes on the stack, of shared memory, instructions outside the loops, and in the
loops instructions a code, of planes of 8, 4, 2 and 1 bits. At 75 % of copy bandwidth an SM may
spend 1.2 on a code of one bit, 2.4 on one of two."""
MIXED = [("shrink_kernel", form) for form in DEFAULT.shrink]
MIXED += [("expand_kernel", form) for form in DEFAULT.expand]


@pytest.mark.parametrize(
    ("capability", "dtype", "name", "form"),
    [
        *[(capability, "bf16", *each) for capability in (80, 90) for each in MIXED],
        *[(90, "fp16", *each) for each in (MIXED[1], MIXED[-1])],
    ],
)
def test_machine_code(capability: int, dtype: str, name: str, form: Form) -> None:
    compiled = compile_for(capability, getattr(kernel, name), dtype, form)
    code = read_code(name, compiled, form.warps)
    spilled, shared, straight, bounds = BOUNDS[form]
    # Words and terms are loaded by the threads that use them.
    assert not code.shared_in_loops
    # A load that goes to the stack at once is waited for, before others are asked for.
    assert capability < 90 or not code.stalls
    assert code.shared_bytes <= shared
    assert places_of(form, 1) == code.programs_per_sm
    assert code.programs_per_sm * form.warps >= 12
    # Spilled registers are on the stack, outside the loops of narrow planes.
    assert code.stack_bytes <= spilled
    assert code.common + code.tile + 4 * code.plane <= straight
    # What comes before the wait is hidden where launches overlap.
    assert (code.head >= 250) == (capability >= 90)
    codes_of = expand_codes(form) if isinstance(form, ExpandForm) else SHRINK_CODES
    found = lane_instructions(code, codes_of)
    assert all(number <= bound for number, bound in zip(found, bounds, strict=True)), found
    check_packed_assembly(compiled.asm["ttgir"])


def check_packed_assembly(ttgir: str) -> None:
    """Inline assembly that takes several of a thread's numbers at once gets the expected ones.

    It gets them in the order of the result's registers. Nothing here executes it.
    """
    layouts = dict(
        re.findall(r"^(#\w+) = #ttg\.linear<\{register = (\[\[.*?\]\]), lane", ttgir, re.M)
    )
    found = re.findall(r"packed_element = (\d+).*-> tensor<[\dx]+x(i8|i32), (#\w+)> loc", ttgir)
    packed = [(int(count), dtype, name) for count, dtype, name in found if count != "1"]
    assert packed
    for count, dtype, name in packed:
        bases = json.loads(layouts[name])
        last, zeros = [0] * (len(bases[0]) - 1), [0] * (len(bases[0]) - 2)
        turns = [[*last, 1], [0, 8, 0, 0]] if PAIRED else [[0, 8, 0, 0], [*last, 1]]
        expected = {
            (4, "i8"): [[*last, 1], [*zeros, 1, 0]],  # the copies of a word
            (4, "i32"): [[*last, 1], [*last, 2]],  # consecutive words
            (8, "i32"): [*turns, [*last, 2]],  # those of two vectors in turn
        }[count, dtype]
        assert bases[: len(expected)] == expected


@pytest.mark.parametrize(
    ("name", "forms"), [("shrink_kernel", DEFAULT.shrink), ("expand_kernel", DEFAULT.expand)]
)
def test_sums_have_one_order_for_any_form(name: str, forms: Sequence[Form]) -> None:
    """Float sums over an axis follow the layout of a warp, which must not depend on the form."""
    orders = set()
    for form in forms:
        ttgir = compile_for(90, getattr(kernel, name), "bf16", form).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ttgir, re.M))
        reductions = re.findall(r'"tt\.reduce"(.*?)\n *\}\) : \((.*?)\) ->', ttgir, re.S)
        sums = [
            summed
            for body, operands in reductions
            if "arith.addf" in body
            for summed in re.findall(r"tensor<([\dx]+)xf32, (#\w+)>", operands)
        ]
        assert len(sums) == (2 if name == "shrink_kernel" else 1)
        warp = re.compile(r"sizePerThread = .*?, threadsPerWarp = .*?\]|order = .*?\]")
        orders.add(tuple((shape, *warp.findall(layouts[layout])) for shape, layout in sums))
    assert len(orders) == 1, orders


@pytest.mark.parametrize(
    ("name", "forms", "written"),
    # Arguments that kernels of a step write.
    [
        ("prepare_kernel", DEFAULT.prepare, ["x_ptr", "xs_ptr", "scales_ptr"]),
        ("shrink_kernel", DEFAULT.shrink,
         ["xs_ptr", "scales_ptr", "projected_ptr", "peaks_ptr", "rests_ptr"]),
        ("expand_kernel", DEFAULT.expand, ["projected_ptr", "peaks_ptr", "rests_ptr", "y_ptr"]),
    ],
)  # fmt: skip
def test_what_other_kernels_write_is_accessed_after_the_wait(
    name: str, forms: Sequence[Form], written: list[str]
) -> None:
    function = getattr(kernel, name)
    for form in forms:
        code = disassemble(compile_for(90, function, "bf16", form))
        check_accesses_after_the_wait(code, function, written)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_small_kernels_are_small(capability: int) -> None:
    for form, most in zip(DEFAULT.prepare, (340, 440), strict=True):
        prepare = disassemble(compile_for(capability, kernel.prepare_kernel, "bf16", form))
        assert len(prepare.operations) <= most
        assert prepare.stack_bytes == 0
        assert "STS" not in prepare.operations[prepare.loops[0]]
        assert places_of(form, 1) <= prepare.programs_per_sm
    numbers = ("tiles_word", "tiles", "rank", "padded_rank", "columns", "offset_word",
               "rank_scale_word", "column_scale_word")  # fmt: skip
    compiled = compile_kernel(
        capability, products.unpack_kernel, {"out_ptr": "*bf16"} | dict.fromkeys(numbers, "i32"),
        {"BLOCK": products.BLOCK_COLUMNS, "EMULATE": False}, num_warps=4,
        unspecialized=set(numbers) - {"columns"},
    )  # fmt: skip
    unpack = disassemble(compiled)
    assert unpack.stack_bytes == 0
    assert unpack.programs_per_sm * unpack.warps >= 16
    values = products.BLOCK_COLUMNS * products.TILE_RANKS / (32 * unpack.warps)
    # All four planes, of which a code goes through one or two.
    assert len(unpack.operations) / values <= 1.6 * UNPACK_INSTRUCTIONS


@pytest.mark.parametrize(("key", "measured"), MEASURED.items())
def test_the_model_explains_what_an_h200_measured(key: Any, measured: float) -> None:
    name, rows, deltas = key
    projections = [each for each in LAYER if name in ("whole layer", each.name)]
    predicted = predict(projections, rows, deltas, MEASURED_CODE, SLOW)
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("rows", "deltas"), [(1, 1), (8, 8), (64, 8)])
def test_the_model_expects_these_kernels_to_be_faster(rows: int, deltas: int) -> None:
    compiled = codes(DEFAULT, 90)
    measured = MEASURED["whole layer", rows, deltas]
    assert predict(LAYER, rows, deltas, compiled, SLOW) < measured / 2.5
    assert predict(LAYER, rows, deltas, compiled, QUICK) < measured / 5.5


@pytest.mark.parametrize(
    ("rows", "deltas"), [(2, 2), (4, 4), (16, 4), (8, 8), (64, 8), (16, 16), (64, 16)]
)
def test_the_model_expects_no_alternative_to_be_faster(rows: int, deltas: int) -> None:
    """From two deltas on, or four with many rows; for fewer see ADR 42."""
    _, slow = predicted_range(rows, deltas, codes(DEFAULT, 90))
    assert slow < min(alternatives(rows, deltas))


def test_prefill_by_unpacked_factors_stays_within_its_bar() -> None:
    base, thin, dense = prefill(2048)
    assert thin < min(0.7 * base, dense)


def test_programs_at_decode_shapes() -> None:
    """One row on one delta, for an H200's 132 SMs: a layer's launches leave some of them idle."""
    compiled = codes(DEFAULT, 90)
    programs = {
        each.name: (
            len(shrink_programs(each, compiled, DEFAULT.shrink[0])),
            *[sum(map(len, expand_tiles(each, compiled, form))) for form in DEFAULT.expand],
        )
        for each in LAYER
    }
    assert programs == {
        "q, k, v": (41, 72, 36, 18), "o": (25, 56, 28, 14), "gate, up": (80, 592, 296, 148),
        "down": (40, 56, 28, 14),
    }  # fmt: skip


def test_programs_take_as_many_tiles_of_expand() -> None:
    """Whatever a chunk has in common is loaded again only where one begins."""
    first, second = [[(8, 1)]] * 5, [[(2, 1)]] * 4
    assert expand_programs([first, second], 4) == [
        [first[:3]], [first[3:], second[:1]], [second[1:]],
    ]  # fmt: skip


def test_few_rows_are_prepared_by_a_program_for_each_plane() -> None:
    form = DEFAULT.prepare[0]
    places = places_of(form, 132)
    assert parts_of_prepare(places // 4, form, 132) == 4
    assert parts_of_prepare(places // 4 + 1, form, 132) == 1


def test_few_programs_have_smaller_tiles() -> None:
    """All programs of a form run at once, if fewer than the last would."""
    few, some, many = DEFAULT.expand
    limits = [3 * 132, 3 * 132, 3 * 132]
    assert [places_of(form, 132) for form in DEFAULT.expand] == limits
    for tiles, form in ((99, few), (100, some), (198, some), (199, many), (999, many)):
        assert form_of(DEFAULT.expand, lambda each, n=tiles: n * 256 // each.columns, 132) == form
    # A delta of one bit per weight has about a third of a table's most ranks, or fewer.
    compiled = codes(DEFAULT, 90)
    for each in LAYER:
        most = sum(min(h_out, each.h_in) for h_out in each.h_outs)
        tiles = len(shrink_programs(each, compiled, DEFAULT.shrink[0]))
        assert tiles <= 1.1 * most / TILE_RANKS / USUAL_SHARE


LISTING = """
.L_x_0:
        /*0000*/  IMAD R1, R2, R3, R4 ;
.L_x_1:
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0020*/  @P0 BRA `(.L_x_1) ;
        /*0030*/  @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0040*/  LDG.E R1, [R2] ;
        /*0050*/  FADD R1, R1, R2 ;
        /*0060*/  @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/  BRA `(.L_x_3) ;
"""


def test_loops_of_are_found_in_a_listing() -> None:
    operations, inner, outer = loops_of(LISTING)
    assert [operations[loop] for loop in inner] == [["HMMA", "BRA"], ["LDG", "FADD", "BRA"]]
    assert [operations[loop] for loop in outer] == [["IMAD", "HMMA", "BRA", "BRA"]]


STALLS = """
        /*0000*/  @P0 LDG.E.64 R2, desc[UR4][R8.64] ;
        /*0010*/  LDG.E R5, desc[UR4][R8.64+0x8] ;
        /*0020*/  LDG.E R6, desc[UR4][R8.64+0x10] ;
        /*0030*/  STL [R1+0x4], R3 ;
        /*0040*/  FADD R5, R5, R2 ;
        /*0050*/  STL [R1+0x8], R5 ;
        /*0060*/  STL [R1+0xc], R6 ;
"""


def test_loads_to_the_stack_are_found_in_a_listing() -> None:
    assert loads_to_the_stack(STALLS) == [0, 2]
