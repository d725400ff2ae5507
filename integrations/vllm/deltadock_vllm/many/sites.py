"""What the rows of each slot add to the outputs of one module of the model.

    LinearSite     a linear layer, or several fused into one (q, k, v), or the head
    EmbeddingSite  the token embedding
    NormSite       a norm's weight

The sites know nothing of vLLM. Rows of slot 0 are the base's; a step without other rows runs the
base's layers and nothing else. For torch.compile and CUDA graphs, `linear`, `embedding` and `norm`
are operators that cannot be looked into: those of linears and norms read only buffers that never
move, so that a captured graph serves the deltas and rows of later steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltadock.inference.model.routing import DENSE_ROWS
from deltadock.inference.model.unpacked import change_embeddings, change_products
from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import (
    Chunks,
    DeltaTable,
    PackedDelta,
    clear_slot,
    discard_rows,
    svd_delta,
)
from deltadock.kernels.svd_delta.chunks import most_chunks
from deltadock_vllm.many.sharding import PartDelta

SITES: Final[dict[int, "Site"]] = {}
"""By number, as the operators name them."""


class StepChunks(Chunks):
    """Chunks that a captured graph can be replayed with.

    Of up to `captured` rows, a step launches `most_chunks` chunks, which depends on nothing but its
    number of rows, and unpacks no factors: a graph that was captured with as many rows or more then
    has a chunk for each of this step's.
    """

    def __init__(
        self,
        max_rows: int,
        slots: int,
        tables: Sequence[DeltaTable],
        *,
        captured: int,
        device: torch.device | str = "cpu",
    ) -> None:
        dense_rows = DENSE_ROWS if torch.device(device).type == "cuda" else None
        super().__init__(
            max_rows, slots, tables, dense_rows=dense_rows, packed_rows=captured, device=device
        )

    def assign(self, row_slots: Sequence[int]) -> None:
        super().assign(row_slots)
        if self.row_count <= self._packed_rows and self.members:
            self.count = most_chunks(self.row_count, self.slot_count)


class Rows:
    """Which rows of a step belong to which slot; shared by the sites of a model.

    Attributes:
        tokens: of the step's tokens.
        samples: of the positions that logits are computed for.
        cache: unpacked factors and decoded differences.
    """

    tokens: Chunks
    samples: Chunks

    def __init__(self, cache: TensorCache) -> None:
        self.cache = cache


class Site(ABC):
    """One module and its deltas by slot."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.number = len(SITES)
        SITES[self.number] = self

    @property
    def active(self) -> bool:
        """Whether the site may change a row of this step."""
        return bool(self.rows.tokens.members)

    @abstractmethod
    def remove(self, slot: int) -> None:
        """Remove the deltas of a slot, if it has any."""


class LinearDelta(NamedTuple):
    """What a delta does to one of a site's linears."""

    weight: PartDelta | None
    bias: Tensor | None
    """The difference of the biases, float32."""


class _Unpacked(NamedTuple):
    weight: PartDelta | None
    bias: Tensor | None
    """The bias itself if the weight is replaced, otherwise its difference from the base's."""


class LinearSite(Site):
    """Linears that share their input."""

    def __init__(
        self,
        rows: Rows,
        slots: int,
        h_in: int,
        h_outs: Sequence[int],
        *,
        bias: Tensor | None = None,
        head: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """`bias`: what the base's layer adds to the product; `head`: inputs are sampled rows."""
        super().__init__(rows)
        self.head, self._bias = head, bias
        max_rank = sum(min(h_out, h_in) for h_out in h_outs)
        self.table = DeltaTable(slots, h_in, h_outs, max_rank=max_rank, device=device)
        self._unpacked: dict[int, list[_Unpacked | None]] = {}

    @property
    def _chunks(self) -> Chunks:
        return self.rows.samples if self.head else self.rows.tokens

    @property
    def active(self) -> bool:
        return bool(self._chunks.members)

    def install(self, slot: int, deltas: Sequence[LinearDelta | None]) -> None:
        """Add one delta per linear, on the site's device, to the rows of an empty slot."""
        packed: list[PackedDelta | None] = []
        unpacked: list[_Unpacked | None] = []
        for number, delta in enumerate(deltas):
            weight, bias = delta or (None, None)
            packed.append(weight if isinstance(weight, PackedDelta) else None)
            if isinstance(weight, PackedDelta) or delta is None:
                unpacked.append(None)
                continue
            if isinstance(weight, Tensor) and self._bias is not None:
                base = self._bias.split(self.table.h_outs)[number].float()
                bias = base if bias is None else base + bias
            unpacked.append(_Unpacked(weight, bias))
        if any(delta is not None for delta in packed):
            self.table.install(slot, *packed)
        if any(delta is not None for delta in unpacked):
            self._unpacked[slot] = unpacked

    def remove(self, slot: int) -> None:
        clear_slot(self.table, slot, self.rows.cache)
        for delta in self._unpacked.pop(slot, ()):
            if delta is not None:
                self.rows.cache.discard(delta.weight)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the deltas of the step's rows to `y` (rows, h_out) in place; x is (rows, h_in).

        There may be more rows than the step has, which are padding.
        """
        chunks = self._chunks
        if not chunks.members:
            return
        if len(x) < chunks.row_count:
            raise RuntimeError(
                f"A layer was called with {len(x)} of {chunks.row_count} rows of a step: the "
                "model leaves out rows, and cannot be served with deltas."
            )
        x, y = x[: chunks.row_count], y[: chunks.row_count, : self.table.h_out]
        # On a GPU always: a captured graph also serves deltas that are installed later.
        if x.is_cuda or self.table.deltas:
            svd_delta(y, x, self.table, chunks, self.rows.cache)
        for slot, unpacked in self._unpacked.items():
            if slot in chunks.by_slot:
                rows, begin = chunks.by_slot[slot], 0
                for delta, h_out in zip(unpacked, self.table.h_outs, strict=True):
                    place = (rows, slice(begin, begin + h_out))
                    if delta is not None:
                        bias = None if delta.bias is None else delta.bias.to(y.dtype)
                        y[place] = change_products(
                            y[place], x[rows], delta.weight, bias, self.rows.cache
                        )
                    begin += h_out


class EmbeddingSite(Site):
    """The token embedding, or a rank's part of it: what it is asked for counts from its first row.

    It runs outside of CUDA graphs.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self._deltas: dict[int, PartDelta] = {}

    def install(self, slot: int, delta: PartDelta) -> None:
        """Change the rows of an empty slot."""
        self._deltas[slot] = delta

    def remove(self, slot: int) -> None:
        discard_rows(self._deltas.pop(slot, None), self.rows.cache)

    def add(self, y: Tensor, tokens: Tensor) -> None:
        """Change the embeddings `y` (rows, hidden) of `tokens` (rows,) int64 in place."""
        for slot, rows in self.rows.tokens.by_slot.items():
            if slot in self._deltas:
                y[rows] = change_embeddings(
                    y[rows], tokens[rows], self._deltas[slot], self.rows.cache
                )


class NormSite(Site):
    """A norm's weight.

    Attributes:
        weights: (slots, width), the base's where a slot has none of its own.
    """

    def __init__(self, rows: Rows, slots: int, weight: Tensor) -> None:
        super().__init__(rows)
        self._base = weight
        self.weights = weight.repeat(slots, 1)
        self._changed: set[int] = set()

    def install(self, slot: int, weight: PartDelta) -> None:
        """Replace the weight for the rows of an empty slot."""
        assert isinstance(weight, Tensor)
        self.weights[slot] = weight
        self._changed.add(slot)

    def remove(self, slot: int) -> None:
        if slot in self._changed:
            self._changed.remove(slot)
            self.weights[slot] = self._base

    @property
    def active(self) -> bool:
        return not self._changed.isdisjoint(self.rows.tokens.members)

    def scale(self, y: Tensor) -> None:
        """Multiply the normalized `y` (rows, ..., width) by each row's weight in place."""
        if not self.rows.tokens.members:
            y.mul_(self._base)
            return
        own = self.weights[self.rows.tokens.row_slots[: len(y)]]
        y.mul_(own.view(len(y), *[1] * (y.ndim - 2), own.shape[-1]))


def is_called(site: int) -> bool:
    """Whether a module has to call its site's operator: a step of the base's rows alone need not.

    What is compiled always does: it cannot ask which rows a step has.
    """
    return torch.compiler.is_compiling() or SITES[site].active


def _linear(site: int) -> LinearSite:
    found = SITES[site]
    assert isinstance(found, LinearSite)
    return found


@torch.library.custom_op("deltadock::linear", mutates_args=["y"])
def linear(y: Tensor, x: Tensor, site: int) -> None:
    """`LinearSite.add`; further leading dimensions are rows."""
    _linear(site).add(y.flatten(0, -2), x.flatten(0, -2))


@torch.library.custom_op("deltadock::embedding", mutates_args=["y"])
def embedding(y: Tensor, tokens: Tensor, site: int) -> None:
    """`EmbeddingSite.add`."""
    found = SITES[site]
    assert isinstance(found, EmbeddingSite)
    found.add(y.flatten(0, -2), tokens.flatten())


@torch.library.custom_op("deltadock::norm", mutates_args=["y"])
def norm(y: Tensor, site: int) -> None:
    """`NormSite.scale`."""
    found = SITES[site]
    assert isinstance(found, NormSite)
    found.scale(y)


@linear.register_fake
def _(y: Tensor, x: Tensor, site: int) -> None:
    return None


@embedding.register_fake
def _(y: Tensor, tokens: Tensor, site: int) -> None:
    return None


@norm.register_fake
def _(y: Tensor, site: int) -> None:
    return None
