"""What a decode step does between its products, at Qwen2.5-7B's shape.

    python -m benchmarks.decoder

It needs a GPU. First it prints the time in a CUDA graph of residual and norm, of rotation with the
cache's write and of the gated activation, by their kernels and by PyTorch's operators. Then that of
the five launches of a layer between its products, one after another and overlapping, after their
results have been compared. Last that of a layer's attention, for rows of equal and of mixed
lengths: by the kernel's default and best variants, with the time that a copy of the rows' keys and
values takes as a fraction of it; and by PyTorch's attention over slots of the longest row's length
rounded up to a power of two, behind a mask, which is what a step on static buffers does without the
kernel. Every variant's result is checked first.

    TRITON_INTERPRET=1 python -m benchmarks.decoder --device cpu

runs the same code at a tiny size without a GPU, and times nothing.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import describe_machine, device_bandwidth, gpu_seconds
from benchmarks.machine_code import MachineCode, compile_kernel, disassemble
from deltadock.kernels import decoder, overlap
from deltadock.kernels.decode_attention import triton as kernel
from deltadock.kernels.decode_attention.reference import decode_attention as reference
from deltadock.kernels.decode_attention.triton import DEFAULT, Variant, decode_attention
from deltadock.kernels.decoder import reference as decoder_reference
from deltadock.kernels.decoder import triton as decoder_triton

HEADS, KV_HEADS, WIDTH = 28, 4, 128
HIDDEN, INTERMEDIATE = 3584, 18944
STEPS: Final[dict[str, list[int]]] = {
    "1 row of 200": [200],
    "12 rows of 200": [200] * 12,
    "64 rows of 200": [200] * 64,
    "12 rows, one of 8000": [200] * 11 + [8000],
    "16 rows of 4000": [4000] * 16,
}
"""Lengths of the rows."""
SWEEP: Final = [DEFAULT] + [
    variant
    for variant in (
        Variant(tokens, splits, warps, stages)
        for tokens, splits, warps, stages in product((32, 64), (16, 32), (2, 4), (2, 3))
    )
    if variant != DEFAULT
]
SHOWN: Final = 3
"""Best variants that are shown."""
TOLERANCE: Final = 0.01
"""Largest accepted relative RMS error in bfloat16."""
WORKING_SET_BYTES: Final = 256 << 20
"""Read by all layers together: several times a GPU's L2 cache."""
LAYERS: Final = 32
OPERATION_TYPES: Final = dict.fromkeys(
    ("out_ptr", "sum_ptr", "x_ptr", "residual_ptr", "weights_ptr", "query_ptr", "projected_ptr",
     "cos_ptr", "sin_ptr", "keys_ptr", "values_ptr", "query_weights_ptr", "key_weights_ptr"),
    "*bf16",
) | dict.fromkeys(
    ("x_stride", "residual_stride", "projected_stride", "slot_stride", "kv_stride", "heads",
     "kv_heads", "width"),
    "i32",
) | dict.fromkeys(("epsilons_ptr", "query_epsilons_ptr", "key_epsilons_ptr"), "*fp32") | {
    "slots_ptr": "*i64", "positions_ptr": "*i64"
}  # fmt: skip
TYPES: Final = {
    "parts_ptr": "*fp32", "states_ptr": "*fp32", "slots_ptr": "*i64", "lengths_ptr": "*i64",
    "scale": "fp32", "query_ptr": "*bf16", "keys_ptr": "*bf16", "values_ptr": "*bf16",
    "out_ptr": "*bf16", "row_stride": "i32", "head_stride": "i32", "slot_stride": "i32",
    "kv_stride": "i32", "window": "i32", "heads": "i32",
}  # fmt: skip


@functools.cache
def compile_for(
    capability: int,
    variant: Variant = DEFAULT,
    *,
    width: int = WIDTH,
    group: int = HEADS // KV_HEADS,
    cap: float | None = None,
) -> tuple[MachineCode, MachineCode]:
    """The split and the combine kernel's machine code for bfloat16.

    `width` is a head's, a power of two; `group` the queries that share a key head.
    """
    constants = {
        "WIDTH": width, "BLOCK_D": width, "GROUP": group, "BLOCK_G": 16,
        "BLOCK_N": variant.tokens, "SPLITS": variant.splits, "STAGES": variant.stages,
        "CAP": cap, "OVERLAP": capability >= 90, "EMULATE": False,
    }  # fmt: skip
    unspecialized = kernel.UNSPECIALIZED
    split, combine = (
        compile_kernel(
            capability, function, TYPES, constants, unspecialized=unspecialized, num_warps=warps
        )
        for function, warps in ((kernel.split_kernel, variant.warps), (kernel.combine_kernel, 4))
    )
    return disassemble(split), disassemble(combine)


def compile_operation(
    capability: int, name: str, warps: int, constants: dict[str, Any], **types: str
) -> MachineCode:
    """A small operation's machine code, for bfloat16 but for arguments of these types."""
    compiled = compile_kernel(
        capability, getattr(decoder_triton, name), OPERATION_TYPES | types,
        constants | {"OVERLAP": capability >= 90, "EMULATE": False},
        unspecialized=decoder_triton.UNSPECIALIZED, num_warps=warps,
    )  # fmt: skip
    return disassemble(compiled)


def name_of(variant: Variant) -> str:
    """Tokens, splits, warps and stages."""
    return f"{variant.tokens}x{variant.splits}x{variant.warps}x{variant.stages}"


def padded_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """PyTorch's attention over all of the slots, one of each row."""
    hidden = torch.arange(keys.shape[2], device=query.device) >= lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
    grouped = query.view(len(query), KV_HEADS, HEADS // KV_HEADS, WIDTH)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)


def measure(name: str, rows: Sequence[int], variants: Sequence[Variant], device: str) -> None:
    """Check and time a step of rows of these lengths, on several layers in turn, as in a model.

    Raises:
        SystemExit: a variant's result is wrong.
    """
    read = 2 * sum(rows) * KV_HEADS * WIDTH * 2
    layers = max(1, min(LAYERS, WORKING_SET_BYTES // read)) if device == "cuda" else 1
    generator = torch.Generator(device).manual_seed(0)
    length = 1 << (max(rows) - 1).bit_length()
    shape = (layers, 2, len(rows), KV_HEADS, length, WIDTH)
    cache = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(generator=generator)
    query = torch.empty((len(rows), HEADS, WIDTH), device=device).normal_(generator=generator)
    query = query.to(torch.bfloat16)
    lengths, slots = torch.tensor(rows, device=device), torch.arange(len(rows), device=device)

    def seconds_of(attend: Callable[[Tensor, Tensor], Tensor]) -> float:
        def step() -> None:
            for keys, values in cache:
                attend(keys, values)

        return gpu_seconds(step, graph=True) / layers

    scale = WIDTH**-0.5
    keys, values = cache[0].float()
    want = reference(query.float(), keys, values, slots, lengths, scale=scale)
    times = {}
    for variant in variants:

        def attend(keys: Tensor, values: Tensor, variant: Variant = variant) -> Tensor:
            return decode_attention(
                query, keys, values, slots, lengths, scale=scale, variant=variant
            )

        error = float((attend(*cache[0]).float() - want).norm() / want.norm())
        if not error < TOLERANCE:
            raise SystemExit(f"{name}, {name_of(variant)}: the relative error is {error:.1e}.")
        times[name_of(variant)] = seconds_of(attend)
    padded = seconds_of(lambda keys, values: padded_attention(query, keys, values, lengths))
    copied = read / device_bandwidth() if device == "cuda" else math.nan
    best = sorted(times, key=times.__getitem__)[:SHOWN]
    shown = dict.fromkeys([name_of(DEFAULT), *best])
    print(
        f"{name}, {read / 1e6:.1f} MB: padded {padded * 1e6:.1f} us; "
        + ", ".join(f"{it} {times[it] * 1e6:.1f} us ({copied / times[it]:.0%})" for it in shown),
        flush=True,
    )


def measure_operations(rows: int, device: str) -> None:
    """Time each of the small operations, all rows on slots of their own."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    norm = decoder.RowNorm(random(rows, HIDDEN), torch.full((rows,), 1e-6, device=device))
    row_slots = torch.arange(rows, dtype=torch.int32, device=device)
    x, residual, gate_up = (
        random(rows, HIDDEN),
        random(rows, HIDDEN),
        random(rows, INTERMEDIATE * 2),
    )
    rotation = decoder.Rotation(random(rows, WIDTH), random(rows, WIDTH))
    keys, values = random(2, rows, KV_HEADS, 16, WIDTH)
    cache = decoder.CacheRows(keys, values, row_slots.long(), row_slots.long() % 16)
    projected = random(rows, (HEADS + 2 * KV_HEADS) * WIDTH)

    operations: dict[str, Callable[[Any], object]] = {
        "residual and norm": lambda way: way.add_rms_norm(x, residual, norm, row_slots),
        "rotation and cache": lambda way: way.rotate_and_store(
            projected, rotation, cache, None, row_slots
        ),
        "gated activation": lambda way: way.gated(gate_up, "silu"),
    }
    for name, operation in operations.items():
        fused, plain = (
            gpu_seconds(functools.partial(_call, operation, way), graph=True)
            for way in (decoder_triton, decoder_reference)
        )
        print(f"{name}, {rows} rows: {fused * 1e6:.1f} us, PyTorch {plain * 1e6:.1f} us")


def _call(operation: Callable[[Any], object], way: Any) -> None:
    operation(way)


def measure_between(rows: int, device: str, repeats: int = 8) -> None:
    """Time a layer's launches between its products, each on what the one before wrote.

    Raises:
        SystemExit: a result depends on whether they overlap.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    norm = decoder.RowNorm(random(rows, HIDDEN), torch.full((rows,), 1e-6, device=device))
    row_slots = torch.arange(rows, dtype=torch.int32, device=device)
    slots, lengths = row_slots.long(), torch.full((rows,), 200, device=device)
    keys, values = random(2, rows, KV_HEADS, 256, WIDTH)
    cache = decoder.CacheRows(keys, values, slots, lengths - 1)
    rotation = decoder.Rotation(random(rows, WIDTH), random(rows, WIDTH))
    inputs, residual = random(repeats, rows, (HEADS + 2 * KV_HEADS) * WIDTH), random(rows, HIDDEN)
    outputs: list[Tensor] = []

    def layer(projected: Tensor) -> Tensor:
        query = decoder_triton.rotate_and_store(projected, rotation, cache, None, row_slots)
        out = decode_attention(query, keys, values, slots, lengths, scale=WIDTH**-0.5)
        _, x = decoder_triton.add_rms_norm(out.view(rows, -1), residual, norm, row_slots)
        return decoder_triton.gated(x, "silu")

    def layers() -> None:
        outputs[:] = map(layer, inputs)

    times, results = [], []
    for overlaps in (overlap.overlaps, lambda _: False):
        with patch.object(overlap, "overlaps", overlaps):
            times.append(gpu_seconds(layers, graph=True) / repeats)
        results.append(torch.stack(outputs))  # of the graph's last replay
    if not torch.equal(*results):
        raise SystemExit("Launches that overlap have another result.")
    print(
        f"between the products, {rows} rows: overlapping {times[0] * 1e6:.1f} us, "
        f"one after another {times[1] * 1e6:.1f} us"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    print(describe_machine(device))
    for rows in (1, 12, 64) if device == "cuda" else (2,):
        measure_operations(rows, device)
        measure_between(rows, device)
    print("attention; tokens x splits x warps x stages: the default, then the best (of a copy)")
    if device == "cuda":
        for name, lengths in STEPS.items():
            measure(name, lengths, SWEEP, device)
    else:
        measure("2 rows", [40, 7], SWEEP[:2], device)


if __name__ == "__main__":
    main()
