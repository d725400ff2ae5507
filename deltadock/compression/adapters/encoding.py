"""Encode what a PEFT LoRA adapter changes, without loss.

The files are those that PEFT's `save_pretrained` writes. Factors keep the adapter's dtype. Tensors
that the adapter stores whole (`modules_to_save`, biases, a resized vocabulary) replace the base's,
as do the rows of an embedding that it trains alone (`trainable_token_indices`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from deltadock.artifacts.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltadock.artifacts.compatibility import (
    EMPTY_TENSOR,
    check_not_quantized,
    is_tied,
    tied_head,
)
from deltadock.artifacts.container import StreamingInspector
from deltadock.artifacts.encodings import (
    Encoded,
    decode_dense,
    decode_factors,
    deflate,
    encode_alias,
    encode_exact,
    encode_low_rank,
    encode_new_rows,
)
from deltadock.artifacts.names import find_name, is_embedding, is_head, unwrapped
from deltadock.compression.adapters.config import LoraConfig, read_config
from deltadock.compression.adapters.products import (
    BASE_LAYER,
    CONV1D,
    DTYPES,
    base_entry,
    encode_layer,
    encode_parameter,
    make_factors,
    parameters_of,
)
from deltadock.compression.checkpoints import CheckpointReader, diverged, to_numpy
from deltadock.compression.checks import MERGE
from deltadock.errors import (
    ArchitectureMismatch,
    InvalidAdapter,
    MalformedSafetensors,
    UnsafeFile,
)
from deltadock.words import counted

PREFIX: Final = "base_model.model."
SAVED: Final = ".modules_to_save."
ORIGINAL: Final = ".original_module."
"""PEFT's names within a module of `modules_to_save`."""

TOKENS: Final = ".token_adapter.trainable_tokens_delta"
"""End of the names of an embedding's rows that are trained alone."""
AROUND_TOKENS: Final = ".token_adapter.base_layer."
"""PEFT's name of the embedding in which they are; saved with it if the vocabulary is resized."""

FACTORS: Final = {
    "lora_A.weight": ("a", False),
    "lora_B.weight": ("b", False),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
}
"""Endings of the factors' names: which factor it is, and whether its layer is an embedding."""


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) over the adapter's configuration and weights; validates the weights' file.

    Raises:
        UnsafeFile: the weights are a pickle.
        InvalidAdapter: there are no weights.
        MalformedSafetensors: the weights are damaged.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        if any(folder.glob("adapter_model.bin")):
            raise UnsafeFile(
                "adapter_model.bin can run code when it is opened. Save the adapter as "
                ".safetensors with a current PEFT: model = PeftModel.from_pretrained(base, FOLDER);"
                " model.save_pretrained(NEW_FOLDER)."
            )
        raise InvalidAdapter(f"{folder.name} has no {ADAPTER_WEIGHTS}; is it a PEFT adapter?")
    digest = hashlib.sha256(hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes()).digest())
    inspector = StreamingInspector()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            inspector.update(chunk)
            digest.update(chunk)
    header, _ = inspector.finish()
    if not header.tensors:
        raise MalformedSafetensors(f"{ADAPTER_WEIGHTS} holds no tensors.")
    return digest.hexdigest()


def encode_adapter(base: CheckpointReader, adapter: Path) -> dict[str, Encoded]:
    """Encode every tensor that the adapter changes, by the base's names.

    Args:
        base: checkpoint that the adapter was trained on.
        adapter: folder of adapter_config.json and adapter_model.safetensors.

    Raises:
        InvalidAdapter: a file is missing, or uses an unsupported feature; the message names it.
        UnsafeFile, MalformedSafetensors: the weights are a pickle, or damaged.
        ArchitectureMismatch: the base lacks a tensor, or has it in another shape.
        UnsupportedModel: the same, and the base's weights are quantized.
        NonFiniteWeights: a tensor holds NaN or an infinity.
    """
    config = read_config(_adapter_folder(adapter))
    adapter_digest(adapter)
    base.entries |= tied_head(base.manifest)
    try:
        return _encode(config, base, adapter)
    except ArchitectureMismatch:
        check_not_quantized(base.manifest.config, base.entries)
        raise


def _encode(config: LoraConfig, base: CheckpointReader, adapter: Path) -> dict[str, Encoded]:
    model_type = base.manifest.config["model_type"]
    tensors = _read_tensors(adapter)
    factors, tables, tokens = tensors
    modules = [module for module, embedding in factors if not embedding]
    parameters = parameters_of(config, base.entries, model_type, modules)
    encoded: dict[str, Encoded] = {}
    layers: dict[str, Tensor] = {}

    for (module, embedding), pair in factors.items():
        if pair.keys() != {"a", "b"} or f"{module}.weight" in tables:
            raise InvalidAdapter(
                f"The adapter does not hold both factors of {module!r} and no more."
            )
        both = make_factors(module, pair)
        if not embedding and module in parameters:
            found = encode_parameter(config, base.entries, parameters[module], model_type, both)
        else:
            name = find_name(f"{module}.weight", base.entries, model_type) or f"{module}.weight"
            if (table := tables.pop(f"{module}{BASE_LAYER}.weight", None)) is not None:
                layers[name] = table
            product = encode_layer(
                config,
                base.entries,
                module,
                name,
                table,
                embedding=embedding,
                conv1d=model_type in CONV1D,
                factors=both,
            )
            found = {name: product if table is None else _on_table(base, name, table, product)}
        if twice := encoded.keys() & found.keys():
            raise InvalidAdapter(f"The adapter holds {min(twice)!r} twice.")
        encoded |= found
    tied = is_tied(base.manifest) and _stay_tied(adapter, tensors)
    for module, rows in tokens.items():
        name = find_name(f"{module}.weight", base.entries, model_type) or f"{module}.weight"
        table = tables.pop(f"{module}.weight", None)
        if tied and is_head(name):  # of a resized vocabulary, saved once more
            continue
        if name in encoded or name not in base.entries:
            raise InvalidAdapter(
                f"The adapter trains tokens of {module!r}, which the base lacks or for which there "
                f"are factors too. {MERGE}"
            )
        encoded[name] = _with_rows(base, name, table, config.tokens_of(module), rows)
    for key, tensor in tables.items():
        plain = key.replace(f"{BASE_LAYER}.", ".")
        name = find_name(plain, base.entries, model_type) or plain
        if name in encoded:
            raise InvalidAdapter(f"The adapter holds {name!r} twice.")
        if (whole := _whole(base, name, tensor)) is not None:
            encoded[name] = whole
    return _with_head(base, encoded, layers, tied=tied)


class _Tensors(NamedTuple):
    """An adapter's tensors."""

    factors: dict[tuple[str, bool], dict[str, Tensor]]
    """The factors `a` and `b` by module and "is an embedding"."""
    tables: dict[str, Tensor]
    """Tensors saved whole, by name."""
    tokens: dict[str, Tensor]
    """Rows that are trained alone, by module."""


def _read_tensors(adapter: Path) -> _Tensors:
    factors: dict[tuple[str, bool], dict[str, Tensor]] = {}
    tables: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a mapping
            tensor = weights.get_tensor(key)
            if tensor.dtype not in DTYPES:
                raise InvalidAdapter(f"Tensor {key!r} is {tensor.dtype}; floats are expected.")
            if not torch.isfinite(tensor.float()).all():
                raise diverged(key, "adapter")
            if not tensor.numel():
                raise InvalidAdapter(f"Tensor {key!r} of the adapter is empty: {EMPTY_TENSOR}")
            name = unwrapped(unwrapped(key).removeprefix(PREFIX))
            module, side, embedding = _as_factor(name)
            if side:
                factors.setdefault((module, embedding), {})[side] = tensor
            elif name.endswith(TOKENS):
                tokens[name.removesuffix(TOKENS)] = tensor
            else:
                tables[name.replace(AROUND_TOKENS, ".")] = tensor
    return _Tensors(factors, _without_wrappers(tables), tokens)


def _without_wrappers(tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without PEFT's copies of a module in `modules_to_save`.

    Of embeddings and heads with added tokens it saves the wrapped module too, before and after.
    """
    saved = {
        name.replace(SAVED, "."): tensor
        for name, tensor in tables.items()
        if ORIGINAL not in name and SAVED in name
    }
    return saved | {
        name: tensor
        for name, tensor in tables.items()
        if ORIGINAL not in name and SAVED not in name
    }


def _with_head(
    base: CheckpointReader,
    encoded: dict[str, Encoded],
    layers: Mapping[str, Tensor],
    *,
    tied: bool,
) -> dict[str, Encoded]:
    """Add what a changed embedding means for a head that is tied to it, and the reverse.

    PEFT changes one of them: the other stays the base's, or the saved layer of `layers` that has
    added tokens. With `tied` they stay one tensor.

    Raises:
        InvalidAdapter: the adapter adds tokens to one of them only.
    """
    table = next((name for name in base.entries if is_embedding(name)), None)
    head = next((name for name in base.entries if is_head(name)), None)
    if table is None or head is None:
        return encoded
    if is_tied(base.manifest):
        stored = head not in tied_head(base.manifest)
        if tied:
            encoded.pop(head, None)
            if stored and table in encoded:
                shape = tuple(encoded[table].record["shape"])
                encoded[head] = encode_alias(table, shape, base.entries[table].dtype)
        else:
            _keep_other(base, encoded, layers, table, head)
        if head not in encoded and not stored:
            del base.entries[head]
            return encoded
    rows = {
        name: encoded[name].record["shape"][0] if name in encoded else base.entries[name].shape[0]
        for name in (table, head)
    }
    if rows[table] != rows[head]:
        raise InvalidAdapter(
            f"The adapter has {rows[table]} tokens in the embedding, but {rows[head]} in the head. "
            "Save it again with save_embedding_layers=True."
        )
    return encoded


def _stay_tied(adapter: Path, tensors: _Tensors) -> bool:
    """Whether PEFT keeps a tied embedding and head one tensor.

    It does with `ensure_weight_tying`, if both are saved whole and equal, and if tokens of the
    embedding are trained alone and no others of the head.

    Raises:
        InvalidAdapter: tokens of the embedding are trained alone, and the head has factors.
    """
    tokens = {is_head(f"{module}.weight"): rows for module, rows in tensors.tokens.items()}
    if False in tokens and any(is_head(f"{module}.weight") for module, _ in tensors.factors):
        raise InvalidAdapter(
            "The adapter trains tokens of an embedding alone, and the head that is tied to it has "
            "factors: PEFT runs and merges that as two different models. Train one of the two."
        )
    if tokens:
        return False in tokens and tokens[False].equal(tokens.get(True, tokens[False]))
    saved = [
        tensor for name, tensor in tensors.tables.items() if is_embedding(name) or is_head(name)
    ]
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return bool(config.get("ensure_weight_tying")) or (len(saved) == 2 and saved[0].equal(saved[1]))


def _keep_other(
    base: CheckpointReader,
    encoded: dict[str, Encoded],
    layers: Mapping[str, Tensor],
    table: str,
    head: str,
) -> None:
    """Encode the one of a tied embedding and head that an adapter changes without the other."""
    for changed, other in ((table, head), (head, table)):
        if changed not in encoded or other in encoded:
            continue
        kept = None if changed not in layers else _whole(base, other, layers[changed])
        if kept is not None:
            encoded[other] = kept
        elif other == head:  # a difference of zero
            rows, columns = base.entries[table].shape
            zeros = np.zeros((rows, 1), np.float32), np.zeros((1, columns), np.float32)
            encoded[head] = encode_low_rank(*zeros, 1.0, base.entries[table].dtype, {}, "F32")


def _adapter_folder(folder: Path) -> Path:
    """`folder`, if it holds an adapter.

    Raises:
        InvalidAdapter: its adapters are in inner folders, such as `checkpoint-500`.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_WEIGHTS}"))
        if inner:
            raise InvalidAdapter(
                f"{folder.name} has its adapters in inner folders ({', '.join(inner[:4])}). Take "
                "the one to use as the adapter's folder."
            )
    return folder


def _on_table(base: CheckpointReader, name: str, table: Tensor, product: Encoded) -> Encoded:
    """Encode a saved base layer (an embedding with added tokens) with its product on top."""
    whole = _whole(base, name, table)
    if whole is None:
        return product
    dtype = DTYPES[table.dtype]
    if whole.record["kind"] == "new-rows" and product.record["kind"] == "low-rank":
        rows = base.entries[name].shape[0]
        factors = decode_factors(product)
        u, s, v = map(torch.from_numpy, (factors.u, factors.s, factors.v))
        added = (table[rows:].float() + (u[rows:] * s) @ v).to(table.dtype)
        first = encode_low_rank(
            product.segments["u"][:rows],
            product.segments["v"],
            product.record["scaling"],
            dtype,
            {},
            product.record["factor_dtype"],
        )
        return encode_new_rows(first, to_numpy(added, dtype), rows, dtype)
    changed = (table.float() + torch.from_numpy(decode_dense(product))).to(table.dtype)
    return encode_exact(to_numpy(changed, dtype), dtype, tuple(changed.shape))


def _with_rows(
    base: CheckpointReader,
    name: str,
    table: Tensor | None,
    numbers: Sequence[int],
    rows: Tensor,
) -> Encoded:
    """Encode an embedding or head of which some rows are replaced.

    Their differences are a product, with one column of zeros and a one for each row, unless the
    whole tensor takes less memory.

    Args:
        base: checkpoint.
        name: the base's tensor.
        table: as the adapter saved it; None: the base's.
        numbers: of the rows.
        rows: (numbers, columns).
    """
    old = base.tensor(name)
    before = old if table is None else _with_all_rows(base, name, table)
    count = len(old)
    if rows.shape != (len(numbers), *old.shape[1:]):
        raise InvalidAdapter(
            f"The adapter holds rows of shape {list(rows.shape)} of {name!r}, but {ADAPTER_CONFIG} "
            f"names {counted(len(numbers), 'token')} of it. Save the adapter again."
        )
    if max(numbers, default=0) >= len(before):
        raise InvalidAdapter(
            f"The adapter trains the token {max(numbers)} of {name!r}, which has {len(before)} "
            "rows in the base: the adapter lacks those that were added. Call merge_and_unload on "
            "the trained model, save it and compress that."
        )
    dtype, index = DTYPES[before.dtype], torch.tensor(numbers)
    after = before.index_copy(0, index, rows.to(before.dtype))
    inside = index[index < count]
    u = torch.zeros(count, len(inside)).scatter_(0, inside[None], 1.0)
    v = after[inside].float() - old[inside].float()
    same = before.dtype == old.dtype and before[:count].equal(old)
    if not same or u.nbytes + v.nbytes > old.nbytes:
        return encode_exact(to_numpy(after, dtype), dtype, tuple(after.shape))
    product = encode_low_rank(u.numpy(), v.numpy(), 1.0, dtype, {}, "F32")
    if len(after) == count:
        return deflate(product)
    added = to_numpy(after[count:], dtype)
    return deflate(encode_new_rows(product if len(inside) else None, added, count, dtype))


def _as_factor(name: str) -> tuple[str, str, bool]:
    """Split a name into module, side ("a", "b", or "" for a whole tensor) and "is an embedding".

    Raises:
        InvalidAdapter: it is a LoRA tensor of another kind.
    """
    for ending, (side, embedding) in FACTORS.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), side, embedding
    if ".lora_" in name:
        raise InvalidAdapter(
            f"Tensor {name!r} belongs to a feature that cannot be imported (DoRA, say). {MERGE}"
        )
    return name, "", False


def _with_all_rows(base: CheckpointReader, name: str, table: Tensor) -> Tensor:
    """An embedding or head with the base's rows beyond its own.

    A vocabulary resized to the tokenizer's size may be smaller than that of the base, whose further
    rows no token has.
    """
    shape = base.shapes.get(name, ())
    shorter = (is_embedding(name) or is_head(name)) and table.shape[1:] == shape[1:]
    if not shorter or len(table) >= shape[0]:
        return table
    return torch.cat([table, base.tensor(name)[len(table) :].to(table.dtype)])


def _whole(base: CheckpointReader, name: str, tensor: Tensor) -> Encoded | None:
    """Encode a tensor that replaces the base's; None if it equals the base's."""
    tensor = _with_all_rows(base, name, tensor)
    dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
    entry = base.entries.get(name)
    if entry is not None and shape[1:] == entry.shape[1:] and shape[:1] > entry.shape[:1]:
        rows, old = entry.shape[0], base.tensor(name)
        if tensor.dtype == old.dtype and tensor[:rows].equal(old):
            return encode_new_rows(None, to_numpy(tensor[rows:], dtype), rows, dtype)
        return encode_exact(to_numpy(tensor, dtype), dtype, shape)
    entry = base_entry(base.entries, name, shape)
    data = to_numpy(tensor, dtype)
    if (dtype, hashlib.sha256(data.tobytes()).hexdigest()) == (entry.dtype, entry.sha256):
        return None
    return encode_exact(data, dtype, shape)
