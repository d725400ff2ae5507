"""Tricks with the container: lengths, offsets, shapes and JSON that libraries read differently."""

import json
from typing import Any

from deltadock.artifacts.container import MAX_HEADER_BYTES, MAX_NAME, MAX_TENSORS
from tests.artifacts.attacks.registry import add_all, attack
from tests.artifacts.edits import FILE
from tests.artifacts.support import container, entry, split

SEGMENT = "norm.weight:data"


def with_length(length: int) -> bytes:
    return length.to_bytes(8, "little") + FILE[8:]


def edited(change: Any, data: bytes | None = None) -> bytes:
    """The golden file after `change(header)`, its manifest as it was."""
    header, old = split(FILE)
    change(header)
    return container(header, old if data is None else data)


def of_segment(**keys: Any) -> bytes:
    """The golden file with other keys in one segment's entry."""
    return edited(lambda header: header[SEGMENT].update(keys))


def text(old: bytes, new: bytes) -> bytes:
    """The golden file with other bytes in its header's text."""
    end = 8 + int.from_bytes(FILE[:8], "little")
    assert old in FILE[8:end]
    return container(FILE[8:end].rstrip().replace(old, new, 1), FILE[end:])


add_all(
    {
        "empty_file": lambda: b"",
        "shorter_than_a_length": lambda: FILE[:7],
        "header_length_zero": lambda: with_length(0),
        "header_length_one_less": lambda: with_length(int.from_bytes(FILE[:8], "little") - 1),
        "header_length_one_more": lambda: with_length(int.from_bytes(FILE[:8], "little") + 1),
        "header_length_of_the_whole_file": lambda: with_length(len(FILE) - 8),
        "header_length_beyond_the_file": lambda: with_length(MAX_HEADER_BYTES),
        "header_length_over_the_bound": lambda: with_length(MAX_HEADER_BYTES + 1),
        "header_length_that_is_negative_when_signed": lambda: with_length(2**64 - 1),
        "header_length_that_wraps_around_with_its_own_bytes": lambda: with_length(2**64 - 8),
        "trailing_bytes": lambda: FILE + b"\0" * 128,
        "another_file_behind": lambda: FILE + FILE,
        "data_cut_off": lambda: FILE[:-1],
        "list_at_the_top": lambda: container(b"[]"),
        "number_at_the_top": lambda: container(b"17"),
        "byte_order_mark": lambda: container(b"\xef\xbb\xbf{}"),
        "utf_16": lambda: container("{}".encode("utf-16")),
        "not_utf_8": lambda: text(b"norm.weight", b"norm\xff.weight"),
        "surrogate_in_utf_8": lambda: text(b"norm.weight", b"norm\xed\xa0\x80.weight"),
        "escaped_surrogate": lambda: text(b"norm.weight", rb"norm\ud800.weight"),
        "escaped_letter": lambda: text(b'"norm.weight:', rb'"\u006eorm.weight:'),
        "tab_between_tokens": lambda: text(b'"shape":[3]', b'"shape":\t[3]'),
        "nul_padding": lambda: container(FILE[8:].split(b"  ")[0] + b"\0" * 8),
        "comment": lambda: text(b'"shape":[3]', b'"shape":/**/[3]'),
        "two_documents": lambda: container(b"{}{}"),
        "nan_offset": lambda: text(b'"shape":[3]', b'"shape":[NaN]'),
        "infinite_offset": lambda: text(b'"shape":[3]', b'"shape":[Infinity]'),
        "number_of_five_thousand_digits": lambda: text(
            b'"shape":[3]', b'"shape":[' + b"9" * 5000 + b"]"
        ),
        "deep_nesting": lambda: container(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "deep_nesting_unclosed": lambda: container(b'{"a":' * 200_000),
        "negative_dimension": lambda: of_segment(shape=[-3]),
        "true_as_a_dimension": lambda: of_segment(shape=[True, 3]),
        "fraction_as_a_dimension": lambda: of_segment(shape=[3.0]),
        "hundred_dimensions": lambda: of_segment(shape=[3] + [1] * 100),
        "size_of_2_to_the_63": lambda: of_segment(shape=[2**62], data_offsets=[0, 2**63]),
        "product_that_wraps_around": lambda: of_segment(shape=[2**32, 2**32], data_offsets=[0, 0]),
        "product_that_wraps_around_times_zero": lambda: of_segment(
            shape=[2**62, 4, 0], data_offsets=[0, 0]
        ),
        "negative_offset": lambda: of_segment(data_offsets=[-6, 0]),
        "offsets_reversed": lambda: of_segment(data_offsets=[6, 0]),
        "offset_of_2_to_the_64": lambda: of_segment(data_offsets=[2**64, 2**64 + 6]),
        "three_offsets": lambda: of_segment(data_offsets=[0, 6, 6]),
        "unknown_dtype": lambda: of_segment(dtype="F24"),
        "dtype_in_a_list": lambda: of_segment(dtype=["BF16"]),
        "another_dtype_of_the_same_size": lambda: of_segment(dtype="F16"),
        "key_unknown_in_an_entry": lambda: of_segment(strides=[1]),
        "entry_is_a_list": lambda: edited(lambda header: header.update({SEGMENT: ["BF16", [3]]})),
        "name_with_a_line_break": lambda: text(b'"norm.weight:', rb'"norm\n.weight:'),
        "name_that_colours_a_terminal": lambda: edited(
            lambda header: header.update({"\x1b[31m:data": entry("U8", [0], 0, 0)})
        ),
        "name_without_end": lambda: edited(
            lambda header: header.update({"a" * (MAX_NAME + 1): entry("U8", [0], 0, 0)})
        ),
        "metadata_holds_a_number": lambda: edited(
            lambda header: header["__metadata__"].update(manifest=1)
        ),
        "metadata_that_no_hash_covers": lambda: edited(
            lambda header: header["__metadata__"].update(note="not hashed")
        ),
        "no_metadata": lambda: edited(lambda header: header.pop("__metadata__")),
    }
)


@attack
def duplicate_tensor() -> bytes:
    """Readers keep the first or the last of the two."""
    header, _ = split(FILE)
    again = json.dumps({SEGMENT: header[SEGMENT]})[1:-1].encode()
    return text(b'{"__metadata__"', b"{" + again + b',"__metadata__"')


@attack
def duplicate_key_in_an_entry() -> bytes:
    return text(b'"shape":[3]', b'"shape":[1],"shape":[3]')


@attack
def duplicate_metadata() -> bytes:
    return text(b'{"__metadata__"', b'{"__metadata__":{"format":"pt"},"__metadata__"')


@attack
def overlap() -> bytes:
    """Two segments share bytes: one hash would then vouch for both."""
    header, data = split(FILE)
    order = sorted(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
    for name in order[-1:]:
        header[name]["data_offsets"] = [offset - 1 for offset in header[name]["data_offsets"]]
    return container(header, data[:-1])


@attack
def gap() -> bytes:
    """Bytes that belong to no segment, where something could hide."""
    header, data = split(FILE)
    order = sorted(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
    header[order[-1]]["data_offsets"] = [o + 4 for o in header[order[-1]]["data_offsets"]]
    return container(header, data + b"\0" * 4)


@attack
def same_bytes_twice() -> bytes:
    header, data = split(FILE)
    return container({**header, "copy": header[SEGMENT]}, data)


@attack
def empty_tensor_inside_another() -> bytes:
    header, data = split(FILE)
    begin = header[SEGMENT]["data_offsets"][0] + 2
    return container({**header, "empty": entry("U8", [0], begin, begin)}, data)


@attack
def more_tensors_than_any_model_has() -> bytes:
    tensor = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return container(b"{" + b",".join(tensor % n for n in range(MAX_TENSORS + 1)) + b"}")


@attack
def millions_of_empty_lists() -> bytes:
    """Each takes 3 bytes here and 64 in memory."""
    return container(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}")


@attack
def a_million_small_objects() -> bytes:
    """Each takes 7 bytes here and 192 in memory; one character makes all others take four bytes."""
    return container('{"😀":['.encode() + b'{"":0},' * 1_000_000 + b"0]}")
