"""Write a delta of low-rank products as a PEFT adapter, the reverse of an import."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltadock.artifacts.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    CheckpointManifest,
)
from deltadock.artifacts.compatibility import is_tied, tied_head
from deltadock.artifacts.configs import check_same_forward, expand
from deltadock.artifacts.encodings import Encoded, inflate, parts
from deltadock.artifacts.export import new_folder, write_carried, write_tensors
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.names import find_name, is_embedding, is_head
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import TORCH_DTYPES, merged_tensor
from deltadock.compression.adapters.config import model_name
from deltadock.compression.adapters.encoding import PREFIX
from deltadock.compression.adapters.products import BASE_LAYER, Factors
from deltadock.compression.families import CALIBRATED, Family
from deltadock.compression.model.families import build, is_experts
from deltadock.errors import InvalidAdapter

WHOLE: Final = ("exact", "rows")
"""Encodings of tensors that an adapter holds whole."""

_EXPERT: Final = re.compile(r"^(.+)\.(\d+)\.(\w+)\.weight$")

OTHERWISE: Final = "Merge it into its base instead: `deltadock merge`."


class Product(NamedTuple):
    """The delta `scaling * B @ A`."""

    factors: Factors
    scaling: float

    @property
    def rank(self) -> int:
        """Of the factors."""
        return len(self.factors.a)


def export_adapter(base: Path, delta: Path, out: Path) -> None:
    """Write a delta as a PEFT LoRA adapter of its base.

    Factors are those of the delta, so that an imported adapter is the same model again. Other
    changed tensors are whole in it.

    Args:
        base: the base's checkpoint folder.
        delta: the delta file.
        out: the adapter's folder; appears complete or not at all.

    Raises:
        BaseMismatch: `base` is not the delta's base.
        InvalidArtifact: the delta is unreadable or damaged.
        InvalidAdapter: it changes what no adapter can, or has no low-rank products.
        UnsupportedModel: `transformers` cannot build the model.
        Conflict: `out` exists and is not an empty folder.
    """
    with new_folder(out) as folder, Artifact(delta) as artifact:
        manifest = scan_folder(base)
        artifact.check_base(manifest.weights_digest)
        artifact.check_intact()
        text = artifact.files.get(CONFIG)
        if text is not None and (changed := check_same_forward(manifest.config, json.loads(text))):
            raise InvalidAdapter(
                f"The delta has another {changed[0].key} than its base, which an adapter cannot "
                f"have. {OTHERWISE}"
            )
        tensors, config = _Export(base, manifest, artifact).run()
        kept = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
        write_tensors(folder / ADAPTER_WEIGHTS, {k: t.clone() for k, t in kept.items()})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_carried(artifact, folder, without=CONFIG)


class _Export:
    """One export: the adapter's tensors by the model's names, and its configuration."""

    def __init__(self, base: Path, manifest: CheckpointManifest, artifact: Artifact) -> None:
        self._base, self._manifest, self._artifact = base, manifest, artifact
        self._kind: str = manifest.config["model_type"]
        self._entries = {**tied_head(manifest), **{t.name: t for t in manifest.tensors}}
        self._model = build(expand(manifest.config), torch.float32)
        self._names = list(self._model.state_dict())
        # In mixtures, PEFT takes layers of these names for the experts' stacked projections.
        mixture = any(is_experts(module) for module in self._model.modules())
        self._projections = CALIBRATED.get(self._kind, Family()).experts
        self._reserved = {"gate", *self._projections} if mixture else set()
        self._layers: dict[str, Product] = {}
        self._parameters: dict[str, list[Product]] = {}
        self._whole: dict[str, Tensor] = {}
        self._tied = False

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, without `PREFIX`, and the content of adapter_config.json."""
        experts: dict[str, dict[tuple[int, int], Product]] = {}
        for name, record in self._artifact.records.items():
            if record["kind"] == "alias" and is_tied(self._manifest):
                continue
            encoded = inflate(self._artifact.resolved(name))
            target = find_name(name, self._names, self._kind)
            if target is not None:
                self._add(target, name, encoded)
            elif (found := self._expert(name)) is not None and (product := _product(encoded)):
                experts.setdefault(found[0], {})[found[1:]] = _oriented(*product, transposed=False)
            else:
                raise _no_adapter(name, record["kind"])
        for parameter, pieces in experts.items():
            self._parameters[parameter] = self._stacked(parameter, pieces)
        if not self._layers and not self._parameters:
            raise InvalidAdapter(f"The delta has no low-rank products. {OTHERWISE}")
        changed = {
            name for name, record in self._artifact.records.items() if record["kind"] != "alias"
        }
        table, head = (any(is_one(n) for n in changed) for is_one in (is_embedding, is_head))
        self._tied = is_tied(self._manifest) and table and not head
        return self._tensors(), self._config()

    def _add(self, target: str, name: str, encoded: Encoded) -> None:
        """Add a tensor of the delta that is the model's parameter `target`."""
        module, _, end = target.rpartition(".")
        owner, record = self._model.get_submodule(module), encoded.record
        if (found := _product(encoded)) is not None:
            layer = end == "weight" and isinstance(owner, nn.Linear | nn.Embedding | Conv1D)
            product = _oriented(*found, transposed=layer and isinstance(owner, Conv1D))
            if not layer or module.rpartition(".")[2] in self._reserved:
                self._parameters[target] = [product]
            elif product.factors.a.any() and product.factors.b.any():
                self._layers[module] = product
        elif record["kind"] == "stack":
            transposed = getattr(owner, "is_transposed", False)
            self._parameters[target] = _padded(
                name,
                [
                    None if part is None else _oriented(*_need(name, part), transposed=transposed)
                    for part in parts(encoded)
                ],
            )
        elif record["kind"] in WHOLE and tuple(record["shape"]) == self._entries[name].shape:
            self._whole[target] = self._merged(name)
        else:
            raise _no_adapter(name, record["kind"])

    def _merged(self, name: str) -> Tensor:
        entry = self._entries[name]
        with safe_open(str(self._base / entry.file), framework="pt") as file:
            return merged_tensor(self._artifact, name, file.get_tensor(entry.name))

    def _expert(self, name: str) -> tuple[str, int, int] | None:
        """The model's stacked parameter, the expert and the projection of an expert's tensor."""
        gate, up, down = self._projections
        held = {gate: ("gate_up_proj", 0), up: ("gate_up_proj", 1), down: ("down_proj", 0)}
        match = _EXPERT.search(name)
        if match is None or match[3] not in held:
            return None
        parameter, piece = held[match[3]]
        target = find_name(f"{match[1]}.{parameter}", self._names, self._kind)
        return None if target is None else (target, int(match[2]), piece)

    def _stacked(self, name: str, pieces: Mapping[tuple[int, int], Product]) -> list[Product]:
        """The products of all experts of a parameter, whose projections are stacked rows."""
        shape = self._model.get_parameter(name).shape
        count = 2 if name.endswith("gate_up_proj") else 1
        joined: list[Product | None] = []
        for expert in range(shape[0]):
            found = [pieces.get((expert, piece)) for piece in range(count)]
            joined.append(_rows(name, found, shape[1] // count) if any(found) else None)
        return _padded(name, joined)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for module, (factors, _) in self._layers.items():
            if isinstance(self._model.get_submodule(module), nn.Embedding):
                tensors[f"{module}.lora_embedding_A"] = factors.b.t()
                tensors[f"{module}.lora_embedding_B"] = factors.a.t()
            else:
                tensors |= _named(module, factors)
        order = [name for name, _ in self._model.named_parameters() if name in self._parameters]
        for module in dict.fromkeys(name.rpartition(".")[0] for name in order):
            own = [name for name in order if name.rpartition(".")[0] == module]
            for depth, name in enumerate(reversed(own)):
                each = [product.factors for product in self._parameters[name]]
                a = torch.cat([one.a for one in each])
                b = torch.stack([one.b for one in each], dim=2).flatten(1)
                tensors |= _named(module + depth * BASE_LAYER, Factors(a, b))
        for name, tensor in self._whole.items():
            module, _, end = name.rpartition(".")
            wrappers = sum(one.rpartition(".")[0] == module for one in order)
            depth = wrappers + (module in self._layers)
            tensors[f"{module}{depth * BASE_LAYER}.{end}"] = tensor
        for module in self._saved():
            for end in self._model.get_submodule(module).state_dict():
                if f"{module}.{end}" not in tensors:
                    stored = find_name(f"{module}.{end}", self._entries, self._kind)
                    tensors[f"{module}.{end}"] = self._merged(stored or f"{module}.{end}")
        table, head = self._embedding_and_head()
        if self._tied and table in self._whole:  # PEFT reads both
            tensors[head] = self._whole[table]
        return tensors

    def _embedding_and_head(self) -> tuple[str, str]:
        """Their names in the model."""
        table, head = (next(filter(is_one, self._names)) for is_one in (is_embedding, is_head))
        return table, head

    def _saved(self) -> list[str]:
        """The modules that the adapter holds whole."""
        weights = (name.removesuffix(".weight") for name in self._whole if name.endswith(".weight"))
        wrapped = {*self._layers, *(name.rpartition(".")[0] for name in self._parameters)}
        return [module for module in weights if module not in wrapped]

    def _config(self) -> dict[str, Any]:
        scales = {module: (one.rank, one.scaling) for module, one in self._layers.items()}
        scales |= {name: (each[0].rank, each[0].scaling) for name, each in self._parameters.items()}
        if self._tied:  # PEFT scales the head's product by the head's patterns
            table, head = (name.removesuffix(".weight") for name in self._embedding_and_head())
            scales |= {head: scales[table]} if table in scales else {}
        ((rank, scaling), _), *_ = Counter(scales.values()).most_common()
        saved = self._saved()
        others = {name for name in self._whole if name.removesuffix(".weight") not in saved}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model_name(self._base),
            "r": rank,
            "lora_alpha": _alpha(rank, scaling),
            "rank_pattern": {name: r for name, (r, _) in scales.items() if r != rank},
            "alpha_pattern": {
                name: _alpha(*one)
                for name, one in scales.items()
                if _alpha(*one) != _alpha(rank, scaling)
            },
            "target_modules": list(self._layers),
            "target_parameters": list(self._parameters) or None,
            "modules_to_save": saved or None,
            "bias": "all" if others else "none",
            "fan_in_fan_out": any(
                isinstance(self._model.get_submodule(module), Conv1D) for module in self._layers
            ),
            "ensure_weight_tying": self._tied,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "inference_mode": True,
        }


def _product(encoded: Encoded) -> tuple[Product, bool] | None:
    """A stored product of factors, and whether it is transposed; None: another encoding."""
    transposed = encoded.record["kind"] == "transposed"
    if transposed:
        (part,) = parts(encoded)
        assert part is not None
        encoded = part
    record = encoded.record
    if record["kind"] != "low-rank":
        return None
    u, v = (
        torch.from_numpy(np.array(encoded.segments[side])).view(
            TORCH_DTYPES[record["factor_dtype"]]
        )
        for side in "uv"
    )
    return Product(Factors(v, u), record["scaling"]), transposed


def _oriented(product: Product, stored: bool, *, transposed: bool) -> Product:
    """The product whose transpose, if `transposed`, is the delta of the weight.

    Args:
        product: as stored.
        stored: whether its transpose is the delta.
        transposed: whether PEFT transposes the product of the factors that it is given.
    """
    if stored == transposed:
        return product
    a, b = product.factors
    return product._replace(factors=Factors(b.t(), a.t()))


def _need(name: str, part: Encoded) -> tuple[Product, bool]:
    found = _product(part)
    if found is None:
        raise _no_adapter(name, part.record["kind"])
    return found


def _rows(name: str, found: Sequence[Product | None], height: int) -> Product:
    """One product for several that have each `height` rows of its result; None: zero."""
    products = [one for one in found if one is not None]
    scaling = _common(name, {one.scaling for one in products})
    first = products[0].factors.a
    shared = all(one.factors.a.equal(first) for one in products)
    empty = torch.zeros(height, len(first) if shared else 0, dtype=first.dtype)
    blocks = [empty if one is None else one.factors.b for one in found]
    if shared:
        return Product(Factors(first, torch.cat(blocks)), scaling)
    a = torch.cat([one.factors.a for one in products])
    return Product(Factors(a, torch.block_diag(*blocks)), scaling)


def _padded(name: str, found: list[Product | None]) -> list[Product]:
    """The products of all experts, of equal ranks: with ranks of zero where there are too few."""
    products = [one for one in found if one is not None]
    scaling = _common(name, {one.scaling for one in products})
    rank, (h_out, h_in) = max(one.rank for one in products), products[0].factors.shape
    dtype = products[0].factors.a.dtype
    padded = []
    for one in found:
        a, b = torch.zeros(rank, h_in, dtype=dtype), torch.zeros(h_out, rank, dtype=dtype)
        if one is not None:
            a[: one.rank], b[:, : one.rank] = one.factors
        padded.append(Product(Factors(a, b), scaling))
    return padded


def _common(name: str, scalings: set[float]) -> float:
    if len(scalings) != 1:
        raise InvalidAdapter(
            f"The experts of {name!r} have products of several scalings, which PEFT has not. "
            f"{OTHERWISE}"
        )
    return scalings.pop()


def _named(module: str, factors: Factors) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": factors.a, f"{module}.lora_B.weight": factors.b}


def _alpha(rank: int, scaling: float) -> int | float:
    """The alpha that gives the scaling; whole where rounding has made it nearly so."""
    alpha = scaling * rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def _no_adapter(name: str, kind: str) -> InvalidAdapter:
    return InvalidAdapter(
        f"The delta stores {name!r} as {kind!r}, or with added rows, which an adapter cannot hold. "
        f"{OTHERWISE}"
    )
