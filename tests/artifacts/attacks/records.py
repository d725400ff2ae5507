"""Tricks with single records, every hash being right."""

from typing import Any

import numpy as np

from tests.artifacts.attacks.registry import add_all, defused, forged, halves, words
from tests.artifacts.edits import drop, put, rewritten

HUGE = 2**40


def changed(*keys: str | int, value: Any) -> bytes:
    return rewritten(put("tensors", *keys, value=value))


def alias(of: str) -> Any:
    return {"kind": "alias", "of": of, "shape": [4, 3], "dtype": "BF16", "sha256": {}}


def nested(depth: int) -> Any:
    """A sum of a sum of ... rows without a stored row; no segment at all but empty codes."""
    record: Any = rows(1, 1, [])
    for _ in range(depth - 1):
        record = {"kind": "sum", "shape": [1, 1], "dtype": "F32", "parts": [record]}
    return record


def rows(height: int, width: int, runs: list[Any], **keys: Any) -> Any:
    return {
        "kind": "rows", "shape": [height, width], "dtype": "F32", "runs": runs, "scale": "shared",
        "index": len(runs) < height, **keys,
    }  # fmt: skip


ONE_SCALE = ("F32", np.ones(1, np.float32))


def ranks(count: Any, bits: Any = 8) -> list[Any]:
    return [{"count": count, "v_bits": bits, "u_bits": bits}]


add_all(
    {
        "unknown_kind": lambda: changed("steps", "kind", value="lut"),
        "kind_is_a_list": lambda: changed("steps", "kind", value=["exact"]),
        "record_is_null": lambda: changed("steps", value=None),
        "unknown_dtype_of_a_record": lambda: changed("steps", "dtype", value="F24"),
        "wrong_dtype_of_a_record": lambda: changed("norm.weight", "dtype", value="F16"),
        "hash_missing": lambda: rewritten(drop("tensors", "norm.weight", "sha256", "data")),
        "hash_too_many": lambda: changed("norm.weight", "sha256", "more", value="0" * 64),
        "alias_cycle": lambda: rewritten(
            lambda _, manifest: manifest["tensors"].update(a=alias("b"), b=alias("a"))
        ),
        "alias_of_itself": lambda: changed("alias.weight", "of", value="alias.weight"),
        "alias_of_an_alias": lambda: changed("another", value=alias("alias.weight")),
        "alias_of_nothing": lambda: changed("alias.weight", "of", value="ghost"),
        "alias_of_a_part": lambda: changed("alias.weight", "of", value="both.weight:0"),
        "alias_of_null": lambda: changed("alias.weight", "of", value=None),
        "alias_deflated": lambda: changed("alias.weight", "deflated", value={}),
        "count_of_ranks_without_end": lambda: changed("proj.weight", "ranks", value=ranks(10**12)),
        "count_of_ranks_over_64_bits": lambda: changed("proj.weight", "ranks", value=ranks(2**64)),
        "count_of_ranks_negative": lambda: changed("proj.weight", "ranks", value=ranks(-4)),
        "count_of_ranks_true": lambda: changed("proj.weight", "ranks", value=ranks(True)),
        "count_of_ranks_a_fraction": lambda: changed("proj.weight", "ranks", value=ranks(4.0)),
        "width_of_zero": lambda: changed("proj.weight", "ranks", value=ranks(4, 0)),
        "width_of_nine": lambda: changed("proj.weight", "ranks", value=ranks(4, 9)),
        "widths_that_rise": lambda: changed("proj.weight", "ranks", value=ranks(2, 2) + ranks(2)),
        "runs_as_text": lambda: changed("proj.weight", "ranks", value="8888"),
        "shape_over_64_bits": lambda: changed("proj.weight", "shape", value=[2**32, 2**32]),
        "shape_of_three_sides_for_a_matrix": lambda: changed(
            "proj.weight", "shape", value=[3, 5, 1]
        ),
        "shape_is_a_number": lambda: changed("proj.weight", "shape", value=15),
        "gain_that_float32_cannot_hold": lambda: changed("scaled.weight", "gain", value=1e39),
        "gain_as_text": lambda: changed("scaled.weight", "gain", value="1"),
        "gain_of_four_thousand_digits": lambda: changed("scaled.weight", "gain", value=10**4000),
        "group_of_zero": lambda: changed("pruned.weight", "group", value=0),
        "kept_more_than_there_are": lambda: changed("thinned.weight", "kept", value=10**6),
        "rank_of_an_adapter_without_end": lambda: changed("lora.weight", "rank", value=2**40),
        "new_rows_fewer_than_before": lambda: changed("new.weight", "base_rows", value=7),
        "parts_as_an_object": lambda: changed("both.weight", "parts", value={"0": None}),
        "part_that_is_null_in_a_sum": lambda: changed("both.weight", "parts", 1, value=None),
        "part_that_is_exact": lambda: changed("both.weight", "parts", 1, "kind", value="exact"),
        "part_that_is_an_alias": lambda: changed(
            "both.weight", "parts", 1, value={**alias("signs.weight"), "shape": [3, 5]}
        ),
        "nested_too_deeply": lambda: forged(nested(5), {}),
        "nested_without_end": lambda: forged(nested(200), {}),
        "nine_parts_of_a_sum": lambda: forged({**nested(2), "parts": [nested(1)] * 9}, {}),
        "ranks_of_an_empty_matrix": lambda: forged(
            {"kind": "low-rank", "shape": [0, 0], "dtype": "F32", "rank": 2**40, "scaling": 1,
             "factor_dtype": "F32"},
            {"u": ("F32", np.zeros((0, HUGE), np.float32)),
             "v": ("F32", np.zeros((HUGE, 0), np.float32))},
        ),
    }
)  # fmt: skip


@defused
def rows_without_columns() -> bytes:
    """Row numbers of a tensor of 2^40 rows and nothing in them."""
    run = [{"count": HUGE, "bits": 8}]
    return forged(rows(HUGE, 0, run, index=False), {"codes": words(0), "scale": ONE_SCALE})


@defused
def columns_without_rows() -> bytes:
    """Column numbers, for the groups of a tensor of 2^40 columns and no rows."""
    record = {"kind": "sparse", "shape": [0, HUGE], "dtype": "F32", "bits": 8, "group": 1,
              "gain": 1, "kept": 0}  # fmt: skip
    return forged(record, {"bitmap": words(0), "codes": words(0), "scale": halves(0, HUGE)})


@defused
def large_tensor_without_data() -> bytes:
    """A sparse record of 2^40 entries none of which is stored; no base has this shape."""
    index = ("I32", np.zeros(0, np.int32))
    segments = {"codes": words(0), "scale": ONE_SCALE, "index": index}
    return forged(rows(2**20, 2**20, []), segments)
