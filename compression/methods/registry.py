"""Methods for linear layers by name; `exact` has none, since it keeps every tensor as it is."""

from typing import Final

from compression.catalogue import check_method
from compression.methods import adamix
from compression.methods.base import MatrixMethod

_METHODS: Final[dict[str, MatrixMethod]] = {"adamix": adamix.compress_matrix}


def matrix_method(name: str, bits: float | None) -> MatrixMethod | None:
    """What compresses a linear layer under `name`; None keeps it exact.

    Raises:
        UnknownMethod: nothing has this name.
        BitsOutOfRange: the budget does not suit the method.
    """
    check_method(name, bits)
    return _METHODS.get(name)
