"""What else could add the deltas of a step: low-rank factors of its bytes, and dense deltas."""

from collections.abc import Callable

import torch

from benchmarks.kernel_layers import Step

Peer = tuple[Callable[[], None], int]
"""What it runs, and for how many layers that stands."""


def low_rank_products(step: Step) -> Peer:
    """bfloat16 factors of as many bytes, one pair of products a delta and linear."""
    layers = step.layers
    parts = []
    for _ in range(layers.copies):
        for y, x, table in zip(step.outputs, step.inputs, layers.tables[0], strict=True):
            for slot, rows in step.chunks.by_slot.items():
                begin = 0
                for delta in table.deltas[slot]:
                    assert delta is not None
                    rank = max(1, delta.nbytes // 2 // (delta.h_out + delta.h_in))
                    v, u = layers.normal(delta.h_in, rank), layers.normal(rank, delta.h_out)
                    end = begin + delta.h_out
                    parts.append((y[rows, begin:end], x[rows], v, u))
                    begin = end

    def run() -> None:
        for out, x, v, u in parts:
            out.addmm_(x @ v, u)

    return run, layers.copies


def dense_products(step: Step) -> Peer:
    """A dense bfloat16 product a delta and projection; one layer is more than a cache holds."""
    layers = step.layers
    parts = [
        (x[rows], layers.normal(sum(part.h_outs), part.h_in))
        for x, part in zip(step.inputs, layers.parts, strict=True)
        for rows in step.chunks.by_slot.values()
    ]

    def run() -> None:
        for x, weight in parts:
            torch.nn.functional.linear(x, weight)

    return run, 1
