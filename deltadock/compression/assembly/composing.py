"""From the encodings of a checkpoint's linear maps to those of its tensors."""

from collections.abc import Mapping, Sequence

from deltadock.artifacts.encodings import (
    Encoded,
    encode_new_rows,
    encode_stack,
    encode_transposed,
)
from deltadock.compression.model.weights import MatrixRef, raw
from deltadock.compression.run import Run


def with_added_rows(run: Run, name: str, encoded: Encoded | None) -> Encoded:
    """The encoding of a tensor to which a larger vocabulary has added rows, kept exactly.

    `encoded` is that of the base's rows; None: these have not changed.
    """
    entry, added = run.finetuned.entries[name], run.added_rows(name)
    rows = raw(run.finetuned.tensor(name)[-added:], entry.dtype)
    return encode_new_rows(encoded, rows, entry.shape[0] - added, entry.dtype)


def composed(
    run: Run, refs: Sequence[MatrixRef], made: Mapping[str, Encoded | None]
) -> dict[str, Encoded]:
    """Each tensor's encoding; a tensor is left out unless all of its maps are encoded.

    Args:
        run: the two checkpoints.
        refs: the maps; where one is an expert's part of a tensor, every part is there, in order.
        made: encodings by the maps' keys; None: the map has not changed.
    """
    by_tensor: dict[str, list[MatrixRef]] = {}
    for ref in refs:
        by_tensor.setdefault(ref.name, []).append(ref)
    encoded = {}
    for name, parts in by_tensor.items():
        found = [made[ref.key] for ref in parts if ref.key in made]
        if len(found) < len(parts):
            continue
        turned = [
            encode_transposed(part) if ref.transposed and part is not None else part
            for ref, part in zip(parts, found, strict=True)
        ]
        if run.added_rows(name):
            encoded[name] = with_added_rows(run, name, turned[0])
        elif parts[0].part is not None and any(turned):
            encoded[name] = encode_stack(turned)
        elif turned[0] is not None:
            encoded[name] = turned[0]
    return encoded
