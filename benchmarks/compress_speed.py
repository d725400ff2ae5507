"""Time of each stage of AdaMix, against a straightforward implementation and its FLOP floor.

    python -m benchmarks.compress_speed [896x4864 ...] [--bits 1] [--device cpu]
    python -m benchmarks.compress_speed --model qwen2.5-7b --blocks 2 [--method adamix] \
        --device cuda

The first form takes layer shapes, h_out x h_in, and runs the product's code and
`straightforward.py` on the same random layer in one process. The floor is the stage's arithmetic at
the rate of a large matrix product of the same precision on the device. The second compresses a
synthetic pair with a model's real shapes but fewer blocks, prints the time of every block, and
projects the time of the whole model.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Qwen2Config

from benchmarks import straightforward
from benchmarks.harness import describe_machine, synchronize
from benchmarks.synthetic import write_pair, write_text
from deltadock.compression.methods import adamix
from deltadock.compression.methods.base import MatrixTask
from deltadock.compression.numerics.metric import damped
from deltadock.compression.options import CompressOptions, Goal, rank_budget
from deltadock.compression.pipeline import compress
from deltadock.compression.progress import Progress
from deltadock.compression.statistics import MomentCollector

STAGES: Final = {
    "decompose": "SVD",
    "quantize_rows": "GPTQ of V",
    "simulated_errors": "GPTQ of V",
    "allocate": "allocation",
    "refit_left_factors": "target correction",
    "quantize_columns": "GPTQ of U",
}
"""Functions of `adamix`, by name, and their stages."""
MOMENTS: Final = "moments"
LENGTH: Final = 512
BATCH: Final = 4096
"""Tokens per forward pass of a block in the product."""
RATE_SIZE: Final = 2048


class Stopwatch:
    """Seconds by stage; every reading synchronizes the device."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._began = 0.0
        self.start()

    def start(self) -> None:
        """Start timing."""
        synchronize(self._device)
        self._began = time.perf_counter()

    def stop(self, stage: str) -> None:
        """Add the time since the last reading to `stage`."""
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._began
        self._began = now

    @contextmanager
    def watching(self, module: ModuleType, stages: dict[str, str]) -> Iterator[None]:
        """Time the functions of `module` named in `stages`; time between them counts as `other`."""
        originals = {name: getattr(module, name) for name in stages}
        for name, stage in stages.items():
            setattr(module, name, self._timed(originals[name], stage))
        try:
            self.start()
            yield
            self.stop("other")
        finally:
            for name, function in originals.items():
                setattr(module, name, function)

    def _timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.stop("other")
            result = function(*args, **kwargs)
            self.stop(stage)
            return result

        return timed


@dataclass(frozen=True, slots=True)
class RandomLayer:
    """A random layer: its delta (h_out, h_in) and input sequences (length, h_in), float32."""

    delta: Tensor
    inputs: list[Tensor]


def random_layer(h_out: int, h_in: int, tokens: int, device: torch.device) -> RandomLayer:
    """A delta with a decaying spectrum plus noise, and correlated inputs, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    strong = min(64, h_out, h_in)
    falling = torch.arange(1, strong + 1, device=device) ** -0.5
    delta = 2e-3 * normal(h_out, h_in) + 2e-3 * (normal(h_out, strong) * falling) @ normal(
        strong, h_in
    )
    mix = normal(strong, h_in)
    inputs = [
        normal(LENGTH, h_in) + normal(LENGTH, strong) @ mix for _ in range(max(1, tokens // LENGTH))
    ]
    return RandomLayer(delta, inputs)


def time_ours(
    layer: RandomLayer, bits: float, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Seconds by stage of the product's method, and the compressed delta."""
    watch = Stopwatch(device)
    collector = MomentCollector()
    for batch in torch.cat(layer.inputs).split(BATCH):
        collector("layer", batch)
    moment = damped(collector.moment("layer"))
    watch.stop(MOMENTS)
    task = MatrixTask("layer", layer.delta, moment, "BF16", bits, "exact")
    method = adamix.AdaMix()
    ranks = method.ranks(bits, *layer.delta.shape)
    with watch.watching(adamix, STAGES):
        (result,) = method.compress([task], method.prepare([task], ranks))
    return watch.seconds, result.approximation


def time_straightforward(
    layer: RandomLayer, bits: float, device: torch.device, block: int = 1
) -> tuple[dict[str, float], Tensor]:
    """Seconds by stage of the straightforward implementation, and the compressed delta."""
    watch = Stopwatch(device)
    approximation = straightforward.compress(layer.delta, layer.inputs, bits, watch.stop, block)
    return watch.seconds, approximation


def output_error(layer: RandomLayer, approximation: Tensor) -> float:
    """`||(D - D_hat) X||^2 / ||D X||^2`."""
    rest = layer.delta - approximation.to(layer.delta.device)
    lost = sum(float((x @ rest.t()).double().square().sum()) for x in layer.inputs)
    return lost / sum(float((x @ layer.delta.t()).double().square().sum()) for x in layer.inputs)


def gemm_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of a large matrix product, the best of `repeats`."""
    a = torch.randn(RATE_SIZE, RATE_SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * RATE_SIZE**3 / best


def floors(
    h_out: int, h_in: int, tokens: int, bits: float, device: torch.device
) -> dict[str, float]:
    """Lower bound on each stage's seconds: its arithmetic at the rate of a matrix product.

    With k candidate ranks: moments, only the products; SVD, two products of the delta with k
    vectors; GPTQ of V, every width of every candidate in one sweep after one inversion; target
    correction, its four products and its solve; GPTQ of U, one sweep and one inversion.
    """
    single, double = (gemm_rate(dtype, device) for dtype in (torch.float32, torch.float64))
    k = min(rank_budget(bits, h_out, h_in) // min(adamix.CANDIDATES), h_out, h_in)

    def inversion(n: int) -> float:
        return 4 / 3 * n**3 / double

    return {
        MOMENTS: 2 * tokens * h_in**2 / single,
        "SVD": 4 * h_out * h_in * k / single,
        "GPTQ of V": len(adamix.CANDIDATES) * k * h_in**2 / single + inversion(h_in),
        "target correction": (
            2 * k * h_in**2 + 2 * k**2 * h_in + 2 * h_out * h_in * k + k**3 / 3 + 2 * h_out * k**2
        )
        / double,
        "GPTQ of U": h_out * k**2 / single + inversion(k),
    }


def compare(
    h_out: int, h_in: int, tokens: int, bits: float, device: torch.device, block: int
) -> float:
    """Print the table of one layer; returns the speed-up over the straightforward code."""
    layer = random_layer(h_out, h_in, tokens, device)
    least = floors(h_out, h_in, tokens, bits, device)
    ours, approximation = time_ours(layer, bits, device)
    print(f"\n{h_out} x {h_in}, {bits:g} bits, {tokens} tokens; "
          f"output error {output_error(layer, approximation):.5f}", end="")  # fmt: skip
    theirs, approximation = time_straightforward(layer, bits, device, block)
    print(f", straightforward with GPTQ blocks of {block} {output_error(layer, approximation):.5f}")
    print(f"{'stage':18} {'ours, s':>10} {'straight, s':>12} {'faster':>8} {'floor, s':>10} "
          f"{'of floor':>9}")  # fmt: skip
    stages = [*dict.fromkeys([MOMENTS, *STAGES.values()]), "other"]
    for stage in stages:
        mine, other, floor = ours.get(stage, 0.0), theirs.get(stage), least.get(stage)
        print(
            f"{stage:18} {mine:10.3f}"
            + (f" {other:12.3f} {other / mine:7.1f}x" if other else f" {'–':>12} {'–':>8}")
            + (f" {floor:10.3f} {mine / floor:8.1f}x" if floor else f" {'–':>10} {'–':>9}")
        )
    mine, other, floor = (sum(part.values()) for part in (ours, theirs, least))
    print(f"{'total':18} {mine:10.3f} {other:12.3f} {other / mine:7.1f}x {floor:10.3f} "
          f"{mine / floor:8.1f}x")  # fmt: skip
    return other / mine


MODELS: Final[dict[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Qwen2 configurations by name."""


@dataclass(slots=True)
class Timeline:
    """Seconds of each stage of a compression, and of each block within `compressing`."""

    stages: dict[str, float] = field(default_factory=dict)
    blocks: list[float] = field(default_factory=list)
    _stage: str = ""
    _block: int = 0
    _stage_began: float = field(default_factory=time.perf_counter)
    _block_began: float = 0.0

    def __call__(self, progress: Progress) -> None:
        """Record a progress report."""
        now = time.perf_counter()
        if progress.stage != self._stage:
            self._close(now)
            self._stage, self._block, self._block_began = progress.stage, 0, now
            print(f"{progress.stage} ...", flush=True)
        if progress.stage == "compressing" and progress.block > self._block:
            self.blocks.append(now - self._block_began)
            name = f"block {progress.block} of {progress.blocks}"
            print(f"  {name}: {self.blocks[-1]:.2f} s", flush=True)
            self._block, self._block_began = progress.block, now

    def _close(self, now: float) -> None:
        if self._stage:
            self.stages[self._stage] = self.stages.get(self._stage, 0.0) + now - self._stage_began
        self._stage_began = now

    def end(self) -> None:
        """Close the last stage."""
        self._close(time.perf_counter())


PER_BLOCK: Final = ("validating", "calibrating", "assembling", "verifying")
"""Stages projected as proportional to the number of blocks; distillation is in `assembling`. The
embeddings' part of them is constant, so the projection is slightly high."""


def project(timeline: Timeline, blocks: int, whole: int) -> float:
    """Project the seconds of `whole` blocks from a run of `blocks`.

    A compressed output head is one more block in the timeline and is counted once.
    """
    decoder, head = timeline.blocks[:blocks], sum(timeline.blocks[blocks:])
    # The first block includes warm-up.
    steady = decoder[1:] or decoder
    rest = timeline.stages["compressing"] - sum(timeline.blocks)
    seconds = sum(steady) / len(steady) * whole + head + rest
    for stage, spent in timeline.stages.items():
        if stage != "compressing":
            seconds += spent * (whole / blocks if stage in PER_BLOCK else 1.0)
    return seconds


def time_model(
    name: str, blocks: int, method: str, bits: float, tokens: int, device: str
) -> Timeline:
    """Compress a synthetic pair with a model's shapes; print each block's time and a projection."""

    values = MODELS[name]
    whole = values["num_hidden_layers"]
    config = Qwen2Config(
        **{**values, "num_hidden_layers": blocks}, max_position_embeddings=32_768,
        bos_token_id=0, eos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        base, tuned = write_pair(config, Path(folder), lambda tensor: True, device=device)
        # A quarter more, as a tenth and a sixteenth of the windows are held out.
        text = write_text(Path(folder) / "calibration.txt", tokens + tokens // 4)
        print(f"{name} with {blocks} of {whole} blocks, {method}, {bits:g} bits, {tokens} tokens; "
              f"pair written in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        timeline = Timeline()
        options = CompressOptions(method=method, goal=Goal("bits", bits))
        report = compress(
            base, tuned, Path(folder) / "out.delta", options,
            calibration=text, progress=timeline, device=device,
        )  # fmt: skip
        timeline.end()
    for stage, seconds in timeline.stages.items():
        print(f"{stage:12} {seconds:8.2f} s")
    print(f"{'total':12} {sum(timeline.stages.values()):8.2f} s; ratio {report.ratio:.2f}, "
          f"KL {report.quality.kl if report.quality else None}")  # fmt: skip
    projected = project(timeline, blocks, whole)
    print(f"projected to {whole} blocks: {projected:.0f} s ({projected / 60:.1f} minutes)")
    return timeline


def shape_of(text: str) -> tuple[int, int]:
    """`896x4864` as (896, 4864)."""
    h_out, _, h_in = text.partition("x")
    return int(h_out), int(h_in)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="*", type=shape_of, help="h_out x h_in, as 896x4864")
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument(
        "--gptq-block", type=int, default=1, help="block size of the straightforward GPTQ, columns"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="number of torch threads")
    parser.add_argument("--model", choices=MODELS, help="time some blocks of this model instead")
    parser.add_argument("--blocks", type=int, default=2, help="number of these blocks")
    parser.add_argument("--method", default="adamix", help="compression method")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"Machine: {describe_machine(arguments.device)}")
    if arguments.model is not None:
        time_model(
            arguments.model, arguments.blocks, arguments.method, arguments.bits,
            arguments.tokens, arguments.device,
        )  # fmt: skip
        return
    # Libraries warm up in an untimed first run.
    warm_up = random_layer(64, 96, LENGTH, device)
    time_ours(warm_up, arguments.bits, device)
    time_straightforward(warm_up, arguments.bits, device)
    for h_out, h_in in arguments.shapes or [(896, 4864)]:
        compare(h_out, h_in, arguments.tokens, arguments.bits, device, arguments.gptq_block)


if __name__ == "__main__":
    main()
