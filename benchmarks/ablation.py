"""Ablation of `optimix`: the method with one part changed at a time.

    python -m benchmarks.ablation --base DIR --finetuned DIR --calibration FILE --heldout FILE \
        [--bits 1.0] [--calibration-tokens N] [--seed 0] [--threads N]

Calibration runs once; every variant then encodes the whole checkpoint at the same budget, without
distillation unless it says so. KL (nats per token) and top-token agreement are measured on the
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
from deltadock.artifacts.writer import write_artifact
from deltadock.compression.assembly import compressors
from deltadock.compression.assembly.assembling import encode_others, make_manifest
from deltadock.compression.assembly.blocks import encode_blocks
from deltadock.compression.assembly.compressors import UnderOneBudget
from deltadock.compression.calibration.options import TOKENS, CalibrationOptions, Source
from deltadock.compression.calibration.windows import CalibrationSet, load_calibration
from deltadock.compression.distillation import training as distillation
from deltadock.compression.evaluation import evaluate
from deltadock.compression.methods import optimix
from deltadock.compression.model.forward import BlockwiseModel
from deltadock.compression.numerics import budget, two_sided
from deltadock.compression.numerics.budget import Profile, Shares
from deltadock.compression.run import CompressOptions, Run, open_run
from deltadock.compression.scratch import Scratch
from deltadock.compression.statistics.collecting import Statistics, collect
from deltadock.compression.work import NoWorkStore

Patches = list[Any]


def _one_sided(outputs: Tensor) -> Tensor:
    """Weigh all outputs equally, by the matrix's mean."""
    mean = (outputs if outputs.ndim == 1 else outputs.diagonal()).mean()
    return mean * torch.ones(len(outputs), dtype=outputs.dtype)


def _per_matrix_budget(profiles: Sequence[Profile], bits: float) -> Shares:
    """Allocate the same bits per weight to every matrix."""
    total = sum(profile.shape[0] * profile.shape[1] for profile in profiles)
    shares = [
        budget.share([profile], bits * profile.shape[0] * profile.shape[1] / total)
        for profile in profiles
    ]
    return Shares(
        [share.widths[0] for share in shares],
        sum(share.error for share in shares),
        max(share.gap for share in shares),
    )


def _equal_widths(costs: Callable[[Profile], Tensor]) -> Callable[[Profile], Tensor]:
    """Force U and V of a rank to one width: other pairs cost more than any budget."""
    count = len(two_sided.WIDTHS)

    def priced(profile: Profile) -> Tensor:
        pairs = costs(profile)
        same = torch.eye(count, dtype=torch.bool).flatten()
        pairs[1:][~same] = 1e18
        return pairs

    return priced


def _no_sign(losses: Tensor) -> Tensor:
    losses = losses.clone()
    losses[:, 0] = 1.0
    return losses


def variants() -> dict[str, Patches]:
    """Patches by variant; none of these is an option of the product."""
    outputs, losses = Statistics.outputs, two_sided.losses
    return {
        "as it is, not distilled": [],
        "errors weighed by the inputs alone": [
            mock.patch.object(
                Statistics, "outputs", lambda self, key: _one_sided(outputs(self, key))
            )
        ],
        "the same bits for every matrix": [
            mock.patch.object(compressors, "share", _per_matrix_budget)
        ],
        "one width for U and V of a rank": [
            mock.patch.object(Profile, "costs", _equal_widths(Profile.costs))
        ],
        "no 1-bit codes": [mock.patch.object(optimix, "losses", lambda *a: _no_sign(losses(*a)))],
        "no refitting of V": [_refinements(0)],
        "one refitting of V": [_refinements(1)],
        "scales of rows and columns everywhere": [mock.patch.object(optimix, "SCALED_RANKS", 0)],
        "no row scales in the embedding": [
            mock.patch.object(optimix, "_scale_pays", lambda metric, wide: wide)
        ],
    }


def _refinements(count: int) -> Any:
    return mock.patch.object(optimix, "encode", partial(two_sided.encode, refinements=count))


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
        self.run: Run = open_run(
            arguments.base,
            arguments.finetuned,
            CompressOptions(bits=arguments.bits, seed=arguments.seed),
            lambda progress: None,
        )
        self.model = BlockwiseModel(arguments.finetuned)
        longest = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        self.data: CalibrationSet = load_calibration(
            [Source(arguments.calibration)],
            arguments.finetuned,
            longest,
            arguments.seed,
            CalibrationOptions(tokens=arguments.calibration_tokens),
        )
        self.statistics = collect(
            self.run,
            self.model,
            self.data,
            scratch,
            gradients=True,
            progress=lambda done, text: None,
        )

    def measure(self, *, distilled: bool) -> tuple[float, float, int]:
        """KL, agreement and artifact bytes with the patches currently applied."""
        run = self.run
        with Scratch() as scratch:
            seen = _ScratchStatistics(self.statistics, scratch)
            compressor = UnderOneBudget(run, seen, self.model.device)
            compressor.settle(self.arguments.bits)
            made = encode_blocks(run, seen.matrices, compressor, seen, NoWorkStore(), "")
        run.encoded, run.matrices = made.tensors, made.reports
        encode_others(run, self.model)
        if distilled:
            run.encoded, _ = distillation.distill(
                run, self.model, self.data, run.encoded, lambda done, text: None
            )
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.delta"
            write_artifact(out, run.encoded, make_manifest(run, None, self.data, ({}, {})))
            quality = evaluate(
                self.arguments.base, self.arguments.finetuned, out, self.arguments.heldout
            )
            return quality.kl, quality.agreement, out.stat().st_size


class _ScratchStatistics(Statistics):
    """The same moments with separate scratch space for a variant's intermediate results."""

    def __init__(self, statistics: Statistics, scratch: Scratch) -> None:
        super().__init__(scratch, statistics.matrices)
        self._moments = statistics
        self.notes = statistics.notes

    def inputs(self, key: str) -> Tensor:
        return self._moments.inputs(key)

    def held_inputs(self, key: str) -> Tensor | None:
        return self._moments.held_inputs(key)

    def outputs(self, key: str) -> Tensor:
        return self._moments.outputs(key)


HEADINGS: Final = (
    "| variant | KL | of the full method's | agreement | bytes |\n|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("base", "finetuned", "calibration", "heldout"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration-tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, help="number of torch threads")
    arguments = parser.parse_args()
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
