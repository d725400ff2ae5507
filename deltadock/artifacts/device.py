"""An artifact's segments in a device's memory, as they lie in the file."""

from io import FileIO
from typing import Final

import torch
from torch import Tensor

from deltadock.artifacts.export import TORCH_DTYPES
from deltadock.artifacts.reader import Artifact
from deltadock.errors import InvalidArtifact

CHUNK_BYTES: Final = 32 << 20
"""Size of each of the two buffers on the way to an accelerator."""


def load_segments(artifact: Artifact, device: torch.device | str) -> dict[str, Tensor]:
    """Every segment by its full name, `<tensor>:<segment>`, in its stored dtype and shape.

    All are parts of one allocation of the size of the file's data, which is read from end to end;
    on the way to an accelerator a chunk is copied while the next one is read. Nothing is hashed.

    Raises:
        InvalidArtifact: the file is no longer as long as when it was opened.
    """
    header = artifact.header
    data = torch.empty(header.data_bytes, dtype=torch.uint8, device=device)
    with FileIO(str(artifact.path)) as stream:
        stream.seek(header.data_offset)
        if data.device.type == "cpu":
            _fill(stream, data)
        else:
            _copy_in_chunks(stream, data)
    segments = {}
    for spec in header.tensors:
        raw = data[spec.begin : spec.end]
        dtype = TORCH_DTYPES[spec.dtype]
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()  # another writer's: ours aligns every segment
        segments[spec.name] = raw.view(dtype).reshape(spec.shape)
    return segments


def _fill(stream: FileIO, buffer: Tensor) -> None:
    view = buffer.numpy().data
    while view:
        count = stream.readinto(view)
        if not count:
            raise InvalidArtifact("The delta file became shorter while it was read.")
        view = view[count:]


def _copy_in_chunks(stream: FileIO, data: Tensor) -> None:
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copies = torch.cuda.current_stream(data.device)
    for number, begin in enumerate(range(0, len(data), CHUNK_BYTES)):
        target = data[begin : begin + CHUNK_BYTES]
        buffer = buffers[number % 2][: len(target)]
        _fill(stream, buffer)
        copies.synchronize()  # the copy of the chunk before, which ran beside the read
        target.copy_(buffer, non_blocking=True)
    copies.synchronize()
