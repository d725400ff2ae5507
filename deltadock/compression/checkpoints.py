"""Base and fine-tuned checkpoints, read one tensor at a time from safetensors files."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from deltadock.artifacts.checkpoint import TensorEntry
from deltadock.artifacts.compatibility import (
    check_differs,
    inherits_tokenizer,
    match_tensors,
    tied_head,
)
from deltadock.artifacts.configs import check_same_forward
from deltadock.artifacts.encodings import NUMPY_DTYPES
from deltadock.artifacts.folder import folder_files, ignored_files, scan_folder
from deltadock.artifacts.names import is_embedding, is_head, is_in_block, predicts_further
from deltadock.compression.progress import ProgressReporter
from deltadock.compression.report import UNRELATED
from deltadock.errors import InvalidCheckpoint, NonFiniteWeights
from deltadock.words import counted

FLOAT_DTYPES: Final = {"BF16", "F16", "F32", "F64"}
"""Dtypes whose deltas can be compressed; tensors of any other dtype are stored exactly."""

RELATED: Final = 0.5
"""Median cosine between matrices of a fine-tune and of its base: below 0.02 for unrelated models,
above 0.8 for fine-tunes, however long they were trained."""
COMPARED_MATRICES: Final = 16
COMPARED_ROWS: Final = 256

KEPT_LAYERS: Final = (
    "The fine-tune lacks the base's layers for predicting further tokens, which transformers does "
    "not load: merged with the delta, the base keeps them."
)
DROPPED_LAYERS: Final = (
    "The fine-tune's layers for predicting further tokens, which transformers does not load, are "
    "left out: the base lacks them."
)

SMALLER_VOCABULARY: Final = (
    "The fine-tune has fewer tokens than its base: for the rest, the base's rows are kept."
)

INHERITED_TOKENIZER: Final = "The fine-tune has no tokenizer: the base's is used."


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One linear map of a checkpoint.

    Attributes:
        name: the checkpoint's tensor.
        part: index of the expert in a tensor that stacks all experts.
        transposed: the tensor is stored as (h_in, h_out).
        mixture: key shared by the same projection of all experts of a layer.
    """

    name: str
    part: int | None = None
    transposed: bool = False
    mixture: str | None = None

    @property
    def key(self) -> str:
        """Key in reports and statistics: the tensor's name and the part."""
        return self.name if self.part is None else f"{self.name}[{self.part}]"


class TensorSource(Protocol):
    """A model's tensors by name."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """Load a tensor in its stored dtype, on the CPU."""
        ...


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of a checkpoint's tensors, from the file headers alone."""
    names: set[str] = set()
    for path in folder_files(folder):
        if path.endswith(".safetensors"):
            with safe_open(str(folder / path), framework="pt") as file:
                names.update(file.keys())
    return frozenset(names)


class CheckpointReader:
    """Reads a checkpoint folder; opening it reads every file once, to hash and check it.

    Attributes:
        manifest: files and tensors with their digests.
        entries: tensors by name; those of a fine-tune by its base's names (`align`).
        non_finite: names of tensors, as stored, that hold NaN or an infinity.
        replaced: row numbers and rows that are read in place of the stored ones, by tensor.
        further: rows of the base that are read after the stored ones, by tensor (`align`).
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            InvalidCheckpoint: not a complete safetensors checkpoint.
        """
        self.folder = folder
        self.non_finite: set[str] = set()
        self.manifest = scan_folder(folder, self.non_finite)
        self.replaced: dict[str, tuple[Tensor, Tensor]] = {}
        self.further: dict[str, Tensor] = {}
        self.entries: dict[str, TensorEntry] = {t.name: t for t in self.manifest.tensors}

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> Tensor:
        """Load a tensor in its stored dtype, on the CPU."""
        with self._open(name) as file:
            tensor: Tensor = file.get_tensor(self.entries[name].name)
        if name in self.further:
            tensor = torch.cat([tensor, self.further[name].to(tensor.dtype)])
        if name in self.replaced:
            numbers, rows = self.replaced[name]
            tensor = tensor.index_copy(0, numbers, rows.to(tensor.dtype))
        return tensor

    def head(self, name: str, rows: int) -> Tensor:
        """The first rows of a tensor as stored, or all that it has."""
        with self._open(name) as file:
            part: Tensor = file.get_slice(self.entries[name].name)[:rows]
        return part

    def _open(self, name: str) -> safe_open:
        # Reopened for each tensor: pages of a mapped file stay resident, so that one mapping per
        # file would end up holding the whole checkpoint in memory.
        return safe_open(str(self.folder / self.entries[name].file), framework="pt")

    def matrix(self, ref: MatrixRef) -> Tensor:
        """Load a linear map (h_out, h_in) in its stored dtype; of stacked experts only its part."""
        if ref.part is None:
            matrix = self.tensor(ref.name)
        else:
            with self._open(ref.name) as file:
                matrix = file.get_slice(self.entries[ref.name].name)[ref.part]
        return matrix.t() if ref.transposed else matrix

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor shapes by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding and head that `further` completes; None: as many as stored."""
        return next((self.entries[name].shape[0] for name in self.further), None)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())

    @property
    def bf16_bytes(self) -> int:
        """Size of the weights at two bytes each, the reference of compression ratios."""
        return 2 * self.parameters


class ResizedSource:
    """A base's tensors extended by the rows that a fine-tune's larger vocabulary adds.

    An added row is the mean of the base's rows, as `resize_token_embeddings` initializes it.
    """

    def __init__(self, base: TensorSource, shapes: Mapping[str, Sequence[int]]) -> None:
        """Return `base`'s tensors in the fine-tune's `shapes`."""
        self._base = base
        self._shapes = shapes

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def tensor(self, name: str) -> Tensor:
        """Load a tensor in its stored dtype, on the CPU."""
        tensor = self._base.tensor(name)
        added = self._shapes[name][0] - len(tensor) if tensor.ndim else 0
        if not added:
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(added, *tensor.shape[1:])])


class Recast(NamedTuple):
    """Whether a tensor is the base's in another dtype: in value, and in every bit (-0 is not 0)."""

    in_value: bool
    in_bits: bool


@dataclass(frozen=True, slots=True)
class CheckpointPair:
    """A fine-tune and its base, of one architecture."""

    base: CheckpointReader
    finetuned: CheckpointReader
    notes: tuple[str, ...] = ()
    """What was not taken from the fine-tune, or not found there, in words."""
    _recast: dict[str, Recast] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokenizer_base(self) -> Path | None:
        """The base's folder if the fine-tune inherits its tokenizer, else None."""
        inherits = inherits_tokenizer(self.base.manifest, self.finetuned.manifest)
        return self.base.folder if inherits else None

    def changed(self, name: str) -> bool:
        """Whether a tensor differs from the base's, by digest and dtype."""
        ours, theirs = self.finetuned.entries[name], self.base.entries[name]
        return (ours.sha256, ours.dtype) != (theirs.sha256, theirs.dtype)

    def recast(self, name: str) -> Recast:
        """Compare a tensor of another dtype than the base's with the base's, rounded to it.

        Of a larger vocabulary, the base's rows are compared. Both tensors are read once.
        """
        if name not in self._recast:
            dtypes = self.finetuned.entries[name].dtype, self.base.entries[name].dtype
            if dtypes[0] == dtypes[1] or not self.is_float(name):
                return Recast(False, False)
            before, after = self.base.tensor(name), self.finetuned.tensor(name)
            after = after[: len(before)] if after.ndim else after
            applied = (before.float() + 0.0).to(after.dtype)  # as a delta of zeros is
            same = torch.equal(applied, after)
            signs = same and torch.equal(applied.signbit(), after.signbit())
            self._recast[name] = Recast(same, signs)
        return self._recast[name]

    def content(self, name: str) -> tuple[Any, ...]:
        """Key that is equal for tensors with equal content, in the base and in the fine-tune."""
        both = self.base.entries[name], self.finetuned.entries[name]
        return tuple((entry.sha256, entry.dtype, entry.shape) for entry in both)

    def is_float(self, name: str) -> bool:
        """Whether base and fine-tune both store `name` in one of `FLOAT_DTYPES`."""
        return {self.finetuned.entries[name].dtype, self.base.entries[name].dtype} <= FLOAT_DTYPES

    def added_rows(self, name: str) -> int:
        """Rows that a larger vocabulary adds to a tensor of the base."""
        ours, theirs = self.finetuned.entries[name].shape, self.base.entries[name].shape
        return ours[0] - theirs[0] if ours else 0

    def shape(self, ref: MatrixRef) -> tuple[int, ...]:
        """Shape of a linear map's delta, (h_out, h_in)."""
        shape = self.base.entries[ref.name].shape[0 if ref.part is None else 1 :]
        return shape[::-1] if ref.transposed else shape

    def weights(self, ref: MatrixRef) -> int:
        """Number of elements of a linear map's delta."""
        return math.prod(self.shape(ref))

    def delta(self, ref: MatrixRef, device: torch.device | str = "cpu") -> Tensor:
        """Fine-tuned minus base of a linear map, (h_out, h_in) float32, without added rows.

        The base is rounded to the fine-tune's dtype, as the sum with the delta will be: else what
        rounding changed would be taken for training.
        """
        before = self.base.matrix(ref).to(device)
        after = self.finetuned.matrix(ref).to(device)
        after = after[: len(before)] if after.ndim else after
        if before.dtype != after.dtype:
            before = before.float()
            rounded = before.to(after.dtype).float()
            before = torch.where(rounded.isfinite(), rounded, before)
        return after.float() - before.float()


def align(base: CheckpointReader, finetuned: CheckpointReader) -> None:
    """Let both readers name their tensors alike, as the base does.

    A head that the base ties to its embedding is a tensor of the base too if the fine-tune has one.
    Layers that predict further tokens are left out if only one of the two has them. A smaller
    vocabulary is completed by the base's rows.

    Raises:
        InvalidInput: they do not belong together: as `match_tensors` and `check_same_forward`.
    """
    finetuned.entries = match_tensors(base.manifest, finetuned.manifest)
    for name in [name for name in base.entries if name not in finetuned.entries]:
        if predicts_further(name, base.manifest.config):
            del base.entries[name]
    for name, entry in tied_head(base.manifest).items():
        if name in finetuned.entries:
            base.entries[name] = entry
    check_same_forward(base.manifest.config, finetuned.manifest.config)
    for name, entry in finetuned.entries.items():
        shape = base.entries[name].shape
        if entry.shape[:1] < shape[:1]:
            finetuned.further[name] = base.tensor(name)[entry.shape[0] :]
            whole = to_numpy(finetuned.tensor(name), entry.dtype)
            digest = hashlib.sha256(whole.tobytes()).hexdigest()
            finetuned.entries[name] = replace(entry, shape=shape, sha256=digest)


def open_pair(
    base: Path, finetuned: Path, progress: ProgressReporter | None = None
) -> CheckpointPair:
    """Open both checkpoints and check that they belong together.

    Raises:
        InvalidCheckpoint: a folder is not a complete safetensors checkpoint.
        ArchitectureMismatch: the fine-tune is not one of this base.
        NonFiniteWeights: a tensor holds NaN or an infinity in a row that a token uses.
        UnchangedCheckpoint: the two are equal.
    """
    progress = progress or ProgressReporter()
    progress.report("reading", 0, 2, "reading the base")
    before = CheckpointReader(base)
    progress.report("reading", 1, 2, "reading the fine-tune")
    after = CheckpointReader(finetuned)
    align(before, after)
    check_differs(before.manifest, after.manifest)
    ignored = ignored_files(finetuned, {file.path for file in after.manifest.files})
    inherited = [INHERITED_TOKENIZER] if inherits_tokenizer(before.manifest, after.manifest) else []
    if any(entry.name not in before.entries for entry in before.manifest.tensors):
        ignored = [KEPT_LAYERS, *ignored]
    taken = {entry.name for entry in after.entries.values()}
    if any(
        entry.name not in taken and predicts_further(entry.name, after.manifest.config)
        for entry in after.manifest.tensors
    ):
        ignored = [DROPPED_LAYERS, *ignored]
    if after.vocabulary is not None:
        ignored = [SMALLER_VOCABULARY, *ignored]
    unused = keep_unused_rows(before, after)
    pair = CheckpointPair(before, after)
    doubt = [] if are_related(pair) else [UNRELATED]
    return replace(pair, notes=(*doubt, *inherited, *ignored, *unused))


def are_related(pair: CheckpointPair) -> bool:
    """Whether the weights tell that one model was trained from the other.

    Compares the first rows of some of the blocks' matrices, whether they changed or not.
    """
    names = [
        name
        for name, entry in sorted(pair.base.entries.items())
        if len(entry.shape) == 2 and is_in_block(name) and pair.is_float(name)
    ]
    cosines = []
    for name in names[:: max(1, len(names) // COMPARED_MATRICES)]:
        before, after = (
            reader.head(name, COMPARED_ROWS).float().flatten()
            for reader in (pair.base, pair.finetuned)
        )
        cosine = float(torch.cosine_similarity(before, after, dim=0))
        if before.any() and after.any():
            cosines.append(cosine)
    return not cosines or median(cosines) >= RELATED


def keep_unused_rows(base: CheckpointReader, finetuned: CheckpointReader) -> list[str]:
    """Let both readers read the base's rows where either has NaN for tokens that no text has.

    Such are rows past the tokenizer's size, and input embeddings that are NaN in both. Returns a
    note for each tensor.

    Raises:
        NonFiniteWeights: a tensor holds NaN or an infinity elsewhere.
    """
    used = tokenizer_size(finetuned.folder) or tokenizer_size(base.folder)
    notes = []
    for name, entry in finetuned.entries.items():
        bad = entry.name in finetuned.non_finite, name in base.non_finite
        if not any(bad):
            continue
        owner = "fine-tune" if bad[0] else "base"
        if not (is_embedding(name) or is_head(name)) or used is None:
            raise diverged(name, owner)
        old = base.tensor(name)
        damaged, found = _non_finite_rows(old), _non_finite_rows(finetuned.tensor(name))
        excused = damaged & found if is_embedding(name) else set()
        rows = sorted(damaged | found)
        if any(row < used and row not in excused for row in rows):
            raise diverged(name, owner)
        mean = old[[row for row in range(len(old)) if row not in damaged]].float().mean(0)
        missing = damaged.union(range(len(old), max(rows) + 1))
        values = torch.stack([mean if row in missing else old[row].float() for row in rows])
        finetuned.replaced[name] = torch.tensor(rows), values
        known = [row for row in rows if row < len(old)]
        base.replaced[name] = torch.tensor(known, dtype=torch.int64), values[: len(known)]
        notes.append(
            f"{counted(len(rows), 'row')} of {name!r} with NaN or an infinity, from row {rows[0]} "
            "on: past the tokenizer's size, or in the base too. The base's are kept."
        )
    checked = {entry.name for entry in finetuned.entries.values()}
    if others := finetuned.non_finite - checked:
        raise diverged(min(others), "fine-tune")
    return notes


def _non_finite_rows(tensor: Tensor) -> set[int]:
    finite = torch.isfinite(tensor.float()).flatten(1).all(1)
    return set((~finite).nonzero().flatten().tolist())


def diverged(name: str, owner: str) -> NonFiniteWeights:
    """The error of a tensor that is not finite, for whoever trained the fine-tune or adapter."""
    return NonFiniteWeights(
        f"Tensor {name!r} of the {owner} holds NaN or an infinity. The training that wrote it has "
        "diverged; upload an earlier checkpoint."
    )


def tokenizer_size(folder: Path) -> int | None:
    """Number of token ids that a folder's tokenizer.json can give; None: there is none.

    Raises:
        InvalidCheckpoint: it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more specific
        raise InvalidCheckpoint(f"{path} cannot be read: {error}") from error
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def to_numpy(tensor: Tensor, dtype: str) -> npt.NDArray[Any]:
    """A tensor's bytes as a numpy array of `dtype` (safetensors' spelling) and the same shape."""
    data: npt.NDArray[Any] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.view(np.dtype(NUMPY_DTYPES[dtype])).reshape(tensor.shape)
