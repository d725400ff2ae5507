"""What each method makes of a tensor, told from its name and shape alone.

Which tensors are linear layers is told from their names here, and from the modelling code in a
real run: a family with unusual names is off by what these tensors weigh. What a search through
the widths, or zlib, will make of a matrix is not known either; the estimates are held to real
artifacts in the tests.
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from deltadock.artifacts.container import DTYPE_BITS
from deltadock.compression.numerics.ranks import rank_budget

Role = Literal["linear layers", "output head", "embeddings", "other tensors"]
ROLES: Final[tuple[Role, ...]] = (
    "linear layers",
    "output head",
    "embeddings",
    "other tensors",
)
FLOATS: Final = frozenset({"BF16", "F16", "F32", "F64"})
EMBEDDINGS: Final = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "token_embedding"}
)
HEADS: Final = frozenset({"lm_head", "embed_out", "output"})
_IN_BLOCK: Final = re.compile(r"\.\d+\.")
_NOT_COMPRESSED: Final = re.compile(
    r"norm|conv|visual|vision|image|audio|router|rotary|relative|position|(^|\.)wpe\."
)


RUNS_PADDING: Final = 680
"""Bytes, as measured."""


class Shape(NamedTuple):
    """A tensor of the fine-tune: its name, safetensors dtype, shape, and whether it changed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed: bool = True

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def role(self) -> Role:
        """How a method sees it."""
        if self.dtype not in FLOATS or len(self.shape) < 2 or _NOT_COMPRESSED.search(self.name):
            return "other tensors"
        parts = self.name.removesuffix(".weight").split(".")
        if len(self.shape) == 2 and parts[-1] in EMBEDDINGS:
            return "embeddings"
        if len(self.shape) == 2 and parts[-1] in HEADS and not _IN_BLOCK.search(self.name):
            return "output head"
        if len(self.shape) <= 3 and _IN_BLOCK.search(self.name) and parts[-1] != "bias":
            return "linear layers"
        return "other tensors"

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices it is (the experts of a mixture), and their two sides."""
        *stacked, h_out, h_in = self.shape
        return math.prod(stacked), h_out, h_in


class Stored(NamedTuple):
    """What one tensor takes: bytes of data, and the number of segments they lie in."""

    bytes: float
    segments: int


Matrix = Callable[[int, int, float], Stored | None]
"""What a (h_out, h_in) matrix takes under a budget; None: it is smaller than the granularity."""

Layout = Callable[[Shape, float | None], Stored]
"""What a tensor takes under a budget."""


def _exact(tensor: Shape, bits: float | None) -> Stored:
    return Stored(tensor.weights * DTYPE_BITS[tensor.dtype] / 8, 1)


def _rows(tensor: Shape, bits: float) -> Stored:
    """Direct codes of `bits` and a float16 scale a row."""
    return Stored(tensor.weights * bits / 8 + 2 * tensor.weights / tensor.shape[-1], 2)


def _local(matrix: Matrix) -> Layout:
    """A method that gives every matrix the same budget, and embeddings 4 bits a weight."""

    def layout(tensor: Shape, bits: float | None) -> Stored:
        role = tensor.role
        if role == "other tensors":
            return _exact(tensor, None)
        if role == "embeddings":
            return _rows(tensor, 4)
        count, h_out, h_in = tensor.matrices
        one = matrix(h_out, h_in, bits or 0.0)
        if one is None:
            return _exact(tensor, None)
        return Stored(count * one.bytes, count * one.segments)

    return layout


def _decomposed(mean_width: float) -> Matrix:
    """Codes of U and V, and 8 bytes of scales a rank, of `mean_width` bits on average."""

    def matrix(h_out: int, h_in: int, bits: float) -> Stored | None:
        budget = rank_budget(bits, h_out, h_in)
        codes = budget * (h_out + h_in) / 8
        return Stored(codes + 8 * budget / mean_width, 5) if budget >= 2 else None

    return matrix


def _fixed(*leading: tuple[int, int], rest: int = 2) -> Matrix:
    """The same with widths by rank: (width, how many), then `rest` while the budget lasts."""

    def matrix(h_out: int, h_in: int, bits: float) -> Stored | None:
        left = budget = rank_budget(bits, h_out, h_in)
        ranks, spent = 0, 0
        for width, most in (*leading, (rest, budget)):
            count = min(most, left // width, min(h_out, h_in) - ranks)
            ranks, spent, left = ranks + count, spent + count * width, left - count * width
        return Stored(spent * (h_out + h_in) / 8 + 8 * ranks, 5) if budget >= 2 else None

    return matrix


def _low_rank(h_out: int, h_in: int, bits: float) -> Stored:
    return Stored(2 * int(bits * h_out * h_in / (16 * (h_out + h_in))) * (h_out + h_in), 2)


def _sign(h_out: int, h_in: int, bits: float) -> Stored:
    return Stored(h_out * h_in / 8 + 4, 2)


def _two_of_four(h_out: int, h_in: int, bits: float) -> Stored:
    """Two codes of 2 bits, or of 4 from 2.0 on, for every four columns; after zlib, as measured."""
    return Stored(h_out * h_in * (2.65 if bits >= 2 else 1.76) / 8, 3)


def _one_in_twenty(h_out: int, h_in: int, bits: float) -> Stored:
    """A bitmap and 2-bit codes of 5 % of the entries, after zlib, as measured; a scale a row."""
    return Stored(h_out * h_in * 0.42 / 8 + 2 * h_out, 3)


def _global(tensor: Shape, bits: float | None) -> Stored:
    """One budget for all that is compressed, the scales in it.

    A matrix has about ten runs of ranks of equal widths; what aligns them comes on top.
    """
    if tensor.role == "other tensors":
        return _exact(tensor, None)
    count = tensor.matrices[0]
    return Stored(tensor.weights * (bits or 0.0) / 8 + RUNS_PADDING * count, 5 * count)


LAYOUTS: Final[Mapping[str, Layout]] = MappingProxyType(
    {
        "optimix": _global,
        "adamix": _local(_decomposed(2.5)),
        "delta-come": _local(_fixed((8, 2), (3, 32))),
        "topk-2": _local(_fixed((8, 2))),
        "topk-32": _local(_fixed((8, 32))),
        "low-rank": _local(_low_rank),
        "bitdelta": _local(_sign),
        "bitdelta-distilled": _local(_sign),
        "delta-zip": _local(_two_of_four),
        "gpt-zip": _local(_one_in_twenty),
        "exact": _exact,
    }
)
"""How each method stores a tensor under a budget."""
