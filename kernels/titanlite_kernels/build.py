"""Real builds of kernels for devices that need not be there, and what can be read from the machine code.

Triton compiles for any NVIDIA target on any machine. From the results this reads registers, spills, shared memory,
the width of memory accesses, the use of tensor cores, and counts the bytes that a kernel moves. It measures no time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from titanlite_kernels.optional_triton import INTERPRETING, triton

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Compute capabilities (ten times the number) of A100, H100/H200 and B200."""


class CannotBuild(Exception):
    """This process or machine cannot compile kernels; the message says why."""


@dataclass(frozen=True)
class Build:
    """One kernel as an operation launches it at one shape."""

    name: str  # operation.kernel, such as `rms_norm.forward`
    kernel: Any  # The `jit` function
    signature: Mapping[str, str | int | float]
    """Argument -> `*bf16` and the like for a pointer, and for a number its value at this shape: as in a launch, Triton
    compiles an integer that is 1 as a constant, and uses it that an integer is a multiple of 16."""
    constexprs: Mapping[str, Any]
    num_warps: int
    shape: str  # What is built, in words: `Llama 3 8B: 8,192 tokens x 4,096, bfloat16`
    minimal_bytes: int
    """What the operation must move between memory and chip at this shape, by the contract in its file."""
    programs: int  # How many programs a launch at this shape has
    num_stages: int = 3
    trips: tuple[float, ...] = ()
    """How often each loop runs whose bounds are no compile-time constants, in the order of the source; the mean over
    the programs."""
    cached: tuple[str, ...] = field(default=())
    """Pointers that programs share, small enough for the cache: what they point to counts once, as `minimal_bytes` says
    it, not once for each program."""
    targets: tuple[str, ...] = tuple(TARGETS)  # Those that the kernel is for: not every device has every number format


@dataclass(frozen=True)
class Compiled:
    """What was read from one build for one target; the fields but `traffic` are a row's columns."""

    registers: int  # Per thread
    spill_bytes: int  # Per thread: registers that the compiler had to keep in memory
    shared_bytes: int  # Per program
    vector_bytes: int  # The widest load from global memory that a thread makes in one instruction
    tensor_cores: str  # The family of matrix instructions: `wgmma`, `tcgen05`, `mma`, or nothing
    moved_bytes: int  # Loaded and stored in all at the build's shape; `Build.cached` pointers left out


def compile_build(build: Build, target: str) -> Compiled:
    """Compile for one of `TARGETS` and read the result. Raises CannotBuild without a usable Triton."""
    if triton is None:
        raise CannotBuild("Triton is not installed: pip install 'triton>=3.6' (Linux)")
    if INTERPRETING:
        raise CannotBuild("TRITON_INTERPRET is set, so kernels are Python here: unset it in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialise(build)
    compiled = triton.compile(
        ASTSource(build.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True},
    )
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        vector_bytes=widest_load(compiled.asm["ptx"]),
        tensor_cores=matrix_instructions(compiled.asm["ptx"]),
        moved_bytes=round(build.programs * _moved_by_a_program(build, compiled.asm["ttir"])),
    )


def _specialise(build: Build) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and attributes of the arguments, as Triton's own launcher would derive them."""
    names = build.kernel.arg_names
    assert set(names) == set(build.signature) | set(build.constexprs), f"{build.name}: {names} is what it takes"
    ones = {name: 1 for name, value in build.signature.items() if isinstance(value, int) and value == 1}
    constants = dict(build.constexprs) | ones
    signature = {name: "constexpr" if name in constants else _type(build.signature[name]) for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if name not in constants
        and (signature[name].startswith("*") or (signature[name] in ("i32", "i64") and build.signature[name] % 16 == 0))
    ]
    return signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned}


def _type(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory a thread, by the disassembler that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory, straight to registers or (`cp.async`) to shared memory."""
    loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in loads] + [int(size, 0) for size in copies]
    return max(widths, default=0)


def matrix_instructions(ptx: str) -> str:
    """The newest family of tensor core instructions in a kernel, or nothing."""
    return next((family for family in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{family}\.", ptx)), "")


# ---- bytes, counted in Triton's own intermediate code: there, loops still have bounds and pointers names ------------

_ARGUMENT = re.compile(r"(%\w+): !tt\.ptr<")
_RESULT = re.compile(r"^\s*(%\w+)(?::\d+)? = ")
_OPERAND = re.compile(r"(%\w+)")
_ACCESS = re.compile(r"tt\.(load|store|atomic_rmw)\b.*?(%\w+).*: \(?(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>")
_LOOP = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
_CARRIED = re.compile(r"(%\w+) = (%\w+)")
_CONSTANT = re.compile(r"(%\w+) = arith\.constant (-?\d+) : i\d+")


def _moved_by_a_program(build: Build, ttir: str) -> float:
    """Bytes that one program loads and stores, masked lanes included, `build.cached` pointers left out."""
    pointers = [name for name in build.kernel.arg_names if str(build.signature.get(name, "")).startswith("*")]
    moved: defaultdict[str, float] = defaultdict(float)
    base: dict[str, str] = {}  # value -> the argument that it points into
    constants: dict[str, int] = {}
    trips = iter(build.trips)
    runs = [1.0]  # how often the block around a line runs, outermost first
    for line in ttir.splitlines():
        if "tt.func" in line:
            base = dict(zip(_ARGUMENT.findall(line), pointers, strict=True))
        for carried, start in _CARRIED.findall(line) if "iter_args" in line else ():
            if start in base:
                base[carried] = base[start]
        if constant := _CONSTANT.search(line):
            constants[constant[1]] = int(constant[2])
        assert "tt.descriptor_" not in line, f"{build.name}: accesses by descriptor are not counted yet"
        if access := _ACCESS.search(line):
            kind, pointer, shape, dtype = access.groups()
            size = prod(int(length) for length in shape.split("x")) if shape else 1
            passes = 2 if kind == "atomic_rmw" else 1
            moved[base[pointer]] += runs[-1] * passes * size * _bytes_of(dtype)
        elif result := _RESULT.match(line):
            operand = next((name for name in _OPERAND.findall(line)[1:] if name in base), None)
            if operand is not None and "!tt.ptr" in line:
                base[result[1]] = base[operand]
        closes, opens = line.lstrip().startswith("}"), line.rstrip().endswith("{")
        if closes:
            runs.pop()
        if opens:
            runs.append(runs[-1] * (_trips(line, constants, trips) if "scf.for" in line else 1))
    return sum(size for name, size in moved.items() if name not in build.cached)


def _bytes_of(dtype: str) -> int:
    """`bf16`, `f8E4M3FN`, `i1` -> 2, 1, 1."""
    bits = re.search(r"\d+", dtype)
    assert bits is not None, dtype
    return max(1, int(bits[0]) // 8)


def _trips(line: str, constants: dict[str, int], given: Iterator[float]) -> float:
    loop = _LOOP.search(line)
    assert loop is not None, line
    if all(bound in constants for bound in loop.groups()):
        first, end, step = (constants[bound] for bound in loop.groups())
        return max(0, -(-(end - first) // step))
    return next(given)
