"""The delta file: its size overhead over codes and scales, and its loading bandwidth.

    python -m benchmarks.artifact [--device cuda] [--layers 28] [--cold]

Random codes at the shapes of Qwen2.5-7B's linear layers, at about one bit per weight. Sizes are
measured on files of one and of two decoder blocks and extrapolated: every block takes as much as
the second one added. Loading is `artifacts.tensors.load_segments`, opening included, against a
plain read of the file into new memory, alternating in one process; the best of several runs each.
The page cache holds the file, unless --cold asks the kernel to drop it before each run (not every
file system honours this: check that the plain read became slower).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.harness import describe_machine, synchronize
from benchmarks.sizes_7b import LAYERS, qwen2_5_7b
from deltadock.artifacts.encodings import Encoded, SvdMatrix, Vectors, encode_svd
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import load_segments
from deltadock.artifacts.writer import write_artifact

GridKind = Literal["zeros", "midrise"]

WIDTH_FRACTIONS: Final = {8: 0.01, 4: 0.09, 3: 0.4, 2: 0.5}
"""Fraction of the ranks at each width, about as allocated at one bit per weight."""

MANIFEST: Final = {
    "base_digest": "b" * 64, "finetuned_digest": "f" * 64, "model_type": "qwen2",
    "method": "benchmark", "nominal_bits": 1.0, "settings": {}, "seed": 0, "calibration": None,
    "checkpoint_bytes": 0, "parameters": 0, "version": "0", "files": {}, "matrices": {},
}  # fmt: skip


class BitsPerWeight(NamedTuple):
    """Bits per weight of the linear layers: codes and scales alone, and the whole file."""

    payload: float
    file: float

    @property
    def overhead(self) -> float:
        """Relative size of headers, hashes and padding."""
        return self.file / self.payload - 1


class LoadingSpeed(NamedTuple):
    """Bytes per second of a plain read and of loading, and seconds to open the file."""

    plain: float
    load: float
    opening: float

    @property
    def ratio(self) -> float:
        """Loading bandwidth over the plain read's."""
        return self.load / self.plain


def _vectors(rng: np.random.Generator, bits: np.ndarray, columns: int, grid: GridKind) -> Vectors:
    codes = rng.integers(0, 256, (len(bits), columns), np.uint8) >> (8 - bits)[:, None]
    zero = np.full(len(bits), 1.5, np.float16) if grid == "zeros" else None
    return Vectors(codes.astype(np.uint8), bits, zero)


def random_matrix(shape: tuple[int, int], grid: GridKind, bits: float, seed: int) -> Encoded:
    """An `svd` encoding of random codes, about `bits` per weight; `midrise` adds scales."""
    rng = np.random.default_rng(seed)
    mean = sum(width * fraction for width, fraction in WIDTH_FRACTIONS.items())
    ranks = min(round(bits * shape[0] * shape[1] / (mean * sum(shape))), *shape)
    widths = np.repeat(
        list(WIDTH_FRACTIONS), [round(ranks * fraction) for fraction in WIDTH_FRACTIONS.values()]
    )
    v, u = (_vectors(rng, widths, side, grid) for side in (shape[1], shape[0]))
    matrix = SvdMatrix(u, np.ones(len(widths), np.float32), v)
    if grid == "zeros":
        return encode_svd(matrix, "BF16")
    return encode_svd(matrix, "BF16", {}, np.ones(shape[0]), np.ones(shape[1]))


def payload_bits(encoded: Encoded) -> int:
    """Bits of codes and scales, without packing and file overhead."""
    h_out, h_in = encoded.record["shape"]
    codes: int = sum(
        run["count"] * (run["v_bits"] * h_in + run["u_bits"] * h_out)
        for run in encoded.record["ranks"]
    )
    scales = sum(data.nbytes for key, data in encoded.segments.items() if key not in ("u", "v"))
    return codes + 8 * scales


def random_block(grid: GridKind, bits: float = 1.0, shrink: int = 1) -> dict[str, Encoded]:
    """The matrices of a decoder block by name within it; `shrink` divides their sides."""
    prefix = "model.layers.0."
    shapes = {
        tensor.name.removeprefix(prefix): tensor.shape
        for tensor in qwen2_5_7b(only_linear=True)
        if tensor.changed and tensor.name.startswith(prefix)
    }
    return {
        name: random_matrix((rows // shrink, columns // shrink), grid, bits, seed)
        for seed, (name, (rows, columns)) in enumerate(shapes.items())
    }


def write(path: Path, block: dict[str, Encoded], layers: int) -> int:
    """Write a file of `layers` identical blocks; returns its size in bytes."""
    tensors = {
        f"model.layers.{layer}.{name}": encoded
        for layer in range(layers)
        for name, encoded in block.items()
    }
    figures = {name: {"error": 0.123456789, "damping": 0.01, "fallbacks": []} for name in tensors}
    write_artifact(path, tensors, {**MANIFEST, "matrices": figures})
    return path.stat().st_size


def project(block: dict[str, Encoded], folder: Path, layers: int = LAYERS) -> BitsPerWeight:
    """Extrapolate the bits per weight of `layers` blocks from files of one and of two."""
    one, two = (write(folder / f"{count}.delta", block, count) for count in (1, 2))
    weights = sum(encoded.record["shape"][0] * encoded.record["shape"][1]
                  for encoded in block.values())  # fmt: skip
    payload = sum(payload_bits(encoded) for encoded in block.values())
    return BitsPerWeight(
        payload / weights, 8 * (one + (layers - 1) * (two - one)) / (layers * weights)
    )


def _drop_pages(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _plain_read(path: Path) -> object:
    with path.open("rb", buffering=0) as stream:
        return stream.readall()


def _load(path: Path, device: torch.device) -> object:
    with Artifact(path) as artifact:
        segments = load_segments(artifact, device)
    synchronize(device)
    return segments


def time_loading(
    path: Path, device: torch.device, repeats: int = 5, *, cold: bool = False
) -> LoadingSpeed:
    """The best of `repeats` alternating runs of each, after one warm-up."""

    def seconds(action: Callable[[], object]) -> float:
        if cold:
            _drop_pages(path)
        began = time.perf_counter()
        kept = action()
        ended = time.perf_counter()
        del kept  # freeing the memory is not timed
        return ended - began

    actions = (
        lambda: _plain_read(path), lambda: _load(path, device), lambda: Artifact(path).close()
    )  # fmt: skip
    runs = [[seconds(action) for action in actions] for _ in range(repeats + 1)][1:]
    plain, load, opening = (min(column) for column in zip(*runs, strict=True))
    size = path.stat().st_size
    return LoadingSpeed(size / plain, size / load, opening)


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help="blocks in the file that is loaded"
    )
    parser.add_argument("--shrink", type=int, default=1, help="divisor of the matrices' sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    print(describe_machine(arguments.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'grid':8} {'codes + scales':>14} {'whole file':>10} {'added':>7}  bits per weight")
        grids: tuple[GridKind, ...] = ("zeros", "midrise")
        for grid in grids:
            block = random_block(grid, shrink=arguments.shrink)
            size = project(block, folder)
            print(f"{grid:8} {size.payload:14.4f} {size.file:10.4f} {size.overhead:7.2%}")
        path = folder / "model.delta"
        nbytes = write(path, block, arguments.layers)
        speed = time_loading(path, device, arguments.repeats, cold=arguments.cold)
    cache = "dropped (requested)" if arguments.cold else "warm"
    print(f"{nbytes / 1e6:,.1f} MB in {arguments.layers} blocks, page cache {cache}")
    print(f"open        {speed.opening * 1e3:8.1f} ms")
    print(f"plain read  {speed.plain / 1e9:8.2f} GB/s")
    print(f"to {device.type:8} {speed.load / 1e9:8.2f} GB/s, {speed.ratio:.0%} of the plain read")


if __name__ == "__main__":
    main()
