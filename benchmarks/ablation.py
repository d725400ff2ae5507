"""Ablation of `optimix`: the method with one part changed at a time.

    python -m benchmarks.ablation --base DIR --finetuned DIR --calibration FILE --heldout FILE \
        [--bits 1.0] [--calibration-tokens N] [--seed 0] [--threads N]

Calibration runs once; every variant then encodes the whole checkpoint at the same budget, without
distillation unless it says so. KL (nats per token) and top-1 agreement are measured on the
held-out text in windows of 256 tokens. Prints a Markdown table.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import describe_machine
from deltadock.artifacts.encodings import Encoded
from deltadock.artifacts.writer import write_artifact
from deltadock.compression import compressors, distillation
from deltadock.compression.assembly import (
    EMBEDDING_BITS,
    build_manifest,
    compose_tensors,
    encode_remaining,
)
from deltadock.compression.calibration.windows import load_calibration
from deltadock.compression.checkpoints import open_pair
from deltadock.compression.compressors import GlobalCompressor
from deltadock.compression.methods import optimix
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.numerics import global_allocation, two_sided
from deltadock.compression.numerics.global_allocation import GlobalAllocation, RankProfile
from deltadock.compression.options import TOKENS, CalibrationOptions, CompressOptions, Goal, Source
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.quality import evaluate
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics import Statistics, collect

Patches = list[Any]


def _one_sided(outputs: Tensor) -> Tensor:
    """Weigh all outputs equally, by the matrix's mean."""
    mean = (outputs if outputs.ndim == 1 else outputs.diagonal()).mean()
    return mean * torch.ones(len(outputs), dtype=outputs.dtype)


def _per_matrix_budget(profiles: Sequence[RankProfile], bits: float) -> GlobalAllocation:
    """Allocate the same bits per weight to every matrix."""
    total = sum(profile.shape[0] * profile.shape[1] for profile in profiles)
    allocations = [
        global_allocation.allocate([profile], bits * profile.shape[0] * profile.shape[1] / total)
        for profile in profiles
    ]
    return GlobalAllocation(
        [allocation.widths[0] for allocation in allocations],
        sum(allocation.error for allocation in allocations),
        max(allocation.gap for allocation in allocations),
    )


def _equal_widths(costs: Callable[[RankProfile], Tensor]) -> Callable[[RankProfile], Tensor]:
    """Force U and V of a rank to one width: other pairs cost more than any budget."""
    count = len(two_sided.WIDTHS)

    def priced(profile: RankProfile) -> Tensor:
        pairs = costs(profile)
        same = torch.eye(count, dtype=torch.bool).flatten()
        pairs[1:][~same] = 1e18
        return pairs

    return priced


def _no_sign(losses: Tensor) -> Tensor:
    losses = losses.clone()
    losses[..., 0] = 1.0
    return losses


def variants() -> dict[str, Patches]:
    """Patches by variant; none of these is an option of the product."""
    outputs, losses = Statistics.outputs, two_sided.width_losses
    return {
        "as it is, not distilled": [],
        "errors weighed by the inputs alone": [
            mock.patch.object(Statistics, "outputs", lambda *a: _one_sided(outputs(*a)))
        ],
        "the same bits for every matrix": [
            mock.patch.object(compressors, "allocate", _per_matrix_budget)
        ],
        "one width for U and V of a rank": [
            mock.patch.object(RankProfile, "costs", _equal_widths(RankProfile.costs))
        ],
        "no 1-bit codes": [
            mock.patch.object(optimix, "width_losses", lambda *a: _no_sign(losses(*a)))
        ],
        "no refitting of V": [_refinements(0)],
        "one refitting of V": [_refinements(1)],
        "scales of rows and columns everywhere": [mock.patch.object(optimix, "SCALED_RANKS", 0)],
        "no row scales in the embedding": [
            mock.patch.object(optimix, "_scale_pays", lambda metric, wide: wide)
        ],
    }


def _refinements(count: int) -> Any:
    return mock.patch.object(
        optimix, "quantize_factors", partial(two_sided.quantize_factors, refinements=count)
    )


@contextmanager
def _patched(patches: Patches) -> Iterator[None]:
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


class Ablation:
    """A pair that is calibrated once and encoded in several variants."""

    def __init__(self, arguments: argparse.Namespace, scratch: Scratch) -> None:
        self.arguments = arguments
        self.pair = open_pair(arguments.base, arguments.finetuned)
        self.model = BlockwiseModel(arguments.finetuned)
        self.data = load_calibration(
            [Source(arguments.calibration)],
            arguments.finetuned,
            self.model.max_length,
            arguments.seed,
            CalibrationOptions(tokens=arguments.calibration_tokens),
        )
        self.statistics = collect(
            self.pair,
            self.model,
            self.data,
            scratch,
            gradients=True,
            seed=arguments.seed,
            progress=ProgressReporter(),
        )

    def measure(self, *, distilled: bool) -> tuple[float, float, int]:
        """KL, agreement and artifact bytes with the patches currently applied."""
        pair, arguments = self.pair, self.arguments
        matrices = self.statistics.matrices
        encodings: dict[str, Encoded | None] = {}
        with Scratch() as scratch:
            compressor = GlobalCompressor(pair, self.statistics, scratch, self.model.device)
            compressor.set_budget(arguments.bits)
            for matrix in matrices:
                delta = pair.delta(matrix.ref, self.model.device)
                (result,) = compressor.compress([matrix], [delta]) if delta.any() else (None,)
                encodings[matrix.ref.key] = None if result is None else result.encoded
        tensors = compose_tensors(pair, [matrix.ref for matrix in matrices], encodings)
        tensors |= encode_remaining(
            pair, tensors, embedding=self.model.embedding, embedding_bits=EMBEDDING_BITS
        )[0]
        if distilled:
            tensors, _ = distillation.distill(
                pair, self.model, self.data, tensors, arguments.seed, lambda done, text: None
            )
        manifest = build_manifest(
            pair.base,
            CompressOptions(goal=Goal("bits", arguments.bits), seed=arguments.seed),
            ({}, {}),
            finetuned_digest=pair.finetuned.manifest.weights_digest,
            parameters=pair.finetuned.parameters,
        )
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.delta"
            write_artifact(out, tensors, manifest)
            quality = evaluate(arguments.base, arguments.finetuned, out, arguments.heldout)
            return quality.kl, quality.agreement, out.stat().st_size


HEADINGS: Final = (
    "| variant | KL | of the full method's | top-1 agreement | bytes |\n|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate once, then measure every variant and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("base", "finetuned", "calibration", "heldout"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration-tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, help="number of torch threads")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(describe_machine("cpu"), flush=True)
    print(HEADINGS)
    with Scratch() as scratch:
        ablation = Ablation(arguments, scratch)
        full = None
        for name, patches in variants().items():
            with _patched(patches):
                kl, agreement, size = ablation.measure(distilled=False)
            full = kl if full is None else full
            print(_row(name, kl, full, agreement, size), flush=True)
        assert full is not None
        kl, agreement, size = ablation.measure(distilled=True)
        print(_row("as it is, distilled", kl, full, agreement, size))


def _row(name: str, kl: float, full: float, agreement: float, size: int) -> str:
    return f"| {name} | {kl:.6f} | {kl / full:.2f} | {agreement:.2%} | {size:,} |"


if __name__ == "__main__":
    main()
