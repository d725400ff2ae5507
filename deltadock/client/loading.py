"""Load a delta, a file or one of a server, into a plain `transformers` model, and unload it."""

import hashlib
import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from deltadock.artifacts.checkpoint import (
    CONFIG,
    TOKENIZER_FILES,
    CheckpointManifest,
    TensorEntry,
    merkle_root,
)
from deltadock.artifacts.configs import EPSILONS, ROPE, check_same_forward, expand
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.names import find_name, is_embedding, is_head, predicts_further
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import TORCH_DTYPES, fits_base, merged_tensor
from deltadock.artifacts.tokenizers import open_tokenizer
from deltadock.client.blocking import Client
from deltadock.client.cache import fetch_cached
from deltadock.client.routes import is_reference
from deltadock.client.views import checkpoint_views, tensors_of
from deltadock.errors import (
    BaseMismatch,
    DeltadockError,
    InvalidArtifact,
    NotFound,
    UnsupportedModel,
)

SAFETENSORS_DTYPES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}

GENERATION: Final = "generation_config.json"

NORMS: Final = ("eps", "variance_epsilon")
SCALES: Final = ("scaling",)
"""Attributes of norms and of attention that configs decide."""

LONGEST: Final = "max_position_embeddings"

NEEDED_FILES: Final = sorted({CONFIG, *TOKENIZER_FILES})
"""What a tokenizer is loaded from."""

NARROW_DTYPES: Final = (torch.bfloat16, torch.float16)
"""Dtypes that a float32 model's checkpoint may have."""


@dataclass(frozen=True, slots=True)
class _BaseWeights:
    """The weights of the base's checkpoint, from the model or from the checkpoint folder.

    Attributes:
        views: views of the model's parameters by checkpoint name.
        dtype: dtype of the checkpoint where the model is in float32.
        folder: the checkpoint folder to read weights from, if given.
        files: the file of each tensor in `folder`.
    """

    views: Mapping[str, Tensor]
    dtype: torch.dtype | None = None
    folder: Path | None = None
    files: Mapping[str, str] | None = None

    def tensor(self, name: str) -> Tensor:
        """A weight with the value and dtype of the checkpoint.

        Raises:
            BaseMismatch: the model's weight is not the checkpoint's.
        """
        if self.folder is None or self.files is None:
            return _narrowed(self.views[name], self.dtype)
        with safe_open(str(self.folder / self.files[name]), framework="pt") as file:
            stored: Tensor = file.get_tensor(name).to(self.views[name].device)
        view = self.views[name]
        if stored.shape != view.shape or not torch.equal(stored.to(view.dtype), view):
            raise BaseMismatch(
                f"The model's {name!r} differs from {self.folder}. Load the model from there, "
                "and unload any other delta first."
            )
        return stored


class _Replacements:
    """Records replaced tensors and attributes of a model, to restore them."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._attributes: list[tuple[Any, str, Any]] = []

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Replace the data of a parameter or buffer in place, for all its references."""
        self._tensors.append((tensor, tensor.data))
        tensor.data = data

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        self._attributes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Restore everything in reverse order; idempotent."""
        while self._tensors:
            tensor, before = self._tensors.pop()
            tensor.data = before
        while self._attributes:
            setattr(*self._attributes.pop())


class LoadedDelta:
    """Handle of a delta loaded into a model; a context manager that unloads it.

    Attributes:
        files: the fine-tune's config and tokenizer files that differ from the base's, by name; None
            for files that the fine-tune lacks. Together with the base's they make the tokenizer.
    """

    def __init__(
        self, files: Mapping[str, str | bytes | None], replacements: _Replacements
    ) -> None:
        self.files = files
        self._replacements = replacements

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unload()

    def tokenizer(self, base: Path | str) -> Any:
        """The fine-tune's tokenizer: the base's files, with those that the fine-tune has changed.

        `base` is the base's folder, or its name on the Hugging Face Hub.
        """
        with tempfile.TemporaryDirectory(prefix="deltadock-tokenizer-") as name:
            folder, source = Path(name), Path(base)
            if not source.is_dir():
                source = Path(snapshot_download(str(base), allow_patterns=NEEDED_FILES))
            for file in NEEDED_FILES:
                if (source / file).is_file():
                    (folder / file).write_bytes((source / file).read_bytes())
            for file, content in self.files.items():
                if content is None:
                    (folder / file).unlink(missing_ok=True)
                else:
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    data = content.encode() if isinstance(content, str) else content
                    (folder / file).write_bytes(data)
            return open_tokenizer(folder)

    def unload(self) -> None:
        """Restore the base's weights bit for bit, from the tensors that were kept."""
        self._replacements.restore()


def load_delta(
    model: Any,
    delta: Path | str,
    base: Path | str | None = None,
    *,
    client: Client | None = None,
) -> LoadedDelta:
    """Turn a `transformers` model into the fine-tuned one, in place.

    Changed weights get new tensors and the old ones are kept for `unload`, so memory grows by the
    size of the changed weights. A larger vocabulary lengthens embedding and head. Rotary embeddings
    and norms' epsilons become the fine-tune's.

    Args:
        model: the base as loaded by `from_pretrained`, on any device, in any floating-point dtype.
        delta: the delta file, or the name or id of a delta of a server, such as
            `project/name@prod`, which is downloaded and kept in the user's cache, and verified.
        base: the checkpoint folder that the model was loaded from. Needed if the model's weights do
            not have the delta's base digest, for example after a cast that rounded them.
        client: of the server; None: `Client()`.

    Raises:
        NotFound: there is no such file, or no such delta on the server.
        BaseMismatch: the model is not the delta's base, or cannot be verified to be.
        InvalidArtifact: the delta is unreadable, damaged or does not fit the model.
        ArchitectureMismatch: the fine-tune's config.json uses the weights differently otherwise.
        UnsupportedModel: weights are quantized or not in memory, so they cannot be replaced.
    """
    path = fetch(delta, client)
    with _named_as_on_the_server(delta, path, client), Artifact(path) as artifact, torch.no_grad():
        artifact.check_intact()
        views = checkpoint_views(model)
        weights = (
            _verified_weights(artifact, model, views)
            if base is None
            else _folder_weights(artifact, views, base)
        )
        untied = _untied_head(artifact, weights, model)
        new_data = _new_data(artifact, weights, model, untied)
        replacements = _Replacements()
        try:
            if untied is not None:
                _untie(replacements, model, untied.data)
            for tensor, data in new_data:
                if data.shape != tensor.shape:
                    _resize_vocabulary(replacements, model, tensor, len(data))
                replacements.replace(tensor, data)
            _set_config(replacements, model, artifact.files.get(CONFIG))
            _set_generation_config(replacements, model, artifact.files.get(GENERATION))
        except BaseException:
            replacements.restore()
            raise
        return LoadedDelta({**artifact.files, **artifact.binary_files}, replacements)


def from_pretrained(
    base: Path | str, delta: Path | str, *, client: Client | None = None, **options: Any
) -> tuple[Any, Any]:
    """The fine-tuned model and its tokenizer, from its base and its delta.

    Args:
        base: the base's folder, or its name on the Hugging Face Hub.
        delta, client: as for `load_delta`.
        options: of `AutoModelForCausalLM.from_pretrained`; the dtype is the checkpoint's, unless
            it says otherwise.

    Raises:
        DeltadockError: as `load_delta`.
    """
    path = fetch(delta, client)
    model = AutoModelForCausalLM.from_pretrained(base, **{"dtype": "auto", **options})
    folder = Path(base) if Path(base).is_dir() else None
    with _named_as_on_the_server(delta, path, client):
        loaded = load_delta(model, path, folder)
    model.eval()
    return model, loaded.tokenizer(base)


def fetch(delta: Path | str, client: Client | None = None) -> Path:
    """The delta's file: `delta` itself, or that of a name or id, from the user's cache.

    Raises:
        NotFound: there is no such file, or no such delta on the server.
        NotReady, HashMismatch, Unavailable: as `fetch_cached`.
    """
    if Path(delta).is_file():
        return Path(delta)
    if isinstance(delta, Path) or not is_reference(delta):
        raise NotFound(f"{delta} is neither a delta file nor a name such as project/model.")
    if client is None:
        with Client() as default:
            return fetch(delta, default)
    return fetch_cached(client, delta)


@contextmanager
def _named_as_on_the_server(delta: Path | str, path: Path, client: Client | None) -> Iterator[None]:
    """Have a BaseMismatch name a fetched delta and its base, whose cached file has but a digest."""
    try:
        yield
    except BaseMismatch as error:
        if Path(delta) != path:
            # Not closed here, if it is the caller's.
            server = Client() if client is None else nullcontext(client)
            with suppress(DeltadockError), server as asked:
                found = asked.delta(str(delta))
                named = error.message.replace(path.name, found.reference)
                error.message = f"{named} On the server that base is {found.base.name!r}."
                error.args = (error.message,)
        raise


def _tied(model: Any) -> set[str]:
    """Names of weights that are tied to another weight."""
    return set(getattr(model, "all_tied_weights_keys", {}) or {})


def _narrowed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.dtype == torch.float32 else tensor


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    digest = hashlib.sha256(_bytes(tensor)).hexdigest()
    return TensorEntry(name, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), "", digest)


def _stored_dtypes(views: Mapping[str, Tensor]) -> Iterator[torch.dtype | None]:
    """Candidate dtypes of the checkpoint: the model's (None), or narrower without rounding."""
    yield None
    wide = [view for view in views.values() if view.dtype == torch.float32]
    for dtype in NARROW_DTYPES:
        if wide and all(torch.equal(view.to(dtype).float(), view) for view in wide):
            yield dtype


def _verified_weights(artifact: Artifact, model: Any, views: Mapping[str, Tensor]) -> _BaseWeights:
    """The model's weights, if their hashes give the base digest of the delta.

    Raises:
        BaseMismatch: they do not.
    """
    tied = _tied(model)
    prefix = f"{model.base_model_prefix}."
    # A checkpoint of the body alone lacks the prefix.
    body = {name.removeprefix(prefix): view for name, view in views.items()}
    for dtype in _stored_dtypes(views):
        for named in (views, body):
            entries = [_entry(name, _narrowed(view, dtype)) for name, view in named.items()]
            # A checkpoint may hold a tied weight once or twice.
            for candidate in (entries, [entry for entry in entries if entry.name not in tied]):
                if merkle_root(candidate) == artifact.base_digest:
                    return _BaseWeights(named, dtype)
    raise BaseMismatch(
        f"{artifact.path.name} needs the base with weights digest {artifact.base_digest}, which is "
        "not the digest of this model's weights. Load that base, unmodified and without another "
        "delta. If loading cast or converted its weights, pass its folder: "
        "load_delta(model, delta, base=folder)."
    )


def _folder_weights(
    artifact: Artifact, views: Mapping[str, Tensor], base: Path | str
) -> _BaseWeights:
    """The weights of the checkpoint folder; each is compared with the model's when it is read."""
    folder = Path(base)
    manifest: CheckpointManifest = scan_folder(folder)
    artifact.check_base(manifest.weights_digest)
    files = {entry.name: entry.file for entry in manifest.tensors}
    kind = manifest.config["model_type"]
    named = {
        name: views[view] for name in files if (view := find_name(name, views, kind)) is not None
    }
    return _BaseWeights(named, None, folder, files)


class _OwnerIndex:
    """Finds the parameter or buffer whose memory a view is in."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
        self._starts = sorted(self._tensors)

    def of(self, view: Tensor) -> Tensor | None:
        index = bisect_right(self._starts, view.data_ptr()) - 1
        if index < 0 or not view.numel():
            return None
        owner = self._tensors[self._starts[index]]
        return owner if view.data_ptr() < owner.data_ptr() + owner.nbytes else None


class _UntiedHead(NamedTuple):
    """A head of its own for a model whose head is tied to the embedding."""

    name: str
    data: Tensor


def _untied_head(artifact: Artifact, base: _BaseWeights, model: Any) -> _UntiedHead | None:
    """The head that the delta has for itself, if the model's is tied.

    Its record is relative to the embedding.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    records = artifact.records
    own = [name for name in records if is_head(name) and records[name]["kind"] != "alias"]
    if not own or head is None or head.weight is not table.weight:
        return None
    embedding = next((name for name in base.views if is_embedding(name)), None)
    if embedding is None:
        raise InvalidArtifact(f"The delta changes {own[0]!r}, which the model does not have.")
    data = merged_tensor(artifact, own[0], base.tensor(embedding))
    return _UntiedHead(own[0], data.to(table.weight.dtype))


def _untie(replacements: _Replacements, model: Any, data: Tensor) -> None:
    """Give the head a tensor of its own."""
    head = model.get_output_embeddings()
    replacements.set_attribute(head, "weight", nn.Parameter(data, requires_grad=False))
    replacements.set_attribute(head, "out_features", len(data))
    replacements.set_attribute(model, "all_tied_weights_keys", {})
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "tie_word_embeddings"):
            replacements.set_attribute(config, "tie_word_embeddings", False)


def _new_data(
    artifact: Artifact, base: _BaseWeights, model: Any, untied: _UntiedHead | None
) -> list[tuple[Tensor, Tensor]]:
    """The tensors of the model that the delta changes, with their new data."""
    owners, tied = _OwnerIndex(tensors_of(model).values()), _tied(model)
    replaced: dict[int, tuple[Tensor, Tensor]] = {}
    # Tied names come last: the tensor that they are tied to decides.
    for name in sorted(artifact.records, key=lambda name: (name in tied, name)):
        if untied is not None and name == untied.name:
            continue
        view = base.views.get(name)
        if view is None and predicts_further(name, model.config.to_dict()):
            continue
        if view is None:
            raise InvalidArtifact(f"The delta changes {name!r}, which the model does not have.")
        if not fits_base(artifact.resolved(name).record, view.shape):
            raise InvalidArtifact(f"The delta's {name!r} has another shape than the model's.")
        owner = owners.of(view)
        if owner is None or not owner.is_contiguous():
            raise UnsupportedModel(
                f"The model stores {name!r} in another form than its checkpoint."
            )
        key = owner.data_ptr()
        if view.shape == owner.shape and key in replaced:
            continue
        data = merged_tensor(artifact, name, base.tensor(name)).to(view.dtype)
        if view.shape == owner.shape:
            replaced[key] = owner, data
        elif data.shape != view.shape:
            raise UnsupportedModel(f"{name!r} is a part of a parameter and cannot be lengthened.")
        else:
            _, whole = replaced.setdefault(key, (owner, owner.detach().clone()))
            offset = (view.data_ptr() - key) // view.element_size()
            whole.as_strided(view.shape, view.stride(), offset).copy_(data)
    return list(replaced.values())


def _resize_vocabulary(replacements: _Replacements, model: Any, tensor: Tensor, rows: int) -> None:
    """Set the new vocabulary size on the modules that own `tensor`, the config and the model."""
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
            replacements.set_attribute(owner, name, rows)


def _set_config(replacements: _Replacements, model: Any, text: str | None) -> None:
    """Set the fine-tune's rotary embeddings and epsilons of norms, if they are not the base's."""
    if text is None:
        return
    try:
        config = json.loads(text)
        differences = check_same_forward(model.config.to_dict(), config)
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidArtifact(f"The delta's {CONFIG} is invalid.") from error
    if not differences:
        return
    old, new = model.config.get_text_config(), expand(config).get_text_config()
    decoder = model.get_decoder()
    with torch.device("meta"):
        rebuilt = dict(type(decoder)(new).named_modules())
    keys = {one.key.rpartition(".")[2] for one in differences}
    for path, module in list(decoder.named_modules()):
        # Not all norms have the config's epsilon; scores of YaRN may be scaled by its factor.
        for name in (
            *(NORMS if keys.intersection(EPSILONS) else ()),
            *(SCALES if ROPE in keys else ()),
        ):
            after = getattr(rebuilt[path], name, None)
            if isinstance(after, float) and after != getattr(module, name):
                replacements.set_attribute(module, name, after)
        for name, child in list(module.named_children()):
            if ROPE in keys and name.endswith("rotary_emb"):
                rotary = type(child)(new).to(model.device)
                replacements.set_attribute(module, name, rotary)
    for key in keys:
        replacements.set_attribute(old, key, getattr(new, key))
    if hasattr(old, LONGEST):  # not where positions have no embeddings (ALiBi)
        replacements.set_attribute(old, LONGEST, getattr(new, LONGEST))


def _set_generation_config(replacements: _Replacements, model: Any, text: str | None) -> None:
    """Set the fine-tune's defaults of `generate`, such as its end-of-sequence token."""
    if text is None or not hasattr(model, "generation_config"):
        return
    try:
        settings = json.loads(text)
        config = GenerationConfig.from_dict(settings)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArtifact(f"The delta's {GENERATION} is invalid.") from error
    replacements.set_attribute(model, "generation_config", config)
