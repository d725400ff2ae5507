"""Delta-CoMe: 8 bits for the 2 leading ranks, 3 for the next 32, 2 for the others in the budget.

Source: Ping et al., "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large
Language Models" (arXiv 2406.08903). As there, GPTQ quantizes V and then U, one width's ranks at a
time, towards the factors themselves. Otherwise than there, a vector has one grid whose range is
searched, in place of a min-max grid for every 128 entries (the better of the two at 2 bits, and
with fewer scales to store), and columns are not reordered.
"""

from typing import Final

from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.methods.factors import compress_fixed

LEADING: Final = ((8, 2), (3, 32))
REST: Final = 2


def compress_matrix(task: MatrixTask) -> MatrixResult:
    """Compress one linear layer's delta."""
    return compress_fixed(task, LEADING, REST)
