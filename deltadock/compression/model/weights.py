"""Tensors of a checkpoint, one at a time, from memory-mapped safetensors files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from deltadock.artifacts.checkpoint import TensorEntry, scan_folder
from deltadock.artifacts.encodings import NUMPY_DTYPES

FLOAT_DTYPES: Final = {"BF16", "F16", "F32", "F64"}
"""Dtypes whose differences can be compressed; every other is kept exactly."""


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One linear map of a checkpoint.

    Attributes:
        name: the checkpoint's tensor.
        part: which expert's, where the tensor holds those of all.
        transposed: the tensor holds (h_in, h_out) in place of (h_out, h_in).
        mixture: of an expert's map, what all experts of the layer have in common.
    """

    name: str
    part: int | None = None
    transposed: bool = False
    mixture: str | None = None

    @property
    def key(self) -> str:
        """What the map is called in reports: its tensor, and the part."""
        return self.name if self.part is None else f"{self.name}[{self.part}]"


class TensorSource(Protocol):
    """Anything that has a model's tensors by name."""

    def __contains__(self, name: object) -> bool: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor, in its stored dtype, on the CPU."""
        ...


def tensor_names(folder: Path) -> frozenset[str]:
    """The names of a checkpoint's tensors, from the headers of its files alone."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            names.update(file.keys())
    return frozenset(names)


class Grown:
    """A base's tensors with the rows that a fine-tune's larger vocabulary adds.

    An added row is the mean of the base's, as where a model is resized: the base has nothing
    better to say of tokens that it does not know.
    """

    def __init__(self, base: TensorSource, shapes: Mapping[str, Sequence[int]]) -> None:
        """Give `base`'s tensors in the fine-tune's `shapes`."""
        self._base = base
        self._shapes = shapes

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def tensor(self, name: str) -> Tensor:
        """The tensor, in its stored dtype, on the CPU."""
        tensor = self._base.tensor(name)
        added = self._shapes[name][0] - len(tensor) if tensor.ndim else 0
        if not added:
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(added, *tensor.shape[1:])])


class Checkpoint:
    """A checkpoint folder. Opening hashes every file once; tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            InvalidCheckpoint: not a complete safetensors checkpoint.
        """
        self.folder = folder
        self.manifest = scan_folder(folder)
        self.entries: dict[str, TensorEntry] = {t.name: t for t in self.manifest.tensors}

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> Tensor:
        """The tensor, in its stored dtype, on the CPU."""
        with self._open(name) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _open(self, name: str) -> safe_open:
        # Anew for each tensor: pages of a file that stays mapped stay resident, and in the end
        # the whole checkpoint is.
        return safe_open(str(self.folder / self.entries[name].file), framework="pt")

    def matrix(self, ref: MatrixRef) -> Tensor:
        """The linear map (h_out, h_in), in its stored dtype; of experts' tensors only its part."""
        if ref.part is None:
            matrix = self.tensor(ref.name)
        else:
            with self._open(ref.name) as file:
                matrix = file.get_slice(ref.name)[ref.part]
        return matrix.t() if ref.transposed else matrix

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values())

    @property
    def bf16_bytes(self) -> int:
        """Size of the weights at two bytes each: what ratios are measured against."""
        return 2 * self.parameters


def raw(tensor: Tensor, dtype: str) -> npt.NDArray[Any]:
    """A tensor's data in numpy's type for `dtype`, safetensors' spelling."""
    data: npt.NDArray[Any] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.view(np.dtype(NUMPY_DTYPES[dtype])).reshape(tensor.shape)
