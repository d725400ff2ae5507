"""Triton kernels compiled without a GPU, and what `nvdisasm` and `cuobjdump` say about them.

Both tools come with Triton.
"""

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

REGISTERS: Final = 65_536
SHARED_BYTES: Final = 232_448
WARPS: Final = 64
PROGRAMS: Final = 32
"""Registers, shared memory, warps and programs that an SM of an H100 or H200 holds."""

INSTRUCTION: Final = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)(.*);")


@dataclass(frozen=True, slots=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        operations: of all instructions, in order.
        loops: where the innermost loops are among them.
        outer_loops: where the loops around them are.
        warps: of a program.
        registers: of a thread.
        stack_bytes: of a thread; spilled registers are there.
        shared_bytes: of a program.
        listing: what `nvdisasm` printed.
    """

    operations: list[str]
    loops: list[slice]
    outer_loops: list[slice]
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    listing: str = field(repr=False)

    @property
    def programs_per_sm(self) -> int:
        """Programs that an SM runs at once."""
        return programs_per_sm(self.warps, self.registers, self.shared_bytes)


def programs_per_sm(warps: int, registers: int, shared_bytes: int) -> int:
    """Programs that an SM runs at once; registers come in units of 256 a warp."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED_BYTES // (shared_bytes + 1024)
    return min(by_registers, by_shared, WARPS // warps, PROGRAMS)


def compile_kernel(
    capability: int,
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    unspecialized: Collection[str] = (),
    **options: Any,
) -> Any:
    """Compile as for arguments that are multiples of 16, except `unspecialized` ones.

    `types` of arguments and `constants` may name more than the kernel has; an argument without a
    type is a pointer to int32. `options` are `num_warps` and the like.
    """
    names = function.arg_names
    constants = {name: constants[name] for name in names if name in constants}
    types = dict(types) | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and name not in unspecialized and signature[name] != "fp32"
    }
    return triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True} | options,
    )


def disassemble(compiled: Any) -> MachineCode:
    """Read a compiled kernel.

    Raises:
        ValueError: the machine code does not name it.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    found = re.search(rf"{compiled.metadata.name}:\s+REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"{compiled.metadata.name} is not in the machine code: {usage}")
    return MachineCode(
        *loops_of(listing),
        warps=compiled.metadata.num_warps,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        listing=listing,
    )


def _output(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def loops_of(listing: str) -> tuple[list[str], list[slice], list[slice]]:
    """The operations of a listing, where its innermost loops are, and where those around them."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    inner: list[slice] = []
    outer: list[slice] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif instruction := INSTRUCTION.match(line):
            operations.append(instruction[1])
            jump = re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            begin = labels.get(jump[1]) if jump and instruction[1] == "BRA" else None
            # A jump to itself ends the program.
            if begin is not None and begin < len(operations) - 1:
                last_end = inner[-1].stop if inner else 0
                (inner if last_end <= begin else outer).append(slice(begin, len(operations)))
    return operations, inner, outer


def global_accesses(listing: str, constant: int) -> list[int]:
    """Which instructions access global memory at addresses made from the pointer argument at
    `constant` in the constant bank.

    Registers, and the places on the stack to which they are spilled, are followed in the order of
    the listing.
    """
    argument = {f"c[0x0][{constant + half:#x}]" for half in (0, 4)}
    derived: set[str] = set()
    found = []
    instructions = filter(None, map(INSTRUCTION.match, listing.splitlines()))
    for place, instruction in enumerate(instructions):
        operation, rest = instruction[1], instruction[2]
        modifiers, _, operands = rest.partition(" ")
        if operation in {"LDG", "LDGSTS", "STG"}:
            address = re.search(r"\]\[(U?R\d+)", operands)
            if address is not None and address[1] in derived:
                found.append(place)
        wide = {".64": 2, ".WIDE": 2, ".128": 4}
        count = next((count for name, count in wide.items() if name in modifiers), 1)
        target, _, sources = operands.partition(",")
        if operation == "STL":
            made, used = _stack_places(target, count), _registers(sources, count)
        elif operation == "LDL":
            made, used = _registers(target, count), _stack_places(sources, count)
        else:
            made, used = _registers(target, count), re.findall(r"\bU?R\d+\b", sources)
        if operation == "STG" or not made:
            continue
        from_argument = any(one in sources for one in argument)
        if operation != "LDG" and (derived.intersection(used) or from_argument):
            derived.update(made)
        elif "@" not in instruction[0]:
            derived.difference_update(made)
    return found


def loads_to_the_stack(listing: str) -> list[int]:
    """Which instructions load from global memory what is stored on the stack before it is used.

    The thread waits for such a load at once.
    """
    loaded: dict[str, int] = {}
    found = []
    instructions = filter(None, map(INSTRUCTION.match, listing.splitlines()))
    for place, instruction in enumerate(instructions):
        operation, rest = instruction[1], instruction[2]
        modifiers, _, operands = rest.partition(" ")
        if operation == "STL":
            source = re.search(r", (U?R\d+)", operands)
            if source is not None and source[1] in loaded:
                found.append(loaded[source[1]])
        for register in re.findall(r"\bR\d+\b", operands):
            loaded.pop(register, None)
        if operation == "LDG":
            count = 4 if ".128" in modifiers else 2 if ".64" in modifiers else 1
            loaded |= dict.fromkeys(_registers(operands.partition(",")[0], count), place)
    return found


def _registers(operand: str, count: int) -> list[str]:
    register = re.fullmatch(r"(U?R)(\d+)", operand.strip())
    return [f"{register[1]}{int(register[2]) + i}" for i in range(count)] if register else []


def _stack_places(operand: str, count: int) -> list[str]:
    place = re.search(r"\[R1(?:\+(0x[0-9a-f]+))?\]", operand)
    return [f"stack {int(place[1] or '0', 16) + 4 * i}" for i in range(count)] if place else []
