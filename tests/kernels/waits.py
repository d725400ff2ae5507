"""Where the machine code of kernels that overlap waits for the kernel before."""

import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.machine_code import MachineCode, global_accesses


def check_accesses_after_the_wait(code: MachineCode, function: Any, written: Sequence[str]) -> None:
    """A kernel of compute capability 9.0 accesses what others write, by these arguments, after its
    wait only."""
    # Programs that have nothing to do wait and exit.
    waits = [
        place
        for place, (one, following) in enumerate(itertools.pairwise(code.operations))
        if one == "ACQBULK" and following != "EXIT"
    ]
    offsets = argument_offsets(function)
    for argument in written:
        accesses = global_accesses(code.listing, offsets[argument])
        assert accesses, argument
        assert waits[0] < min(accesses), argument


def check_every_program_waits(code: MachineCode) -> None:
    """No program ends before a wait, and no wait is conditional."""
    assert code.operations.index("ACQBULK") < code.operations.index("EXIT")
    waits = [line for line in code.listing.splitlines() if "ACQBULK" in line]
    assert not any("@" in line for line in waits)


def argument_offsets(function: Any) -> dict[str, int]:
    """Where a kernel's arguments are in the constant bank of compute capability 9.0."""
    offsets, end = {}, 0x210
    for name in function.arg_names:
        if name.islower():  # constants of the compilation are not passed
            size = 8 if name.endswith("_ptr") else 4
            offsets[name] = end = -(-end // size) * size
            end += size
    return offsets
