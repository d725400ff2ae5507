"""The node on a GPU, at Qwen2.5-7B's shape with random weights and one-bit deltas.

    python -m benchmarks.node_gpu

First the node's logits on two layers of that width are held against the merged weights in plain
transformers. Then: twelve requests on twelve deltas in one batch against twelve full models taken
in turn, and against what reading the base and the deltas takes at the bandwidth of a copy measured
in the same run; 32 and 64 deltas in memory and in one batch; a cold delta's way from page-locked
host memory into a slot against a plain copy of as many bytes; and the time to the first token when
500 deltas with room for 32 are asked for by Zipf's law (they share storage in host memory; the
engine, its scheduler and the slots are the node's own). It ends within nine minutes. `--device cpu
--tiny` proves the script without a GPU; its figures mean nothing.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.machine import describe, synchronize
from benchmarks.node_bench import Bench, Scale
from benchmarks.node_traffic import first_tokens
from benchmarks.serving import (
    Request,
    prompt,
    random_changes,
    random_model,
    shapes_of,
    taken_over,
)
from deltadock.inference.deltas.reading import merge_delta, place_delta
from deltadock.inference.engine.model_runner import ModelRunner
from deltadock.inference.engine.scheduler import ScheduledChunk
from deltadock.inference.model.routing import DeltaLimits
from deltadock.kernels.svd_delta import reference

SECONDS: Final = 500
"""No part begins later than this."""


QWEN_7B = Scale(
    {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 4096,
    }
)
TINY = Scale(
    {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
    },
    running=3,
    held=(4, 6),
    prompt=20,
    tokens=6,
    names=20,
    room=4,
    arrivals=30,
    answer=3,
    copied_bytes=1 << 20,
)


def timed(work: Any, device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def copy_rate(source: Tensor, target: Tensor) -> float:
    """Bytes copied a second."""
    work = partial(target.copy_, source, non_blocking=True)
    return source.nbytes / min(timed(work, target.device) for _ in range(7))


def check(scale: Scale, device: torch.device, dtype: torch.dtype) -> None:
    """Hold the node's logits on a delta, and those of merged weights, against float32."""
    shape = scale.shape | {"num_hidden_layers": 2}
    merged = random_model("qwen2", str(device), dtype, **shape)
    other = random_model("qwen2", str(device), dtype, **shape)
    changes = random_changes(shapes_of(other), str(device))
    model = taken_over(other, DeltaLimits(slots=2, rows=64))
    model.install(1, model.prepare(changes))
    for name, change in changes.items():
        u, s, v, _ = reference.unpack(change)
        parameter = merged.get_parameter(name)
        parameter.data = (parameter.float() + (u * s) @ v).to(dtype)
    tokens = prompt(16, 0, shape["vocab_size"])
    sequence = Request(tokens, 1, "delta", 1).sequence
    sequence.kv_slot = 0
    passes = ModelRunner(model, model.make_cache(1, 128), 1, static=True)
    inputs = torch.tensor([tokens], device=device)
    with torch.inference_mode():
        passes.logits([ScheduledChunk(sequence, 0, 15)])
        node = passes.logits([ScheduledChunk(sequence, 15, 16)]).known[0]
        plain = merged(inputs).logits[0, -1].float()
        exact = merged.float()(inputs).logits[0, -1]
    of_node, of_plain = (float((it - exact).norm() / exact.norm()) for it in (node, plain))
    print(f"relative error of the logits: node {of_node:.1e}, merged weights {of_plain:.1e}")
    if not of_node <= 2 * of_plain + 1e-5:
        raise SystemExit("The node's logits are wrong; nothing is timed.")


def decode(bench: Bench, plain_step: float, bandwidth: float) -> float:
    """Twelve deltas against twelve models in turn, and against the bytes that a step reads."""
    running = bench.scale.running
    alone = bench.step_seconds([0])
    together = bench.step_seconds(range(1, running + 1))
    read = bench.weights_nbytes + running * bench.host.nbytes
    names = ("base alone", f"{running} deltas", "plain transformers")
    for name, found in zip(names, (alone, together, plain_step), strict=True):
        print(f"a decode step, {name}: {found * 1e3:.2f} ms")
    print(f"{running} deltas at once: {running / together:.0f} tokens/s")
    for name, found in (("plain transformers", plain_step), ("this engine", alone)):
        ratio = running * found / together
        print(f"over {running} full models in turn, each in {name}: {ratio:.1f}x")
    share = read / bandwidth / together
    print(f"of the roofline, {read / 1e9:.1f} GB at {bandwidth / 1e12:.2f} TB/s: {share:.1%}")
    return together


def favourite(bench: Bench) -> None:
    """All sequences on one delta: its packed weights beside the base's, against merged ones."""
    slots = [1] * bench.scale.running
    packed = bench.step_seconds(slots)
    merge = timed(partial(merge_delta, bench.model, 1), bench.device)
    merged = bench.step_seconds(slots)
    print(f"one delta for all: {packed * 1e3:.2f} ms a step, merged {merged * 1e3:.2f} ms")
    print(f"merged over packed: {packed / merged:.2f}x; merging took {merge:.1f} s")


def cold_swap(bench: Bench) -> None:
    """A delta from host memory into a slot, against a plain copy of as many bytes."""
    size = bench.host.nbytes
    source = torch.zeros(size, dtype=torch.uint8)
    if bench.device.type == "cuda":
        source = source.pin_memory()
    rate = copy_rate(source, torch.empty(size, dtype=torch.uint8, device=bench.device))
    times = []
    for _ in range(5):
        bench.model.remove(1)
        times.append(timed(partial(place_delta, bench.model, 1, bench.host), bench.device))
    swap = statistics.median(times)
    print(f"cold swap of {size / 1e6:.0f} MB: {swap * 1e3:.1f} ms")
    print(f"of a plain copy's {rate / 1e9:.1f} GB/s: {size / swap / rate:.1%}")


def plain_step_seconds(model: Any, scale: Scale, device: torch.device) -> float:
    """Seconds a token of transformers' `generate` on one prompt, as a full model is served."""
    tokens = torch.tensor([prompt(scale.prompt, 0, scale.shape["vocab_size"])], device=device)

    def generate(count: int) -> None:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    with torch.inference_mode():
        generate(2)
        few, many = (timed(partial(generate, n), device) for n in (2, 2 + scale.tokens))
    return max((many - few) / scale.tokens, 1e-9)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    scale, device = TINY if options.tiny else QWEN_7B, torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(describe(options.device))
    check(scale, device, dtype)
    model = random_model("qwen2", options.device, dtype, **scale.shape)
    plain = plain_step_seconds(model, scale, device)
    source = torch.empty(scale.copied_bytes, dtype=torch.uint8, device=device)
    bandwidth = 2 * copy_rate(source, torch.empty_like(source))
    del source
    bench = Bench(scale, device, model)
    bench.hold(scale.running)
    step = decode(bench, plain, bandwidth)
    favourite(bench)
    cold_swap(bench)
    if time.monotonic() - began < SECONDS:
        for count in scale.held:
            bench.hold(count)
            together = bench.step_seconds(range(1, count + 1))
            size = count * bench.host.nbytes / 1e9
            print(f"{count} deltas held and running, {size:.1f} GB: {together * 1e3:.2f} ms a step")
    if time.monotonic() - began < SECONDS:
        rate = scale.running / step / scale.answer / 2
        asyncio.run(first_tokens(bench, rate))
    bench.engine.stop()
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
