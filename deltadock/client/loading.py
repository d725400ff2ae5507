"""A delta in a plain `transformers` model, in place, and out again."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from deltadock.artifacts.checkpoint import CheckpointManifest, TensorEntry, merkle_root, scan_folder
from deltadock.artifacts.export import TORCH_DTYPES, check_base, fits, merged
from deltadock.artifacts.reader import Artifact
from deltadock.client.views import checkpoint_views, tensors_of
from deltadock.errors import BaseMismatch, InvalidArtifact, UnsupportedModel

SAFETENSORS_DTYPES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}

GENERATION: Final = "generation_config.json"

NARROW: Final = (torch.bfloat16, torch.float16)
"""What the weights of a model in float32 may have been stored in."""


@dataclass(frozen=True, slots=True)
class _Base:
    """The model's weights as the base's checkpoint has them: views of its parameters.

    Attributes:
        views: by the checkpoint's names; each is a part of a parameter, or the whole.
        dtype: what floating-point weights were stored in where the model has them in float32.
        folder: the checkpoint, if there is one to read the weights from.
    """

    views: Mapping[str, Tensor]
    dtype: torch.dtype | None = None
    folder: Path | None = None
    files: Mapping[str, str] | None = None

    def tensor(self, name: str) -> Tensor:
        """A weight as it was stored."""
        if self.folder is None or self.files is None:
            return _narrowed(self.views[name], self.dtype)
        with safe_open(str(self.folder / self.files[name]), framework="pt") as file:
            stored: Tensor = file.get_tensor(name).to(self.views[name].device)
        view = self.views[name]
        if stored.shape != view.shape or not torch.equal(stored.to(view.dtype), view):
            raise BaseMismatch(
                f"The model's {name!r} is not what {self.folder} has. Load the model from there, "
                "and unload any other delta first."
            )
        return stored


class _Changes:
    """What was put into a model, and what was there before."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._attributes: list[tuple[Any, str, Any]] = []

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Give a parameter or buffer other data; all who hold it see them."""
        self._tensors.append((tensor, tensor.data))
        tensor.data = data

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        self._attributes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, the last first; a second time does nothing."""
        while self._tensors:
            tensor, before = self._tensors.pop()
            tensor.data = before
        while self._attributes:
            setattr(*self._attributes.pop())


class LoadedDelta:
    """A delta that a model has taken on; a context manager that unloads it.

    Attributes:
        files: the fine-tune's config and tokenizer files that differ from the base's, by name;
            None for those it has not. The tokenizer that goes with the delta is made of them.
    """

    def __init__(self, files: Mapping[str, str | bytes | None], changes: _Changes) -> None:
        self.files = files
        self._changes = changes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unload()

    def unload(self) -> None:
        """Give the model its base's weights back, bit for bit: they have been kept."""
        self._changes.undo()


def load_delta(model: Any, delta: Path | str, base: Path | str | None = None) -> LoadedDelta:
    """Turn a model of `transformers` into the fine-tuned one, in place.

    The changed weights are new tensors; the old ones are kept for `unload`, so the model takes
    the changed weights' memory once more. A larger vocabulary makes embedding and head longer.

    Args:
        model: the base as `from_pretrained` gave it; on any device, in any floating-point dtype.
        delta: the delta file.
        base: the checkpoint folder that the model was loaded from. It is needed where the
            model's own weights do not prove it to be the delta's base, as after a cast that
            rounded them.

    Raises:
        BaseMismatch: the model is another than the delta's base, or cannot be shown to be it.
        InvalidArtifact: the delta cannot be read, is damaged or does not fit the model.
        UnsupportedModel: weights are quantized or elsewhere, so that none can be put in place.
    """
    with Artifact(Path(delta)) as artifact, torch.no_grad():
        artifact.check_intact()
        views = checkpoint_views(model)
        found = _prove(artifact, model, views) if base is None else _read(artifact, views, base)
        replaced = _replaced(artifact, found, model)
        changes = _Changes()
        try:
            for tensor, data in replaced:
                if data.shape != tensor.shape:
                    _lengthen(changes, model, tensor, len(data))
                changes.replace(tensor, data)
            _generate_as(changes, model, artifact.files.get(GENERATION))
        except BaseException:
            changes.undo()
            raise
        return LoadedDelta({**artifact.files, **artifact.binary_files}, changes)


def _tied(model: Any) -> set[str]:
    """Names of weights that are other weights, by the model's config."""
    return set(getattr(model, "all_tied_weights_keys", {}) or {})


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.dtype == torch.float32 else tensor


def _raw(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    digest = hashlib.sha256(_raw(tensor)).hexdigest()
    return TensorEntry(name, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), "", digest)


def _stored_dtypes(views: Mapping[str, Tensor]) -> Iterator[torch.dtype | None]:
    """What the weights may have been stored in: as they are, or narrower if all fit that."""
    yield None
    wide = [view for view in views.values() if view.dtype == torch.float32]
    for dtype in NARROW:
        if wide and all(torch.equal(view.to(dtype).float(), view) for view in wide):
            yield dtype


def _prove(artifact: Artifact, model: Any, views: Mapping[str, Tensor]) -> _Base:
    """The model's own weights, once their hashes give the digest of the delta's base."""
    tied = _tied(model)
    for dtype in _stored_dtypes(views):
        entries = [_entry(name, _narrowed(view, dtype)) for name, view in views.items()]
        # Tied weights may be in the checkpoint once or twice.
        for found in (entries, [entry for entry in entries if entry.name not in tied]):
            if merkle_root(found) == artifact.base_digest:
                return _Base(views, dtype)
    raise BaseMismatch(
        f"{artifact.path.name} belongs to the base with weights digest {artifact.base_digest}, "
        "which the model's weights do not have. Load its base, unchanged and with no other delta; "
        "if it is that and was cast or converted when it was loaded, name its folder: "
        "load_delta(model, delta, base=folder)."
    )


def _read(artifact: Artifact, views: Mapping[str, Tensor], base: Path | str) -> _Base:
    """The checkpoint's weights, each to be compared with the model's before it is used."""
    folder = Path(base)
    manifest: CheckpointManifest = scan_folder(folder)
    check_base(artifact, manifest.weights_digest)
    files = {entry.name: entry.file for entry in manifest.tensors}
    return _Base({name: view for name, view in views.items() if name in files}, None, folder, files)


class _Owners:
    """Finds the parameter, or buffer, that a view is a part of."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
        self._starts = sorted(self._tensors)

    def of(self, view: Tensor) -> Tensor | None:
        place = bisect_right(self._starts, view.data_ptr()) - 1
        if place < 0 or not view.numel():
            return None
        owner = self._tensors[self._starts[place]]
        return owner if view.data_ptr() < owner.data_ptr() + owner.nbytes else None


def _replaced(artifact: Artifact, base: _Base, model: Any) -> list[tuple[Tensor, Tensor]]:
    """The model's tensors that change, each with its new data."""
    owners, tied = _Owners(tensors_of(model).values()), _tied(model)
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    # What is tied to another tensor comes last: it is the other's that counts.
    for name in sorted(artifact.records, key=lambda name: (name in tied, name)):
        view = base.views.get(name)
        if view is None:
            raise InvalidArtifact(f"The delta changes {name!r}, which the model lacks.")
        if not fits(artifact.resolved(name).record, view.shape):
            raise InvalidArtifact(f"The delta's {name!r} is of another shape than the model's.")
        owner = owners.of(view)
        if owner is None or not owner.is_contiguous():
            raise UnsupportedModel(f"The model holds {name!r} in another form than its checkpoint.")
        key = owner.data_ptr()
        if view.shape == owner.shape and key in replaced:
            continue
        data = merged(artifact, name, base.tensor(name)).to(view.dtype)
        if view.shape == owner.shape:
            replaced[key] = owner, data
        elif data.shape != view.shape:
            raise UnsupportedModel(f"{name!r} is a part of a parameter and cannot be lengthened.")
        else:
            _, whole = replaced.setdefault(key, (owner, owner.detach().clone()))
            offset = (view.data_ptr() - key) // view.element_size()
            whole.as_strided(view.shape, view.stride(), offset).copy_(data)
    return list(replaced.values())


def _lengthen(changes: _Changes, model: Any, tensor: Tensor, rows: int) -> None:
    """Tell modules and config of a vocabulary's new size."""
    before = len(tensor)
    counts = {nn.Embedding: "num_embeddings", nn.Linear: "out_features"}
    owners = [
        (module, counts.get(type(module)))
        for module in model.modules()
        if any(tensor is parameter for parameter in module.parameters(recurse=False))
    ]
    config = model.config.get_text_config()
    for owner, name in [*owners, (config, "vocab_size"), (model, "vocab_size")]:
        if name is not None and getattr(owner, name, None) == before:
            changes.put(owner, name, rows)


def _generate_as(changes: _Changes, model: Any, text: str | None) -> None:
    """Give `generate` the fine-tune's defaults, such as the token that ends a text."""
    if text is None or not hasattr(model, "generation_config"):
        return
    try:
        settings = json.loads(text)
        config = GenerationConfig.from_dict(settings)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArtifact(f"The delta's {GENERATION} cannot be used.") from error
    changes.put(model, "generation_config", config)
