"""From a stored matrix to what the kernels read: the packed words as they lie in the file."""

import numpy as np
import torch

from deltadock.artifacts.encoding import Encoded, inflated
from deltadock.errors import InvalidArtifact
from deltadock.kernels.svd_delta import Group, PackedDelta, pack_delta


def packed_delta(encoded: Encoded) -> PackedDelta:
    """An `svd` matrix in the kernels' form, on the CPU; it keeps no file mapped.

    Raises:
        InvalidArtifact: the matrix is stored as something else, or does not inflate.
    """
    if encoded.record["kind"] != "svd":
        raise InvalidArtifact(f"A matrix stored as {encoded.record['kind']!r} has no packed form.")
    plain = inflated(encoded)
    h_out, h_in = plain.record["shape"]
    segments = {
        # torch wants arrays that may be written to, and knows uint32 only half.
        name.replace(".", "_"): torch.from_numpy(
            np.array(array.view(np.int32) if array.dtype == np.uint32 else array)
        )
        for name, array in plain.segments.items()
    }
    groups = [Group(run["count"], run["v_bits"], run["u_bits"]) for run in plain.record["ranks"]]
    return pack_delta((h_out, h_in), groups, gain=plain.record.get("gain", 1.0), **segments)
