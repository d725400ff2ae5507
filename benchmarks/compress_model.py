"""A model of a compression's time on an H200, from operators, arithmetic and bytes.

    python -m benchmarks.compress_model [qwen2.5-7b smollm2-135m]

It needs no GPU. A stage takes the longer of its launches (`LAUNCH` each, from Python) and of its
arithmetic and memory traffic on the device, then what waits: eigendecompositions, transfers,
files, and work of the host's cores. `then` is the code whose times were measured on an H200 (adamix
on the 7B shape: 27.9 s a block, 13 minutes in all), `now` is today's. Rates are the card's, a
fraction below its peaks; the costs of packing and quantizing a code were measured on one core here;
`COLUMN` is the profile of the 135M model's compression on the H200 (36 s for 21,890 columns of U).
One constant is fitted, to the 7B block: `HOST_DOUBLE`, the float64 rate of the machine's 16 cores,
which computed the output errors then. `EIGEN` has not been measured on a GPU.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.compress_speed import MODELS
from deltadock.compression.distillation import STEPS, TOKENS_PER_STEP
from deltadock.compression.methods.adamix import CANDIDATES, SPARE_RANKS
from deltadock.compression.model.forward import TOKENS_PER_STEP as BATCH_TOKENS
from deltadock.compression.numerics.decomposition import DENSE_SHARE, DENSE_SIZE
from deltadock.compression.numerics.gptq import GRID_SEARCHES
from deltadock.compression.numerics.two_sided import REFINEMENTS, SIMULATED, WIDTHS
from deltadock.compression.options import TOKENS, rank_budget
from deltadock.compression.residence import SCRATCH_SHARE
from deltadock.compression.statistics import GRADIENT_TOKENS

LAUNCH: Final = 5e-6
"""Seconds of an operator called from Python."""
TENSOR: Final = 600e12
SINGLE: Final = 50e12
DOUBLE: Final = 55e12
"""Operations a second: bfloat16 and float64 on tensor cores, float32 without (TF32 is off)."""
BANDWIDTH: Final = 4.19e12
MEMORY: Final = 139e9
EIGEN: Final = 1e12
"""Operations a second of a symmetric eigendecomposition, which takes 10 n^3."""
TRANSFER: Final = 8e9
"""Bytes a second between pageable memory and the device."""
DISK: Final = 2e9
HASH: Final = 1.8e9
"""Bytes a second of SHA-256 on a core."""
HOST_DOUBLE: Final = 0.48e12
THREADS: Final = 8.0
"""Cores' worth of speed of 16 threads that share the interpreter's lock."""
COLUMN: Final = 1.64e-3
"""Seconds of Python and launches for a column of U, when each had a search of its own."""
PACK: Final = 11e-9
UNPACK: Final = 12e-9
OLD_PACK: Final = 19e-9
"""Core seconds of a code."""
QUANTIZE: Final = 140e-9
"""Core seconds of a weight of the embedding, at 24 steps."""
ALLOCATE: Final = 4e-5
"""Seconds of a rank's allocation."""
PRICES: Final = 420
"""Operators of the search of a bit's price, once a model."""
TOKENIZE: Final = 2.5
MEAN_WIDTH: Final = 2.9
"""Bits of a kept rank at one bit a weight (63,540 rank-bits in the 21,890 columns)."""
BLOCK: Final = 64
SHARDS: Final = 4

SMALL: Final[dict[str, Any]] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: Final = MODELS | {"smollm2-135m": SMALL}
MEASURED: Final = {
    "adamix, a 7B block": 27.9,
    "adamix, 28 blocks": 13 * 60.0,
    "adamix, compressing 135M": 48.0,
}
"""Seconds on an H200; the last under cProfile."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Matrices of equal shape that one batch of calls compresses."""

    h_out: int
    h_in: int
    count: int

    @property
    def weights(self) -> int:
        return self.h_out * self.h_in * self.count

    @property
    def kept(self) -> int:
        """Ranks of a matrix that a budget of one bit a weight keeps."""
        return int(rank_budget(1.0, self.h_out, self.h_in) / MEAN_WIDTH)

    @property
    def codes(self) -> int:
        return self.count * self.kept * (self.h_out + self.h_in)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage does.

    Attributes:
        launches: operators called.
        tensor, single, double: operations by kind.
        traffic: bytes of device memory.
        eigen: orders of matrices decomposed.
        moved, stored: bytes to or from host memory and disk.
        host: seconds of the host that nothing hides.
    """

    name: str
    launches: float = 0.0
    tensor: float = 0.0
    single: float = 0.0
    double: float = 0.0
    traffic: float = 0.0
    eigen: Sequence[int] = ()
    moved: float = 0.0
    stored: float = 0.0
    host: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause; of launches and device work the longer counts."""
        device = {
            "launches": self.launches * LAUNCH,
            "arithmetic": (
                self.tensor / TENSOR + self.single / SINGLE + self.double / DOUBLE
                + self.traffic / BANDWIDTH
            ),
        }  # fmt: skip
        longer = max(device, key=lambda name: device[name])
        return {
            longer: device[longer],
            "eigendecompositions": sum(10 * n**3 for n in self.eigen) / EIGEN,
            "transfers": self.moved / TRANSFER,
            "disk": self.stored / DISK,
            "host": self.host,
        }

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


class Model:
    """Shapes of a decoder with grouped-query attention and a gated MLP."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.hidden: int = values["hidden_size"]
        self.inner: int = values["intermediate_size"]
        self.blocks: int = values["num_hidden_layers"]
        self.vocabulary: int = values["vocab_size"]
        self.tied: bool = values["tie_word_embeddings"]
        kv = self.hidden // values["num_attention_heads"] * values["num_key_value_heads"]
        self.batches = [
            Batch(self.hidden, self.hidden, 2),  # q, o
            Batch(kv, self.hidden, 2),
            Batch(self.inner, self.hidden, 2),
            Batch(self.hidden, self.inner, 1),
        ]

    @property
    def block_weights(self) -> int:
        return sum(batch.weights for batch in self.batches)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.blocks * self.block_weights + (1 if self.tied else 2) * self.embedding

    @property
    def inputs(self) -> list[int]:
        """Sizes of a block's distinct inputs of linear maps."""
        return [self.hidden, self.hidden, self.hidden, self.inner]

    @property
    def outputs(self) -> list[int]:
        return [batch.h_out for batch in self.batches for _ in range(batch.count)]


def adamix_launches(h_in: int, count: int, kept: int) -> float:
    """Operators of one batch: those of any shape, then by blocks of columns of V and of U."""
    return 249 + 39 * count + 3 * h_in / BLOCK + 34 * GRID_SEARCHES * math.ceil(kept / BLOCK)


def optimix_launches(h_out: int, h_in: int, count: int) -> float:
    """Operators of one batch, with its profile."""
    return 1000 + 53 * count + 8 * (h_in + h_out) / BLOCK


def validate(model: Model, now: bool) -> Stage:
    size = 2 * 2 * model.parameters
    passes = 1 / HASH + 0.2e-9  # of the tensors, with a check of their numbers
    if now:
        files = SHARDS if size > 10e9 else 1
        return Stage("validating", host=size * passes / files)
    return Stage("validating", host=size * (passes + 1 / HASH))


def calibrate(model: Model, tokens: int, gradients: bool, now: bool) -> Stage:
    """Forward passes with second moments on the text and the sixteenth held out; backward."""
    seen, back = tokens * 17 / 16, GRADIENT_TOKENS if gradients else 0
    squares, outer = (sum(n**2 for n in sizes) for sizes in (model.inputs, model.outputs))
    moments = 2 * model.blocks * (seen * squares + back * outer)
    shared = squares if now else squares + 2 * model.hidden**2 + model.hidden**2
    kept = 4.0 * model.blocks * (2 * shared + (outer if gradients else 0))
    spilled = max(0.0, kept - SCRATCH_SHARE * MEMORY) if now else max(0.0, kept - (1 << 29))
    steps = seen / BATCH_TOKENS["cuda"] * model.blocks
    return Stage(
        "calibrating",
        launches=steps * 90 + back / BATCH_TOKENS["cuda"] * model.blocks * 200,
        tensor=2 * model.blocks * model.block_weights * (seen + 3 * back) + (moments if now else 0),
        single=0 if now else moments,
        traffic=28 * steps * squares,
        moved=2 * model.parameters * (2 if gradients else 1) + (spilled if now else kept),
        stored=0 if now and spilled < 32e9 else spilled,
        host=TOKENIZE,
    )


def adamix(model: Model, now: bool) -> Iterator[Stage]:
    """The decoder blocks and an untied head, then the embedding in four bits."""
    yield from (adamix_batch(batch, model.blocks, now) for batch in model.batches)
    if not model.tied:
        yield adamix_batch(Batch(model.vocabulary, model.hidden, 1), 1, now, "head")
    yield Stage("embedding", host=(QUANTIZE + PACK) * model.embedding / (THREADS if now else 1))


def adamix_batch(batch: Batch, times: int, now: bool, name: str = "") -> Stage:
    """`times` batches of this shape."""
    m, n, b, k = batch.h_out, batch.h_in, batch.count, batch.kept
    candidates = min(rank_budget(1.0, m, n) // min(CANDIDATES) + SPARE_RANKS, m, n)
    short, block = min(m, n), candidates + max(16, candidates // 10)
    iterated = short > DENSE_SIZE and block <= short // DENSE_SHARE
    widths = len(CANDIDATES) * candidates
    double = b * (
        2 * m * n * short  # Gram matrix
        + 2 * widths * n**2  # errors at every width
        + n**3 + 2 * k * n**2 + 2 * m * n * k + 2 * m * k**2
    )  # fmt: skip
    single = b * (widths * n**2 + n**3 + m * k**2 + (40 * short**2 * block if iterated else 0))
    energy = 4.0 * b * m * n**2
    launches = adamix_launches(n, b, k)
    allocating = b * ALLOCATE * candidates
    if now:
        host = allocating + (PACK + UNPACK) * batch.codes / THREADS
    else:
        host = allocating + b * k * COLUMN + energy / HOST_DOUBLE + 2 * OLD_PACK * batch.codes
    orders = [block] * 4 if iterated else [short]
    return Stage(
        name or f"{b} x {m} x {n}",
        launches=times * launches if now else 0,
        double=times * (double + (energy if now else 0)),
        single=times * single,
        traffic=times * b * (40.0 * m * n + 60.0 * n**2),
        eigen=orders * b * times,
        moved=times * (4.0 * batch.weights + 3 * batch.codes),
        host=times * host,
    )


def optimix(model: Model) -> Iterator[Stage]:
    """Spectra and codes of all matrices, with head or embedding, then distillation."""
    for batch in model.batches:
        yield optimix_batch(batch, model.blocks)
    for name in ("embedding",) if model.tied else ("embedding", "head"):
        yield optimix_batch(Batch(model.vocabulary, model.hidden, 1), 1, name)
    weights = model.blocks * model.block_weights
    # A step unpacks each factor's product for the forward and again for the backward pass, whose
    # gradients take two products more.
    unpacking = 4 * 2 * sum(
        batch.count * batch.kept * batch.h_out * batch.h_in for batch in model.batches
    ) * model.blocks  # fmt: skip
    yield Stage("prices", launches=PRICES)
    yield Stage(
        "distillation",
        launches=STEPS * 115 * model.blocks,
        single=STEPS * unpacking,
        tensor=STEPS * (2 + 8) * model.parameters * TOKENS_PER_STEP,
        traffic=STEPS * 60.0 * weights,
        moved=2 * 2.0 * model.parameters,
    )


def optimix_batch(batch: Batch, times: int, name: str = "") -> Stage:
    m, n, b, k = batch.h_out, batch.h_in, batch.count, batch.kept
    sides = [n] if name else [n, m]  # a vocabulary's moment is diagonal
    squares, cubes = sum(side**2 for side in sides), sum(side**3 for side in sides)
    short, rounds = min(m, n), 2 * REFINEMENTS + 1
    sampled = SIMULATED * len(WIDTHS)
    double = b * (
        4 * m * n * short + 2 * short * squares + 6 * cubes  # whitening, Cholesky factors
        + 4 * sampled * squares
        + rounds * (6 * k * squares + 8 * m * n * k + 4 * k**2 * (m + n))
    )  # fmt: skip
    return Stage(
        name or f"{b} x {m} x {n}",
        launches=times * optimix_launches(m, n, b),
        double=times * double,
        single=times * b * (rounds + 1) * k * squares,
        traffic=times * b * (60.0 * squares + rounds * 80.0 * m * n),
        eigen=[short] * b * times,
        moved=times * (8.0 * batch.weights + 3 * batch.codes),
        host=times * (PACK + UNPACK) * batch.codes / THREADS,
    )


def verify(model: Model, tokens: int, now: bool) -> Stage:
    """The reporting windows through base, fine-tune and delta."""
    codes = sum(batch.codes for batch in model.batches) * model.blocks
    dense = 2 * sum(b.count * b.kept * b.h_out * b.h_in for b in model.batches) * model.blocks
    return Stage(
        "verifying",
        launches=3 * 60 * model.blocks,
        tensor=3 * 2 * model.parameters * tokens / 16,
        single=dense if now else 0,
        moved=3 * 2.0 * model.parameters + codes,
        host=UNPACK * codes / THREADS if now else OLD_PACK * codes + dense / (2 * HOST_DOUBLE),
    )


def stages(model: Model, method: str, tokens: int = TOKENS, *, now: bool = True) -> list[Stage]:
    """All stages of a compression at one bit a weight."""
    method_stages = adamix(model, now) if method == "adamix" else optimix(model)
    return [
        validate(model, now),
        calibrate(model, tokens, method == "optimix", now),
        *method_stages,
        verify(model, tokens, now),
    ]


def explained() -> dict[str, float]:
    """What the model says of the code that was measured."""
    large, small = Model(SHAPES["qwen2.5-7b"]), Model(SHAPES["smollm2-135m"])
    block = sum(adamix_batch(batch, 1, now=False).seconds for batch in large.batches)
    compressing = sum(stage.seconds for stage in adamix(small, now=False))
    return {
        "adamix, a 7B block": block,
        "adamix, 28 blocks": large.blocks * block,
        "adamix, compressing 135M": compressing,
    }


def main() -> None:
    """Print what the model explains, then what it predicts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["qwen2.5-7b", "smollm2-135m"])
    arguments = parser.parse_args()
    print("On an H200, code of 9e10efe      measured, s   model, s")
    for name, seconds in explained().items():
        print(f"{name:30} {MEASURED[name]:13.1f} {seconds:10.1f}")
    for name in arguments.models:
        model = Model(SHAPES[name])
        for method in ("adamix", "optimix"):
            print(f"\n{name}, {method}, {TOKENS} tokens, 1 bit: predicted for an H200")
            found = stages(model, method)
            for stage in sorted(found, key=lambda one: -one.seconds):
                cause = max(stage.parts, key=lambda part: stage.parts[part])
                print(f"  {stage.name:22} {stage.seconds:8.1f} s  mostly {cause}")
            print(f"  {'in all':22} {math.fsum(one.seconds for one in found):8.1f} s")


if __name__ == "__main__":
    main()
