"""How Triton lays out the operands of products."""

from typing import Final

import triton

PAIRED: Final = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Whether a thread's words of an operand lie side by side in pairs. Triton before 3.8 counts what
comes from `tl.join` as half as wide."""
