"""Time of each stage of AdaMix against a straightforward implementation and the flop floor.

    python -m benchmarks.compress_speed [896x4864 ...] [--bits 1] [--device cpu]
    python -m benchmarks.compress_speed --model qwen2.5-7b --blocks 2 [--method adamix] \
        --device cuda

The first form takes layer shapes, h_out x h_in, and runs our code and `straightforward.py` on the
same random layer in one process. The floor is the stage's arithmetic at the rate that a large
matrix product of the same precision reaches on the device. The second compresses a synthetic pair
of a model's real shapes with fewer blocks, prints the time of every block, and projects the whole
model from it.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks import straightforward
from benchmarks.harness import describe_machine, synchronize
from benchmarks.whole_model import MODELS, time_model
from deltadock.compression.methods import adamix
from deltadock.compression.methods.base import MatrixTask
from deltadock.compression.numerics.ranks import rank_budget
from deltadock.compression.statistics.moments import MomentCollector, damped

STAGES: Final = {
    "decompose": "SVD",
    "quantize_rows": "GPTQ of V",
    "simulated_errors": "GPTQ of V",
    "allocate": "allocation",
    "refit_left_factor": "target correction",
    "quantize_columns": "GPTQ of U",
}
"""The functions that `adamix` is made of, and the stage that each is part of."""
MOMENTS: Final = "moments"
LENGTH: Final = 512
BATCH: Final = 4096
"""Tokens that the product runs through a block at a time."""
RATE_SIZE: Final = 2048


class Stopwatch:
    """Seconds by stage; the device is waited for at each reading."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._began = 0.0
        self.start()

    def start(self) -> None:
        """Begin to measure."""
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
        """Time the functions of `module` named in `stages`; the time between them is `other`."""
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
class Layer:
    """A random layer: its delta (h_out, h_in) and its inputs, sequences (length, h_in) float32."""

    delta: Tensor
    inputs: list[Tensor]


def random_layer(h_out: int, h_in: int, tokens: int, device: torch.device) -> Layer:
    """A delta with a falling spectrum over noise, and correlated inputs, from one seed."""
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
    return Layer(delta, inputs)


def time_ours(layer: Layer, bits: float, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """Seconds by stage of the product's method, and the compressed delta."""
    watch = Stopwatch(device)
    collector = MomentCollector()
    for batch in torch.cat(layer.inputs).split(BATCH):
        collector("layer", batch)
    moment = damped(collector.moment("layer"))
    watch.stop(MOMENTS)
    task = MatrixTask("layer", layer.delta, moment, "BF16", bits, "exact")
    with watch.watching(adamix, STAGES):
        approximation = adamix.compress_matrix(task).approximation
    return watch.seconds, approximation


def time_straightforward(
    layer: Layer, bits: float, device: torch.device, block: int = 1
) -> tuple[dict[str, float], Tensor]:
    """Seconds by stage of the straightforward implementation, and the compressed delta."""
    watch = Stopwatch(device)
    approximation = straightforward.compress(layer.delta, layer.inputs, bits, watch.stop, block)
    return watch.seconds, approximation


def output_error(layer: Layer, approximation: Tensor) -> float:
    """`||(D - D_hat) X||^2 / ||D X||^2`."""
    rest = layer.delta - approximation.to(layer.delta.device)
    lost = sum(float((x @ rest.t()).double().square().sum()) for x in layer.inputs)
    return lost / sum(float((x @ layer.delta.t()).double().square().sum()) for x in layer.inputs)


def gemm_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Floating point operations a second of a large matrix product, the best of some."""
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
    """Least seconds of each stage: its arithmetic at the rate of a matrix product.

    With k candidate ranks: moments, the products alone; SVD, two products of the delta with k
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
    """Print the table of one layer; returns how many times faster ours is."""
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


def shape_of(text: str) -> tuple[int, int]:
    """`896x4864` as (896, 4864)."""
    h_out, _, h_in = text.partition("x")
    return int(h_out), int(h_in)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="*", type=shape_of, help="h_out x h_in, as 896x4864")
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration")
    parser.add_argument(
        "--gptq-block", type=int, default=1, help="columns of a block in the straightforward GPTQ"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--model", choices=MODELS, help="time a part of this model instead")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of that part")
    parser.add_argument("--method", default="adamix", help="what compresses it")
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
    # A first run pays for the libraries' warm-up.
    warm_up = random_layer(64, 96, LENGTH, device)
    time_ours(warm_up, arguments.bits, device)
    time_straightforward(warm_up, arguments.bits, device)
    for h_out, h_in in arguments.shapes or [(896, 4864)]:
        compare(h_out, h_in, arguments.tokens, arguments.bits, device, arguments.gptq_block)


if __name__ == "__main__":
    main()
