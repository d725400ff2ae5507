"""Tricks with the manifest, told with a right hash: versions, JSON, names, carried files."""

import base64
import hashlib
import zlib
from typing import Any

from tests.artifacts.attacks.registry import add_all
from tests.artifacts.edits import drop, put, rewritten
from tests.artifacts.support import container


def raw(document: str, version: str = "deltadock/1") -> bytes:
    """A file without tensors and with this manifest."""
    digest = hashlib.sha256(document.encode()).hexdigest()
    metadata = {"format": version, "manifest": document, "manifest_sha256": digest}
    return container({"__metadata__": metadata})


def changed(*keys: str | int, value: Any) -> bytes:
    return rewritten(put(*keys, value=value))


def of_version(version: str, told: str | None = None) -> bytes:
    """The golden file under another version, which its manifest may tell too."""

    def edit(header: Any, manifest: Any) -> None:
        header["__metadata__"]["format"] = version
        if told is not None:
            manifest["format"] = told

    return rewritten(edit)


def carrying(name: str, text: Any = "{}") -> bytes:
    return rewritten(lambda _, manifest: manifest["files"].update({name: text}))


def deflated(raw: bytes, size: object, more: bytes = b"") -> bytes:
    """A file that carries a deflated one, of which the manifest gives `size`."""
    coded = base64.b64encode(zlib.compress(raw) + more).decode()
    return carrying("a.json", {"deflated": coded, "bytes": size})


CARRIED = {
    "path_upwards": "../config.json",
    "absolute_path": "/etc/config.json",
    "path_downwards": "a/b.json",
    "backslash": "..\\config.json",
    "drive": "C:\\config.json",
    "hidden_file": ".bashrc",
    "parent": "..",
    "no_name": "",
    "code": "modeling.py",
    "pickle": "pytorch_model.bin",
    "weights": "model.safetensors",
    "index_of_weights": "model.safetensors.index.json",
    "control_character": "a\nb.json",
    "nul": "a.json\0.txt",
    "right_to_left": "\u202enosj.a.json",
    "half_a_surrogate_pair": "\ud800.json",
    "name_without_end": "x" * 251 + ".json",
}

add_all({f"carries_{trick}": lambda name=name: carrying(name) for trick, name in CARRIED.items()})
add_all(
    {
        "carries_a_number": lambda: carrying("a.json", 1),
        "carries_text_without_utf_8": lambda: carrying("a.json", "\udcff"),
        "carries_a_bomb": lambda: deflated(bytes(1 << 26), 10),
        "carries_a_bomb_of_its_size": lambda: deflated(bytes(1 << 26), 1 << 26),
        "carries_bombs_together": lambda: changed(
            "files",
            value={
                f"{k}.json": {
                    "deflated": base64.b64encode(zlib.compress(bytes(1 << 24))).decode(),
                    "bytes": 1 << 24,
                }
                for k in range(3)
            },
        ),
        "carries_fewer_bytes_than_told": lambda: deflated(b"{}", 3),
        "carries_no_bytes_but_some": lambda: deflated(b"{}", 0),
        "carries_true_bytes": lambda: deflated(b"{", True),
        "carries_more_after_a_stream": lambda: deflated(b"{}", 2, more=b"x"),
        "carries_half_a_stream": lambda: carrying("a.json", {"deflated": "eJw=", "bytes": 2}),
        "carries_deflated_that_is_not_base64": lambda: carrying(
            "a.json", {"deflated": "§", "bytes": 2}
        ),
        "carries_deflated_without_utf_8": lambda: deflated(b"\xff", 1),
        "carries_deflated_without_a_size": lambda: carrying("a.json", {"deflated": "eJw="}),
        "carries_what_is_not_base64": lambda: changed("binary_files", value={"a.model": "§"}),
        "carries_null_as_base64": lambda: changed("binary_files", value={"a.model": None}),
        "carries_two_under_one_name": lambda: changed(
            "binary_files", value={"generation_config.json": "AAAA"}
        ),
        "newer_major_version": lambda: of_version("deltadock/2"),
        "version_of_ten": lambda: of_version("deltadock/10"),
        "version_with_a_line_break": lambda: of_version("deltadock/1\n"),
        "version_zero": lambda: of_version("deltadock/0"),
        "minor_version_that_no_hash_covers": lambda: of_version("deltadock/1.2"),
        "minor_version_told_otherwise": lambda: of_version("deltadock/1.2", "deltadock/1.3"),
        "minor_version_told_alone": lambda: of_version("deltadock/1", "deltadock/1.2"),
        "minor_version_of_zero": lambda: of_version("deltadock/1.0", "deltadock/1.0"),
        "manifest_is_a_list": lambda: raw("[]"),
        "manifest_nested_deeply": lambda: raw("[" * 100_000),
        "manifest_with_a_key_twice": lambda: raw('{"base_digest": "a", "base_digest": "b"}'),
        "nan": lambda: changed("nominal_bits", value=float("nan")),
        "infinity": lambda: changed("nominal_bits", value=float("inf")),
        "nan_in_an_unknown_key": lambda: changed("colour", value=[float("nan")]),
        "number_over_float64": lambda: raw('{"nominal_bits": 1e999}'),
        "number_of_five_thousand_digits_in_the_manifest": lambda: raw("9" * 5000),
        "no_base": lambda: rewritten(drop("base_digest")),
        "base_is_a_number": lambda: changed("base_digest", value=1),
        "base_that_colours_a_terminal": lambda: changed("base_digest", value="\x1b[31m"),
        "method_without_end": lambda: changed("method", value="x" * 100_000),
        "model_type_is_a_list": lambda: changed("model_type", value=[]),
        "negative_size": lambda: changed("checkpoint_bytes", value=-1),
        "size_over_64_bits": lambda: changed("parameters", value=2**64),
        "true_as_tensors": lambda: changed("tensors", value=True),
        "matrices_of_numbers": lambda: changed("matrices", value={"proj.weight": 1}),
        "tensor_name_that_colours_a_terminal": lambda: changed(
            "tensors",
            "\x1b[31m",
            value={"kind": "alias", "of": "embed.weight", "shape": [4, 3], "dtype": "BF16",
                   "sha256": {}},
        ),
    }
)  # fmt: skip
